"""The registered peers at a block, with their roles and commitments.

A validator permit is not a role: the chain gives permits to the largest stakes,
and stakes the pay of miners, so a well-paid miner gets one, and so do holders
that run nothing. A peer declares its role in its commitment. The validators of
a run are the peers with a permit that declare to be validators and have voted
within the last `phases.active_rounds` rounds.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from covenant.chain import interface as chain_lib
from covenant.protocol import round as round_lib
from covenant.wire import commitment as commitment_lib

Role = commitment_lib.Role
OUTAGE = 8  # times `active_rounds`: how long a silent majority is waited for


class Membership(NamedTuple):
  """Peers and their commitments at the end of a block, by uid."""

  block: int
  round: int  # the one that is agreed upon at this block; -1 before any
  active_rounds: int  # rounds after its last vote in which a validator counts
  peers: Mapping[int, chain_lib.Peer]
  commitments: Mapping[int, commitment_lib.Commitment]
  committed: Mapping[int, int]  # block of each commitment
  votes: Mapping[int, int]  # round of the last vote of declared validators

  @property
  def validators(self) -> list[chain_lib.Peer]:
    """The validators of the run, the leader first."""
    return self.active(self.round)

  @property
  def candidates(self) -> list[chain_lib.Peer]:
    """All peers that may propose, in the order of their turns.

    The validators of the run come first, then the other holders of a permit
    that do not declare to be miners: validators that have been silent or are
    new, and hotkeys that take no part in the run.
    """
    first = self.validators
    rest = [p for p in self._holders() if p not in first]
    return first + _by_stake(rest)

  @property
  def miners(self) -> list[chain_lib.Peer]:
    """The peers that declare to be miners, or declare nothing, by uid.

    Holders of a permit that declare nothing are none.
    """
    roles = {uid: c.role for uid, c in self.commitments.items()}
    return [
      peer
      for uid, peer in self.peers.items()
      if roles.get(uid, None if peer.permit else Role.MINER) is Role.MINER
    ]

  def active(self, round_index: int) -> list[chain_lib.Peer]:
    """Returns the validators that voted in a round or soon before, by stake."""
    return self._voted_since(round_index - self.active_rounds)

  def stakes(self, round_index: int) -> dict[int, float]:
    """Returns the stakes of which a round's decision takes more than half.

    They are those of the validators of the run. Nobody can have voted before
    round 0, so there all holders of a permit count that are no miners.

    Validators that fell silent count on if those who still vote are a minority
    of all who voted in the last `OUTAGE` times as many rounds. So a minority
    does not decide alone as soon as the others have been away for a while.
    """
    voters = self.active(round_index) if round_index else self._holders()
    stakes = {peer.uid: peer.stake for peer in voters}
    if round_index:
      before = self._voted_since(round_index - OUTAGE * self.active_rounds)
      known = {peer.uid: peer.stake for peer in before}
      if 2 * _total(stakes) <= _total(known):
        return known
    return stakes

  def is_majority(self, hotkeys: Collection[str], round_index: int) -> bool:
    """Returns whether hotkeys hold more than half of the stake of a round."""
    stakes = self.stakes(round_index)
    mine = {u: x for u, x in stakes.items() if self.peers[u].hotkey in hotkeys}
    return 2 * _total(mine) > _total(stakes)

  def payload(self, uid: int, round_index: int, opens: int) -> bytes | None:
    """Returns the digest that a miner committed to in a round, if any.

    Args:
      uid: of a peer, which may not be registered.
      round_index: the round.
      opens: the first block of its put window.
    """
    new, peer = self.commitments.get(uid), self.peers.get(uid)
    if new is None or peer is None:
      return None
    if new.role is not Role.MINER or new.round != round_index:
      return None
    # A uid may have changed hands since.
    since = max(opens, peer.registered)
    return new.digest if self.committed[uid] >= since else None

  def role(self, uid: int) -> Role | None:
    """Returns the role that a peer declares; None if it declares none."""
    commitment = self.commitments.get(uid)
    return commitment.role if commitment else None

  def location(self, uid: int) -> bytes:
    """Returns the location of a peer's bucket; empty if it committed none."""
    commitment = self.commitments.get(uid)
    return commitment.location if commitment else b''

  @property
  def locations(self) -> set[bytes]:
    """The newest location of each uid that committed one."""
    return {c.location for c in self.commitments.values() if c.location}

  def uid(self, hotkey: str) -> int:
    """Returns the uid of a hotkey; raises ChainRejectedError if it has none."""
    for peer in self.peers.values():
      if peer.hotkey == hotkey:
        return peer.uid
    raise chain_lib.ChainRejectedError(
      f'{hotkey} is not registered at block {self.block}: register it, or '
      'name another hotkey'
    )

  def _voted_since(self, oldest: int) -> list[chain_lib.Peer]:
    """Returns the validators whose last vote is on this round or later."""
    return _by_stake(
      peer
      for uid, peer in self.peers.items()
      if peer.permit and self.votes.get(uid, oldest - 1) >= oldest
    )

  def _holders(self) -> list[chain_lib.Peer]:
    """Returns the holders of a permit that do not declare to be miners."""
    return [
      peer
      for uid, peer in self.peers.items()
      if peer.permit and self.role(uid) is not Role.MINER
    ]


def read(
  chain: chain_lib.Chain, block: int, schedule: round_lib.Schedule
) -> Membership:
  """Reads the membership from the chain; raises ChainError."""
  peers = {peer.uid: peer for peer in chain.peers(block)}
  commitments, committed, votes = {}, {}, {}
  for uid, (included, data) in chain.commitments(block).items():
    commitment = commitment_lib.decode(data)
    if uid in peers and commitment is not None:
      commitments[uid], committed[uid] = commitment, included
      # A vote on a round that had not ended is none: its maker would count for
      # all rounds until then.
      r = commitment.round
      if commitment.role is Role.VALIDATOR and r is not None:
        if included >= schedule.start(r + 1):
          votes[uid] = r
  agreed = schedule.round_at(block) - 1
  return Membership(
    block,
    agreed,
    schedule.at(agreed).active_rounds,
    peers,
    commitments,
    committed,
    votes,
  )


def _by_stake(peers: Iterable[chain_lib.Peer]) -> list[chain_lib.Peer]:
  return sorted(peers, key=lambda peer: (-peer.stake, peer.uid))


def _total(stakes: Mapping[int, float]) -> float:
  return sum(stakes[uid] for uid in sorted(stakes))
