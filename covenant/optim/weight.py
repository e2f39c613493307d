"""How much one message counts beside the others of its round.

Peers of unequal hardware train on unequally many sequences in a round. Three
rules (`optim.aggregation.weight`) say what that means for the mean:

  equal       nothing: every message counts alike
  tokens      in proportion to what it was trained on, as if every sequence
              had one vote (the p_i of FedAvg and FedNova)
  normalized  alike, and each tensor of each peer is first brought to the
              median norm, so that more local steps are not more weight by a
              longer delta. FedNova (arXiv 2007.07481) divides by the number of
              steps; a norm cannot be lied about, and of AdamW's deltas under
              error feedback it is nearly proportional to the steps: 3.8, 6.5,
              11.5, 22 after 5, 10, 20, 40 (configs/shakespeare.py, warmed up).

A weight is a function of one payload's header, counted in parts of a whole,
that every node takes for the same. What a header claims is bounded by what was
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
    rule: 'equal', 'tokens' or 'normalized'.
    sequences: that it says it was trained on.
    assigned: the most that it may.
    discount: what else lessens it, 0 to 1.

  >>> weigh('tokens', sequences=20, assigned=80)
  Weight(parts=16, size=20)
  """
  if rule not in ('equal', 'tokens', 'normalized'):
    raise ValueError(
      f"weight: expected 'equal', 'tokens' or 'normalized', got {rule!r}"
    )
  sequences = min(max(sequences, 1), assigned)
  by_tokens = rule == 'tokens'
  share = discount * (sequences / assigned if by_tokens else 1.0)
  return Weight(max(round(WHOLE * share), 1), sequences if by_tokens else 1)
