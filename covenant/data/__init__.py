"""Data: documents, tokenizers, token shards, and their assignment to miners.

`dataset.load(config)` returns the tokens of a run as `tokens.TokenData`.
`assignment.assign` returns the sequences that a miner trains on.
"""
