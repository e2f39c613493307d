"""Accelerators and their published specifications.

The table holds peak numbers. The fraction that training reaches is an
assumption of the plan (`plan.peak_fraction`).
"""

import dataclasses
import re
from typing import NamedTuple

from covenant import config as config_lib


class Device(NamedTuple):
  """One accelerator; 1 GB is 10^9 bytes, link rates are per direction."""

  memory: float  # bytes
  peak: float  # bfloat16 FLOP/s, dense, float32 sums
  bandwidth: float  # device memory bandwidth, bytes/s
  inside: float  # link to devices of the same host, bytes/s
  outside: float  # link to devices of other hosts, bytes/s; assumed
  host_link: float  # link to host memory, bytes/s
  per_host: int  # devices per host
  source: str


def _gpu(memory, tflops, bandwidth, inside, host_link, source, outside=50):
  """Returns a GPU from GB, TFLOP/s and GB/s.

  The default `outside` is one 400 Gbit/s port per device.
  """
  return Device(
    memory * 1e9,
    tflops * 1e12,
    bandwidth * 1e9,
    inside * 1e9,
    outside * 1e9,
    host_link * 1e9,
    8,
    source,
  )


def _tpu(memory, tflops, bandwidth, inside, source):
  """Returns a TPU; one interconnect joins all chips of a slice."""
  return Device(
    memory * 1e9,
    tflops * 1e12,
    bandwidth * 1e9,
    inside * 1e9,
    inside * 1e9,
    32e9,
    4,
    source,
  )


# Consumer cards use PCIe inside a host. Between hosts a home or office network
# of 10 Gbit/s is assumed.
DEVICES = {
  'B300': _gpu(288, 2250, 8000, 900, 64, 'NVIDIA HGX B300 page'),
  'B200': _gpu(192, 2250, 8000, 900, 64, 'NVIDIA HGX B200 data sheet; '
               '192 GB as Templar names it'),
  'H200': _gpu(141, 989, 4800, 450, 64, 'NVIDIA H200 SXM data sheet'),
  'H100': _gpu(80, 989, 3350, 450, 64, 'NVIDIA H100 SXM data sheet'),
  'A100': _gpu(80, 312, 2039, 300, 32, 'NVIDIA A100 80GB SXM data sheet'),
  'A100-40': _gpu(40, 312, 1555, 300, 32, 'NVIDIA A100 40GB SXM data sheet'),
  'L40S': _gpu(48, 362, 864, 32, 32, 'NVIDIA L40S data sheet', 12.5),
  '5090': _gpu(32, 209, 1792, 64, 64, 'NVIDIA Blackwell RTX whitepaper', 1.25),
  '4090': _gpu(24, 165, 1008, 32, 32, 'NVIDIA Ada whitepaper', 1.25),
  '3090': _gpu(24, 71, 936, 32, 32, 'NVIDIA Ampere GA102 whitepaper', 1.25),
  'v5e': _tpu(16, 197, 819, 100, 'Google Cloud TPU v5e page'),
  'v5p': _tpu(95, 459, 2765, 300, 'Google Cloud TPU v5p page'),
  'v6e': _tpu(32, 918, 1640, 224, 'Google Cloud TPU v6e page'),
}  # fmt: skip


class Hardware(NamedTuple):
  """The devices of one peer."""

  count: int
  name: str
  device: Device

  @property
  def hosts(self) -> int:
    return -(-self.count // self.device.per_host)

  @property
  def link(self) -> float:
    """The rate between a device and all others of the peer, bytes/s."""
    return self.device.outside if self.hosts > 1 else self.device.inside


def parse(text: str) -> Hardware:
  """Parses `plan.hardware`.

  >>> parse('16xB200').hosts
  2

  Raises:
    ConfigError: the device kind is unknown; lists the known kinds.
  """
  match = re.fullmatch(r'([1-9]\d*)x(.+)', text)
  names = {name.lower(): name for name in DEVICES}
  if not match or match[2].lower() not in names:
    raise config_lib.ConfigError(
      'plan.hardware: expected COUNTxKIND, such as 8xB200; '
      f'kinds: {", ".join(DEVICES)}; got {text!r}'
    )
  name = names[match[2].lower()]
  return Hardware(int(match[1]), name, DEVICES[name])


def check(config: config_lib.Config) -> Hardware:
  """Returns the hardware of `config.plan`.

  Raises:
    ConfigError: the device count differs from the mesh in `config.devices`.
  """
  hardware, devices = parse(config.plan.hardware), config.devices
  data, fsdp, tensor = devices.data, devices.fsdp, devices.tensor
  if data * fsdp * tensor != hardware.count:
    raise config_lib.ConfigError(
      f'plan.hardware: {hardware.count} devices, but the mesh takes '
      f'devices.data * devices.fsdp * devices.tensor = {data} * {fsdp} * '
      f'{tensor} = {data * fsdp * tensor}; change these or the hardware'
    )
  return hardware


def resolve(config: config_lib.Config) -> config_lib.Config:
  """Replaces `devices.data` = 0 by the number of replicas that fit."""
  devices = config.devices
  if devices.data:
    return config
  count = parse(config.plan.hardware).count
  data = max(1, count // (devices.fsdp * devices.tensor))
  return dataclasses.replace(
    config, devices=dataclasses.replace(devices, data=data)
  )
