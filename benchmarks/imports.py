"""Times `import covenant.optim.sparseloco` against `import optax`.

Both in new processes, in turns, after one that warms the file cache:

  python -m benchmarks.imports
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

_BAR = 1.2


def seconds(module: str) -> float:
  """Returns the time of a new Python that imports a module and ends."""
  begin = time.perf_counter()
  subprocess.run([sys.executable, '-c', f'import {module}'], check=True)
  return time.perf_counter() - begin


def main() -> None:
  """Prints the median time of each import and their ratio."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--turns', type=int, default=11)
  turns = parser.parse_args().turns
  modules = ('optax', 'covenant.optim.sparseloco')
  times: dict[str, list[float]] = {module: [] for module in modules}
  for module in modules:
    seconds(module)
  for _ in range(turns):
    for module in modules:
      times[module].append(seconds(module))
  for module in modules:
    print(f'import {module:26} {statistics.median(times[module]):.2f} s')
  ratio = statistics.median(
    ours / theirs
    for theirs, ours in zip(*(times[module] for module in modules), strict=True)
  )
  verdict = 'holds' if ratio < _BAR else 'MISSED'
  print(
    f'ratio {ratio:.3f}, the median of {turns} pairs; bar {_BAR}: {verdict}; '
    f'load {os.getloadavg()[0]:.0f}'
  )


if __name__ == '__main__':
  main()
