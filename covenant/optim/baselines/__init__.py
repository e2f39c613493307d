"""Rivals of SparseLoCo, as optax transformations."""
