"""The schema of an experiment, its loading and its errors."""

from covenant.config.config import Aggregation
from covenant.config.config import Checkpoint
from covenant.config.config import Compression
from covenant.config.config import Config
from covenant.config.config import ConfigError
from covenant.config.config import Data
from covenant.config.config import Devices
from covenant.config.config import Eval
from covenant.config.config import Gauntlet
from covenant.config.config import Inner
from covenant.config.config import Model
from covenant.config.config import Network
from covenant.config.config import Optim
from covenant.config.config import Outer
from covenant.config.config import Phases
from covenant.config.config import Plan
from covenant.config.config import Pool
from covenant.config.config import choose
from covenant.config.config import differences
from covenant.config.config import flatten
from covenant.config.config import from_json
from covenant.config.config import identity
from covenant.config.config import load
from covenant.config.config import parse
from covenant.config.config import to_json

__all__ = [
  'Aggregation',
  'Checkpoint',
  'Compression',
  'Config',
  'ConfigError',
  'Data',
  'Devices',
  'Eval',
  'Gauntlet',
  'Inner',
  'Model',
  'Network',
  'Optim',
  'Outer',
  'Phases',
  'Plan',
  'Pool',
  'choose',
  'differences',
  'flatten',
  'from_json',
  'identity',
  'load',
  'parse',
  'to_json',
]
