"""The rules of a Bittensor subnet, and what became of weights sent to it.

Storage items are named by text: an item that the runtime does not have is an
error of the one read that needs it, and not of the SDK's catalog.
"""

import asyncio
from collections.abc import Mapping
from typing import Any, NamedTuple

from covenant.chain import interface
from covenant.chain import session as session_lib
from covenant.chain import yuma

_RAO = 10**9  # per TAO or alpha
_MECHANISMS = 4096  # distance of the storage indexes of two mechanisms
# Blocks after the epoch in which weights are revealed before they are missed.
_SLACK = 10


class Neuron(NamedTuple):
  """A registered hotkey, and its pay of the last epoch."""

  peer: interface.Peer
  pay: float  # alpha


class Sent(NamedTuple):
  """Weights that this hotkey sent."""

  weights: Mapping[int, float]
  block: int  # the newest block at that time
  uid: int
  stake: float  # now


def neuron(found: Any) -> Neuron:
  """Returns what a `bittensor.MetagraphNeuron` says."""
  peer = interface.Peer(
    uid=int(found.uid),
    hotkey=str(found.hotkey),
    stake=float(found.total_stake.amount),
    permit=bool(found.validator_permit),
    registered=int(found.block_at_registration),
  )
  return Neuron(peer, float(found.emission.amount))


async def version_key(session: session_lib.Session, netuid: int) -> int:
  """Returns the version that the subnet requires of weights."""
  return int(await _item(session, 'WeightsVersionKey', [netuid]) or 0)


async def read(
  session: session_lib.Session,
  netuid: int,
  keypair: Any,
  block: int,
  mechanism: int = 0,
) -> interface.Subnet:
  """Reads the rules of a subnet now; a rule that is unknown stays None."""
  import bittensor as bt

  names = (
    'Tempo',
    'WeightsSetRateLimit',
    'MinAllowedWeights',
    'WeightsVersionKey',
    'CommitRevealWeightsEnabled',
    'RevealPeriodEpochs',
    'MechanismCountCurrent',
    'MaxAllowedValidators',
    'ImmunityPeriod',
  )
  found = dict(
    zip(
      names,
      await asyncio.gather(
        *(_known(session, name, [netuid]) for name in names)
      ),
      strict=True,
    )
  )
  threshold = await _known(session, 'StakeThreshold', [])
  space = await _known(session, 'MaxSpace', [], pallet='Commitments')
  sealed = found['CommitRevealWeightsEnabled']
  return interface.Subnet(
    block=block,
    runtime=session.spec,
    sdk=f'bittensor {bt.__version__}',
    tempo=found['Tempo'],
    commitment_bytes=space,
    weights_interval=found['WeightsSetRateLimit'],
    min_weights=found['MinAllowedWeights'],
    stake_threshold=None if threshold is None else threshold / _RAO,
    version_key=found['WeightsVersionKey'],
    sealed=None if sealed is None else bool(sealed),
    reveal_epochs=found['RevealPeriodEpochs'],
    mechanisms=found['MechanismCountCurrent'],
    owner_uids=await _owner_uids(session, netuid),
    permits=found['MaxAllowedValidators'],
    immunity=found['ImmunityPeriod'],
    weights_error=await _try_weights(session, netuid, keypair, mechanism),
  )


async def check_weights(
  session: session_lib.Session,
  netuid: int,
  mechanism: int,
  sent: Sent,
  head: int,
) -> str | None:
  """See `interface.Chain.check_weights`."""
  index = netuid + mechanism * _MECHANISMS
  rows = await _item(session, 'Weights', [index, sent.uid]) or []
  wanted = yuma.quantize(sent.weights)
  if _is_equal({int(u): int(w) for u, w in rows}, wanted):
    return ''
  if await _item(session, 'CommitRevealWeightsEnabled', [netuid]):
    tempo = int(await _item(session, 'Tempo', [netuid]))
    epochs = int(await _item(session, 'RevealPeriodEpochs', [netuid]) or 1)
    due = sent.block + (epochs + 1) * (tempo + 1) + _SLACK
    if head < due:
      return None
    late = f'they should have been revealed by block {due}'
  elif head <= sent.block + _SLACK:
    return None
  else:
    late = 'the chain holds others'
  reasons = await _reasons(session, netuid, sent, len(wanted))
  why = '; '.join(reasons) or (
    'no reason is known: sent by another process of this hotkey, or not '
    'revealed because of a fault of the random beacon'
  )
  return f'weights of block {sent.block} are not in force: {late}: {why}'


async def _reasons(
  session: session_lib.Session, netuid: int, sent: Sent, count: int
) -> list[str]:
  """Returns what forbids weights now, by the rules that a reveal applies."""
  reasons = []
  permits = await _known(session, 'ValidatorPermit', [netuid]) or []
  if sent.uid >= len(permits) or not permits[sent.uid]:
    reasons.append(f'uid {sent.uid} has no validator permit any more')
  threshold = await _known(session, 'StakeThreshold', [])
  if threshold is not None and sent.stake < threshold / _RAO:
    reasons.append(
      f'its stake of {sent.stake:,.1f} is below the threshold of '
      f'{threshold / _RAO:,.1f}'
    )
  least = await _known(session, 'MinAllowedWeights', [netuid])
  if least is not None and count < least:
    reasons.append(
      f'{count} weights are not 0, and the subnet requires {least}'
    )
  changed = await _known(session, 'WeightsVersionKey', [netuid])
  before = await _known(
    session, 'WeightsVersionKey', [netuid], block=sent.block
  )
  if None not in (changed, before) and changed != before:
    reasons.append(
      f'the version of weights that the subnet requires went from {before} to '
      f'{changed} before they were revealed'
    )
  return reasons


async def _owner_uids(
  session: session_lib.Session, netuid: int
) -> tuple[int, ...] | None:
  """Returns the uid of the owner's hotkey; empty if it has none."""
  hotkey = await _known(session, 'SubnetOwnerHotkey', [netuid])
  if hotkey is None:
    return None
  uid = await _known(session, 'Uids', [netuid, str(hotkey)])
  return () if uid is None else (int(uid),)


async def _try_weights(
  session: session_lib.Session, netuid: int, keypair: Any, mechanism: int
) -> str:
  """Returns why the SDK cannot compose weights for this runtime; else ''.

  Refusals of the subnet for other reasons are not of interest here.
  """
  import bittensor as bt

  intent = bt.SetWeights(
    netuid=netuid, weights={0: 1.0}, mechid=mechanism, version_key=0
  )
  try:
    await intent.build(session.substrate, keypair)
  except (bt.BittensorError, OSError):
    return ''
  except Exception as e:
    return f'{type(e).__name__}: {" ".join(str(e).split())}'
  return ''


async def _item(
  session: session_lib.Session,
  name: str,
  params: list[Any],
  pallet: str = 'SubtensorModule',
  block: int | None = None,
) -> Any:
  return await session.client.query((pallet, name), params, block=block)


async def _known(
  session: session_lib.Session, name: str, params: list[Any], **where: Any
) -> Any:
  """Returns an item; None if this runtime has none, or has pruned it."""
  try:
    return await _item(session, name, params, **where)
  except OSError:
    raise
  except Exception as e:
    import bittensor as bt

    if isinstance(e, bt.RpcConnectionError):
      raise
    return None


def _is_equal(ours: Mapping[int, int], theirs: Mapping[int, int]) -> bool:
  """Compares quantized weights, whose largest is 65535; one may be rounded."""
  uids = {*ours, *theirs}
  return all(abs(ours.get(u, 0) - theirs.get(u, 0)) <= 1 for u in uids)
