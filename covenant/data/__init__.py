"""Data: documents, tokenizers, token shards, and who trains on what.

`dataset.load(config)` is the door: it gives the tokens of a run as
`tokens.TokenData`. `assignment.assign` says which of them a miner trains.
"""
