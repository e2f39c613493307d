"""A subnet behind a node, as tests want to hold it."""

import contextlib
import os
from collections.abc import Iterator
from unittest import mock

import bittensor as bt
from absl.testing import absltest
from absl.testing import parameterized

from covenant.chain import bittensor
from covenant.chain import connection
from covenant.chain import interface
from tests.chain import node as node_lib
from tests.chain import substrate

BOB, EVE, _NOBODY = substrate.hotkeys(3)
# One attempt, which ends before the SDK has tried all that it tries.
ONCE = connection.Patience(0.5, 0.5, 0.5, pause=60.0)


def isolate(test: absltest.TestCase) -> str:
  """Keeps what the SDK stores between runs in a folder of the test."""
  path = test.create_tempdir().full_path
  files = {
    'BTCLI_TOKEN_SYMBOLS_CACHE': f'{path}/symbols.json',
    'BITTENSOR_RUNTIME_CACHE_DIR': f'{path}/runtimes',
  }
  test.enterContext(mock.patch.dict(os.environ, files))
  return path


class BittensorControl:
  """The control that interface_test has over a chain."""

  tempo = 10

  def __init__(
    self,
    test: absltest.TestCase,
    commit_interval: int = 0,
    weights_interval: int = 0,
  ):
    self._test = test
    self._path = isolate(test)
    self._chain = substrate.Subtensor()
    self._chain.state['WeightsSetRateLimit'] = weights_interval
    if commit_interval:  # one a Bittensor epoch; a few blocks longer than asked
      self._chain.state['MaxSpace'] = 100
      self._chain.state['Tempo'] = commit_interval + 4
    self._chain.step(3)
    self._node = node_lib.Node(self._chain)
    test.addCleanup(self._node.close)

  def view(self, name: str) -> interface.Chain:
    if not os.path.exists(f'{self._path}/{name}'):
      bt.Wallet(name, path=self._path).create_new_hotkey(suppress=True)
    chain = bittensor.BittensorChain(
      netuid=self._chain.netuid,
      network=self._node.url,
      wallet_name=name,
      hotkey_name='default',
      wallet_path=self._path,
      patience=connection.Patience(20.0, 20.0, 20.0, pause=60.0),
    )
    self._test.addCleanup(chain.close)
    return chain

  def advance(self, blocks: int = 1) -> None:
    for _ in range(blocks):
      if len(self._chain.blocks) % self.tempo:
        self._chain.step()
      else:
        self._pay()

  def _pay(self) -> None:
    """Half to who has stake, half by what those say. No Yuma."""
    stakes = [n['stake'] / substrate.RAO for n in self._chain.state['neurons']]
    pay = dict.fromkeys(range(len(stakes)), 0.0)
    for uid, weights in self._chain.state['weights'].items():
      pay[uid] += stakes[uid] / sum(stakes)
      for other, weight in weights.items():
        share = weight / sum(weights.values())
        pay[other] += share * stakes[uid] / sum(stakes)
    self._chain.pay(pay)

  def register(self, hotkey: str, stake: float, validator: bool) -> int:
    """The uid of who was thrown out, if anybody was: there are no holes."""
    found = [n['hotkey'] for n in self._chain.state['neurons']]
    uid = found.index(_NOBODY) if _NOBODY in found else None
    return self._chain.register(hotkey, stake, validator, uid)

  def set_stake(self, hotkey: str, stake: float) -> None:
    for neuron in self._chain.state['neurons']:
      if neuron['hotkey'] == hotkey:
        neuron['stake'] = round(stake * substrate.RAO)

  def deregister(self, hotkey: str) -> None:
    found = [n['hotkey'] for n in self._chain.state['neurons']]
    self._chain.register(_NOBODY, uid=found.index(hotkey))

  def weights(self, uid: int) -> dict[int, int]:
    return self._chain.state['weights'].get(uid, {})

  def make_impatient(self, chain: bittensor.BittensorChain) -> None:
    chain._connection._patience = ONCE

  def make_patient(self, chain: bittensor.BittensorChain) -> None:
    chain._connection._patience = connection.Patience()

  @contextlib.contextmanager
  def outage(self) -> Iterator[None]:
    self._node.go_down()
    yield
    self._node.come_up()


class ChainTestCase(parameterized.TestCase):
  """A subnet with ourselves as validator 0, Bob 1 and Eve 2."""

  def setUp(self):
    super().setUp()
    self.path = isolate(self)
    bt.Wallet('w', 'h', self.path).create_new_hotkey(suppress=True)
    self.hotkey = bt.Wallet('w', 'h', self.path).hotkey.ss58_address
    self.subnet = substrate.Subtensor()
    self.subnet.register(self.hotkey, stake=1000, validator=True)
    self.subnet.register(BOB, stake=1.5)
    self.subnet.register(EVE)
    self.node = node_lib.Node(self.subnet)
    self.addCleanup(self.node.close)
    self.chain = self.open(connection.Patience(pause=0.0))

  def open(self, patience=None, **kwargs) -> bittensor.BittensorChain:
    kwargs = {
      'netuid': 1,
      'network': self.node.url + '/secret',
      'wallet_name': 'w',
      'hotkey_name': 'h',
      'wallet_path': self.path,
    } | kwargs
    chain = bittensor.BittensorChain(**kwargs, patience=patience)
    self.addCleanup(chain.close)
    return chain
