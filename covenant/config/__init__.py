"""The schema of an experiment, its loading and its errors."""

from covenant.config.config import Checkpoint
from covenant.config.config import Config
from covenant.config.config import ConfigError
from covenant.config.config import Eval
from covenant.config.config import choose
from covenant.config.config import differences
from covenant.config.config import edit
from covenant.config.config import flatten
from covenant.config.config import from_json
from covenant.config.config import identity
from covenant.config.config import load
from covenant.config.config import parse
from covenant.config.config import to_json
from covenant.config.network import Devices
from covenant.config.network import Island
from covenant.config.network import Network
from covenant.config.network import Phases
from covenant.config.network import Plan
from covenant.config.network import Pool
from covenant.config.network import read_islands
from covenant.config.network import show_islands
from covenant.config.secrets import hide_secrets
from covenant.config.telemetry import Alerts
from covenant.config.telemetry import Telemetry
from covenant.config.training import WEIGHT_UNITS
from covenant.config.training import Aggregation
from covenant.config.training import Compression
from covenant.config.training import Data
from covenant.config.training import DataPhase
from covenant.config.training import DataShare
from covenant.config.training import Gauntlet
from covenant.config.training import Inner
from covenant.config.training import Model
from covenant.config.training import Optim
from covenant.config.training import Outer
from covenant.config.training import PackedModel

__all__ = [
  'WEIGHT_UNITS',
  'Aggregation',
  'Alerts',
  'Checkpoint',
  'Compression',
  'Config',
  'ConfigError',
  'Data',
  'DataPhase',
  'DataShare',
  'Devices',
  'Eval',
  'Gauntlet',
  'Inner',
  'Island',
  'Model',
  'Network',
  'Optim',
  'Outer',
  'PackedModel',
  'Phases',
  'Plan',
  'Pool',
  'Telemetry',
  'choose',
  'differences',
  'edit',
  'flatten',
  'from_json',
  'hide_secrets',
  'identity',
  'load',
  'parse',
  'read_islands',
  'show_islands',
  'to_json',
]
