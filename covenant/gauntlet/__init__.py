"""Decides who is heard and who is paid: pure functions, no I/O."""
