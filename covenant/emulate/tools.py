"""The programs and data of an emulation, by the config of a round.

An amendment gives a run another config from a round on. The nodes of a host
come to that round one after another, and share what is made for it.
"""

from collections.abc import Callable

from covenant import config as config_lib
from covenant.data import dataset
from covenant.data import tokens as tokens_lib
from covenant.emulate import devices as devices_lib
from covenant.node import base as node_lib
from covenant.node import miner as miner_lib
from covenant.node import multihost as multihost_lib
from covenant.node import validator as validator_lib
from covenant.train import shared_state as shared_state_lib


class Tools:
  """The trainers of miners and the judges of validators, by config.

  Args:
    shared_model: of the run.
    data: of the config that the run began with.
    process_group: the processes that emulate the run; this one if omitted.
    pausing: see `devices.DevicePool`.
  """

  def __init__(
    self,
    shared_model: shared_state_lib.SharedModel,
    data: tokens_lib.TokenData,
    process_group: multihost_lib.ProcessGroup | None = None,
    pausing: Callable[[], bool] | None = None,
  ):
    self._pausing = pausing
    self._shared_model = shared_model
    self._process_group = process_group or multihost_lib.ProcessGroup()
    self._data = {shared_model.genesis.data: data}
    self._pools: dict[config_lib.Config, devices_lib.DevicePool] = {}
    self._judges: dict[config_lib.Config, validator_lib.Judge] = {}

  def data(self, config: config_lib.Config) -> tokens_lib.TokenData:
    """Returns the data of a config."""
    if config.data not in self._data:
      self._data[config.data] = dataset.load(config)
    return self._data[config.data]

  def pool(self, config: config_lib.Config) -> devices_lib.DevicePool:
    """Returns the devices of the miners under a config."""
    if config not in self._pools:
      self._pools[config] = devices_lib.DevicePool(
        config,
        self._shared_model.amended(config),
        self.data(config),
        self._process_group,
        self._pausing,
      )
    return self._pools[config]

  def judge(self, config: config_lib.Config) -> validator_lib.Judge:
    """Returns the programs of the validators under a config."""
    if config not in self._judges:
      model = self._shared_model.amended(config)
      data = self.data(config)
      self._judges[config] = validator_lib.judge(config, model, data)
    return self._judges[config]

  def retool(self, node: node_lib.Node, name: str) -> None:
    """Gives a node of a name the tools of its config."""
    if isinstance(node.role, miner_lib.MinerRole):
      node.role.slot = self.pool(node.config).slot(name)
    elif isinstance(node.role, validator_lib.ValidatorRole):
      node.role.judge = self.judge(node.config)

  def close(self) -> None:
    """Stops all training; its results are lost."""
    for pool in self._pools.values():
      pool.close()
