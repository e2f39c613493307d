"""SparseLoCo and its baselines: local steps, then a small exchange."""
