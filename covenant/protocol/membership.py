"""Who is registered at a block, and what each stands for."""

from collections.abc import Mapping
from typing import NamedTuple

from covenant.chain import interface as chain_lib
from covenant.wire import commitment as commitment_lib


class Membership(NamedTuple):
  """Peers and their commitments at the end of a block, by uid."""

  block: int
  peers: Mapping[int, chain_lib.Peer]
  commitments: Mapping[int, commitment_lib.Commitment]
  committed: Mapping[int, int]  # the block of each commitment

  @property
  def validators(self) -> list[chain_lib.Peer]:
    """Who may lead, the leader first."""
    able = [peer for peer in self.peers.values() if peer.validator]
    return sorted(able, key=lambda peer: (-peer.stake, peer.uid))

  @property
  def miners(self) -> list[chain_lib.Peer]:
    return [peer for peer in self.peers.values() if not peer.validator]

  def location(self, uid: int) -> bytes:
    """Of the bucket of `uid`; empty if it never said."""
    commitment = self.commitments.get(uid)
    return commitment.location if commitment else b''

  def uid(self, hotkey: str) -> int:
    """Raises chain_lib.ChainRejectedError where it is not registered."""
    for peer in self.peers.values():
      if peer.hotkey == hotkey:
        return peer.uid
    raise chain_lib.ChainRejectedError(
      f'{hotkey} is not registered at block {self.block}: register it, or '
      'name another hotkey'
    )


def read(chain: chain_lib.Chain, block: int) -> Membership:
  """What the chain says; raises chain_lib.ChainError."""
  peers = {peer.uid: peer for peer in chain.peers(block)}
  commitments, committed = {}, {}
  for uid, (included, data) in chain.commitments(block).items():
    commitment = commitment_lib.decode(data)
    if uid in peers and commitment is not None:
      commitments[uid], committed[uid] = commitment, included
  return Membership(block, peers, commitments, committed)
