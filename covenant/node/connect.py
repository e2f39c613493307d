"""Opens the chain and the buckets that a config names.

A run on one machine has a folder, `network.path`: the chain is a file in it,
every hotkey that names no bucket has a folder there, and keys derive from the
run's seed, because nothing is at stake.
"""

import hashlib
import pathlib

from covenant import config as config_lib
from covenant import plugins
from covenant.chain import bittensor
from covenant.chain import interface as chain_lib
from covenant.chain import keys
from covenant.chain import local_chain
from covenant.protocol import run_storage as run_storage_lib
from covenant.store import bucket as bucket_lib
from covenant.store import interface as store_lib
from covenant.store import location as location_lib

_BESIDE = b'/'  # a location on a local chain: a folder beside it, by name


def local_key(seed: int, name: str) -> keys.Key:
  """Returns the hotkey of a name in a run that makes its own keys."""
  text = f'{seed}/{name}'.encode()
  return keys.Key.from_seed(hashlib.blake2b(text, digest_size=32).digest())


def chain_file(config: config_lib.Config) -> pathlib.Path:
  """Returns the file of the chain of a run on one machine."""
  return _folder(config) / 'chain.sqlite'


def _folder(config: config_lib.Config) -> pathlib.Path:
  """Returns the folder of a run on one machine."""
  if not config.network.path:
    raise config_lib.ConfigError(
      'network.path: expected the folder of a network, because network.chain='
      "'local'; --role=localnet makes one"
    )
  return pathlib.Path(config.network.path).absolute()


def chain(
  config: config_lib.Config, reads_only: bool = False
) -> chain_lib.Chain:
  """Returns the chain of a run as this node's hotkey sees it.

  Args:
    config: the config of this node.
    reads_only: needs no wallet.

  Raises:
    ChainError: it cannot be reached, or refuses the hotkey.
    PluginError: `network.chain` names no chain.
  """

  def connect_local(network: config_lib.Network) -> chain_lib.Chain:
    key = local_key(config.seed, network.hotkey)
    return local_chain.LocalChain.open(chain_file(config), key)

  def connect_bittensor(network: config_lib.Network) -> chain_lib.Chain:
    return bittensor.BittensorChain(
      network.netuid,
      network.name,
      '' if reads_only else network.wallet,
      network.hotkey,
      mechanism=network.mechanism,
    )

  known = {'local': connect_local, 'bittensor': connect_bittensor}
  connect = plugins.choose('network.chain', known, config.network.chain)
  return connect(config.network)


def objects(
  config: config_lib.Config, run: bytes, writes: bool = True
) -> run_storage_lib.RunStorage:
  """Opens the own bucket, and finds those of others.

  Args:
    config: the config of this node.
    run: the id of the run.
    writes: True if the node needs a bucket of its own.

  Raises:
    StoreError: the own bucket cannot be opened.
    ValueError: `network.bucket` is not a location.
  """
  network = config.network
  if network.store:
    open_named = plugins.choose('network.store', {}, network.store)
    name = network.bucket or network.hotkey
    return run_storage_lib.RunStorage(
      run,
      open_named(name, writes),
      name.encode() if writes else b'',
      lambda data: open_named(data.decode(), False),
    )

  def beside(name: str) -> location_lib.Location:
    folder = _folder(config) / 'buckets' / name
    return location_lib.Location('file', str(folder))

  def open_bucket(data: bytes) -> store_lib.Bucket:
    if network.chain == 'local' and data[:1] == _BESIDE:
      name = data[1:].decode()
      if name in ('', '..') or pathlib.PurePath(name).name != name:
        raise ValueError(f'expected the name of a folder, got {name!r}')
      return bucket_lib.open_for_reading(beside(name), allow_local=True)
    location = location_lib.Location.from_bytes(data)
    allow_local = network.chain == 'local'
    return bucket_lib.open_for_reading(
      location, allow_local=allow_local, hosts=config.store_hosts
    )

  if not writes:
    own = location_lib.Location('memory', 'nothing')
    packed = b''
  elif network.bucket:
    # One text for all members of a network of processes.
    text = network.bucket.replace('{hotkey}', network.hotkey)
    own = location_lib.Location.parse(text)
    packed = own.to_bytes()
  elif network.chain == 'local':
    own, packed = beside(network.hotkey), _BESIDE + network.hotkey.encode()
  else:
    raise ValueError(
      'network.bucket: expected a location such as r2://ACCOUNT/BUCKET or '
      's3://BUCKET, to which this node can write and which others can read'
    )
  return run_storage_lib.RunStorage(
    run, bucket_lib.open_bucket(own), packed, open_bucket
  )
