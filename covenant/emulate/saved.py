"""The state of an emulation in its checkpoints.

An emulation is saved between two rounds, or while its miners train: of those
that have trained it keeps what they will send, and the others train when it is
restored. Nothing else has happened in a round before that.
"""

import base64
import io
import json
from collections.abc import Callable

import numpy as np

from covenant import typing as ct
from covenant.chain import local_chain
from covenant.emulate import devices as devices_lib
from covenant.emulate import host as host_lib
from covenant.gauntlet import ratings
from covenant.node import base as node_lib
from covenant.node import miner as miner_lib
from covenant.protocol import apply
from covenant.protocol import checkpoint as checkpoint_lib
from covenant.train import local as local_lib
from covenant.wire import amendment as amendment_lib
from covenant.wire import payload as payload_lib

State = checkpoint_lib.RunState
Contribution = local_lib.Contribution


def save(host: host_lib.Host) -> State:
  """Returns the state to resume from, valid until the next round."""
  place = host.validators[0].place
  made = {
    uid: contribution
    for uid, miner in enumerate(host.miners)
    if (contribution := _made(miner, place.round)) is not None
  }
  protocol = {
    'block': host.chain.head(),
    'root': place.root.hex(),
    'chain': base64.b64encode(host.chain.dump()).decode(),
    # What validators compare the next round's messages with.
    'before': host.before.hex(),
    # The sizes of payloads, whose bytes follow each other in this order.
    'payloads': {str(uid): len(data) for uid, data in host.counted.items()},
    # What is made, and is to be sent in this round or a later one.
    'contributions': {
      str(uid): [len(one.payload), *one[1:]] for uid, one in made.items()
    },
    # The steps of the miners that have trained in this round.
    'trained': {
      str(uid): host.miners[uid].role.trained
      for uid in made
      if host.miners[uid].role.trained[0] == place.round
    },
    'standings': {
      str(host.config.miners + i): ratings.to_json(v.role.standings)
      for i, v in enumerate(host.validators)
    },
    'passed': [v.role.passed for v in host.validators],
    'amendments': amendment_lib.list_to_json(place.amendments),
  }
  miners = {
    uid: _private(miner, place.round, uid in made)
    for uid, miner in enumerate(host.miners)
  }
  data = [*host.counted.values(), *(one.payload for one in made.values())]
  payloads = np.frombuffer(b''.join(data), np.uint8)
  text = json.dumps(protocol)
  return State(host.counters, place.shared, miners, text, payloads)


def _made(miner: miner_lib.Miner, round_index: int) -> Contribution | None:
  """Returns what a miner has made for a round or a later one, if anything."""
  try:
    found = miner.role.contribution.result()
  except devices_lib.PausedError:
    return None
  return found if found is not None and found.round >= round_index else None


def _private(
  miner: miner_lib.Miner, round_index: int, has_trained: bool
) -> local_lib.MinerState:
  """Returns the private state of a miner: before the round, if it is undone."""
  slot = miner.role.slot
  kept = slot.kept if isinstance(slot, devices_lib.Slot) else None
  if not has_trained and kept is not None and kept[0] == round_index:
    return kept[1]
  return miner.role.miner_state.result()


def load(host: host_lib.Host, state: State) -> None:
  """Continues from a state of the run of a host, and consumes it."""
  protocol = json.loads(state.protocol)
  host.counters = state.counters
  chain = local_chain.LocalChain.load(
    base64.b64decode(protocol['chain']), clock=lambda: host.now
  )
  place = apply.Position(
    state.counters.round,
    bytes.fromhex(protocol['root']),
    state.shared,
    amendment_lib.list_from_json(protocol.get('amendments', [])),
  )
  standings = {
    int(uid): ratings.from_json(text)
    for uid, text in protocol['standings'].items()
  }
  host.populate(chain, protocol['block'], place, state.miners, standings)
  passed = protocol.get('passed', [{}] * len(host.validators))
  for validator, rounds in zip(host.validators, passed, strict=True):
    validator.role.passed = dict(rounds)
  host.before = bytes.fromhex(protocol['before'])
  read = _reader(state.payloads)
  host.counted = {
    int(uid): read(size) for uid, size in protocol['payloads'].items()
  }
  for uid, (size, *numbers) in protocol['contributions'].items():
    made = Contribution(read(size), *numbers)
    host.miners[int(uid)].role.contribution = node_lib.Future.done(made)
  for uid, (number, losses, norms) in protocol.get('trained', {}).items():
    trained = number, tuple(losses), tuple(norms)
    host.miners[int(uid)].role.trained = trained
  messages = {u: _message(host, u, d) for u, d in host.counted.items()}
  for node in host.nodes:
    node.messages = messages


def _reader(payloads: ct.Array | None) -> Callable[[int | str], bytes]:
  """Returns a function that reads the next payload, by its size."""
  whole = b'' if payloads is None else np.asarray(payloads).tobytes()
  file = io.BytesIO(whole)

  def read(size: int | str) -> bytes:
    if isinstance(size, str):  # the payload as text, by an earlier release
      return base64.b64decode(size)
    return file.read(size)

  return read


def _message(host: host_lib.Host, uid: int, data: bytes) -> ct.Message:
  """Decodes a payload of the last round, which was verified then."""
  run, last = host.shared_model.run, host.counters.round - 1
  expected = payload_lib.Header(run, last, uid, host.before[:16], b'', 0)
  return host.shared_model.decode(data, expected, lambda *_: True).message
