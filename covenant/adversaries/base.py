"""What adversaries have in common: a miner's program, and accomplices.

An adversary knows what a real one could: its own state, the chain, and the
buckets of the others, through the same objects as any node. Accomplices also
share notes, which in a real network would be a private channel.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from covenant.data import receipt as receipt_lib
from covenant.emulate import devices as devices_lib
from covenant.emulate import miner as miner_lib
from covenant.optim import aggregate
from covenant.optim import compression as compression_lib
from covenant.optim import sparseloco
from covenant.protocol import apply
from covenant.protocol import membership as membership_lib
from covenant.protocol import round as round_lib
from covenant.protocol import run_storage as run_storage_lib
from covenant.store import interface as store_lib
from covenant.train import local as local_lib
from covenant.wire import manifest as manifest_lib
from covenant.wire import payload as payload_lib


class Gang(NamedTuple):
  """Who of a run are accomplices, and what they tell each other."""

  names: Mapping[int, str]  # by uid, of the registry
  notes: dict[str, Any]  # what one made and others use

  def uids(self, name: str) -> list[int]:
    return sorted(u for u, n in self.names.items() if n == name)

  def note(self, what: str, when: Any, make: Callable[[], Any]) -> Any:
    """`make()`, once for all accomplices; what is of another time is gone."""
    if what not in self.notes or self.notes[what][0] != when:
      self.notes[what] = when, make()
    return self.notes[what][1]


class Adversary(miner_lib.Miner):
  """Trains honestly and sends something else; subclasses say what.

  Args:
    *args: as `node.Node`.
    gang: its accomplices, itself among them.
    **kwargs: as `miner.Miner`.
  """

  honest = False  # whether it must not be punished

  def __init__(self, *args: Any, gang: Gang, **kwargs: Any):
    super().__init__(*args, **kwargs)
    self._gang = gang

  def _contribute(self, task: local_lib.Task) -> None:
    wait = self._start(task)

    def begun() -> tuple[local_lib.Contribution, local_lib.MinerState]:
      work, private = wait()
      return self._seal(self._spoil(work, task), task), private

    self._begun = begun

  def _start(
    self, task: local_lib.Task
  ) -> devices_lib.Begun[local_lib.TrainedRound]:
    """Trains, from the parameters and on the data that a subclass chooses."""
    return self._slot.work(
      self.shared.params, self.private, task, self._batches(task)
    )

  def _work(self, task: local_lib.Task) -> local_lib.TrainedRound:
    """As `_start`, done."""
    work, self.private = self._start(task)()
    return work

  def _seal(
    self, work: local_lib.TrainedRound, task: local_lib.Task
  ) -> local_lib.Contribution:
    return self._trainer.seal(work, task, self.chain.sign)

  def _batches(self, task: local_lib.Task) -> Iterable[np.ndarray]:
    return self._trainer.batches(task)

  def _spoil(
    self, work: local_lib.TrainedRound, task: local_lib.Task
  ) -> local_lib.TrainedRound:
    """What it says it has done."""
    del task
    return work

  def _commit(self, command: round_lib.Command, head: int) -> None:
    if self.contribution is not None:
      super()._commit(command, head)

  def _upload(self, command: round_lib.Command, head: int) -> None:
    if self.contribution is not None:
      super()._upload(command, head)

  def _idle(self, message: Any, task: local_lib.Task) -> None:
    """Sends `message` without work, under a receipt that is right.

    Whoever reads the data can make it.
    """
    work = self._pretend(
      local_lib.TrainedRound(message, b'', 0, 0.0, 0.0), task
    )
    self.contribution = self._seal(work, task)._replace(tokens=0)

  def _pretend(
    self,
    work: local_lib.TrainedRound,
    task: local_lib.Task,
    sequences: int | None = None,
  ) -> local_lib.TrainedRound:
    """`work` under the receipt of the first assigned sequences, or of all."""
    split, context = self._trainer.split, self.config.data.context
    ids = local_lib.assigned_ids(self.config, task, split)[:sequences]
    receipt = receipt_lib.of_sequences(split, ids, context)
    return work._replace(receipt=receipt, sequences=len(ids))

  def _random(self, task: local_lib.Task, *who: int) -> np.random.Generator:
    """Draws of this round, its own unless `who` says otherwise."""
    whose = who or (task.uid,)
    return np.random.default_rng([self.config.seed, task.round, *whose])

  def _dense(self, message: Any) -> Any:
    """The delta that a message stands for: float32, NumPy."""
    compression = self.shared_model.method.compression
    return jax.device_get(_dense(message, self.shared.params, compression))

  def _sparse(self, delta: Any) -> Any:
    """The message of a delta."""
    return jax.device_get(_sparse(delta, self.shared_model.method.compression))

  def _noise(self, task: local_lib.Task, *who: int) -> Any:
    """A normal delta, each tensor of the norm that is usual."""
    draw = self._random(task, *who)
    noise = jax.tree.map(
      lambda x: draw.normal(size=x.shape).astype(np.float32), self.shared.params
    )
    return self._fit(noise, self.messages)

  def _fit(self, delta: Any, messages: Mapping[int, Any]) -> Any:
    """`delta` with the median norm of `messages`: as large as is not clipped.

    Without messages, a hundredth of the parameters' norm.
    """
    leaves, treedef = jax.tree.flatten(delta)
    compression = self.shared_model.method.compression

    def norms(message: Any) -> np.ndarray:
      return np.asarray(_norms(message, self.shared.params, compression))

    if messages:
      norms_RxP = np.stack([norms(message) for message in messages.values()])
      wanted_P = np.sort(norms_RxP, axis=0)[(len(norms_RxP) - 1) // 2]
    else:
      params = jax.tree.leaves(self.shared.params)
      wanted_P = np.array([0.01 * np.linalg.norm(x) for x in params])
    # What is dropped in sparsification is made up for.
    factors_P = wanted_P / np.maximum(norms(self._sparse(delta)), 1e-12)
    scaled = [
      (np.asarray(x) * f).astype(np.float32)
      for x, f in zip(leaves, factors_P, strict=True)
    ]
    return treedef.unflatten(scaled)

  def _victims(self, membership: membership_lib.Membership) -> list[int]:
    """Miners outside the gang, who earned most first."""
    earned = self.chain.earned(membership.block)
    uids = [p.uid for p in membership.miners if p.uid not in self._gang.names]
    return sorted(uids, key=lambda u: (-earned.get(u, 0.0), u))

  def _in_turn(self, uids: list[int], task: local_lib.Task) -> list[int]:
    """`uids` from another one on for every accomplice."""
    place = sorted(self._gang.names).index(task.uid) % max(len(uids), 1)
    return uids[place:] + uids[:place]

  def _published(
    self,
    membership: membership_lib.Membership,
    task: local_lib.Task,
    uids: list[int],
  ) -> dict[int, Any]:
    """The messages of this round that some have committed to and uploaded."""
    entries = {}
    for uid in uids:
      commitment = membership.commitments.get(uid)
      if commitment is not None and commitment.round == task.round:
        hotkey = membership.peers[uid].hotkey
        entries[uid] = manifest_lib.Entry(uid, hotkey, commitment.digest)
    wanted = [
      run_storage_lib.ObjectRef(e.digest, membership.location(u))
      for u, e in entries.items()
    ]
    limit = self.shared_model.spec.payload_bytes
    got = self.objects.fetch('payloads', task.round, wanted, [], limit)
    messages = {}
    for uid, entry in entries.items():
      data = got[entry.digest]
      if isinstance(data, store_lib.StoreError):
        continue
      message = self._read(entry, data)
      if message is not None:
        messages[uid] = message
    return messages

  def _read(self, entry: manifest_lib.Entry, data: bytes) -> Any:
    """The message in a payload of this round; None if it is refused."""
    try:
      return apply.decode(
        self.shared_model, self.chain, entry, self.place, data
      ).message
    except payload_lib.PayloadError:
      return None

  @staticmethod
  def serve(reader: str, bucket: store_lib.Bucket) -> store_lib.Bucket:
    """Its bucket as the node `reader` finds it."""
    del reader
    return bucket


@functools.partial(jax.jit, static_argnames='compression')
def _dense(
  message: Any, like: Any, compression: compression_lib.Compression
) -> Any:
  return sparseloco.decompress(message, like, compression)


@functools.partial(jax.jit, static_argnames='compression')
def _sparse(delta: Any, compression: compression_lib.Compression) -> Any:
  return sparseloco.compress(delta, None, compression, None)[0]


@functools.partial(jax.jit, static_argnames='compression')
def _norms(
  message: Any, like: Any, compression: compression_lib.Compression
) -> jax.Array:
  return aggregate.message_norms(message, like, compression)
