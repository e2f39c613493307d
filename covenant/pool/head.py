"""The process of a pipeline's head: a miner to the network, a hub to stages.

It has the uid, the data and the bucket, and none of the parameters: it passes
on what stages send each other, puts their sections together to a payload, and
tells them how the payloads of a round move their tensors. Its workdir has the
files of a pool, stages.jsonl with each round's work, and orders/.
"""

import functools
import os
import pathlib
import secrets
import sys
from collections.abc import Callable

import jax
import numpy as np

from covenant import config as config_lib
from covenant import files
from covenant.data import tokens as tokens_lib
from covenant.node import base as node_lib
from covenant.node import follow
from covenant.node import miner as miner_lib
from covenant.node import process
from covenant.pool import messages
from covenant.pool import miner as pool_miner
from covenant.pool import orders as orders_lib
from covenant.pool import seats as seats_lib
from covenant.pool import server as server_lib
from covenant.pool import server_settings as settings_lib
from covenant.pool import stage_audit
from covenant.pool import stage_keeper
from covenant.pool import stage_process
from covenant.pool import stage_tensors
from covenant.pool import stage_training
from covenant.pool import stage_work
from covenant.pool import staged_model
from covenant.protocol import apply
from covenant.protocol import membership as membership_lib
from covenant.protocol import published_checkpoint
from covenant.protocol import round as round_lib
from covenant.protocol import run_storage as run_storage_lib
from covenant.store import interface as store_lib


class HeadProcess:
  """A head and its server; errors are those of `Process`.

  Args:
    config: the config of the run, with one pipeline.
    workdir: the folder of this node.
    stop: returns True if the head is asked to stop.
  """

  def __init__(
    self,
    config: config_lib.Config,
    workdir: str | os.PathLike[str],
    stop: Callable[[], bool] = lambda: False,
  ):
    self._workdir = pathlib.Path(workdir)
    self._island = stage_process.pipeline_of(config)
    self._stop = stop
    self._process = process.Process(
      config,
      'pool',
      workdir,
      build=self._build,
      make_model=staged_model.StagedModel,
    )

  def _build(
    self,
    context: node_lib.Context,
    start: apply.Position,
    data: tokens_lib.TokenData,
    mesh: jax.sharding.Mesh | None,
  ) -> miner_lib.Miner:
    del mesh
    config, model = context.config, context.shared_model
    assert isinstance(model, staged_model.StagedModel)
    self._config, self._model, self._context = config, model, context
    verify = pool_miner.verifier(config.pool)
    self._ledger = pool_miner.open_ledger(config.pool, self._workdir)
    self._tensors = stage_tensors.StageTensors(config, self._island, model.spec)
    self._log = orders_lib.OrderLog(self._workdir / 'orders', model.run.hex())
    longest = stage_work.longest_message(config, model.spec.payload_bytes)
    self._seats = seats_lib.Seats(
      self._island.stages,
      self._log,
      self._tensors.part,
      longest,
      config.pool.patience,
      config.pool.ban_rounds,
    )
    auditor = stage_audit.Auditor(
      config,
      self._island,
      self._log,
      self._tensors.part,
      self._payload,
      functools.partial(stage_keeper.load_tensors, context.objects),
    )
    model.attach(self._seats, self._log, auditor, self._stop)
    self._server = server_lib.PoolServer(
      settings_lib.of(config.pool),
      context.chain.hotkey,
      context.chain.sign,
      {'run': model.run.hex()},
      verify,
      self._admit,
      self._answer,
      channels=self._seats,
    )
    self._server.start()
    host, port = self._server.address
    files.write(self._workdir / 'address', f'{host}:{port}')
    _say(f'head of {context.chain.hotkey}: stages may come to {host}:{port}')
    training = self._training = stage_training.StageTraining(
      config,
      self._island,
      self._seats,
      self._tensors,
      auditor,
      self._ledger,
      model.run,
      self._workdir,
      lambda fields: self._process.workdir.record('stages', fields),
      self._stop,
      np.random.default_rng(secrets.randbits(128)),
    )
    trainer = stage_training.StageTrainer(model.spec, data)
    role = miner_lib.role(stage_training.StageSlot(trainer), start)  # type: ignore[arg-type]
    policy = miner_lib.HONEST._replace(
      batches=lambda node, task: (), train=training.train, seal=training.seal
    )
    handlers = miner_lib.handlers(policy)
    follow_others = handlers[round_lib.Phase.CATCH_UP]

    def catch_up(
      node: miner_lib.Miner, command: round_lib.Command, head: int
    ) -> object:
      self._locate(node, head)
      return follow_others(node, command, head)

    own = {
      round_lib.Phase.APPLY: self._apply,
      round_lib.Phase.CATCH_UP: catch_up,
    }
    return node_lib.Node(context, start, role, {**handlers, **own})

  def run(self) -> None:
    """Serves stages and follows the run, until it is over or asked to stop."""
    host, port = self._server.address
    self._process.workdir.status(address=f'{host}:{port}')
    try:
      self._process.run(self._stop)
    finally:
      self._server.close()
      self._ledger.close()

  def _admit(self, request: server_lib.Request) -> int | server_lib.Reply:
    path, _ = pool_miner.parse_path(request.path)
    if path not in ('/channel', '/sections', '/account'):
      return server_lib.Reply(404, {'error': 'unknown path'})
    if path == '/channel' and request.worker in self._seats.banned:
      return server_lib.Reply(
        403, {'error': 'this worker was caught with false numbers'}
      )
    # The payload may have to be fetched, while others wait for an answer.
    if path == '/sections' and not self._seats.holds(request.worker):
      return server_lib.Reply(403, {'error': 'for holders of a stage'})
    return 0

  def _answer(self, request: server_lib.Request) -> server_lib.Reply:
    path, asked = pool_miner.parse_path(request.path)
    if path == '/account':
      account = self._ledger.account(request.worker)
      return server_lib.Reply(200, account._asdict())
    try:
      number, stage = int(asked['number']), int(asked['stage'])

      def read(source: orders_lib.Source) -> bytes:
        if not self._seats.serve(request.worker, stage, number, source.uid):
          raise orders_lib.OrderError(
            f'stage {stage} is not told to take order {number}, or has asked '
            f'for uid {source.uid} too often'
          )
        return self._payload(source)

      sections = self._tensors.sections_of(
        self._log.get(number), stage, int(asked['uid']), read
      )
    except (*messages.MALFORMED, orders_lib.OrderError) as e:
      return server_lib.Reply(400, {'error': f'{path}: {e}'})
    return server_lib.Reply(200, {}, b''.join(sections))

  def _payload(self, source: orders_lib.Source) -> bytes:
    """Returns the payload of a source, fetched again after a restart.

    Raises:
      OrderError: nobody has it.
    """
    found = self._model.payload(source)
    if found is None:
      digest, storage = bytes.fromhex(source.digest), self._context.objects
      places = list(map(bytes.fromhex, self._model.places(source)))
      refs = [run_storage_lib.ObjectRef(digest, place) for place in places[:1]]
      mirrors = storage.buckets_at(places)
      limit = self._model.spec.payload_bytes
      got = storage.fetch('payloads', source.round, refs, mirrors, limit)
      found = got.get(digest)
    if not isinstance(found, bytes):
      raise orders_lib.OrderError(
        f'uid {source.uid}, round {source.round}: nobody has the payload'
      )
    return found

  def _apply(
    self, node: miner_lib.Miner, command: round_lib.Command, head: int
  ) -> None:
    """Takes the outer step; stages are told where the payloads are."""
    membership = self._locate(node, head)
    try:
      follow.apply_round(node, command, head)
    except apply.OutOfSyncError as e:
      if not self._find_liars(e):
        raise
      follow.apply_round(node, command, head)
    publish = node.config.checkpoint.publish
    if command.round % publish == publish - 1:
      self._rebase(node, membership)

  def _locate(
    self, node: miner_lib.Miner, head: int
  ) -> membership_lib.Membership:
    """Tells the model where payloads are; returns the members."""
    membership = membership_lib.read(
      node.chain, node.schedule.finalized(head), node.schedule
    )
    found = [membership.location(p.uid) for p in membership.candidates]
    mirrors = [x.hex() for x in found if x]
    locations = {}
    for uid, mine in membership.commitments.items():
      own = membership.location(uid)
      locations[mine.digest.hex()] = (*([own.hex()] if own else []), *mirrors)
    self._model.locate(locations, mirrors)
    return membership

  def _find_liars(self, error: apply.OutOfSyncError) -> bool:
    """Returns whether stages have led this node astray; they are not paid."""
    _say(f'{error}; the tensors of all stages are computed again')
    try:
      is_false, liars = self._model.check_stages()
    except (orders_lib.OrderError, store_lib.StoreError) as e:
      _say(f'they cannot be: {e}')
      return False
    self._training.accuse(liars)
    return is_false

  def _rebase(
    self, node: miner_lib.Miner, membership: membership_lib.Membership
  ) -> None:
    """Lets later stages begin from the newest published checkpoint."""
    layout = published_checkpoint.layout(self._model)
    mirrors = apply.mirrors(node.objects, membership)
    for peer in membership.candidates:
      bucket = node.objects.bucket_at(membership.location(peer.uid))
      if bucket is None:
        continue
      try:
        newest = published_checkpoint.published(node.objects, bucket)[-1:]
        for number in newest:
          key = node.objects.key('checkpoints', number)
          data = bucket.get(key, layout.index_bytes + 64)
          index = published_checkpoint.decode(
            data, layout, peer.hotkey, node.chain.verify
          )
          places = [place.hex() for place in node.objects.locations(mirrors)]
          if self._model.rebase(index.files, places):
            return
      except (store_lib.StoreError, apply.OutOfSyncError):
        continue


def _say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)
