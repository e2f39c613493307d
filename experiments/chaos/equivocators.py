"""Leaders that sign two manifests for one round."""

from collections.abc import Callable
from typing import Any

from covenant.node import follow
from covenant.node import validator as validator_lib
from covenant.protocol import run_storage as run_storage_lib
from covenant.wire import manifest as manifest_lib
from experiments.chaos import faults

Policy = validator_lib.ValidatorPolicy
Validator = validator_lib.Validator
Publish = Callable[[Validator, int, bytes, bytes], None]


def publish_both(node: Validator, r: int, one: bytes, two: bytes) -> None:
  """Publishes both manifests."""
  for data in one, two:
    key = node.objects.key('proposals', r, run_storage_lib.digest(data))
    node.objects.put_once(key, data)


def publish_other(node: Validator, r: int, one: bytes, two: bytes) -> None:
  """Serves the second manifest in place of the first."""
  key = node.objects.key('proposals', r, run_storage_lib.digest(one))
  node.objects.put_once(key, two)


def publish_nothing(node: Validator, r: int, one: bytes, two: bytes) -> None:
  """Withholds both manifests."""


def equivocator(policy: Policy, publish: Publish = publish_both) -> Policy:
  """Signs two manifests, and commits to one of them."""

  def stand_for(node: Validator, r: int, data: bytes, head: int) -> None:
    manifest = manifest_lib.decode(data, node.chain.verify)
    other = manifest._replace(entries=manifest.entries[1:])
    chain: Any = node.chain  # of `Faults.chain`
    chain.faults.struck(faults.Kind.TWO)
    publish(node, r, data, manifest_lib.encode(other, node.chain.sign))
    follow.commit(node, r, run_storage_lib.digest(data), head)

  return policy._replace(stand_for=stand_for)


def liar(policy: Policy) -> Policy:
  """Commits to one manifest, and serves the other in its place."""
  return equivocator(policy, publish_other)


def withholder(policy: Policy) -> Policy:
  """Commits to a manifest that nobody ever sees."""
  return equivocator(policy, publish_nothing)
