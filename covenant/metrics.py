"""The metrics of a run: `metrics.jsonl`, one JSON object per line.

The fields of `Round`, `Evaluation`, `Step` and `NodeRound` are the schema; the
key `kind` before them tells them apart. An emulated run writes the first two,
and steps to `steps.jsonl`; a process of a network writes the last two.

TensorBoard gets a copy of the scalars; the JSONL is authoritative.
"""

import dataclasses
import json
import math
import operator
import os
import pathlib
import reprlib
import sys
import types
import typing
from collections.abc import Collection, Iterable, Iterator
from typing import Any, ClassVar, TypeAlias

from covenant import errors
from covenant import files
from covenant import tensorboard


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


@dataclasses.dataclass(frozen=True)
class Step:
  """One inner step: of one miner, or the mean of all miners of an emulation.

  A loss or a norm that is not finite becomes None.

  Raises:
    MetricsError: a field has the wrong type.
  """

  kind: ClassVar[str] = 'step'

  round: int  # rounds completed once the step's round is
  step: int  # inner step of the run, from 0 on
  tokens: int  # trained on in this step
  loss: float | None  # nats per token; None: not finite
  gradient_norm: float | None  # L2, before it is clipped; None: not finite
  learning_rate: float
  skipped: int = 0  # miners whose step was not finite and so not taken
  # Of a process:
  seconds: float | None = None  # wall-clock time of this step
  wait_seconds: float | None = None  # part of it without batch or message
  tokens_per_second: float | None = None
  mfu: float | None = None  # share of the devices' peak; None: unknown peak
  device_bytes: int | None = None  # memory in use on a device; None: unknown
  host_bytes: int | None = None  # memory of this process on the host
  stage: int | None = None  # of a pipeline, whose process this is

  def __post_init__(self):
    for name in ('loss', 'gradient_norm'):
      value = getattr(self, name)
      if value is not None and not math.isfinite(value):
        object.__setattr__(self, name, None)
    _normalize(self)


@dataclasses.dataclass(frozen=True)
class NodeRound:
  """One round of one process of a network.

  Raises:
    MetricsError: a field has the wrong type, or is infinite or NaN.
  """

  kind: ClassVar[str] = 'node'

  round: int  # rounds completed
  seconds: float  # wall-clock time of this round
  queue_seconds: float  # part of it without work: waiting for the chain
  bytes_sent: int  # to stores
  bytes_received: int  # from stores
  send_rate: float  # bytes per second of sending; 0 without
  receive_rate: float  # bytes per second of receiving; 0 without
  retries: int  # requests to stores, and channels to a head, begun again
  failures: int  # phases that failed and were tried again
  host_bytes: int  # memory of this process on the host
  host_free_bytes: int  # memory that it can still get
  disk_free_bytes: int  # of the disk of its folder
  # Seconds of each phase.
  begin_seconds: float = 0.0
  train_seconds: float = 0.0
  commit_seconds: float = 0.0
  upload_seconds: float = 0.0
  collect_seconds: float = 0.0
  vote_seconds: float = 0.0
  decide_seconds: float = 0.0
  apply_seconds: float = 0.0
  keep_seconds: float = 0.0
  score_seconds: float = 0.0
  catch_up_seconds: float = 0.0
  # Between a pool and its workers, or a head and its stages; None: no pool.
  pool_bytes_sent: int | None = None
  pool_bytes_received: int | None = None
  pool_send_rate: float | None = None  # bytes per second of the round
  pool_receive_rate: float | None = None  # the same

  def __post_init__(self):
    _normalize(self)


Record = Round | Evaluation
Line = Record | Step | NodeRound

_Value: TypeAlias = Any  # a Python or NumPy number, or a sequence of them
_AT = ('round', 'step', 'stage')
_KINDS = {cls.kind: cls for cls in (Round, Evaluation, Step, NodeRound)}


def _normalize(record: Line) -> None:
  """Checks the fields and replaces them by plain Python objects."""
  for field in dataclasses.fields(record):
    where = f'{record.kind} {record.round}: {field.name!r}'
    value = _checked(getattr(record, field.name), field.type, where)
    object.__setattr__(record, field.name, value)  # the dataclass is frozen


def _checked(value: _Value, kind: object, where: str) -> _Value:
  """Returns `value` as the plain Python object of type `kind`."""
  if isinstance(kind, types.UnionType):
    if value is None:
      return None
    kind = typing.get_args(kind)[0]
  got = f'{where} is {reprlib.repr(value)}'
  if typing.get_origin(kind) is tuple:
    element = typing.get_args(kind)[0]
    if isinstance(value, (str, bytes)):
      raise MetricsError(f'{got}, not a list of numbers')
    try:
      items = list(value)
    except TypeError:
      raise MetricsError(f'{got}, not a list of numbers') from None
    return tuple(
      _checked(item, element, f'{where}[{i}]') for i, item in enumerate(items)
    )
  # float('3') and operator.index(True) would both succeed.
  if isinstance(value, (str, bytes, bool)) or value is None:
    raise MetricsError(f'{got}, not a number')
  try:
    number = operator.index(value) if kind is int else float(value)
  except (TypeError, ValueError, OverflowError):
    noun = 'an integer' if kind is int else 'a number'
    raise MetricsError(f'{got}, not {noun}') from None
  if kind is float and not math.isfinite(number):
    raise MetricsError(f'{where} is {number}: the run has diverged')
  return number


def _fields(record: Line) -> dict[str, object]:
  """Returns the fields of a line; a default None is left out."""
  fields = dataclasses.asdict(record)
  for field in dataclasses.fields(record):
    if field.default is None and fields[field.name] is None:
      del fields[field.name]
  return {'kind': record.kind, **fields}


def scalars(record: Line) -> dict[str, float]:
  """Returns the numbers of a record but for its places, by field."""
  return {
    name: value
    for name, value in dataclasses.asdict(record).items()
    if isinstance(value, (int, float)) and name not in _AT
  }


def encode(record: Line) -> str:
  """Returns the line of a record, without its newline."""
  return json.dumps(_fields(record), allow_nan=False)


def decode(line: str | bytes) -> Line:
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
    raise MetricsError(
      f'kind is {reprlib.repr(kind)}; allowed: {", ".join(_KINDS)}'
    )
  cls = _KINDS[kind]
  known = dataclasses.fields(cls)
  # Fields with a default are newer than some runs.
  needed = {x.name for x in known if x.default is dataclasses.MISSING}
  if missing := sorted(needed - set(fields)):
    raise MetricsError(f'{kind}: missing {", ".join(missing)}')
  if unknown := sorted(set(fields) - {x.name for x in known}):
    raise MetricsError(f'{kind}: unknown field {", ".join(unknown)[:200]}')
  return cls(**fields)


def _lines(path: pathlib.Path) -> Iterator[tuple[bytes, Line]]:
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
    text = f'{path}: {len(torn)} torn lines are left out: {numbers}'
    print(text, file=sys.stderr, flush=True)


def read(
  path: str | os.PathLike[str],
  kinds: Collection[type[Line]] = (Round, Evaluation),
) -> list[Any]:
  """Reads the records of some kinds of a metrics file in their order.

  A run that is still writing may be read: an unfinished last line is left out.

  Raises:
    MetricsError: there is no such file, or a line is malformed; the message
      has the file and the line.
  """
  path = pathlib.Path(path)
  if not path.exists():
    raise MetricsError(f'{path}: expected the metrics of a run, found no file')
  return [record for _, record in _lines(path) if type(record) in kinds]


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

  def write(self, record: Line) -> None:
    """Appends one record and hands it to the operating system."""
    files.append_jsonl(self._path, _fields(record))
    self.mirror(record)

  def mirror(self, record: Line) -> None:
    """Hands a record to TensorBoard alone."""
    at = record.step if isinstance(record, Step) else record.round
    for name, value in scalars(record).items():
      self._tensorboard.add_scalar(f'{record.kind}/{name}', value, at)

  def sync(self) -> None:
    """Returns once all records are on the disk."""
    files.sync(self._path)
    self._tensorboard.flush()

  def close(self) -> None:
    """Syncs and closes; a second call does nothing."""
    if self._is_open:
      self._is_open = False
      try:
        self.sync()
      finally:
        self._tensorboard.close()

  def __enter__(self) -> 'MetricsWriter':
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


EventWriter = tensorboard.EventWriter
