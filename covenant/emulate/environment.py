"""The chain and the buckets around the nodes of a run on one machine."""

from covenant import config as config_lib
from covenant.chain import interface as chain_lib
from covenant.chain import local_chain
from covenant.chain import storage as chain_storage
from covenant.node import connect
from covenant.store import interface as store_lib

_STAKE = 1000.0  # TAO of the leader; each further validator has 1 less


def chain_seed(config: config_lib.Config) -> bytes:
  """Returns the seed of the block hashes of a run on one machine."""
  return config.seed.to_bytes(8, 'little')


def rules(config: config_lib.Config) -> chain_storage.ChainRules:
  """Returns the rules of the chain of a run on one machine."""
  network = config.network
  return chain_storage.ChainRules(
    block_seconds=network.block_seconds,
    reveal_epochs=network.reveal_epochs,
    permits=network.permits,
  )


def register(chain: local_chain.LocalChain, config: config_lib.Config) -> None:
  """Registers the miners, uids 0 to miners - 1, and then the validators."""
  for uid in range(config.miners + config.validators):
    rank = uid - config.miners
    stake = max(_STAKE - rank, 1.0) if rank >= 0 else 0.0
    address = connect.local_key(config.seed, str(uid)).address
    chain.register(address, stake, validator=rank >= 0)


class Environment:
  """The chain and the buckets as the nodes see them; here, without faults."""

  def chain(self, name: str, chain: chain_lib.Chain) -> chain_lib.Chain:
    """Returns the chain as the node of a name sees it."""
    return chain

  def bucket(
    self, name: str, owner: str, bucket: store_lib.Bucket
  ) -> store_lib.Bucket:
    """Returns the bucket of `owner` as the node of a name sees it."""
    return bucket
