"""Small files of text in every format that covenant.data.sources reads."""

import gzip
import json
import pathlib
from collections.abc import Sequence

import pyarrow as pa
import zstandard
from pyarrow import parquet

ROWS = ('jsonl', 'jsonl.gz', 'jsonl.zst', 'parquet', 'arrow')
TEXTS = ('txt', 'md', 'TXT', 'txt.gz', 'txt.zst', 'md.gz')


def packed(content: bytes, suffix: str) -> bytes:
  """Compresses content as a suffix says."""
  if suffix.endswith('.gz'):
    return gzip.compress(content)
  if suffix.endswith('.zst'):
    half = len(content) // 2  # two frames, as parallel zstd writes
    parts = content[:half], content[half:]
    return b''.join(map(zstandard.compress, parts))
  return content


def write_rows(path: pathlib.Path, texts: Sequence[str], field='text') -> None:
  """Writes one document per row; the suffix of the path is the format."""
  if path.suffix in ('.parquet', '.arrow'):
    table = pa.table({'id': list(range(len(texts))), field: list(texts)})
    if path.suffix == '.parquet':
      parquet.write_table(table, path, row_group_size=7)
      return
    with (
      pa.OSFile(str(path), 'wb') as file,
      pa.ipc.new_stream(file, table.schema) as writer,
    ):
      writer.write_table(table, max_chunksize=5)
    return
  lines = [json.dumps({'id': i, field: t}) + '\n' for i, t in enumerate(texts)]
  path.write_bytes(packed(''.join(lines).encode(), path.name))
