"""The training of a lease, and the process of a pool's worker.

A worker takes leases and prints its earnings. It needs only the run's config:
no data, chain, bucket or open port. The pool sends the sequences of each lease,
and its parameters when they change.
"""

import dataclasses
import os
import pathlib
import secrets
import stat
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from covenant import config as config_lib
from covenant import errors
from covenant import typing as ct
from covenant.chain import keys
from covenant.node import step_meter
from covenant.node import workdir as workdir_lib
from covenant.optim import sparseloco
from covenant.pool import client as client_lib
from covenant.pool import deltas as deltas_lib
from covenant.pool import ledger as ledger_lib
from covenant.pool import messages
from covenant.pool import pool as pool_lib
from covenant.protocol import amendments as amendments_lib
from covenant.telemetry import telemetry as telemetry_lib
from covenant.train import local as local_lib
from covenant.train import shared_state as shared_state_lib
from covenant.train import step as step_lib
from covenant.wire import amendment as amendment_lib
from covenant.wire import payload

_LONGEST_WAIT = 10.0  # seconds between retries, at most
_LOOK_SECONDS = 0.2  # poll interval of the stop flag


class LeaseTrainer:
  """The compiled steps of leases, one program per batch size.

  An audit of the pool trains a lease again by the same programs.

  Args:
    config: the config of the run.
    shared_model: the shared model of the run.

  Raises:
    ConfigError: the algorithm has no local steps.
  """

  def __init__(
    self, config: config_lib.Config, shared_model: shared_state_lib.SharedModel
  ):
    method = shared_model.method
    if method.inner is None:
      raise config_lib.ConfigError(
        f"optim.method: expected 'sparseloco' or 'diloco' for a pool, whose "
        f'workers take local steps; got {config.optim.method!r}'
      )
    # No microbatches: a worker states the batch that fits its memory.
    inner = dataclasses.replace(config.optim.inner, microbatch_size=0)
    optim = dataclasses.replace(config.optim, inner=inner)
    config = dataclasses.replace(config, optim=optim)
    self._shared_model = shared_model
    self._context = config.data.context
    self._spec = deltas_lib.spec(config, shared_model.abstract_params)
    compression = deltas_lib.compression(config)
    self._step = step_lib.inner_step(config)

    def begin(params: ct.Params) -> tuple[ct.Params, ct.OptState]:
      # The first step donates its parameters.
      return jax.tree.map(jnp.copy, params), method.inner.init(params)

    def end(start: ct.Params, local: ct.Params) -> ct.Message:
      delta = sparseloco.pseudo_gradient(start, local)
      return sparseloco.compress(delta, None, compression, None)[0]

    self.observe: Callable[
      [pool_lib.Job, list[step_lib.StepOutcome], float], None
    ] = lambda job, outcomes, seconds: None
    self._begin = jax.jit(begin)
    self._end = jax.jit(end)

  def warm_up(self) -> tuple[ct.Params, ct.Message]:
    """Compiles the programs of a lease with one sequence per step.

    Returns:
      Zero parameters, and a message.
    """
    params = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype), self._shared_model.abstract_params
    )
    tokens_1xL1 = np.zeros((1, self._context + 1), np.int32)
    job = pool_lib.Job(0, 0, b'', 0, 1, tokens_1xL1)
    return params, self.train(params, job)[0]

  def compile(self, batch: int) -> None:
    """Compiles the step of leases with so many sequences per step."""
    state = jax.eval_shape(self._begin, self._shared_model.abstract_params)
    tokens_BxL1 = jax.ShapeDtypeStruct((batch, self._context + 1), jnp.int32)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    self._step.lower(*state, tokens_BxL1, number, number).compile()

  def train(
    self, params: ct.Params, job: pool_lib.Job
  ) -> tuple[ct.Message, float]:
    """Trains a lease; returns the message and the mean loss.

    Args:
      params: the parameters with the id `job.base`.
      job: the lease.

    Raises:
      DivergedError: the loss is not finite.
    """
    local, inner = self._begin(params)
    outcomes, began = [], time.perf_counter()
    for k, tokens_BxL1 in enumerate(np.split(job.tokens_NxL1, job.steps)):
      local, inner, outcome = self._step(
        local, inner, tokens_BxL1, np.int32(job.step + k), np.int32(0)
      )
      outcomes.append(outcome)
    outcomes = jax.device_get(outcomes)
    self.observe(job, outcomes, time.perf_counter() - began)
    loss = float(np.mean([outcome.nats for outcome in outcomes]))
    if not np.isfinite(loss):
      raise local_lib.DivergedError(
        f'round {job.round}, lease {job.number}: the loss is {loss}; lower '
        'optim.inner.learning_rate'
      )
    return self.compress(params, local), loss

  def compress(self, start: ct.Params, end: ct.Params) -> ct.Message:
    """Returns the message of a worker that moved from `start` to `end`."""
    return jax.device_get(self._end(start, end))

  def encode(
    self, job: pool_lib.Job, message: ct.Message, sign: ct.Sign
  ) -> bytes:
    """Encodes a message as a signed payload."""
    shared_model = self._shared_model
    header = job.header(shared_model.run)
    return payload.encode(
      header, message, shared_model.abstract_params, self._spec, sign
    )

  def parameters(self, data: bytes) -> ct.Params:
    """Parses serialized parameters; raises ValueError on a wrong size."""
    leaves, treedef = jax.tree.flatten(self._shared_model.abstract_params)
    sizes = [4 * int(np.prod(x.shape)) for x in leaves]
    if sum(sizes) != len(data):
      raise ValueError(f'expected {sum(sizes)} bytes, got {len(data)}')
    ends = np.cumsum([0, *sizes])
    return treedef.unflatten(
      jnp.asarray(np.frombuffer(data[a:b], '<f4').reshape(x.shape), x.dtype)
      for x, a, b in zip(leaves, ends[:-1], ends[1:], strict=True)
    )


PoolUnreachableError = client_lib.PoolUnreachableError


class Worker:
  """A worker that trains leases until it is stopped.

  Args:
    config: the config of the run, with `pool.url`.
    workdir: the folder of status.json.

  Raises:
    ConfigError: `pool.url` is missing or the key cannot be read.
  """

  def __init__(
    self, config: config_lib.Config, workdir: str | os.PathLike[str]
  ):
    if urllib.parse.urlsplit(config.pool.url).scheme not in ('http', 'https'):
      raise config_lib.ConfigError(
        'pool.url: expected that of a pool, http://HOST:PORT, got '
        f'{config.pool.url!r}'
      )
    self._config = self._followed = config
    self._key = read_key(config.pool.key)
    self._shared_model = shared_state_lib.SharedModel(config)
    self._lease_trainer = LeaseTrainer(config, self._shared_model)
    self._client = client_lib.Client(
      config.pool.url,
      self._key,
      self._shared_model.run,
      config.pool.hotkey,
    )
    self._workdir = workdir_lib.Workdir(workdir, 'worker', self._key.address)
    self._workdir.measure(config)
    self._meter = step_meter.StepMeter(
      config, self._shared_model.method, self._workdir.telemetry
    )
    self._base = b''
    self._params: ct.Params = None
    self._round = -1
    self._counts: dict[str, int] = {}  # verdicts in this round

  def run(self, stop: Callable[[], bool]) -> None:
    _say(f'worker {self._key.address} of {self._config.pool.url}')
    self._lease_trainer.warm_up()
    self._lease_trainer.observe = self._observe
    self._workdir.status(phase='ready')
    wait, batch = 0.0, 2
    measured = self._workdir.telemetry
    while not stop():
      measured.pulse(max(self._round, 0), self._config.network.block_seconds)
      try:
        seconds, wait = self._turn(), 0.0
      except PoolUnreachableError as e:
        seconds = wait = min(2 * wait + 0.5, _LONGEST_WAIT)
        self._workdir.status(error=str(e))
        _say(f'{e}; again in {wait:.0f} s')
      # Leases double the batch: before the first one there is time to compile.
      if self._round < 0 and batch <= self._config.pool.batch:
        self._lease_trainer.compile(batch)
        batch *= 2
        continue
      _sleep(seconds, stop)
      measured.waited(seconds)
    measured.close()
    if self._round >= 0:
      self._tell()

  def _turn(self) -> float:
    """Trains one lease if available; returns the seconds until the next."""
    most = self._config.pool.batch
    text, data = self._client.ask(
      'POST', f'/lease?most={most}', longest=1 << 30
    )
    if 'wait' in text:
      try:
        return min(max(0.0, float(text['wait'])), _LONGEST_WAIT)
      except messages.MALFORMED as e:
        raise PoolUnreachableError(f'/lease: {e}') from None
    job = read_lease(text, data, self._config.data.context)
    self._follow(text.get('amendments', []), job.round)
    if job.round != self._round:
      self._tell()
      self._round, self._counts = job.round, {}
    if job.base != self._base:
      self._fetch(job.base)
    try:
      message, loss = self._lease_trainer.train(self._params, job)
    except local_lib.DivergedError as e:
      self._workdir.status(error=str(e))  # the pool gives the lease to others
      _say(str(e))
      return _LONGEST_WAIT
    sent = self._lease_trainer.encode(job, message, self._key.sign)
    path = f'/delta?number={job.number}&loss={loss:.6f}'
    text, _ = self._client.ask('POST', path, sent)
    verdict = str(text.get('verdict'))
    self._counts[verdict] = self._counts.get(verdict, 0) + 1
    self._workdir.status(round=job.round, leases=self._counts, error='')
    if verdict != 'VALID':
      _say(f'round {job.round}, lease {job.number}: {text.get("text")}')
    return 0.0

  def _follow(self, raw: ct.Json, round_index: int) -> None:
    """Takes the rules of a round, by the amendments that a pool sends."""
    try:
      adopted = amendment_lib.list_from_json(raw)
      if any(one.run != self._shared_model.run for one in adopted):
        raise amendment_lib.AmendmentError('amendments of another run')
      config = amendments_lib.config_at(self._config, adopted, round_index)
    except (errors.CovenantError, ValueError, TypeError, KeyError) as e:
      raise PoolUnreachableError(f'/lease: {e}') from None
    if config != self._followed:
      model = self._shared_model.amended(config)
      self._followed = config
      self._lease_trainer = LeaseTrainer(config, model)
      self._lease_trainer.observe = self._observe
      self._workdir.telemetry.follow(config)

  def _observe(
    self,
    job: pool_lib.Job,
    outcomes: list[step_lib.StepOutcome],
    seconds: float,
  ) -> None:
    """Measures the steps of a lease."""
    for k, (loss, norm) in enumerate(outcomes):
      self._meter.add(
        telemetry_lib.Measured(
          job.round + 1,
          job.step + k,
          job.batch * self._config.data.context,
          float(loss) if np.isfinite(loss) else None,
          float(norm) if np.isfinite(norm) else None,
          seconds / len(outcomes),
          0.0,
        )
      )

  def _fetch(self, base: bytes) -> None:
    size = self._shared_model.spec.dense_bytes
    path = f'/parameters?base={base.hex()}'
    text, data = self._client.ask('GET', path, longest=size)
    try:
      if pool_lib.parameters_id(data, bytes.fromhex(text['salt'])) != base:
        raise ValueError('damaged on the way')
      self._params = self._lease_trainer.parameters(data)
    except messages.MALFORMED as e:
      raise PoolUnreachableError(f'/parameters: {e}') from None
    self._base = base

  def _tell(self) -> None:
    """Prints the earnings so far, at the end of a round."""
    of = ledger_lib.Account._fields
    try:
      account, _ = self._client.ask('GET', '/account')
      account = {name: int(account.get(name, 0)) for name in of}
    except (PoolUnreachableError, *messages.MALFORMED) as e:
      _say(f'/account: {e}')
      return
    self._workdir.status(account=account)
    if self._round < 0:
      return
    tao = [f'{name} {account[name] / ledger_lib.RAO:.9f}' for name in of]
    leases = ', '.join(f'{n} {v}' for v, n in sorted(self._counts.items()))
    _say(f'round {self._round}: leases: {leases}; TAO: {", ".join(tao)}')


def read_lease(
  text: dict[str, ct.Json], data: bytes, context: int
) -> pool_lib.Job:
  """Parses a lease; raises PoolUnreachableError if it is malformed."""
  try:
    tokens = np.frombuffer(data, '<i4').astype(np.int32)
    tokens_NxL1 = tokens.reshape(-1, context + 1)
    job = pool_lib.Job(
      int(text['round']),
      int(text['number']),
      bytes.fromhex(text['base']),
      int(text['step']),
      int(text['steps']),
      tokens_NxL1,
    )
    job.header(bytes(16))  # computes the receipt
  except (KeyError, TypeError, ValueError, OverflowError) as e:
    raise PoolUnreachableError(f'/lease: not a lease: {e}') from None
  numbers = job.round, job.number, job.step
  if min(numbers) < 0 or max(numbers) >= 2**32 or len(job.base) != 16:
    raise PoolUnreachableError(f'/lease: not a lease: {numbers}')
  if job.steps < 1 or not job.batch or len(tokens_NxL1) % job.steps:
    raise PoolUnreachableError(
      f'/lease: {len(tokens_NxL1)} sequences in {job.steps}'
    )
  return job


def read_key(path: str) -> keys.Key:
  """Reads a key file, and creates it, readable by its owner, if missing.

  Raises:
    ConfigError: the file cannot be read or created; never shows the secret.
  """
  file = pathlib.Path(path).expanduser()
  try:
    if not file.exists():
      file.parent.mkdir(parents=True, exist_ok=True)
      flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
      with os.fdopen(os.open(file, flags, 0o600), 'w') as new:
        new.write(secrets.token_hex(keys.SEED_BYTES))
    if stat.S_IMODE(file.stat().st_mode) & 0o077:
      raise config_lib.ConfigError(
        f'pool.key: others can read {file}; chmod 600 {file}'
      )
    return keys.Key.from_seed(bytes.fromhex(file.read_text().strip()))
  except OSError as e:
    raise config_lib.ConfigError(f'pool.key: {file}: {e.strerror}') from None
  except ValueError as e:
    if isinstance(e, config_lib.ConfigError):
      raise
    raise config_lib.ConfigError(
      f'pool.key: {file} does not hold a key: {keys.SEED_BYTES} bytes as hex'
    ) from None


def _sleep(seconds: float, stop: Callable[[], bool]) -> None:
  until = time.monotonic() + seconds
  while not stop() and (left := until - time.monotonic()) > 0:
    time.sleep(min(left, _LOOK_SECONDS))


def _say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)
