"""Scenarios in which a validator publishes checkpoints that are lies.

The liar's checkpoints, of every round up to the newest, are there before those
of the others. Meanwhile a miner joins, and another was away. Both must stand
where all are, and take part again, without a detour.
"""

import json
from collections.abc import Callable, Mapping

import jax

from covenant.protocol import apply
from covenant.protocol import published_checkpoint
from covenant.store import interface as store_lib
from covenant.wire import manifest as manifest_lib
from experiments.chaos import faults
from experiments.chaos import network as network_lib
from experiments.chaos import scenario as scenario_lib

Index = published_checkpoint.Index
Kind = faults.Kind
Network = network_lib.Network
ROUND = scenario_lib.ROUND
_HONEST, _, _LIAR = scenario_lib.VALIDATORS
_JOINER, _JOINER_UID = '20', len(scenario_lib.EVERYBODY)
_FIRST, _JOINS, _LAST = 2, 5, 9  # rounds
_MOST_ERRORS = 2  # of a node that repairs itself, each

# (network, what a true index would say) -> the bytes of the lie, unsigned.
Forge = Callable[[Network, Index], bytes]


def scenarios() -> list[scenario_lib.Scenario]:
  """Returns one scenario per lie."""
  return [_scenario(name, forge) for name, forge in _LIES.items()]


def _scenario(name: str, forge: Forge) -> scenario_lib.Scenario:
  script = {
    block: lambda network: _lie(network, forge)
    for block in range(_FIRST * ROUND, _LAST * ROUND)
  }
  joins = _JOINS * ROUND + 3

  def lie_and_join(network: Network) -> None:
    _lie(network, forge)
    network.join(_JOINER)

  away = faults.Fault(
    Kind.UNREACHABLE, range(3 * ROUND, 6 * ROUND), frozenset('0')
  )
  return scenario_lib.Scenario(
    f'a validator forges checkpoints: {name}',
    (away,),
    script=script | {joins: lie_and_join},
    dishonest={_LIAR: lambda policy: policy},
    rounds=_LAST,
    check=_check,
  )


def _check(network: Network, counted: Mapping[int, list[int]]) -> str:
  for node, uid in (('0', 0), (_JOINER, _JOINER_UID)):
    if uid not in counted[_LAST - 1]:
      return f'uid {uid} did not count in the last round'
    errors = [seen for seen in network.errors('OutOfSync') if seen.name == node]
    if len(errors) > _MOST_ERRORS:
      return f'node {node} was out of sync {len(errors)} times'
  return ''


def _lie(network: Network, forge: Forge) -> None:
  """Replaces the liar's checkpoints, as far as they were not looked at."""
  liar = network.nodes[_LIAR]
  layout = published_checkpoint.layout(network.host.shared_model)
  for r in range(max(liar.state.round - 3, 0), liar.state.round + 2):
    key = liar.objects.key('checkpoints', r)
    true = Index(
      r,
      _root(network, r).hex(),
      network.host.shared_model.fingerprint(liar.shared),
      {name: ['0f' * 32] * layout.pieces(name) for name in layout.tensors},
    )
    try:
      before = liar.objects.bucket.get(key, 1 << 24)
    except store_lib.StoreError:
      before = b''
    body = forge(network, true)
    data = body + liar.chain.sign(body)
    if before == data:
      continue
    liar.objects.bucket.put(key, data, replace=True)
    network.faults.struck(Kind.FORGED)


def _root(network: Network, round_index: int) -> bytes:
  """Returns the true history root before a round, as far as it is known."""
  honest = network.nodes[_HONEST]
  if round_index >= honest.state.round:
    return honest.root
  key = honest.objects.key('history', round_index)
  try:
    data = honest.objects.bucket.get(key, manifest_lib.MAX_BYTES)
    return manifest_lib.decode(data, honest.chain.verify).root
  except (store_lib.StoreError, manifest_lib.ManifestError):
    return honest.root


def _consistent(index: Index) -> bytes:
  """Returns an index whose fingerprint is that of its own pieces."""
  fingerprint = published_checkpoint.fingerprint_of(index.files)
  return published_checkpoint.encode(index._replace(fingerprint=fingerprint))


def _raw(**changes: object) -> Forge:
  """Returns a lie with other fields, in whatever form."""
  return lambda network, index: json.dumps(
    index._asdict() | changes, separators=(',', ':')
  ).encode()


def _with_pieces(network: Network, index: Index) -> bytes:
  """Publishes other parameters under the right root."""
  liar = network.nodes[_LIAR]
  wrong = jax.tree.map(lambda x: x + 1, liar.shared)
  place = apply.Position(index.round, bytes.fromhex(index.root), wrong)
  key = liar.objects.key('checkpoints', index.round)
  liar.objects.bucket.delete([key])
  published_checkpoint.publish(
    liar.objects, place, network.host.shared_model, liar.chain.sign
  )
  return liar.objects.bucket.get(key, 1 << 24)[:-64]


_LIES: Mapping[str, Forge] = {
  'other parameters': _with_pieces,
  'pieces that nobody has': lambda network, index: _consistent(index),
  'the fingerprint of others': lambda network, index: (
    published_checkpoint.encode(index)
  ),
  'another root': lambda network, index: _consistent(
    index._replace(root='e' * 64)
  ),
  'a round of the future': lambda network, index: _consistent(
    index._replace(round=10**6)
  ),
  'brackets': lambda network, index: b'[' * 100_000,
  'nested objects': lambda network, index: b'{"round":' * 500,
  'a name with a zero byte': _raw(files={'a\0b': []}),
  'a name that is no text': _raw(files={'\ud800': []}),
  'a file and a folder of one name': _raw(files={'a': [], 'a/b': []}),
  'a long name': _raw(files={'a' * 300: []}),
  'a thousand pieces': _raw(files={'params.embedding': ['00' * 32] * 1000}),
  'no object': lambda network, index: b'null',
  'an endless number': _raw(round=1e999),
}
