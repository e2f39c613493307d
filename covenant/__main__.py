"""The console script `covenant`, also `python -m covenant`."""

import sys


def main() -> None:
  """Runs the command line; Ctrl-C ends it with one line."""
  try:
    # Imported here, because it takes seconds, in which Ctrl-C is possible.
    from covenant import cli

    cli.main()
  except KeyboardInterrupt:
    sys.exit('stopped')


if __name__ == '__main__':
  main()
