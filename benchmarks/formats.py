"""One generated corpus in every format of rows: are the shards identical?

  python -m benchmarks.formats --size=200

Prints a line per format with the digest of the manifest, the time, and whether
every file of tokens and of their digests has the same bytes as the first's. The
text is that of `benchmarks.tokenize`, the tokenizer the bytes. The exit status
says if all are identical.
"""

import gzip
import hashlib
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence

from absl import app
from absl import flags

from benchmarks import tokenize as benchmark
from covenant import config as config_lib
from covenant.data import tokenize

_SIZE = flags.DEFINE_float('size', 200.0, 'Megabytes of text.')
_FILES = 4


def _parquet(path: pathlib.Path, texts: Sequence[str]) -> None:
  import pyarrow as pa
  from pyarrow import parquet

  parquet.write_table(pa.table({'text': texts}), path)


def _arrow(path: pathlib.Path, texts: Sequence[str]) -> None:
  import pyarrow as pa

  table = pa.table({'text': texts})
  with (
    pa.OSFile(str(path), 'wb') as file,
    pa.ipc.new_stream(file, table.schema) as writer,
  ):
    writer.write_table(table, max_chunksize=1000)


def _lines(texts: Iterable[str]) -> bytes:
  return ''.join(json.dumps({'text': t}) + '\n' for t in texts).encode()


def _zstandard(path: pathlib.Path, texts: Sequence[str]) -> None:
  import zstandard

  path.write_bytes(zstandard.compress(_lines(texts)))


FORMATS: dict[str, Callable[[pathlib.Path, Sequence[str]], object]] = {
  'jsonl': lambda path, texts: path.write_bytes(_lines(texts)),
  'jsonl.gz': lambda path, texts: path.write_bytes(
    gzip.compress(_lines(texts), 1)
  ),
  'jsonl.zst': _zstandard,
  'parquet': _parquet,
  'arrow': _arrow,
}


def run(folder: pathlib.Path, megabytes: float) -> bool:
  """Tokenizes the corpus in every format; returns whether all are identical."""
  documents = benchmark.make(folder / 'made', _FILES, megabytes)
  print(f'{len(documents):,} documents in {_FILES} files', flush=True)
  found = set()
  for suffix, write in FORMATS.items():
    source = folder / 'text' / suffix
    source.mkdir(parents=True)
    for i in range(_FILES):
      write(source / f'{i}.{suffix}', documents[i::_FILES])
    data = config_lib.Data(source='text', path=str(source))
    config = config_lib.Config(
      model=config_lib.Model(vocab_size=300), data=data
    )
    began, out = time.perf_counter(), folder / 'shards' / suffix
    made = tokenize.run(config, str(out), 2, (1, 1))
    assert made is not None
    found.add((made.digest, _bytes(out)))
    print(
      f'{suffix:10} {made.digest[:16]} {time.perf_counter() - began:6.1f} s, '
      f'{"identical" if len(found) == 1 else "NOT IDENTICAL"}',
      flush=True,
    )
  return len(found) == 1


def _bytes(folder: pathlib.Path) -> str:
  """Returns the digest of all files of tokens and of their digests."""
  digest = hashlib.sha256()
  for path in sorted(folder.rglob('*')):
    if path.suffix in ('.tokens', '.sums'):
      digest.update(path.relative_to(folder).as_posix().encode())
      digest.update(path.read_bytes())
  return digest.hexdigest()


def main(argv: list[str]) -> None:
  del argv
  with tempfile.TemporaryDirectory() as folder:
    sys.exit(not run(pathlib.Path(folder), _SIZE.value))


if __name__ == '__main__':
  app.run(main)
