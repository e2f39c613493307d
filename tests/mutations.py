"""Changes to the bytes of strangers, for tests of parsers."""

import random
import re
from typing import Protocol

from hypothesis import strategies as st

# Bytes that parsers of text and JSON look out for.
_TELLING = (
  b'[', b']', b'{', b'}', b'"', b'\\', b',', b':', b'0', b'-', b'.', b'e',
  b'null', b'true', b'NaN', b'1e999', b'\\u0000', b'\\ud800', b'\x00', b'\xff',
  b'../', b'\r\n', b' ', b'9' * 5000, b'[' * 3000, b'{"a":' * 3000,
)  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn, data: bytes, most: int = 4) -> bytes:
  """Draws bytes that differ from `data` in up to `most` places.

  Bits are flipped; runs of bytes are cut out, repeated, moved, replaced, or
  followed by bytes that parsers look out for.
  """
  changed = bytearray(data)
  for _ in range(draw(st.integers(1, most))):
    if not changed:
      break
    start = draw(st.integers(0, len(changed) - 1))
    size = draw(st.sampled_from((1, 2, 4, 8, 64, 1000)))
    run = bytes(changed[start : start + size])
    match draw(st.integers(0, 6)):
      case 0:
        changed[start] ^= 1 << draw(st.integers(0, 7))
      case 1:
        del changed[start : start + size]
      case 2:
        changed[start:start] = run
      case 3:
        to = draw(st.integers(0, len(changed)))
        changed[to:to] = run
      case 4:
        changed[start : start + size] = draw(st.binary(max_size=16))
      case 5:
        changed[start:start] = draw(st.sampled_from(_TELLING))
      case 6:
        del changed[start:]
  return bytes(changed)


class Parser(Protocol):
  """Parses a mutant; returns what became of it, or fails."""

  seeds: list[bytes]

  def __call__(self, mutant: bytes) -> str: ...


def parse_many(parse: Parser, count: int, seed: int) -> dict[str, int]:
  """Parses many mutants; returns how often each first word came of them."""
  for whole in parse.seeds:
    parse(whole)
  fuzzer = Fuzzer(parse.seeds, seed)
  outcomes: dict[str, int] = {}
  for _ in range(count):
    mutant = fuzzer.next()
    try:
      outcome = parse(mutant)
    except BaseException:
      print(f'the mutant: {mutant!r}')
      raise
    assert len(outcome) < 2000, outcome  # errors of strangers fill no disk
    fuzzer.tell(outcome)
    kind = outcome.partition(' ')[0]
    outcomes[kind] = outcomes.get(kind, 0) + 1
  return outcomes


class Fuzzer:
  """Mutates bytes without end; what led to something new is mutated again.

  Args:
    seeds: the bytes to begin with.
    seed: of the random draws.
  """

  def __init__(self, seeds: list[bytes], seed: int = 0):
    self._random = random.Random(seed)
    self._pool = list(seeds)
    self._known: set[str] = set()
    self._last = b''

  def next(self) -> bytes:
    """Returns the next mutant."""
    changed = bytearray(self._random.choice(self._pool))
    for _ in range(self._random.choice((1, 1, 1, 2, 3, 8))):
      if changed:
        self._change(changed)
    self._last = bytes(changed)
    return self._last

  def tell(self, outcome: str) -> None:
    """Notes what became of the last mutant, as text."""
    kind = re.sub(r'[0-9a-f]{6,}|\d+|\'.*\'|".*"', '_', outcome)[:200]
    if kind not in self._known and len(self._pool) < 500:
      self._known.add(kind)
      self._pool.append(self._last)

  def _change(self, data: bytearray) -> None:
    draw = self._random
    start = draw.randrange(len(data))
    end = start + draw.choice((1, 1, 2, 4, 8, 64))
    match draw.randrange(9):
      case 0 | 1:
        data[start] ^= 1 << draw.randrange(8)
      case 2:
        data[start] = draw.choice((0, 1, 127, 128, 255, draw.randrange(256)))
      case 3:
        del data[start:end]
      case 4:
        data[start:start] = data[start:end]
      case 5:
        other = draw.choice(self._pool)
        at = draw.randrange(len(other)) if other else 0
        data[start:end] = other[at : at + end - start]
      case 6:
        data[start:end] = draw.randbytes(draw.randrange(9))
      case 7:
        data[start:end] = draw.choice(_TELLING)[: draw.choice((1, 99, 9999))]
      case 8:
        del data[draw.choice((start, len(data) - 1)) :]
