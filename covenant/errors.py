"""The base of every error that this project raises for its users."""


class CovenantError(Exception):
  """An error with a message for people; run.py ends with that line."""
