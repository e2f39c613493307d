"""Who is who, when it is, and what was promised: the chain as nodes use it."""
