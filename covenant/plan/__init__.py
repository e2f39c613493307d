"""What a round of a config costs: memory, arithmetic, bytes, time."""
