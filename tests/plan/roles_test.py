import dataclasses

from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.plan import roles
from tests import helpers

PARAMS = 70_599_843_840


def load(name, *overrides):
  return config_lib.load(str(helpers.CONFIGS / f'{name}.py'), overrides)


class RolesTest(parameterized.TestCase):
  def phases(self, *overrides):
    found = roles.phases(load('72b', *overrides))
    return {(phase.role, phase.name): phase for phase in found}

  def test_every_role_has_its_phases(self):
    self.assertEqual(
      list(self.phases()),
      [
        ('validator', 'collect'),
        ('validator', 'score'),
        ('validator', 'apply'),
        ('validator', 'publish'),
        ('evaluator', 'evaluate'),
        ('evaluator', 'export'),
        ('joiner', 'load'),
        ('joiner', 'replay a round'),
      ],
    )
    for phase in self.phases().values():
      self.assertGreater(phase.seconds, 0)
      self.assertGreater(phase.host_bytes, 0)

  def test_all_devices_are_as_many_as_there_are(self):
    """A miner says `devices.data=0` for all that are left."""
    self.assertEqual(
      self.phases('devices.data=0'), self.phases('devices.data=1')
    )

  @parameterized.parameters(True, False)
  def test_scoring_takes_one_copy_and_little_more(self, offload):
    """At most 5 bytes a parameter beside the parameters and activations."""
    for peers in 20, 40:
      phase = self.phases(f'devices.offload={offload}', f'plan.peers={peers}')[
        'validator', 'score'
      ]
      beside = {
        name: size
        for name, size in phase.device.items()
        if name not in ('parameters', 'outer momentum', 'activations')
      }
      # A leaf waits on the host where state is offloaded.
      beside.pop('a leaf', None)
      beside.pop('copy of the state', None)  # it is published meanwhile
      self.assertLess(sum(beside.values()) / (PARAMS / 8), 5)

  def test_offload_moves_state_to_the_host(self):
    here = self.phases('devices.offload=False')['validator', 'collect']
    away = self.phases('devices.offload=True')['validator', 'collect']
    moved = here.device_bytes - away.device_bytes
    # The state and the copy of it that is published.
    self.assertAlmostEqual(moved, 2 * 8 * PARAMS / 8, delta=1e8)
    self.assertAlmostEqual(
      away.host_bytes - here.host_bytes, 8 * moved, delta=1e7
    )

  @parameterized.parameters(True, False)
  def test_the_copy_that_is_published_stays_through_all_phases(self, offload):
    found = self.phases(f'devices.offload={offload}')
    copy = 8 * PARAMS  # of parameters and momentum
    for name in 'collect', 'score', 'apply', 'publish':
      phase = found['validator', name]
      device = phase.device.get('copy of the state', 0)
      host = phase.host.get('copy of the state', 0)
      self.assertAlmostEqual(device, 0 if offload else copy / 8, delta=1e8)
      self.assertAlmostEqual(host, copy if offload else 0, delta=1e9)

  def test_payloads_grow_with_peers_up_to_what_is_fetched(self):
    """Messages do not: they stay packed but for one."""
    host = {
      peers: self.phases(f'plan.peers={peers}')['validator', 'collect'].host
      for peers in (10, 20, 1000)
    }
    self.assertAlmostEqual(host[20]['payloads'], 2 * host[10]['payloads'])
    self.assertEqual(host[20]['a message'], host[10]['a message'])
    # 20 contributors, 10 reserves and those that are evaluated.
    config = load('72b')
    most = roles.most_fetched(config)
    self.assertLess(most, 100)
    self.assertAlmostEqual(
      host[1000]['payloads'], most / 10 * host[10]['payloads']
    )

  def test_seconds_of_scoring_follow_the_sequences(self):
    config = load('72b')
    more = dataclasses.replace(
      config, gauntlet=dataclasses.replace(config.gauntlet, sequences=32)
    )
    one, two = (
      {p.name: p for p in roles.of_role(x, 'validator')}['score'].seconds
      for x in (config, more)
    )
    self.assertBetween(two / one, 1.7, 2.01)

  def test_without_momentum_less_is_held(self):
    with_, without = (
      {p.name: p for p in roles.of_role(x, 'joiner')}['load']
      for x in (load('72b'), load('72b', 'optim.outer.momentum=0'))
    )
    self.assertAlmostEqual(with_.device_bytes, 2 * without.device_bytes)
    self.assertGreater(with_.seconds, 1.5 * without.seconds)


if __name__ == '__main__':
  absltest.main()
