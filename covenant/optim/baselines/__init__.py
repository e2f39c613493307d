"""The baselines of SparseLoCo, as optax transformations."""
