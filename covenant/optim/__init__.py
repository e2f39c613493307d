"""Local steps, then one small exchange: SparseLoCo and its baselines."""
