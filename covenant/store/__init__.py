"""Buckets in memory, in a folder, or behind S3, with one interface."""
