"""The nodes of a run: miners, validators, evaluators, and their processes."""
