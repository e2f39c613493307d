"""Rules of a subnet, weights that come into force or do not, other runtimes."""

from absl.testing import absltest
from absl.testing import parameterized

from covenant.chain import interface
from tests.chain import control
from tests.chain import runtime as runtime_lib
from tests.chain import substrate

BOB, EVE = control.BOB, control.EVE
WEIGHTS = {1: 0.75, 2: 0.25}
QUANTIZED = {1: 65535, 2: 21845}
SEND = 'author_submitAndWatchExtrinsic'


class RulesTest(control.ChainTestCase):
  def test_all_rules_are_read(self):
    self.subnet.state |= {
      'Tempo': 99,
      'WeightsSetRateLimit': 100,
      'WeightsVersionKey': 7,
      'MinAllowedWeights': 3,
      'StakeThreshold': 500 * substrate.RAO,
      'CommitRevealWeightsEnabled': True,
      'RevealPeriodEpochs': 2,
      'MechanismCountCurrent': 2,
      'owner': BOB,
      'MaxAllowedValidators': 64,
      'ImmunityPeriod': 5000,
      'MaxSpace': 3100,
    }
    self.subnet.step(20)
    self.assertEqual(
      self.chain.subnet(10),
      interface.Subnet(
        block=self.subnet.head,
        runtime=runtime_lib.LATER,
        sdk=self.chain.subnet().sdk,
        tempo=99,
        commitment_bytes=3100,
        weights_interval=100,
        min_weights=3,
        stake_threshold=500.0,
        version_key=7,
        sealed=True,
        reveal_epochs=2,
        mechanisms=2,
        owner_uids=(1,),
        permits=64,
        immunity=5000,
        oldest=self.subnet.head - 10,
      ),
    )
    self.assertRegex(self.chain.subnet().sdk, r'bittensor 11\.\d')

  def test_an_owner_that_is_not_registered_has_no_uid(self):
    self.subnet.state['owner'] = substrate.hotkeys(9)[8]
    self.subnet.step()
    self.assertEqual(self.chain.subnet().owner_uids, ())

  def test_a_state_that_is_pruned_is_not_found(self):
    self.subnet.step(20)
    self.subnet.oldest = 15
    self.assertIsNone(self.chain.subnet(10).oldest)
    self.assertEqual(self.chain.subnet(5).oldest, 18)
    self.assertEqual(self.chain.subnet(0).oldest, None)


class WeightsTest(control.ChainTestCase):
  """Ours is uid 0."""

  def send(self, **state):
    self.subnet.state |= state
    self.subnet.step()
    self.chain.set_weights(WEIGHTS)
    return self.subnet.head

  def test_the_version_that_the_subnet_requires_is_sent(self):
    self.send(WeightsVersionKey=2067)
    self.assertEqual(self.subnet.sent[-1][1]['version_key'], 2067)
    self.assertEqual(self.subnet.state['weights'], {0: QUANTIZED})

  def test_weights_are_for_the_chosen_mechanism(self):
    self.subnet.state['MechanismCountCurrent'] = 2
    self.subnet.step()
    self.open(mechanism=1).set_weights(WEIGHTS)
    self.assertEqual(self.subnet.sent[-1][1]['mecid'], 1)
    with self.assertRaisesRegex(interface.ChainRejectedError, '(?i)mechanism'):
      self.open(mechanism=2).set_weights(WEIGHTS)

  def test_plain_weights_are_in_force_at_once(self):
    block = self.send()
    self.assertEqual(self.chain.check_weights(WEIGHTS, block), '')

  def test_plain_weights_that_another_process_replaced(self):
    block = self.send()
    self.subnet.state['weights'][0] = {2: 65535}
    self.subnet.step()
    self.assertIsNone(self.chain.check_weights(WEIGHTS, block))
    self.subnet.step(20)
    self.assertRegex(
      self.chain.check_weights(WEIGHTS, block),
      f'weights of block {block} are not in force: the chain holds others',
    )

  def test_sealed_weights_are_waited_for(self):
    block = self.send(CommitRevealWeightsEnabled=True, Tempo=20)
    self.assertEmpty(self.subnet.state['weights'])
    self.assertIsNone(self.chain.check_weights(WEIGHTS, block))
    self.subnet.step(30)
    self.assertIsNone(self.chain.check_weights(WEIGHTS, block))
    self.assertEqual(self.subnet.reveal(0, QUANTIZED, 0), '')
    self.assertEqual(self.chain.check_weights(WEIGHTS, block), '')

  @parameterized.parameters(
    ({'StakeThreshold': 2000 * substrate.RAO}, 'below the threshold of 2,000'),
    ({'MinAllowedWeights': 3}, '2 weights are not 0, .* requires 3'),
    ({'WeightsVersionKey': 9}, 'went from 0 to 9 before they were revealed'),
    ({}, 'no reason is known'),
  )
  def test_a_reveal_that_fails_is_told_with_its_reason(self, change, reason):
    block = self.send(CommitRevealWeightsEnabled=True, Tempo=20)
    self.subnet.state |= change
    self.subnet.step(30)
    if change:
      self.assertNotEqual(self.subnet.reveal(0, QUANTIZED, 0), '')
    self.assertIsNone(self.chain.check_weights(WEIGHTS, block))
    self.subnet.step(30)
    found = self.chain.check_weights(WEIGHTS, block)
    self.assertRegex(found, f'weights of block {block} are not in force')
    self.assertRegex(found, reason)

  def test_a_lost_permit_is_told(self):
    block = self.send(CommitRevealWeightsEnabled=True, Tempo=20)
    self.subnet.state['neurons'][0]['permit'] = False
    self.subnet.step(60)
    self.assertEqual(
      self.subnet.reveal(0, QUANTIZED, 0), 'NeuronNoValidatorPermit'
    )
    self.assertRegex(
      self.chain.check_weights(WEIGHTS, block), 'no validator permit any more'
    )

  @parameterized.parameters(
    ({'StakeThreshold': 2000 * substrate.RAO}, '(?i)stake'),
    ({'MinAllowedWeights': 3}, 'at least 3'),
  )
  def test_a_refusal_names_its_reason(self, change, reason):
    with self.assertRaisesRegex(interface.ChainRejectedError, reason):
      self.send(**change)


class RuntimeTest(control.ChainTestCase):
  """The recorded runtime does not have an item that SDK 11.3 reads."""

  def setUp(self):
    super().setUp()
    self.subnet.spec = runtime_lib.RECORDED
    self.subnet.step(2)
    self.chain = self.open()

  def reads_what_it_needs(self):
    import bittensor as bt

    version = tuple(int(x) for x in bt.__version__.split('.')[:2])
    return version >= (11, 3)

  def test_everything_but_weights_works(self):
    head = self.chain.head()
    self.assertLen(self.chain.peers(head), 3)
    self.chain.commit(b'data')
    self.assertEqual(self.chain.commitments(self.chain.head())[0].data, b'data')
    self.chain.earned(head), self.chain.timestamp(head)
    self.assertEqual(self.chain.subnet().runtime, runtime_lib.RECORDED)

  def test_weights_are_refused_and_nothing_ends(self):
    if not self.reads_what_it_needs():
      self.skipTest('this SDK knows the runtime')
    for _ in range(2):
      with self.assertRaisesRegex(
        interface.ChainRejectedError,
        'weights: the runtime of 127.0.0.1, spec 461, is not what SDK .* '
        'knows: StorageFunctionNotFound: .*SubnetEpochConsensus',
      ):
        self.chain.set_weights(WEIGHTS)
    self.assertEqual(self.node.asked[SEND], 0)
    self.assertIn('SubnetEpochConsensus', self.chain.subnet().weights_error)
    self.assertEqual(self.chain.head(), self.subnet.head)

  def test_after_the_upgrade_they_are_taken(self):
    self.subnet.spec = runtime_lib.LATER
    self.subnet.step(2)
    chain = self.open()
    chain.set_weights(WEIGHTS)
    self.assertEqual(self.subnet.state['weights'], {0: QUANTIZED})
    self.assertEqual(chain.subnet().weights_error, '')
    # States of the old runtime are read as it wrote them.
    self.assertLen(chain.peers(3), 3)


if __name__ == '__main__':
  absltest.main()
