"""False checkpoints shown to an evaluator by a validator of little stake.

A liar with a permit publishes, in every block, a checkpoint of a round that
nobody has reached and one of other parameters under the true root. The
evaluator may measure nothing but what manifests of the majority name.
"""

import dataclasses
import pathlib
from unittest import mock

import jax

from covenant import config as config_lib
from covenant import files
from covenant.data import dataset
from covenant.emulate import host as host_lib
from covenant.node import evaluator as evaluator_lib
from covenant.protocol import apply
from covenant.protocol import published_checkpoint
from experiments.chaos import network as network_lib
from experiments.chaos import scenario

_HONEST, _LIAR = '2', '3'
_ROUNDS = 3
_BEYOND = 100  # a round that nobody reaches


def run(base: config_lib.Config, folder: pathlib.Path) -> tuple[int, int]:
  """Returns the numbers of false checkpoints and of those evaluated.

  Raises:
    AssertionError: the true checkpoints were not evaluated.
  """
  config = dataclasses.replace(
    scenario.get_config(base),
    miners=2,
    validators=2,
    checkpoint=config_lib.Checkpoint(every=1, keep=2, publish=1),
  )
  network = network_lib.Network(
    config, host_lib.Host(config, dataset.load(config))
  )
  stranger = network.host.objects('stranger')
  chain = network.nodes['0'].chain
  with (
    mock.patch.object(evaluator_lib.connect, 'chain', return_value=chain),
    mock.patch.object(evaluator_lib.connect, 'objects', return_value=stranger),
  ):
    process = evaluator_lib.EvaluatorProcess(
      dataclasses.replace(config, rounds=_ROUNDS), folder
    )
  true: dict[int, str] = {}  # round -> fingerprint
  lies = 0
  while _ROUNDS not in true:
    network.step()
    node = network.nodes[_HONEST]
    true.setdefault(node.state.round, node.fingerprint())
    lies += _lie(network)
    process._look()
  network.run(_ROUNDS + 1)
  process._look()
  rows = files.read_jsonl(folder / 'evaluations.jsonl')
  found = {row['round']: row['fingerprint'] for row in rows}
  if not {1, _ROUNDS} <= found.keys():
    raise AssertionError(f'the rounds {sorted(found)} alone were evaluated')
  return lies, sum(true.get(r) != found[r] for r in found)


def _lie(network: network_lib.Network) -> int:
  """Publishes the false checkpoints; returns their number."""
  liar, model = network.nodes[_LIAR], network.host.shared_model
  wrong = jax.tree.map(lambda x: x + 7, liar.shared)
  places = (_BEYOND, b'e' * 32), (liar.state.round, liar.root)
  for r, root in places:
    key = liar.objects.key('checkpoints', r)
    liar.objects.bucket.delete([key])
    place = apply.Position(r, root, wrong)
    published_checkpoint.publish(liar.objects, place, model, liar.chain.sign)
  return len(places)
