"""The cost of one round: memory, arithmetic, bytes and seconds."""
