"""Who is heard and who is paid: pure functions, no I/O, the same for all."""
