"""What the nodes of a run do: miners train, everybody applies the same set."""
