"""Bytes between peers. What arrives is hostile until it is parsed."""
