"""Paths that many tests share."""

import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIGS = ROOT / 'configs'
GOLDEN = ROOT / 'tests' / 'golden'
