"""The work of the stages of a pipeline in a round, and its samples to check."""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from covenant import config as config_lib
from covenant import typing as ct
from covenant.models import llama
from covenant.pool import messages
from covenant.train import island as island_lib
from covenant.train import local as local_lib
from covenant.train.pipeline import stage_bytes
from covenant.train.pipeline import stage_programs
from covenant.train.pipeline import subspace

NOT_FINITE = 'it sends numbers that are not finite'
_TEXT_BYTES = 1 << 20  # of a message, at most
_SAMPLES = 64  # microbatches of a round that are kept to be computed again
_LARGEST = 1e30  # of a loss or a square; their sums are finite in float32


class Sample(NamedTuple):
  """The output of a stage for a microbatch, forward or back."""

  stage: int
  worker: str
  step: int  # of the round
  tokens_bxL1: np.ndarray
  crossed: int  # boundary of its coordinates: a lower one past bypassed stages
  came: bytes  # coordinates
  given: bytes  # the gradient that came back; empty: of its forward pass
  divisor: float  # the number of targets of the batch
  sent: bytes


class Samples:
  """Some of the microbatches of a round, at random.

  Args:
    draw: the generator, unknown to workers.
  """

  def __init__(self, draw: np.random.Generator):
    self.kept: list[Sample] = []
    self._draw, self._seen = draw, 0

  def add(self, sample: Sample) -> None:
    """Keeps a sample perhaps, in the place of another if there are many."""
    self._seen += 1
    if len(self.kept) < _SAMPLES:
      self.kept.append(sample)
    elif (place := int(self._draw.integers(self._seen))) < _SAMPLES:
      self.kept[place] = sample


class StagesResult(NamedTuple):
  """The training of a round."""

  sequences: int  # the number trained on, a prefix of the assigned ones
  receipt: bytes
  losses: tuple[float, ...]  # nats per token, of each step
  norms: tuple[float, ...]  # of the gradients
  work: Mapping[str, int]  # layers x microbatches, per worker
  idle: tuple[float, ...]  # share of the time in which each stage did nothing
  replays: int  # inner steps that were begun again
  passed_bytes: int  # bytes that passed between stages
  samples: tuple[Sample, ...]
  refused: Mapping[str, str]  # workers that are not paid, with reasons
  fits: Mapping[int, bytes]
  bypassed: tuple[int, ...]  # steps in which each stage was bypassed


def inner_step(
  at: tuple[int, int, int],
  tokens_BxL1: np.ndarray,
  found: tuple[float, float, float, float],
) -> local_lib.InnerStep:
  """Returns the measurements of a step; its uid is 0, as if it joined at 0.

  Args:
    at: the round, the step of it, and the inner step of the run.
    tokens_BxL1: the tokens of the step.
    found: loss, norm of the gradient, seconds, and seconds until the batch was
      there.
  """
  nats, norm, seconds, wait = found
  return local_lib.InnerStep(
    0,
    *at,
    0,
    tokens_BxL1[:, 1:].size,
    nats if math.isfinite(nats) else None,
    norm if math.isfinite(norm) else None,
    seconds,
    wait,
  )


def leaf_places(
  model: config_lib.Model, island: config_lib.Island
) -> list[tuple[int, int]]:
  """Returns (stage, place among its own) of each tensor, in leaf order."""
  whole, found = llama.abstract(model), {}
  for s in range(island.stages):
    own = stage_programs.pick(whole, stage_programs.names(model, island, s).own)
    structure = jax.tree.structure(own)
    pairs = [(s, i) for i in range(structure.num_leaves)]
    found |= structure.unflatten(map(_Place, pairs))
  return [x.pair for x in jax.tree.leaves(found)]


class _Place:
  """A leaf that JAX does not take apart."""

  def __init__(self, pair: tuple[int, int]):
    self.pair = pair


def flaw(data: bytes, form: ct.PyTree) -> str:
  """Returns what is wrong with packed coordinates; empty: nothing."""
  try:
    found = stage_bytes.from_bytes(data, form)
  except ValueError as e:
    return str(e)
  for x in jax.tree.leaves(found):
    if jax.numpy.issubdtype(x.dtype, jax.numpy.floating):
      if not np.isfinite(x.astype(np.float32)).all():
        return NOT_FINITE
  return ''


def longest_message(config: config_lib.Config, payload_bytes: int) -> int:
  """Returns the most bytes of a message of a stage of the first island."""
  island = island_lib.of(config, 0)
  sequences = max(subspace.FITTED, island.batch)
  passed = stage_programs.coordinates(
    config.decoder, island, sequences, config.data.context
  )
  fit = stage_programs.fits(config.decoder, island)
  sizes = stage_bytes.size_of(passed) + stage_bytes.size_of(fit)
  return _TEXT_BYTES + sizes + payload_bytes


def numbers(text: Mapping[str, ct.Json]) -> tuple[list[float], float]:
  """Returns the squares and the loss that a stage says.

  A value that is no number, or too large for one, becomes NaN.
  """
  try:
    squares = [float(x) for x in text.get('squares', ())]
    nats = float(text.get('nats', 0.0))
  except messages.MALFORMED:
    squares, nats = [math.nan], math.nan
  *squares, nats = (
    x if abs(x) <= _LARGEST else math.nan for x in (*squares, nats)
  )
  return squares, nats


def total(numbers: Iterable[float]) -> np.float32:
  """Returns the sum in float32, one after another, as the stages' device."""
  total = np.float32(0)
  for number in numbers:
    total += np.float32(number)
  return total


def tokens_bytes(tokens: np.ndarray) -> bytes:
  """Returns tokens as they are sent."""
  return np.ascontiguousarray(tokens, '<i4').tobytes()
