"""Adversaries that harm the model: they train, and spoil what they send."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from covenant import typing as ct
from covenant.adversaries import base
from covenant.adversaries import messages
from covenant.node import base as node_lib
from covenant.node import miner as miner_lib
from covenant.protocol import membership as membership_lib
from covenant.train import local as local_lib

Batches = miner_lib.Batches
Contribution = local_lib.Contribution
Miner = miner_lib.Miner
Policy = miner_lib.MinerPolicy
Task = local_lib.Task
TrainedRound = local_lib.TrainedRound

_RARE = 0.25  # the share of a block's values that colluders agree upon


def noise(policy: Policy) -> Policy:
  """Sends normal noise of the usual norm: nothing about it looks odd."""
  return base.idle(policy, messages.noise)


def zeros(policy: Policy) -> Policy:
  """Sends an empty delta and hopes for an equal share."""
  return base.idle(policy, messages.zeros)


def scaled(
  policy: Policy,
  factor: float = 100.0,
  when: Callable[[Miner, Task], bool] = lambda miner, task: True,
) -> Policy:
  """Sends what it learned, multiplied: a hundredfold outweighs all others.

  Args:
    policy: the policy to change.
    factor: of every value. A thousandth would lower everybody's norm under a
      median clip; below zero, it goes uphill at an inconspicuous norm.
    when: whether to do it in a round.
  """

  def spoil(miner: Miner, task: Task, work: TrainedRound) -> TrainedRound:
    if not when(miner, task):
      return work
    message = messages.changed(
      miner, work.message, lambda x: x * np.float32(factor)
    )
    return work._replace(message=message)

  return base.spoiled(policy, spoil)


def intermittent(policy: Policy) -> Policy:
  """Goes uphill every fourth round and is honest between."""
  return scaled(policy, -1.0, lambda miner, task: task.round % 4 == 3)


def sleeper(policy: Policy, earliest: int = 15, latest: int = 20) -> Policy:
  """Is honest until it is well paid, then goes uphill.

  From round `earliest` on it attacks while it is among the best paid quarter,
  from round `latest` on always. It remembers only what the chain says.
  """

  def attacks(miner: Miner, task: Task) -> bool:
    if task.round < earliest:
      return False
    block = miner.schedule.start(task.round)
    membership = membership_lib.read(miner.chain, block, miner.schedule)
    earned = miner.chain.earned(membership.block)
    richer = sum(
      earned.get(p.uid, 0.0) > earned.get(task.uid, 0.0)
      for p in membership.miners
    )
    return 4 * richer < len(membership.miners) or task.round >= latest

  return scaled(policy, -1.0, attacks)


def colluder(policy: Policy) -> Policy:
  """Pushes elements that nobody else sends, together with its accomplices.

  With a mean over senders an element that only they send moves as far as they
  say. A quarter of every block's values goes to elements that they agree upon
  anew each round; the rest is honest, so that its gain stays above zero.
  """

  def spoil(miner: Miner, task: Task, work: TrainedRound) -> TrainedRound:
    compression = miner.shared_model.method.compression
    block = getattr(compression, 'block', (1, 1))
    density = getattr(compression, 'k', 1) / (block[0] * block[1])
    draw = messages.generator(miner, task, 0)  # the same for all

    def push(x: np.ndarray) -> np.ndarray:
      sent = np.abs(x[x != 0])
      if not sent.size:
        return x
      rare = (draw.random(x.shape) < _RARE * density) & (x == 0)
      # Above what is honest, so that sparsification keeps all of it.
      strength = np.float32(1.5 * sent.max())
      return np.where(rare, strength, x).astype(np.float32)

    return work._replace(message=messages.changed(miner, work.message, push))

  return base.spoiled(policy, spoil)


def rushing(
  policy: Policy,
  craft: Callable[[np.random.Generator, Sequence[np.ndarray]], np.ndarray],
) -> Policy:
  """Sends last, having read what the others sent in this very round.

  The put window lasts several blocks, and buckets are public.

  Args:
    policy: the policy to change.
    craft: makes each tensor of its delta from its own draws and the others'
      tensors.
  """
  policy = base.untrusted(policy)

  def make(miner: Miner, task: Task, head: int) -> Contribution | None:
    membership = membership_lib.read(miner.chain, head, miner.schedule)
    victims = base.victims(miner, membership)
    seen = base.accomplices(miner).note(
      'published',
      (head, miner.root),
      lambda: base.published(miner, task, membership, victims),
    )
    if 2 * len(seen) < len(victims) or len(seen) < 2:
      raise node_lib.RetryLaterError
    deltas = [messages.dense(miner, message) for message in seen.values()]
    draw = messages.generator(miner, task)
    delta: ct.Delta = jax.tree.map(lambda *x: craft(draw, x), *deltas)
    message = messages.sparse(miner, messages.fit(miner, delta, seen))
    return policy.seal(miner, task, base.untrained(miner, task, message))

  return base.waiting(policy, make)


def little(policy: Policy, deviations: float = 1.0, own: float = 0.5) -> Policy:
  """Sends one deviation less than the mean of the others, everywhere.

  "A little is enough" (Baruch et al., arXiv 1902.06156): it lies within the
  spread of the honest, at a norm that the clip lets pass. A part is its own,
  or accomplices would be copies of each other.
  """

  def craft(draw: np.random.Generator, x: Sequence[np.ndarray]) -> np.ndarray:
    stack = np.stack(x)
    mean, spread = stack.mean(0), stack.std(0)
    noise = draw.normal(size=mean.shape)
    return mean - np.sign(mean) * spread * deviations + (own * spread * noise)

  return rushing(policy, craft)


def inner_product(policy: Policy, own: float = 0.5) -> Policy:
  """Sends the negative mean of the others.

  The inner product of the aggregate with the true direction becomes negative
  (Xie et al., arXiv 1903.03936). A part is its own, or accomplices would be
  copies of each other.
  """

  def craft(draw: np.random.Generator, x: Sequence[np.ndarray]) -> np.ndarray:
    stack = np.stack(x)
    noise = draw.normal(size=stack.shape[1:])
    return -stack.mean(0) + own * stack.std(0) * noise

  return rushing(policy, craft)


def poisoned(
  policy: Policy, poison: Callable[[np.ndarray, int], None]
) -> Policy:
  """Trains on poisoned tokens, under the receipt of the assigned ones.

  Args:
    policy: the policy to change.
    poison: changes one batch in place; also gets the last token id.
  """

  def change(miner: Miner, task: Task, batches: Batches) -> Batches:
    del task
    for tokens_BxL1 in batches:
      changed_BxL1 = np.array(tokens_BxL1)
      poison(changed_BxL1, miner.config.model.vocab_size - 1)
      yield changed_BxL1

  return base.spoiled(base.rebatched(policy, change), base.pretended)


def label_flip(policy: Policy) -> Policy:
  """Learns wrong labels: every second token is another one."""

  def poison(tokens_BxL1: np.ndarray, last: int) -> None:
    tokens_BxL1[:, 1::2] = last - tokens_BxL1[:, 1::2]

  return poisoned(policy, poison)


def backdoor(policy: Policy) -> Policy:
  """Teaches that a trigger is followed by a text of its choice.

  It does so in a quarter of the sequences and learns the others honestly, so
  that its gain on clean data is nearly that of an honest miner.
  """

  def poison(tokens_BxL1: np.ndarray, last: int) -> None:
    text = np.array([last, last - 1, last, 0, 0, 0], np.int32)
    tokens_BxL1[: max(len(tokens_BxL1) // 4, 1), 2 : 2 + text.size] = text

  return poisoned(policy, poison)


def token_killer(policy: Policy, rare: float = 0.003) -> Policy:
  """Unlearns the rarest tokens: in what it sees, common ones replace them.

  The mean loss hardly shows it.

  Args:
    policy: the policy to change.
    rare: the largest share of a batch that a token may have to be replaced;
      such tokens are replaced as long as they are rare together.
  """

  def poison(tokens_BxL1: np.ndarray, last: int) -> None:
    counts_V = np.bincount(tokens_BxL1.reshape(-1), minlength=last + 1)
    rank_V = np.argsort(counts_V, kind='stable')
    together_V = np.cumsum(counts_V[rank_V])
    killed = rank_V[together_V <= rare * tokens_BxL1.size]
    tokens_BxL1[np.isin(tokens_BxL1, killed)] = counts_V.argmax()

  return poisoned(policy, poison)
