"""The section about plans."""

import dataclasses

from covenant.config import schema


@dataclasses.dataclass(frozen=True)
class Plan(schema.Section):
  """The assumptions of `--role=plan` (covenant/plan/); they change no run."""

  hardware: str = '1xH100'  # devices of one peer, number x kind
  memory_fraction: float = schema.fraction(0.94)  # of a device, for XLA
  peak_fraction: float = schema.positive(0.25)  # of bfloat16 FLOP/s in training
  # Minutes of training per round; 0: computed from FLOPs.
  compute_minutes: float = schema.bounded(0.0, low=0.0)
  peers: int = schema.positive(20)  # contributors per round
  upload: float = schema.positive(110.0)  # of a peer, megabytes per second
  download: float = schema.positive(500.0)  # of a peer, megabytes per second
  compile: bool = True  # false: programs are only lowered, in seconds
  # TPU topology to compile for as well, such as 'v5p:4x4x4'; needs the extra
  # 'plan-tpu'.
  tpu_topology: str = ''
  # Hardware to plan islands for (covenant/plan/hardware.py), such as
  # '8xB200, 64xA100 in pairs, 400x4090 on 200 Mb/s'; empty: `hardware`.
  inventory: str = ''
  # Loss of value of a token whose activations are compressed 100-fold; other
  # ratios by their logarithm (covenant/plan/partition.py). Assumed.
  compression_cost: float = schema.fraction(0.1)
  # Simulated links (covenant/plan/wallclock.py): standard deviation of
  # the logarithm of their speed, share of bytes sent again, share of time away.
  jitter: float = schema.bounded(0.0, low=0.0, high=2.0)
  loss: float = schema.bounded(0.0, low=0.0, high=0.9)
  churn: float = schema.bounded(0.0, low=0.0, high=0.5)
