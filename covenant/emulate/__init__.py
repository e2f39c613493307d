"""Many miners on one host, through the code that the real network runs."""
