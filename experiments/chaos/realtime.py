"""Processes, sockets and real time, with strangers that commit every round.

configs/localnet.py runs as processes. Strangers register beside its miners and
commit in every put window to payloads in buckets of hostile.py: nobody listens
there, or says nothing, or sends a byte now and then, or sends without an end.
No round may be lost, and from round 1 on all miners of the run count.
"""

import contextlib
import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Sequence

from covenant import config as config_lib
from covenant.chain import local_chain
from covenant.emulate import localnet
from covenant.node import connect
from covenant.protocol import round as round_lib
from covenant.store import location as location_lib
from covenant.wire import commitment as commitment_lib
from covenant.wire import manifest as manifest_lib
from experiments.chaos import hostile

_LEAST = 4  # rounds, so that buckets fail, are remembered and tried again


class _Strangers:
  """Hotkeys that commit to payloads in hostile buckets.

  Args:
    network: the network, which does not run yet.
    config: its config.
    servers: the servers with the buckets.
    count: the number of hotkeys.
  """

  def __init__(
    self,
    network: localnet.Localnet,
    config: config_lib.Config,
    servers: Sequence[hostile.HostileServer],
    count: int,
  ):
    self.commitments = 0
    self._chain = network.chain
    self._schedule = round_lib.Schedule(config.phases)
    self._done = -1  # round
    self._views: list[tuple[local_chain.LocalChain, bytes]] = []
    for i in range(count):
      key = connect.local_key(config.seed, f'stranger-{i}')
      self._chain.register(key.address, 0.0, False)
      endpoint = servers[i % len(servers)].endpoint
      location = location_lib.Location.parse(
        f's3://bucket-{i}?endpoint={endpoint}'
      )
      self._views.append((self._chain.seen_by(key), location.to_bytes()))

  def look(self, sights: list[localnet.Sight]) -> None:
    """Commits once in each put window; called twice per second."""
    del sights
    head = self._chain.head()
    r = self._schedule.round_at(head) if head >= 0 else -1
    if r <= self._done or head < self._schedule.put_opens(r):
      return
    self._done = r
    for chain, location in self._views:
      new = commitment_lib.Commitment(
        commitment_lib.Role.MINER, location, r, os.urandom(32)
      )
      chain.commit(commitment_lib.encode(new))
      self.commitments += 1


def run(rounds: int, strangers: int) -> bool:
  """Runs the network; returns True if no round was lost to the strangers."""
  root = pathlib.Path(__file__).parents[2]
  base = config_lib.load(str(root / 'configs' / 'localnet.py'))
  config = dataclasses.replace(
    base, rounds=max(rounds, _LEAST), validators=3, miners=3
  )
  workdir = tempfile.mkdtemp(prefix='covenant-realtime-')
  print(f'{config.rounds} rounds, {strangers} strangers, in {workdir}')
  with contextlib.ExitStack() as stack:
    servers = [
      stack.enter_context(hostile.HostileServer(kind)) for kind in hostile.KINDS
    ]
    network = localnet.Localnet(config, workdir)
    hostiles = _Strangers(network, config, servers, strangers)
    counted: dict[int, list[int]] = {}
    kept = pathlib.Path(workdir, 'network', 'buckets', str(config.miners))

    def look(sights: list[localnet.Sight]) -> None:
      hostiles.look(sights)
      counted.update(_counted(kept))  # old rounds are deleted

    outcome = network.run(look)
    requests = sum(server.requests for server in servers)
  print(
    f'{hostiles.commitments} commitments of strangers; '
    f'{requests} requests to their buckets'
  )
  for r, uids in sorted(counted.items()):
    print(f'round {r}: counted {uids}')
  everybody = list(range(config.miners))
  played = range(config.rounds)
  lost = [r for r in played if not counted.get(r)]
  # In round 0 no bucket is known to be bad, and places are given by lot.
  partly = [r for r in played if r and counted.get(r) != everybody]
  agreed = 'equal' if outcome.equal else 'NOT EQUAL'
  print(f'rounds lost: {lost}; without one of the miners: {partly}; ', end='')
  print(f'roots and states: {agreed}')
  return outcome.finished and outcome.equal and not lost and not partly


def _counted(bucket: pathlib.Path) -> dict[int, list[int]]:
  """Returns the uids that counted in the rounds that a validator keeps."""
  found = {}
  for path in bucket.glob('*/history/*'):
    with contextlib.suppress(OSError, manifest_lib.ManifestError):
      data, entries = path.read_bytes(), ()
      if data:
        entries = manifest_lib.decode(data, lambda *_: True).entries
      found[int(path.name)] = [entry.uid for entry in entries]
  return found
