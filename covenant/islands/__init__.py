"""Unequal hardware in one run: who trains how much, and how it is cut."""
