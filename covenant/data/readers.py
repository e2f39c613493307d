"""Documents of a file, streamed: of text, of tables, or of tokens."""

import codecs
import contextlib
import gzip
import importlib
import io
import json
import os
import pathlib
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import IO

import numpy as np

from covenant import config
from covenant import typing as ct
from covenant.data import remote
from covenant.data import sources

File = sources.File
Observe = Callable[[int], None]  # told the bytes of a file that were read
_BLOCK = 2**20  # bytes of a text file that are decoded at once
_BATCH = 256  # rows of a table that are decoded at once
_MEGATRON = b'MMIDIDX\0\0'
_DTYPES = {4: '<i4', 5: '<i8', 8: '<u2'}  # of Megatron's codes


class _Observed(io.RawIOBase):
  """A file that tells how many bytes of it were read."""

  def __init__(self, file: IO[bytes], observe: Observe):
    self._file, self._observe = file, observe

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
    return self._file.seek(offset, whence)

  def tell(self) -> int:
    return self._file.tell()

  def readinto(self, buffer) -> int:
    content = self._file.read(len(buffer))
    buffer[: len(content)] = content
    self._observe(len(content))
    return len(content)


@contextlib.contextmanager
def _open(file: File, observe: Observe) -> Iterator[ct.PyTree]:
  """Opens a file, decompressed."""
  with contextlib.ExitStack() as stack:
    if remote.is_url(file.path):
      raw = remote.RemoteFolder(file.path).open(file.name, file.size)
    else:
      raw = open(file.path, 'rb', buffering=0)
    stack.callback(raw.close)
    stream = io.BufferedReader(_Observed(raw, observe), _BLOCK)
    suffix = os.path.splitext(file.name.lower())[1]
    if suffix == '.gz':
      with gzip.GzipFile(fileobj=stream) as unpacked:
        yield unpacked
    elif suffix == '.zst':
      # Files of several frames are what zstd's own tools write in parallel.
      unpacker = _needs('zstandard').ZstdDecompressor(max_window_size=2**31)
      yield unpacker.stream_reader(stream, read_across_frames=True)
    else:
      yield stream


def _ignore(count: int) -> None:
  del count


def _needs(package: str) -> ct.PyTree:
  """Imports a package of the extra `data`."""
  try:
    return importlib.import_module(package)
  except ImportError:
    raise config.ConfigError(
      f'data.path: this kind of file needs the package {package}; run '
      "`pip install 'covenant[data]'`"
    ) from None


@contextlib.contextmanager
def _explained(file: File) -> Iterator[None]:
  """Turns the errors of readers into one line that names the file."""
  try:
    yield
  except (config.ConfigError, remote.DataError):
    raise
  except Exception as error:  # each library has errors of its own
    text = str(error).partition('\n')[0]
    raise config.ConfigError(f'data.path: {file.label!r}: {text}') from error


def blocks(file: File, observe: Observe = _ignore) -> Iterator[str]:
  """Yields the text of a file that is one document, block by block.

  Raises:
    ConfigError: it is not UTF-8, or cannot be read.
  """
  with _explained(file), _open(file, observe) as stream:
    yield from _decoded(file, iter(lambda: stream.read(_BLOCK), b''))


def _decoded(file: File, content: Iterable[bytes]) -> Iterator[str]:
  decoder, at, first = codecs.getincrementaldecoder('utf-8')(), 0, True
  for block in _ended(content):
    pending = len(decoder.getstate()[0])
    try:
      text = decoder.decode(block or b'', final=block is None)
    except UnicodeDecodeError as error:
      where = at - pending + error.start
      raise config.ConfigError(
        f'data.path: {file.label!r} is not UTF-8: byte {where} is '
        f'0x{error.object[error.start]:02x}; convert the file or leave it out'
      ) from None
    at += len(block or b'')
    if first and text:
      first, text = False, text.removeprefix('\ufeff')  # byte order mark
    if text:
      yield text


def _ended(content: Iterable[bytes]) -> Iterator[bytes | None]:
  yield from content
  yield None


def rows(file: File, field: str, observe: Observe = _ignore) -> Iterator[str]:
  """Yields the documents of a file that has many; empty ones are left out.

  Raises:
    ConfigError: the field is missing or no text, or the file cannot be read.
  """
  readers: dict[str, _Reader] = {'.parquet': _parquet, '.arrow': _arrow}
  read = readers.get(file.kind, _json_lines)
  with _explained(file), _open(file, observe) as stream:
    for text in read(file, stream, field):
      if text:
        yield text if text.isascii() else _clean(text)


_Reader = Callable[[File, IO[bytes], str], Iterator[str | None]]


def _clean(text: str) -> str:
  """Replaces halves of surrogate pairs, which JSON can escape, by U+FFFD."""
  try:
    text.encode()
  except UnicodeEncodeError:
    return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
  return text


def _json_lines(
  file: File, stream: IO[bytes], field: str
) -> Iterator[str | None]:
  buffered: ct.PyTree = stream  # zstandard's reader has no lines
  for number, line in enumerate(io.BufferedReader(buffered), start=1):
    if number == 1:
      line = line.removeprefix(codecs.BOM_UTF8)
    if not line.strip():
      continue
    where = f'data.path: {file.label!r}, line {number}'
    try:
      record = json.loads(line)
    except ValueError as error:
      raise config.ConfigError(f'{where}: not JSON: {error}') from None
    if not isinstance(record, dict) or field not in record:
      got = sorted(record) if isinstance(record, dict) else 'no object'
      raise _no_field(where, field, got)
    if not isinstance(record[field], str | None):
      raise _no_text(where, field, type(record[field]).__name__)
    yield record[field]


def _no_field(where: str, field: str, got: object) -> config.ConfigError:
  columns = ', '.join(map(str, got)) if isinstance(got, list) else got
  return config.ConfigError(
    f'{where}: there is no field {field!r} (data.field); there: {columns}'
  )


def _no_text(where: str, field: str, got: object) -> config.ConfigError:
  return config.ConfigError(
    f'{where}: expected text in the field {field!r} (data.field), got {got}'
  )


def _check_column(file: File, schema: ct.PyTree, field: str) -> None:
  """Raises ConfigError unless a schema of Arrow has a column of text."""
  types = _needs('pyarrow.types')
  where = f'data.path: {file.label!r}'
  if field not in schema.names:
    raise _no_field(where, field, list(schema.names))
  found = schema.field(field).type
  if types.is_dictionary(found):
    found = found.value_type
  if not (types.is_string(found) or types.is_large_string(found)):
    raise _no_text(where, field, found)


def _parquet(file: File, stream: IO[bytes], field: str) -> Iterator[str | None]:
  parquet = _needs('pyarrow.parquet')
  with parquet.ParquetFile(stream) as table:
    _check_column(file, table.schema_arrow, field)
    for batch in table.iter_batches(_BATCH, columns=[field], use_threads=False):
      yield from batch.column(0).to_pylist()


def _arrow(file: File, stream: IO[bytes], field: str) -> Iterator[str | None]:
  """Reads the stream format, which datasets write, or the file format."""
  ipc = _needs('pyarrow.ipc')
  magic = stream.read(6)
  stream.seek(0)
  if magic == b'ARROW1':
    table = ipc.open_file(stream)
    batches = (table.get_batch(i) for i in range(table.num_record_batches))
  else:
    table = batches = ipc.open_stream(stream)
  _check_column(file, table.schema, field)
  for batch in batches:
    yield from batch.column(field).to_pylist()


def token_rows(file: File, observe: Observe = _ignore) -> Iterator[np.ndarray]:
  """Yields the ids of the documents of a file of tokens, int64 [n].

  Raises:
    ConfigError: its index is missing, or the two do not fit together.
  """
  reader = _datatrove if file.kind == '.ds' else _megatron
  with _explained(file), _open(file, observe) as stream:
    yield from reader(file, stream)


def _datatrove(file: File, stream: IO[bytes]) -> Iterator[np.ndarray]:
  """Reads tokens of 2 or 4 bytes, and an index of the ends of documents."""
  ends = np.frombuffer(_beside(file, '.ds', '.ds.index'), '<u8').astype(int)
  total = int(ends[-1]) if len(ends) else 0
  width, rest = divmod(file.size, max(total, 1))
  if rest or width not in (2, 4) or (np.diff(ends) < 0).any():
    raise config.ConfigError(
      f'data.path: {file.label!r} has {file.size} bytes, which are not the '
      f'{total} tokens of its index'
    )
  for length in np.diff(ends, prepend=0):
    content = stream.read(int(length) * width)
    yield np.frombuffer(content, f'<u{width}').astype(np.int64)


def _megatron(file: File, stream: IO[bytes]) -> Iterator[np.ndarray]:
  """Reads an indexed dataset of version 1."""
  index = _beside(file, '.bin', '.idx')
  head = struct.Struct('<9sQBQQ')
  if len(index) < head.size or not index.startswith(_MEGATRON):
    raise config.ConfigError(
      f'data.path: the .idx beside {file.label!r} is no index of Megatron'
    )
  _, version, code, sequences, ends = head.unpack_from(index)
  if version != 1 or code not in _DTYPES:
    raise config.ConfigError(
      f'data.path: the .idx beside {file.label!r} has version {version} and '
      f'dtype {code}; expected 1 and one of {sorted(_DTYPES)}'
    )
  dtype = np.dtype(_DTYPES[code])
  sizes = np.frombuffer(index, '<i4', sequences, head.size)
  at = head.size + sizes.nbytes + 8 * sequences  # after the pointers
  documents = np.frombuffer(index, '<i8', ends, at)
  if sizes.sum(dtype=np.int64) * dtype.itemsize != file.size:
    raise config.ConfigError(
      f'data.path: {file.label!r} has {file.size} bytes; its index expects '
      f'{sizes.sum(dtype=np.int64)} tokens of {dtype.itemsize} bytes'
    )
  for first, last in zip(documents[:-1], documents[1:], strict=True):
    length = int(sizes[first:last].sum(dtype=np.int64)) * dtype.itemsize
    yield np.frombuffer(stream.read(length), dtype).astype(np.int64)


def _beside(file: File, suffix: str, other: str) -> bytes:
  """Returns the content of the file whose name ends otherwise."""
  name = file.name[: -len(suffix)] + other
  if remote.is_url(file.path):
    return remote.RemoteFolder(file.path).read(name)
  return pathlib.Path(file.path[: -len(suffix)] + other).read_bytes()
