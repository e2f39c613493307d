"""Rates of a host that the plan counts with; measured, or named as assumed.

A rate is of one core. The work on payloads is spread over the cores of a host
(`plan.cores`), so that a phase takes as long as its slowest part.
"""

from covenant import config as config_lib
from covenant.plan import hardware as hardware_lib

# Bytes of payload per second and core, elias-fano, of an 8192 x 8192 matrix on
# a core of an AMD EPYC 7R13, and blake2b of large pieces.
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
