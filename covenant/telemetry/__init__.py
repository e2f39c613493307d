"""The measurements of a live node: where they come from, where they go."""
