"""The weight of a message beside the others of its round.

`optim.aggregation.weight` is one of two rules:

  equal   every message counts alike
  tokens  a message counts in proportion to the sequences it was trained on, as
          if every sequence had one vote (the p_i of FedAvg and FedNova)

A weight is a function of one payload's header, counted in parts of a whole, and
the same on every node. What a header claims is bounded by what was
assigned. Who claims more than it trained on is heard more, up to that; it is
evaluated on what it claims (covenant/gauntlet/scores.py), of which it has seen
a part only, so it proves and is paid as much less.
"""

from typing import NamedTuple

WHOLE = 64  # parts; sums of 1023 peers' fit the uint16 of `Sums.senders`
MOST_PEERS = (2**16 - 1) // WHOLE


class Weight(NamedTuple):
  """Of one message."""

  parts: int = WHOLE  # from 1
  # Sequences it was trained on, where a longer delta is what they lead to.
  size: int = 1


def weigh(
  rule: str, sequences: int, assigned: int, discount: float = 1.0
) -> Weight:
  """The weight of a message.

  Args:
    rule: 'equal' or 'tokens'.
    sequences: that it says it was trained on.
    assigned: the most that it may.
    discount: what else lessens it, 0 to 1.

  >>> weigh('tokens', sequences=20, assigned=80)
  Weight(parts=16, size=20)
  """
  if rule not in ('equal', 'tokens'):
    raise ValueError(f"weight: expected 'equal' or 'tokens', got {rule!r}")
  sequences = min(max(sequences, 1), assigned)
  by_tokens = rule == 'tokens'
  share = discount * (sequences / assigned if by_tokens else 1.0)
  return Weight(max(round(WHOLE * share), 1), sequences if by_tokens else 1)
