"""Tokenization against the library alone, and training over a slow store.

  python -m benchmarks.tokenize                 rates, memory, 1.1 T tokens
  python -m benchmarks.tokenize --store         training over a store of 50 ms
  python -m benchmarks.tokenize --make=corpus   ten Parquet files, no more

The text is random lines of Shakespeare's plays in documents of about 4 KB, the
tokenizer a byte-level BPE of 8192 ids. The baseline is `encode_batch` of
`tokenizers` over texts that are in memory, on the same cores. Ours reads
Parquet, splits, and writes shards. Turns alternate.
"""

import dataclasses
import http.server
import multiprocessing
import os
import pathlib
import random
import re
import statistics
import tempfile
import threading
import time

import numpy as np
from absl import app
from absl import flags

from covenant import config as config_lib
from covenant.data import corpus
from covenant.data import dataset
from covenant.data import shards
from covenant.data import tokenize
from covenant.data import tokenizer as tokenizer_lib
from covenant.telemetry import machine
from covenant.train import local as local_lib
from covenant.train import shared_state
from covenant.train import trainer as trainer_lib

_MEGABYTES = flags.DEFINE_float('megabytes', 64.0, 'Text of the corpus.')
_FILES = flags.DEFINE_integer('files', 8, 'Files of the corpus.')
_MAKE = flags.DEFINE_string('make', '', 'Only make the corpus in this folder.')
_TURNS = flags.DEFINE_integer('turns', 3, 'Turns of each side.')
_STORE = flags.DEFINE_bool('store', False, 'Measure training over a store.')
_LATENCY = flags.DEFINE_float('latency', 0.05, 'Seconds of each request.')
_VOCABULARY = 8192
_PUBLISHED = 1.1e12  # tokens of Covenant-72B


def make(folder: pathlib.Path, files: int, megabytes: float) -> list[str]:
  """Writes a corpus as Parquet files; returns its documents."""
  import pyarrow as pa  # noqa: PLC0415  an optional dependency
  from pyarrow import parquet  # noqa: PLC0415

  plays = corpus.load(config_lib.Data(), seed=0).train
  lines = [line for play in plays for line in play.text.splitlines()]
  draw = random.Random(0)
  documents, left = [], megabytes * 1e6
  while left > 0:
    count = draw.randint(20, 180)
    documents.append('\n'.join(draw.choices(lines, k=count)))
    left -= len(documents[-1])
  folder.mkdir(parents=True)
  for i in range(files):
    table = pa.table({'text': documents[i::files]})
    parquet.write_table(table, folder / f'{i}.parquet')
  return documents


def _baseline(pipe, definition: str, documents: list[str]) -> None:
  """Sends the seconds of `encode_batch` over all documents."""
  import tokenizers  # noqa: PLC0415  after the fork, with threads of its own

  library = tokenizers.Tokenizer.from_str(definition)
  library.encode_batch(documents[:64])
  began = time.perf_counter()
  for i in range(0, len(documents), 1000):
    library.encode_batch(documents[i : i + 1000], add_special_tokens=False)
  pipe.send(time.perf_counter() - began)


def _library_seconds(definition: str, documents: list[str]) -> float:
  context = multiprocessing.get_context('spawn')
  ours, theirs = context.Pipe()
  process = context.Process(
    target=_baseline, args=(theirs, definition, documents)
  )
  process.start()
  seconds = ours.recv()
  process.join()
  return seconds


class _Watch:
  """Watches the memory of the processes that this one started.

  Attributes:
    most: the most bytes that one of them held.
  """

  def __init__(self):
    self.most = 0
    self._end = threading.Event()
    self._thread = threading.Thread(target=self._run, daemon=True)

  def __enter__(self) -> '_Watch':
    self._thread.start()
    return self

  def __exit__(self, *args: object) -> None:
    self._end.set()
    self._thread.join()

  def _run(self) -> None:
    while not self._end.wait(0.2):
      parents, held = {}, {}
      for status in pathlib.Path('/proc').glob('[0-9]*/status'):
        try:
          text = status.read_text()
        except OSError:  # it has ended
          continue
        pid = int(status.parent.name)
        parent = re.search(r'PPid:\s+(\d+)', text)
        parents[pid] = int(parent[1]) if parent else 0
        if peak := re.search(r'VmHWM:\s+(\d+) kB', text):
          held[pid] = 1024 * int(peak[1])
      ours = {os.getpid()}
      for _ in range(3):  # the server of forks, its processes, theirs
        ours |= {pid for pid, parent in parents.items() if parent in ours}
      found = [held.get(pid, 0) for pid in ours - {os.getpid()}]
      self.most = max([self.most, *found])


def rates(folder: pathlib.Path) -> None:
  """Prints the rate of both sides, their ratio and the memory of a process."""
  documents = make(folder / 'text', _FILES.value, _MEGABYTES.value)
  definition = tokenizer_lib.BPE.train(documents[:2000], _VOCABULARY).to_json()
  (folder / 'tokenizer.json').write_text(definition)
  data = config_lib.Data(
    source='text',
    path=str(folder / 'text'),
    tokenizer='bpe',
    tokenizer_path=str(folder / 'tokenizer.json'),
  )
  config = config_lib.Config(
    model=config_lib.Model(vocab_size=_VOCABULARY), data=data
  )
  workers, watch = machine.cores(), _Watch()
  ratios, rate = [], 0.0
  size = sum(len(d.encode()) for d in documents)
  for turn in range(_TURNS.value):
    library = _library_seconds(definition, documents)
    began = time.perf_counter()
    watch = _Watch()
    with watch:
      made = tokenize.run(config, str(folder / f'{turn}'), workers)
    seconds = time.perf_counter() - began
    assert made is not None
    tokens = made.num_tokens('train') + made.num_tokens('heldout')
    ratios.append(library / seconds)
    rate = max(rate, tokens / seconds)
    print(
      f'turn {turn}: encode_batch {size / library / 1e6:.2f} MB/s, ours '
      f'{size / seconds / 1e6:.2f} MB/s, ratio {ratios[-1]:.2f}',
      flush=True,
    )
  days = _PUBLISHED / rate / 86_400
  print(
    f'{size / 1e6:.0f} MB, {workers} processes: '
    f'{statistics.median(ratios):.2f} of encode_batch (bar 0.90), '
    f'{rate / 1e3:,.0f} k tokens/s, at most {watch.most / 1e6:,.0f} MB a '
    'process (bar 1,000)\n'
    f'1.1 T tokens: {days:.1f} days here; {days * workers / 64:.2f} days on 64 '
    f'cores, {days * workers / 4096 * 24:.1f} hours on 64 machines of 64'
  )


class _Slow(http.server.SimpleHTTPRequestHandler):
  """Answers ranges of files after a while, as a store does."""

  protocol_version = 'HTTP/1.1'

  def log_message(self, format: str, *args: object) -> None:
    del format, args

  def do_GET(self) -> None:
    time.sleep(_LATENCY.value)
    content = pathlib.Path(self.translate_path(self.path)).read_bytes()
    match = re.match(r'bytes=(\d+)-(\d+)', self.headers.get('Range', ''))
    self.send_response(206 if match else 200)
    if match:
      where = f'bytes {match[1]}-{match[2]}/{len(content)}'
      self.send_header('Content-Range', where)
      content = content[int(match[1]) : int(match[2]) + 1]
    self.send_header('Content-Length', str(len(content)))
    self.end_headers()
    self.wfile.write(content)


def store(folder: pathlib.Path) -> None:
  """Prints the speed of rounds over a store relative to local shards."""
  plays = corpus.load(config_lib.Data(), seed=0)
  shards.write(folder / 'tokens', plays, tokenizer_lib.Bytes(), 2**17)

  def serve(*args):
    return _Slow(*args, directory=str(folder))

  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), serve)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  os.environ['XDG_CACHE_HOME'] = str(folder / 'cache')
  base = config_lib.Config(
    rounds=2 * _TURNS.value,
    miners=1,
    model=config_lib.Model(width=128),
    optim=config_lib.Optim(inner_steps=40),
  )
  seconds: dict[str, list[float]] = {}
  model = shared_state.SharedModel(base)
  params = model.init().params
  sides = {}
  for name, path in (
    ('local', str(folder / 'tokens')),
    ('store', f'http://127.0.0.1:{server.server_port}/tokens'),
  ):
    data = config_lib.Data(source='shards', path=path, context=256)
    config = dataclasses.replace(base, data=data)
    sides[name] = trainer_lib.Trainer(config, model, dataset.load(config))
    seconds[name] = []
  for turn in range(_TURNS.value + 1):
    for name, trainer in sides.items():
      state = trainer.init(params)
      task = local_lib.Task(uid=0, round=turn, seed=turn, root=bytes(32))
      began = time.perf_counter()
      trainer.train(params, state, task, trainer.batches(task))
      spent = time.perf_counter() - began
      if turn:  # the first one compiles
        seconds[name].append(spent)
      print(f'turn {turn}, {name}: {spent:.2f} s', flush=True)
  server.shutdown()
  ratios = np.array(seconds['local']) / np.array(seconds['store'])
  print(
    f'{1e3 * _LATENCY.value:.0f} ms per request: {np.median(ratios):.3f} of '
    f'the speed of local shards ({ratios.min():.3f} to {ratios.max():.3f} over '
    f'{len(ratios)} turns; bar 0.98), {np.median(seconds["store"]):.1f} s per '
    'round of 40 steps of 8 x 256 tokens'
  )


def main(argv: list[str]) -> None:
  del argv
  if _MAKE.value:
    made = make(pathlib.Path(_MAKE.value), _FILES.value, _MEGABYTES.value)
    print(f'{len(made)} documents in {_FILES.value} files of {_MAKE.value}')
    return
  with tempfile.TemporaryDirectory() as folder:
    (store if _STORE.value else rates)(pathlib.Path(folder))


if __name__ == '__main__':
  app.run(main)
