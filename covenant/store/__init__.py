"""How bytes move: buckets in memory, in a folder, or behind S3."""
