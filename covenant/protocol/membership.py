"""The registered peers at a block, with their roles and commitments."""

from collections.abc import Mapping
from typing import NamedTuple

from covenant.chain import interface as chain_lib
from covenant.wire import commitment as commitment_lib


class Membership(NamedTuple):
  """Peers and their commitments at the end of a block, by uid."""

  block: int
  peers: Mapping[int, chain_lib.Peer]
  commitments: Mapping[int, commitment_lib.Commitment]
  committed: Mapping[int, int]  # block of each commitment

  @property
  def validators(self) -> list[chain_lib.Peer]:
    """The peers that may lead, the leader first."""
    able = [peer for peer in self.peers.values() if peer.validator]
    return sorted(able, key=lambda peer: (-peer.stake, peer.uid))

  @property
  def miners(self) -> list[chain_lib.Peer]:
    """The peers without a validator permit, by uid."""
    return [peer for peer in self.peers.values() if not peer.validator]

  def location(self, uid: int) -> bytes:
    """Returns the location of a peer's bucket; empty if it committed none."""
    commitment = self.commitments.get(uid)
    return commitment.location if commitment else b''

  def uid(self, hotkey: str) -> int:
    """Returns the uid of a hotkey; raises ChainRejectedError if it has none."""
    for peer in self.peers.values():
      if peer.hotkey == hotkey:
        return peer.uid
    raise chain_lib.ChainRejectedError(
      f'{hotkey} is not registered at block {self.block}: register it, or '
      'name another hotkey'
    )


def read(chain: chain_lib.Chain, block: int) -> Membership:
  """Reads the membership from the chain; raises ChainError."""
  peers = {peer.uid: peer for peer in chain.peers(block)}
  commitments, committed = {}, {}
  for uid, (included, data) in chain.commitments(block).items():
    commitment = commitment_lib.decode(data)
    if uid in peers and commitment is not None:
      commitments[uid], committed[uid] = commitment, included
  return Membership(block, peers, commitments, committed)
