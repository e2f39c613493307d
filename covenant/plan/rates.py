"""Rates of a host that the plan counts with; measured, or named as assumed.

A rate is of one core. The work on payloads is spread over the cores of a host
(`plan.cores`), so that a phase takes as long as its slowest part.
"""

from covenant import config as config_lib
from covenant.plan import hardware as hardware_lib

# Bytes per second and core: of payloads, elias-fano, with every check, and
# BLAKE2b of large pieces. Measured on a machine of two cores at work on other
# things too; `python -m benchmarks.dataplane` and `benchmarks.compress` measure
# them again. That as many cores are as many times as fast is an extrapolation.
DECODE = 65e6
ENCODE = 84e6
DIGEST = 0.53e9
# Bytes per second to a local disk; assumed.
DISK = 1e9
# Passes over the values of a device's memory in which compression selects and
# quantizes; assumed.
COMPRESS_PASSES = 16
ASSUMED = 'a core decodes 65 MB/s, encodes 84 MB/s, hashes 0.53 GB/s'


def decode_seconds(config: config_lib.Config, size: float) -> float:
  """Returns the seconds to verify, decode and digest bytes of payloads."""
  return size * (1 / DECODE + 1 / DIGEST) / cores(config)


def encode_seconds(config: config_lib.Config, size: float) -> float:
  """Returns the seconds to encode and digest bytes of payloads."""
  return size * (1 / ENCODE + 1 / DIGEST) / cores(config)


def fingerprint_seconds(config: config_lib.Config, state: float) -> float:
  """Returns the seconds to copy a state to its hosts and to hash it.

  Args:
    config: the config of the plan.
    state: bytes of the whole state.
  """
  hardware = hardware_lib.parse(config.plan.hardware)
  copied = state / (hardware.count * hardware.device.host_link)
  return copied + state / (DIGEST * cores(config))


def cores(config: config_lib.Config) -> int:
  """Returns the cores of all hosts of a node."""
  return config.plan.cores * hardware_lib.parse(config.plan.hardware).hosts
