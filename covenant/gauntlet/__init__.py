"""Pure functions that decide which uids are heard and paid; no I/O."""
