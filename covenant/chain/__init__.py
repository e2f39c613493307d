"""The chain as nodes use it: identities, blocks, commitments and weights."""
