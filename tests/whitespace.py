"""Ends of lines and of files: no white space, and one newline.

  python tests/whitespace.py FILE...        names those that are not so
  python tests/whitespace.py --fix FILE...  and mends them

Exits with 1 where there is one, as a pre-commit hook does. Generated files and
those of others are left as they are.
"""

import pathlib
import re
import sys
from collections.abc import Sequence

_LEFT = re.compile(
  r'\.(ipynb|svg|npz|png)$|covenant/report/uplot/|experiments/results/|tests/golden/'
)


def mended(text: str) -> str:
  """Returns the text with clean ends."""
  text = re.sub(r'[ \t\r]+$', '', text, flags=re.MULTILINE).rstrip('\n')
  return f'{text}\n' if text else ''


def main(arguments: Sequence[str]) -> int:
  """Checks the named files; returns the exit status."""
  fix = '--fix' in arguments
  bad = 0
  for name in arguments:
    if name.startswith('--') or _LEFT.search(name):
      continue
    path = pathlib.Path(name)
    try:
      text = path.read_bytes().decode('utf-8')
    except UnicodeDecodeError:
      continue  # not text
    if mended(text) != text:
      bad += 1
      print(f'{name}: white space at the end of a line or of the file')
      if fix:
        path.write_text(mended(text), encoding='utf-8', newline='\n')
  return int(bad > 0)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
