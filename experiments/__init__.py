"""One module a claim: each runs real training and prints what it found."""
