"""The base of every error that this project raises for its users."""


class CovenantError(Exception):
  """An error with a message for people; the program ends with that line."""
