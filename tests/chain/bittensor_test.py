"""The real SDK, over a node of our own; the contract is in interface_test."""

import inspect
import pathlib
import subprocess
import sys

import bittensor as bt
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant.chain import bittensor
from covenant.chain import interface
from tests import helpers
from tests.chain import control
from tests.chain import substrate

_BOB, _EVE = control.BOB, control.EVE


class ReadTest(control.ChainTestCase):
  def test_speaks_for_the_hotkey_of_the_wallet(self):
    self.assertEqual(self.chain.hotkey, self.hotkey)
    self.assertEqual(self.chain.uid(), 0)
    self.assertEqual(self.chain.block_seconds, substrate.BLOCK_SECONDS)

  def test_metagraph_of_every_block(self):
    me = interface.Peer(0, self.hotkey, 1000.0, True, 1)
    bob = interface.Peer(1, _BOB, 1.5, False, 2)
    eve = interface.Peer(2, _EVE, 0.0, False, 3)
    self.assertEqual(self.chain.peers(0), ())
    self.assertEqual(self.chain.peers(2), (me, bob))
    self.assertEqual(self.chain.peers(3), (me, bob, eve))
    self.chain.set_weights({1: 1.0})  # an update is no registration
    self.subnet.register(_EVE, stake=2, uid=1)
    self.assertEqual(
      self.chain.peers(5), (me, interface.Peer(1, _EVE, 2.0, False, 5), eve)
    )
    self.assertEqual(self.chain.peers(3), (me, bob, eve))

  def test_pay_is_that_of_the_last_epoch(self):
    self.subnet.pay({1: 0.25, 2: 1.0})
    self.subnet.pay({1: 0.5})
    self.assertEqual(self.chain.earned(4), {0: 0.0, 1: 0.25, 2: 1.0})
    self.assertEqual(self.chain.earned(5), {0: 0.0, 1: 0.5, 2: 0.0})

  def test_hash_and_time_of_a_block(self):
    self.assertEqual(
      self.chain.block_hash(2).hex(), self.subnet.hash(2).removeprefix('0x')
    )
    self.assertEqual(self.chain.timestamp(2), substrate.GENESIS + 0.5)

  def test_answers_for_final_blocks_only(self):
    self.subnet.lag = 2
    self.subnet.step(10)
    self.assertEqual(self.chain.head(), 11)
    for ask in (
      self.chain.block_hash,
      self.chain.timestamp,
      self.chain.peers,
      self.chain.commitments,
      self.chain.earned,
    ):
      ask(11)
      with self.assertRaisesRegex(
        interface.ChainRejectedError, '12 .* not there yet.*11'
      ):
        ask(12)
      with self.assertRaisesRegex(
        interface.ChainRejectedError, 'not there yet'
      ):
        ask(-1)

  def test_head_never_goes_back(self):
    self.subnet.step(5)
    self.assertEqual(self.chain.head(), 8)
    self.subnet.lag = 3  # another node, which is behind
    self.assertEqual(self.chain.head(), 8)

  def test_pruned_block(self):
    self.subnet.step(10)
    self.subnet.oldest = 8
    for ask in (self.chain.peers, self.chain.commitments, self.chain.timestamp):
      ask(8)
      with self.assertRaisesRegex(
        interface.ChainRejectedError, '127.0.0.1 has pruned it'
      ):
        ask(7)
    self.assertEqual(self.node.connections, 1)  # that was an answer

  def test_commitments_as_of_a_block(self):
    self.chain.commit(b'first')
    self.chain.commit(b'second')
    first = interface.CommittedData(4, b'first')
    second = interface.CommittedData(5, b'second')
    self.assertEqual(self.chain.commitments(3), {})
    self.assertEqual(self.chain.commitments(4), {0: first})
    self.assertEqual(self.chain.commitments(5), {0: second})

  @parameterized.parameters(
    ([],),
    (['None'],),
    (['ResetBondsFlag'],),
    ([{'Sha256': '0x' + 32 * '00'}],),
    ([{'Keccak256': '0x' + 32 * '41'}],),
    ([{'BigRaw': '0x' + 300 * '41'}],),
    ([{'Raw1': '0x00'}, {'Raw1': '0x00'}],),
    ([{'Raw1': '0x00'}, 'ResetBondsFlag'],),
    ([{'TimelockEncrypted': {'encrypted': '0x00', 'reveal_round': 9}}],),
  )
  def test_leaves_out_strange_commitments(self, fields):
    self.subnet.state['commitments'] = {
      _BOB: {'deposit': 0, 'block': 4, 'info': {'fields': fields}},
      _EVE: {'deposit': 0, 'block': 4, 'info': {'fields': [{'Raw0': '0x'}]}},
      substrate.hotkeys(4)[3]: {  # who is not registered any more
        'deposit': 0,
        'block': 4,
        'info': {'fields': [{'Raw1': '0x00'}]},
      },
    }
    self.subnet.step()
    self.assertEqual(
      self.chain.commitments(4), {2: interface.CommittedData(4, b'')}
    )

  def test_a_past_block_is_asked_for_once(self):
    head = self.chain.head()
    self.chain.peers(head), self.chain.commitments(head)
    asked = self.node.asked.total()
    for _ in range(3):
      self.chain.peers(head), self.chain.commitments(head)
      self.chain.earned(head)
    self.assertEqual(self.node.asked.total(), asked)

  def test_text_that_looks_like_hex_stays_as_it_is(self):
    for data in (b'0x41', b'\xff\x00', 'β'.encode(), b''):
      self.chain.commit(data)
      [(_, found)] = self.chain.commitments(self.chain.head()).items()
      self.assertEqual(found.data, data)


class WriteTest(control.ChainTestCase):
  @parameterized.parameters(0, 1, 127, 128)
  def test_commits_up_to_128_bytes(self, size):
    self.subnet.lag = 3
    data = bytes(range(size))
    self.chain.commit(data)
    found = self.chain.commitments(self.chain.head())
    self.assertEqual(found[0].data, data)

  def test_longer_is_refused_before_sending(self):
    with self.assertRaisesRegex(
      interface.ChainRejectedError, 'at most 128.*got 129'
    ):
      self.chain.commit(bytes(129))
    self.assertEmpty(self.subnet.sent)

  def test_commits_too_much_in_an_epoch(self):
    for _ in range(24):
      self.chain.commit(bytes(128))
    with self.assertRaisesRegex(
      interface.ChainRejectedError, 'commitment.*Space Limit'
    ):
      self.chain.commit(bytes(128))

  def test_a_full_epoch_is_told_and_the_next_one_is_tried(self):
    self.subnet.state['Tempo'] = 50
    self.subnet.step()
    for _ in range(24):
      self.chain.commit(bytes(128))
    sent = self.node.asked['author_submitAndWatchExtrinsic']
    for _ in range(3):
      with self.assertRaisesRegex(
        interface.ChainRejectedError,
        r'Space Limit Exceeded.*the next epoch begins in \d+ blocks, and the '
        'commitment is tried again then.*--role=doctor',
      ):
        self.chain.commit(bytes(128))
    # Only the first of them was sent.
    self.assertEqual(
      self.node.asked['author_submitAndWatchExtrinsic'], sent + 1
    )
    self.subnet.step(50 - self.subnet.head)
    self.chain.commit(bytes(128))

  def test_nothing_says_that_somebody_pays_for_them(self):
    """They are `Pays::No` in the runtime."""
    guide = (helpers.ROOT / 'docs' / 'operating.md').read_text()
    for text in (guide, bittensor.__doc__):
      self.assertNotRegex(text, r'(?i)(fees?|paid|pays?) [^.]*coldkey')
    self.assertIn('`Pays::No`', guide)

  def test_weights_are_scaled_to_u16(self):
    self.chain.set_weights({2: 0.2, 0: 0.1, 1: 0.7})
    self.assertEqual(
      self.subnet.state['weights'], {0: {0: 9362, 1: 65535, 2: 18724}}
    )

  def test_weights_are_sealed_where_the_subnet_wants_that(self):
    self.subnet.state['CommitRevealWeightsEnabled'] = True
    self.subnet.step()
    self.chain.set_weights({1: 1.0})
    [(call, args)] = self.subnet.sent
    self.assertEqual(
      call, 'SubtensorModule.commit_timelocked_mechanism_weights'
    )
    self.assertGreater(len(args['commit']), 64)
    self.assertEqual(args['mecid'], 0)

  @parameterized.parameters(
    ({1: float('nan')}, 'finite'),
    ({1: float('inf')}, 'finite'),
    ({1: -0.1, 2: 1.0}, 'from 0, got -0.1 for uid 1'),
    ({1: 0.0}, 'nothing to set'),
    ({}, 'nothing to set'),
    ({70000: 1.0}, '65535'),
    ({3: 1.0}, 'refused by 127.0.0.1'),
  )
  def test_wrong_weights(self, weights, message):
    with self.assertRaisesRegex(interface.ChainRejectedError, message):
      self.chain.set_weights(weights)
    self.assertEmpty(self.subnet.sent)

  def test_too_few_weights(self):
    self.subnet.state['MinAllowedWeights'] = 3
    self.subnet.step()
    with self.assertRaisesRegex(interface.ChainRejectedError, 'at least 3'):
      self.chain.set_weights({1: 1.0})

  def test_weights_too_often(self):
    self.subnet.state['WeightsSetRateLimit'] = 100
    self.subnet.step(100)
    self.chain.set_weights({1: 1.0})
    with self.assertRaisesRegex(
      interface.ChainRejectedError, r'Retry in ~97 blocks'
    ):
      self.subnet.step(3)
      self.chain.set_weights({1: 1.0})
    self.subnet.step(97)
    self.chain.set_weights({1: 1.0})
    self.assertEqual(self.node.connections, 1)

  def test_weights_without_permit(self):
    self.subnet.state['neurons'][0]['permit'] = False
    with self.assertRaisesRegex(
      interface.ChainRejectedError, 'permitted validator'
    ):
      self.chain.set_weights({1: 1.0})

  def test_not_registered(self):
    bt.Wallet('w', 'other', self.path).create_new_hotkey(suppress=True)
    chain = self.open(hotkey_name='other')
    self.assertLen(chain.peers(chain.head()), 3)
    for ask in (
      chain.uid,
      lambda: chain.commit(b'x'),
      lambda: chain.set_weights({1: 1.0}),
    ):
      with self.assertRaisesRegex(
        interface.ChainRejectedError,
        'not registered on subnet 1.*btcli subnets register',
      ):
        ask()

  def test_a_hotkey_swap_takes_the_uid_and_loses_the_commitment(self):
    self.chain.commit(b'x')
    before = self.chain.peers(self.chain.head())[0]
    bt.Wallet('w', 'new', self.path).create_new_hotkey(suppress=True)
    new = self.open(hotkey_name='new')
    self.subnet.swap(self.hotkey, new.hotkey)
    head = self.chain.head()
    after = self.chain.peers(head)[0]
    self.assertEqual(after, before._replace(hotkey=new.hotkey))
    self.assertEqual(self.chain.commitments(head), {})
    with self.assertRaisesRegex(
      interface.ChainRejectedError, f'hotkey {self.hotkey} is not registered'
    ):
      self.chain.commit(b'y')
    new.commit(b'z')
    found = self.chain.commitments(new.head())
    self.assertEqual(found[0].data, b'z')

  def test_a_hotkey_that_registers_again_is_another_peer(self):
    self.chain.commit(b'x')
    before = self.chain.peers(self.chain.head())[0]
    self.subnet.register(_EVE, uid=0)
    with self.assertRaisesRegex(interface.ChainRejectedError, 'not registered'):
      self.chain.commit(b'y')
    self.subnet.register(self.hotkey, stake=1000, uid=0)
    head = self.chain.head()
    self.assertGreater(self.chain.peers(head)[0].registered, before.registered)
    self.assertEqual(self.chain.commitments(head), {})
    self.chain.commit(b'y')

  def test_thrown_out_between_check_and_inclusion(self):
    self.chain.commit(b'x')
    self.subnet.state['neurons'][0]['hotkey'] = _EVE  # in the block to come
    with self.assertRaisesRegex(interface.ChainRejectedError, 'not allowed'):
      self.chain.commit(b'y')


class OpenTest(control.ChainTestCase):
  @parameterized.parameters(
    ({'network': 'finnney'}, "finney, test.*got 'finnney'"),
    ({'netuid': 7}, '127.0.0.1 has no subnet 7'),
    ({'wallet_name': 'v'}, 'no file .*/v/hotkeys/h;.*new-hotkey'),
    ({'hotkey_name': 'i'}, 'no file .*/w/hotkeys/i;'),
    ({'hotkey_name': 'encrypted'}, 'encrypted is encrypted'),
    ({'hotkey_name': 'garbage'}, 'garbage does not hold a secret key'),
    ({'hotkey_name': 'hpub.txt'}, 'does not hold a secret key'),
    ({'hotkey_name': 'folder'}, 'cannot read .*folder: Is a directory'),
    ({'hotkey_name': 'edward'}, 'not an sr25519 key'),
    ({'wallet_name': 'w/h'}, "got 'w/h'"),
    ({'hotkey_name': ''}, "got ''"),
  )
  def test_one_line_says_what_is_wrong(self, changes, message):
    folder = pathlib.Path(self.path, 'w', 'hotkeys')
    (folder / 'encrypted').write_bytes(b'$NACL' + bytes(100))
    (folder / 'garbage').write_text('{"secretPhrase": "hush hush"}')
    (folder / 'folder').mkdir()
    bt.Wallet('w', 'edward', self.path).create_new_hotkey(
      suppress=True, crypto_type=bt.CRYPTO_ED25519
    )
    with self.assertRaisesRegex(
      interface.ChainRejectedError, message
    ) as caught:
      self.open(**changes)
    self.assertNotIn('\n', str(caught.exception))
    self.assertNotIn('hush', str(caught.exception))
    self.assertNotIn('secret ', str(caught.exception).replace('secret key', ''))

  @pytest.mark.slow
  def test_sdk_is_imported_by_those_who_open_one(self):
    code = (
      'import sys; from covenant.chain import bittensor; '
      "sys.exit('bittensor' in sys.modules)"
    )
    subprocess.run([sys.executable, '-c', code], check=True, timeout=60)


class SignatureTest(control.ChainTestCase):
  def test_others_verify_what_the_hotkey_signed(self):
    signature = self.chain.sign(b'data')
    self.assertLen(signature, 64)
    self.assertTrue(self.chain.verify(self.hotkey, b'data', signature))
    self.assertFalse(self.chain.verify(self.hotkey, b'date', signature))
    self.assertFalse(self.chain.verify(_BOB, b'data', signature))

  @parameterized.parameters(
    ('', b'', b''), ('x', b'', bytes(64)), (_BOB, b'', bytes(63)),
    (_BOB, b'', bytes(64)), (_BOB, b'', bytes(65)), (_BOB, 'x', bytes(64)),
    (_BOB, b'', None), (None, b'', bytes(64)),
  )  # fmt: skip
  def test_malformed_is_false(self, hotkey, data, signature):
    self.assertFalse(self.chain.verify(hotkey, data, signature))


class ContractTest(absltest.TestCase):
  def test_has_what_the_interface_asks_for(self):
    for name, member in vars(interface.Chain).items():
      if name.startswith('_') or not callable(member):
        continue
      ours = inspect.signature(getattr(bittensor.BittensorChain, name))
      self.assertEqual(ours, inspect.signature(member), name)


if __name__ == '__main__':
  absltest.main()
