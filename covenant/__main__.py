"""The console script `covenant`, also `python -m covenant`."""

import gc
import signal
import sys

from covenant import extras


def main() -> None:
  """Runs the command line; Ctrl-C ends it with one line."""
  try:
    # Imported here, because it takes seconds, in which Ctrl-C is possible.
    gc.disable()  # most of what is imported stays: nothing to be collected
    with extras.needed('run'):
      from covenant import cli
    gc.freeze()
    gc.enable()

    cli.main()
  except extras.MissingExtraError as e:
    sys.exit(f'error: {e}')
  except KeyboardInterrupt:
    sys.exit('stopped')
  finally:
    # All is written. Ctrl-C while the interpreter ends would print a traceback.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


if __name__ == '__main__':
  main()
