"""The checkpoints to which an emulation has decided to return, on disk.

The buckets of an emulation end with its process. Between the adoption of a
rollback and its round its checkpoints on disk are not complete without the
published one that the run will return to.
"""

import pathlib
import shutil
from collections.abc import Sequence

from covenant.emulate import host as host_lib
from covenant.node import validator as validator_lib
from covenant.protocol import history as history_lib
from covenant.protocol import rollback
from covenant.protocol import run_storage as run_storage_lib
from covenant.store import bucket as bucket_lib
from covenant.store import location as location_lib

_FOLDER = 'rollback'


def save(host: host_lib.Host, workdir: pathlib.Path) -> None:
  """Writes what adopted rollbacks need; deletes what none needs any more."""
  node, folder = host.validators[0], workdir / _FOLDER
  targets = _targets(node)
  if not targets:
    shutil.rmtree(folder, ignore_errors=True)
    return
  source = history_lib.Source(node.chain.hotkey, node.objects.bucket)
  _copy(node, _storage(node, folder), source, targets)


def load(host: host_lib.Host, workdir: pathlib.Path) -> None:
  """Puts what adopted rollbacks need into the buckets of all validators."""
  folder = workdir / _FOLDER
  if folder.is_dir() and (targets := _targets(host.validators[0])):
    signer = host.validators[0].chain.hotkey
    for node in host.validators:
      bucket = _storage(node, folder).bucket
      source = history_lib.Source(signer, bucket)
      _copy(node, node.objects, source, targets)


def _targets(node: validator_lib.Validator) -> list[rollback.Target]:
  """Returns the states to which rollbacks that are adopted will return."""
  return [
    target
    for amendment in node.amendments
    if amendment.round > node.state.round
    and (target := rollback.target(amendment))
    and target.round
  ]


def _storage(
  node: validator_lib.Validator, folder: pathlib.Path
) -> run_storage_lib.RunStorage:
  bucket = bucket_lib.open_bucket(
    location_lib.Location('file', str(folder.absolute()))
  )
  run = node.context.shared_model.run
  return run_storage_lib.RunStorage(run, bucket, b'', lambda data: bucket)


def _copy(
  node: validator_lib.Validator,
  into: run_storage_lib.RunStorage,
  source: history_lib.Source,
  targets: Sequence[rollback.Target],
) -> None:
  """Copies the checkpoints of states; a validator signs the copies."""
  around = rollback.Surroundings(node.chain, into, node.shared_model, [source])
  for target in targets:
    index = rollback.find(around, target.round, {target.fingerprint})
    if index is not None:
      rollback.mirror(around, index, node.chain.sign)
