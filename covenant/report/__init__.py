"""What a run did: metrics (JSONL is the truth), figures, progress, summary.

`covenant.metrics` may be imported by every room, so this file imports
nothing: it runs first for each of them.
"""
