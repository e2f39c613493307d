"""The tensors of a pipeline's payloads, by the stage that has them."""

from collections.abc import Callable

import jax
import numpy as np

from covenant import config as config_lib
from covenant.models import llama
from covenant.pool import orders as orders_lib
from covenant.train.pipeline import stage_programs
from covenant.wire import payload


class StageTensors:
  """The tensors of a run's payloads, by the stage that has them."""

  def __init__(
    self,
    config: config_lib.Config,
    island: config_lib.Island,
    spec: payload.Spec,
  ):
    self.spec = spec
    self._compression = spec.compression
    whole = llama.abstract(config.model)
    place = {tensor.name: i for i, tensor in enumerate(spec.tensors)}

    def places(names: tuple[str, ...]) -> list[int]:
      some = stage_programs.pick(whole, names)
      made = payload.make_spec(some, spec.compression, spec.codec)
      return [place[tensor.name] for tensor in made.tensors]

    found = [
      stage_programs.names(config.decoder, island, s)
      for s in range(island.stages)
    ]
    self.own = [places(names.own) for names in found]
    self.held = [places(names.held) for names in found]

  def part(self, order: orders_lib.Order, stage: int) -> orders_lib.Order:
    """Returns the part of an order that a stage takes."""
    return order.of_tensors(self.held[stage])

  def sections_of(
    self,
    order: orders_lib.Order | None,
    stage: int,
    uid: int,
    read: Callable[[orders_lib.Source], bytes],
  ) -> list[bytes]:
    """Returns the sections that a stage needs of one payload of an order.

    Args:
      order: the order; None raises ValueError.
      stage: the stage.
      uid: of the payload.
      read: returns the payload of a source.

    Raises:
      OrderError, ValueError, IndexError: there are none.
    """
    if order is None:
      raise ValueError('there is no such order')
    (source,) = (s for s in self.part(order, stage).sources if s.uid == uid)
    return orders_lib.cut(read(source), source)

  def sections(self, stage: int, sizes: list[int], data: bytes) -> list[bytes]:
    """Returns what a stage sealed, verified.

    Raises:
      PayloadError, ValueError: it is not the sections of the stage's tensors.
    """
    if len(sizes) != len(self.own[stage]) or sum(sizes) != len(data):
      raise ValueError('not as many sections as tensors')
    ends = np.cumsum([0, *sizes])
    found = [data[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]
    for place, section in zip(self.own[stage], found, strict=True):
      tensor = self.spec.tensors[place]
      _, rest = payload.decode_tensor(tensor, memoryview(section), self.spec)
      if rest:
        raise ValueError(f'{tensor.name}: a section is too long')
    return found

  def unchanged(self, place: int) -> bytes:
    """Returns the section of a tensor that has not moved."""
    tensor = self.spec.tensors[place]
    zeros = jax.numpy.zeros(tensor.shape)
    part = jax.device_get(self._compression.compress(zeros))
    return payload.encode_tensor(tensor, part, self.spec)
