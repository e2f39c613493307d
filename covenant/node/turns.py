"""The order in which validators propose the manifest of a round."""

from covenant.chain import interface as chain_lib
from covenant.node import validator_role as role_lib
from covenant.protocol import membership as membership_lib
from covenant.wire import manifest as manifest_lib

Membership = membership_lib.Membership
Validator = role_lib.Validator

# Rounds in which a validator that was passed over comes after the others.
PASSED_ROUNDS = 16


def turns(
  node: Validator, membership: Membership, round_index: int
) -> list[chain_lib.Peer]:
  """Returns the candidates of a round in the order of their turns.

  They are ordered by stake, and those that were passed over lately come last:
  a leader whose proposal others do not vote for has lost its turn for some
  rounds. A node that is no candidate yet is behind all others.
  """
  order = membership.candidates
  oldest = round_index - PASSED_ROUNDS
  passed = {h for h, r in node.role.passed.items() if r >= oldest}
  order.sort(key=lambda peer: peer.hotkey in passed)
  if all(peer.hotkey != node.chain.hotkey for peer in order):
    order.append(membership.peers[membership.uid(node.chain.hotkey)])
  return order


def pass_over(node: Validator, round_index: int, data: bytes) -> None:
  """Notes who was passed over in a round, once it is decided.

  Those are the candidates before the maker of the manifest that held; if none
  held, the first one. It is a function of what is on the chain. A validator
  that was away for longer than the chain remembers may know another order than
  others for a while; they still vote for the same proposals.

  Args:
    node: the validator.
    round_index: the round.
    data: the manifest that held; b'' if none did.
  """
  block, role = node.schedule.put_closes(round_index), node.role
  try:
    membership = membership_lib.read(node.chain, block, node.schedule)
    maker = manifest_lib.decode(data, node.chain.verify).hotkey if data else ''
  except (chain_lib.ChainRejectedError, manifest_lib.ManifestError):
    return
  order = [peer.hotkey for peer in turns(node, membership, round_index)]
  last = order.index(maker) if maker in order else 1
  role.passed |= dict.fromkeys(order[:last], round_index)
  oldest = round_index - PASSED_ROUNDS
  role.passed = {h: r for h, r in role.passed.items() if r >= oldest}
