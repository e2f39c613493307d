"""The metrics of a run: `metrics.jsonl`, one JSON object per line.

The fields of `Round` and `Evaluation` are the schema; the key `kind` before
them tells the two apart.

TensorBoard gets a copy of the scalars; the JSONL is authoritative. An event
file is a sequence of TFRecords, each a serialized `Event` message
(tensorflow/core/util/event.proto), written here without TensorFlow.
"""

import dataclasses
import json
import math
import operator
import os
import pathlib
import socket
import struct
import sys
import time
import typing
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, TypeAlias

from covenant import errors
from covenant import files

_CASTAGNOLI = 0x82F63B78  # the reflected polynomial of CRC-32C


def _crc_table() -> tuple[int, ...]:
  """Returns the remainder of every byte."""
  table = []
  for byte in range(256):
    for _ in range(8):
      byte = (byte >> 1) ^ (_CASTAGNOLI if byte & 1 else 0)
    table.append(byte)
  return tuple(table)


_CRC_TABLE = _crc_table()


class MetricsError(errors.CovenantError):
  """An invalid record; the message names the field, and the line in a file."""


class TornLineError(MetricsError):
  """A line is not JSON: its writer or its machine died."""


@dataclasses.dataclass(frozen=True)
class Round:
  """One completed round.

  NumPy or JAX scalars become Python numbers, and arrays become tuples.

  Raises:
    MetricsError: a field has the wrong type, or is infinite or NaN.
  """

  kind: ClassVar[str] = 'round'

  round: int  # rounds completed, this one included
  tokens: int  # tokens trained since the start, all miners
  loss: float  # inner training loss, nats per token, mean of miners and steps
  miner_losses: tuple[float, ...]  # loss of each of `uids`, nats per token
  uids: tuple[int, ...]  # miners that trained in this round, ascending
  learning_rate: float  # rate of the last inner step
  bytes_up: int  # payload bytes sent since the start, all miners
  bytes_round: int  # payload bytes sent in this round, all miners
  dense_bytes_round: int  # bytes of the same payloads in dense fp32
  compression_ratio: float  # dense_bytes_round / bytes_round; 0 without bytes
  delta_norm: float  # L2 norm of the aggregated update
  error_norm: float  # L2 norm of the error feedback, mean of miners
  payloads: int  # payloads accepted
  seconds: float  # wall-clock seconds of this round
  tokens_per_second: float  # rate of this round, all miners, wall-clock time
  # Parts of `seconds`, of all nodes together: training and compression (miners
  # side by side count once); commitments, transfers, checks and votes; outer
  # steps; evaluation and ratings.
  train_seconds: float = 0.0
  exchange_seconds: float = 0.0
  outer_seconds: float = 0.0
  score_seconds: float = 0.0
  stage_bytes: int = 0  # bytes between pipeline stages, forward and backward
  # Weights by uid from 0 on, by the leader's verdicts so far; they sum to 1.
  # Empty before the first verdict.
  weights: tuple[float, ...] = ()

  def __post_init__(self):
    _normalize(self)
    if len(self.miner_losses) != len(self.uids):
      raise MetricsError(
        f'round {self.round}: {len(self.miner_losses)} miner_losses for '
        f'{len(self.uids)} uids'
      )


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """One evaluation of the shared model on held-out text.

  Raises:
    MetricsError: a field has the wrong type, or is infinite or NaN.
  """

  kind: ClassVar[str] = 'evaluation'

  round: int  # rounds completed
  tokens: int  # tokens trained since the start, all miners
  bytes_up: int  # payload bytes sent since the start, all miners
  loss: float  # held-out loss, nats per token
  nats_per_byte: float  # held-out loss, nats per byte of text
  bits_per_byte: float  # held-out loss, bits per byte of text
  sequences: int  # held-out sequences evaluated
  seconds: float  # wall-clock seconds of this evaluation

  def __post_init__(self):
    _normalize(self)


Record = Round | Evaluation

_Value: TypeAlias = Any  # a Python or NumPy number, or a sequence of them
_KINDS = {cls.kind: cls for cls in (Round, Evaluation)}


def _normalize(record: Record) -> None:
  """Checks the fields and replaces them by plain Python objects."""
  for field in dataclasses.fields(record):
    where = f'{record.kind} {record.round}: {field.name!r}'
    value = _checked(getattr(record, field.name), field.type, where)
    object.__setattr__(record, field.name, value)  # the dataclass is frozen


def _checked(value: _Value, kind: object, where: str) -> _Value:
  """Returns `value` as the plain Python object of type `kind`."""
  if typing.get_origin(kind) is tuple:
    element = typing.get_args(kind)[0]
    if isinstance(value, (str, bytes)):
      raise MetricsError(f'{where} is {value!r}, not a list of numbers')
    try:
      items = list(value)
    except TypeError:
      raise MetricsError(
        f'{where} is {value!r}, not a list of numbers'
      ) from None
    return tuple(
      _checked(item, element, f'{where}[{i}]') for i, item in enumerate(items)
    )
  # float('3') and operator.index(True) would both succeed.
  if isinstance(value, (str, bytes, bool)) or value is None:
    raise MetricsError(f'{where} is {value!r}, not a number')
  try:
    number = operator.index(value) if kind is int else float(value)
  except (TypeError, ValueError, OverflowError):
    noun = 'an integer' if kind is int else 'a number'
    raise MetricsError(f'{where} is {value!r}, not {noun}') from None
  if kind is float and not math.isfinite(number):
    raise MetricsError(f'{where} is {number}: the run has diverged')
  return number


def _fields(record: Record) -> dict[str, object]:
  return {'kind': record.kind, **dataclasses.asdict(record)}


def encode(record: Record) -> str:
  """Returns the line of a record, without its newline."""
  return json.dumps(_fields(record), allow_nan=False)


def decode(line: str | bytes) -> Record:
  """Returns the record of one line; the inverse of `encode`.

  Raises:
    MetricsError: the line is not a JSON object of a known kind, or a field is
      missing, unknown, ill-typed or not finite.
  """
  try:
    fields = json.loads(line)
  except (ValueError, RecursionError) as error:  # ValueError: UTF-8's as well
    raise TornLineError(f'not JSON: {error}') from None
  if not isinstance(fields, dict):
    raise MetricsError(f'not a JSON object but a {type(fields).__name__}')
  kind = fields.pop('kind', None)
  if not isinstance(kind, str) or kind not in _KINDS:
    raise MetricsError(f'kind is {kind!r}; allowed: {", ".join(_KINDS)}')
  cls = _KINDS[kind]
  names = {field.name for field in dataclasses.fields(cls)}
  # Fields with a default are newer than some runs.
  needed = {
    field.name
    for field in dataclasses.fields(cls)
    if field.default is dataclasses.MISSING
  }
  if missing := sorted(needed - set(fields)):
    raise MetricsError(f'{kind}: missing {", ".join(missing)}')
  if unknown := sorted(set(fields) - names):
    raise MetricsError(f'{kind}: unknown field {", ".join(unknown)}')
  return cls(**fields)


def _lines(path: pathlib.Path) -> Iterator[tuple[bytes, Record]]:
  """Yields every complete line with its record.

  Torn lines, which are not JSON, are left out, and reported.
  """
  torn = []
  for number, line in enumerate(files.read_lines(path), start=1):
    line = line.strip(b'\0')
    try:
      yield line, decode(line)
    except TornLineError:
      torn.append(number)
    except MetricsError as error:
      raise MetricsError(f'{path}:{number}: {error}') from None
  if torn:
    numbers = ', '.join(map(str, torn[:5])) + (', ...' if torn[5:] else '')
    print(
      f'{path}: {len(torn)} torn lines are left out: {numbers}',
      file=sys.stderr,
      flush=True,
    )


def read(path: str | os.PathLike[str]) -> list[Record]:
  """Reads the records of a metrics file in their order.

  A run that is still writing may be read: an unfinished last line is left out.

  Raises:
    MetricsError: there is no such file, or a line is malformed; the message
      has the file and the line.
  """
  path = pathlib.Path(path)
  if not path.exists():
    raise MetricsError(f'{path}: expected the metrics of a run, found no file')
  return [record for _, record in _lines(path)]


def rounds(records: Iterable[Record]) -> list[Round]:
  """Returns the rounds among the records."""
  return [r for r in records if isinstance(r, Round)]


def evaluations(records: Iterable[Record]) -> list[Evaluation]:
  """Returns the evaluations among the records."""
  return [r for r in records if isinstance(r, Evaluation)]


class MetricsWriter:
  """Appends records to the metrics file of a run and mirrors TensorBoard.

  A written line survives the death of the process. Only `sync` makes it
  survive the death of the machine, so call it before a checkpoint is made.
  Write the evaluation of a round before its checkpoint: a run that resumes
  from there does not repeat it.

  Args:
    path: the JSONL file; its folder is created if missing.
    tensorboard_dir: the folder of TensorBoard events.
    resume: rounds completed at the checkpoint from which the run resumes. Later
      records and an unfinished last line are dropped from the file. None
      starts a new file.

  Raises:
    MetricsError: the file to resume is malformed before its last line.
  """

  def __init__(
    self,
    path: str | os.PathLike[str],
    tensorboard_dir: str | os.PathLike[str],
    *,
    resume: int | None = None,
  ):
    self._path = pathlib.Path(path)
    kept = _lines(self._path) if resume is not None else []
    lines = [line for line, record in kept if record.round <= (resume or 0)]
    files.write_lines(path, lines, durable=True)
    self._is_open = True
    purge = 0 if resume is None else resume + 1
    self._tensorboard = EventWriter(tensorboard_dir, purge)

  def write(self, record: Record) -> None:
    """Appends one record and hands it to the operating system."""
    files.append_jsonl(self._path, _fields(record))
    for name, value in dataclasses.asdict(record).items():
      if isinstance(value, (int, float)) and name != 'round':
        tag = f'{record.kind}/{name}'
        self._tensorboard.add_scalar(tag, value, record.round)

  def sync(self) -> None:
    """Returns once all records are on the disk."""
    files.sync(self._path)
    self._tensorboard.flush()

  def close(self) -> None:
    """Syncs and closes; a second call does nothing."""
    if self._is_open:
      self.sync()
      self._tensorboard.close()
      self._is_open = False

  def __enter__(self) -> 'MetricsWriter':
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


class EventWriter:
  """Writes the scalars of one start of a run.

  Args:
    folder: the folder of the event files; created if missing.
    purge_step: the step from which TensorBoard ignores earlier files.
  """

  def __init__(self, folder: str | os.PathLike[str], purge_step: int):
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Two files of one second must not have one name.
    name = f'{int(time.time()):010d}.{socket.gethostname()}.from{purge_step}'
    self._file = open(folder / f'events.out.tfevents.{name}', 'ab')
    self._write(_text(3, b'brain.Event:2'))  # file_version
    self._write(_integer(2, purge_step) + _text(7, _integer(1, 1)))

  def add_scalar(self, tag: str, value: float, step: int) -> None:
    """Writes one value of a curve."""
    simple_value = _key(2, 5) + struct.pack('<f', value)
    summary = _text(1, _text(1, tag.encode()) + simple_value)
    self._write(_integer(2, step) + _text(5, summary))

  def flush(self) -> None:
    self._file.flush()

  def close(self) -> None:
    self._file.close()

  def _write(self, fields: bytes) -> None:
    """Appends an event, with the time, as a TFRecord."""
    event = _key(1, 1) + struct.pack('<d', time.time()) + fields
    length = struct.pack('<Q', len(event))
    self._file.write(length + _masked_crc(length) + event + _masked_crc(event))


def _key(field: int, wire_type: int) -> bytes:
  return bytes([field << 3 | wire_type])


def _varint(value: int) -> bytes:
  """Returns a non-negative integer in protobuf's encoding.

  >>> _varint(300).hex()
  'ac02'
  """
  digits = bytearray()
  while value > 127:
    digits.append(value & 127 | 128)
    value >>= 7
  return bytes([*digits, value])


def _integer(field: int, value: int) -> bytes:
  return _key(field, 0) + _varint(value)


def _text(field: int, data: bytes) -> bytes:
  return _key(field, 2) + _varint(len(data)) + data


def _masked_crc(data: bytes) -> bytes:
  """Returns TFRecord's masked CRC-32C.

  >>> _masked_crc(b'123456789').hex()  # the CRC is 0xe3069283
  'e5b08ac7'
  """
  crc = 0xFFFFFFFF
  for byte in data:
    crc = crc >> 8 ^ _CRC_TABLE[(crc ^ byte) & 255]
  crc ^= 0xFFFFFFFF
  masked = (crc >> 15 | crc << 17) + 0xA282EAD8
  return struct.pack('<I', masked & 0xFFFFFFFF)
