"""A model of three layers, and devices that hold one of them or all."""

import dataclasses

from covenant import config as config_lib

STRONG, WEAK = 'with 9 MB', 'with 4 MB'
FAST, SLOW = 'on 400 kb/s', 'on 30 kb/s'


def make(text, peers=20, layers=3):
  """Returns a config with an inventory."""
  config = config_lib.Config()
  return dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, layers=layers),
    plan=config_lib.Plan(compute_minutes=15, inventory=text, peers=peers),
  )


def any_of(count, speed, memory_, link, latency=50):
  """Returns the text of a group of hosts of one device."""
  return f'{count}xany with {speed} MFLOP/s {memory_} {link} with {latency} ms'
