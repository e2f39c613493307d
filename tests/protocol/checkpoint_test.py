"""Checkpoints across meshes and kinds of memory, and damaged ones."""

import pathlib
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.models import sharding
from covenant.node import export as export_lib
from covenant.protocol import checkpoint
from covenant.protocol import checksums
from covenant.protocol import orbax_context
from covenant.telemetry import machine
from covenant.train import local
from covenant.train import shared_state
from tests import helpers

SIZES = (dict(fsdp=4, tensor=2), dict(fsdp=4), dict(), dict(fsdp=2, tensor=4))


def mesh(**sizes):
  return sharding.mesh(config_lib.Devices(**sizes), jax.devices())


def state(where=None, seed=0):
  """Returns the state of a miner, in which no two numbers are equal."""
  shapes = {
    'embedding': (256, 32),
    'final_norm': {'gain': (32,)},
    'layers': {'ffn': {'gate': (3, 32, 64), 'down': (3, 64, 32)}},
  }
  params = jax.tree.map(
    jnp.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple)
  )
  private = local.MinerState(
    np.array(7, np.int32), optax.adamw(1e-3).init(params), params
  )
  shared = shared_state.SharedState(
    params, optax.sgd(1.0, momentum=0.9).init(params)
  )
  tree = {'shared': shared, 'private': private, 'text': '{"round": 3}'}
  rng = np.random.default_rng(seed)

  def fill(x):
    if not isinstance(x, jax.Array):
      return x
    return jnp.asarray(rng.normal(0, 9, x.shape), x.dtype)

  tree = jax.tree.map(fill, tree)
  return place(tree, where) if where else tree


def place(tree, where):
  """A state on a mesh."""
  arrays = {k: v for k, v in tree.items() if k != 'text'}
  shardings = sharding.shardings(arrays, where)
  placed = jax.tree.map(
    lambda x, s: jax.device_put(x, s) if isinstance(x, jax.Array) else x,
    arrays,
    shardings,
  )
  return placed | {'text': tree['text']}


def bits(tree):
  return [
    x if isinstance(x, str) else np.asarray(x).tobytes()
    for x in jax.tree.leaves(tree)
  ]


def where(tree):
  return [x.sharding for x in jax.tree.leaves(tree) if hasattr(x, 'sharding')]


class CheckpointTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.workdir = pathlib.Path(self.create_tempdir().full_path)
    self.folder = self.workdir / 'checkpoints'
    self.said = []

  def open(self):
    keep = config_lib.Checkpoint(keep=9)
    return checkpoint.Checkpoints(self.folder, keep, self.said.append)

  def save(self, tree, completed=1):
    with self.open() as checkpoints:
      checkpoints.save_tree(completed, tree)

  def restore(self, like):
    with self.open() as checkpoints:
      return checkpoints.restore_tree(like)

  def test_from_mesh_to_mesh_every_bit_stays(self):
    """Eight devices, four, one, eight cut otherwise, and as it was."""
    tree = want = state(mesh(**SIZES[0]))
    for i, sizes in enumerate((*SIZES, SIZES[0])):
      self.save(tree, i)
      like = state(mesh(**sizes), seed=1)
      tree = self.restore(like)
      self.assertEqual(bits(tree), bits(want))
      self.assertEqual(where(tree), where(like))
    completed, params = export_lib.newest(self.workdir)
    self.assertEqual(completed, len(SIZES))
    self.assertEqual(bits(params), bits(want['shared'].params))

  @pytest.mark.slow
  def test_whole_arrays_are_read_in_shards(self):
    """Makes them as several processes and older checkpoints do."""
    want, like = state(), state(mesh(fsdp=4), seed=1)
    self.save(
      jax.tree.map(lambda x: x if isinstance(x, str) else np.asarray(x), want)
    )
    self.assertEqual(bits(self.restore(like)), bits(want))

  @pytest.mark.slow
  def test_what_is_parked_stays_parked(self):
    def park(tree):
      return jax.tree.map(
        lambda x: jax.device_put(x, x.sharding.with_memory_kind('pinned_host')),
        tree,
      )

    def parked(**kwargs):
      tree = state(**kwargs)
      private = tree['private']
      private = private._replace(
        inner=park(private.inner), error=park(private.error)
      )
      return tree | {'private': private}

    want = parked(where=mesh(fsdp=4))
    self.save(want)
    like = parked(where=mesh(fsdp=2, tensor=2), seed=1)
    got = self.restore(like)
    self.assertEqual(bits(got), bits(want))
    self.assertEqual(where(got), where(like))
    kinds = {
      x.sharding.memory_kind for x in jax.tree.leaves(got['private'][1:])
    }
    self.assertEqual(kinds, {'pinned_host'})

  @parameterized.product(sizes=SIZES[:3], fits=(True, False))
  @pytest.mark.rows(1)
  def test_training_goes_on_in_the_same_buffers(self, sizes, fits):
    """Before anything is written, unless it does not fit on the host."""
    train = jax.jit(
      lambda tree: jax.tree.map(lambda x: x + jnp.ones_like(x), tree),
      donate_argnums=0,
    )
    tree = state(mesh(**sizes))
    want, shared = bits(tree), tree['shared']
    where = self.folder / '1'
    with (
      mock.patch.object(orbax_context, 'fits', return_value=fits),
      mock.patch.object(orbax_context, 'IN_FLIGHT', 1 << (30 if fits else 16)),
      self.open() as checkpoints,
    ):
      checkpoints.save_tree(1, tree)
      self.assertTrue(fits or where.exists())
      for _ in range(3):
        shared = train(shared)
      jax.block_until_ready(shared)
    self.assertEqual(bits(self.restore(state(mesh(**sizes), 1))), want)
    self.assertNotEqual(bits(shared), want[-len(bits(shared)) :])

  @pytest.mark.slow
  def test_a_full_disk_is_a_line_and_leaves_the_last_one(self):
    with self.open() as checkpoints:
      checkpoints.save_tree(1, state(mesh(fsdp=1)))
    with (
      mock.patch.object(machine, 'free_disk_bytes', return_value=1000),
      self.open() as checkpoints,
    ):
      with self.assertRaises(checkpoint.CheckpointError) as caught:
        checkpoints.save_tree(2, state(mesh(fsdp=1)))
    self.assertRegex(
      str(caught.exception),
      '^no checkpoint after round 2: .*: the disk is full; earlier .* whole',
    )
    self.assertNotIn('\n', str(caught.exception))
    self.assertTrue((self.folder / '1').exists())
    with self.open() as checkpoints:
      checkpoints.save_tree(2, state(mesh(fsdp=1)))  # with room again
    self.assertTrue((self.folder / '2').exists())

  @pytest.mark.slow
  def test_memory_in_flight_is_bounded(self):
    tree = state(mesh(fsdp=4))
    shard, tensor = 256 * 32, 4 * 256 * 32
    for limit, writes, reads in (
      (1, shard + 1, tensor + 1),
      (shard + 9, shard + 9, tensor + 1),
      (1 << 30, None, None),
    ):
      with mock.patch.object(orbax_context, 'IN_FLIGHT', limit):
        writing, reading = (
          orbax_context.writing(tree),
          orbax_context.reading(tree),
        )
      self.assertEqual(writing.memory.write_concurrent_bytes, writes)
      self.assertEqual(reading.memory.read_concurrent_bytes, reads)
    # These are the least that Orbax works with.
    want = bits(tree)
    with mock.patch.object(orbax_context, 'IN_FLIGHT', 1):
      self.save(tree)
      for sizes in SIZES:
        self.assertEqual(bits(self.restore(state(mesh(**sizes), 1))), want)

  @pytest.mark.slow
  def test_another_model_is_named(self):
    self.save(state())
    wider, more, fewer, other = (state() for _ in range(4))
    wider['shared'].params['embedding'] = jnp.zeros((512, 32))
    more['shared'].params['bias'] = jnp.zeros(3)
    del fewer['private'].error['embedding']
    other['shared'].params['embedding'] = jnp.zeros((256, 32), jnp.bfloat16)
    names = r'shared\.params\.'
    for like, message in (
      (wider, names + r'embedding is float32\[256, 32\] there, .*512, 32\] h'),
      (more, names + r'bias is missing there, float32\[3\] here'),
      (fewer, r'private\.error\.embedding is .* there, missing here'),
      (other, names + r'embedding .* there, bfloat16\[256, 32\] here'),
    ):
      with self.assertRaisesRegex(
        config_lib.ConfigError, f'checkpoints/1 is not of this run: {message}'
      ):
        self.restore(like)
    left_out = state()
    left_out['shared'].params['embedding'] = ...
    self.assertIsNotNone(self.restore(left_out))

  @parameterized.parameters('short', 'gone', 'metadata', 'more', 'checksums')
  @pytest.mark.rows(1)
  def test_a_damaged_one_is_named_and_set_aside(self, what):
    for completed in (1, 2):
      self.save(state(seed=completed), completed)
    files = [p for p in (self.folder / '2').rglob('*') if p.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    match what:
      case 'short':
        largest.write_bytes(largest.read_bytes()[:1000])
      case 'gone':
        largest.unlink()
      case 'metadata':
        (self.folder / '2' / 'state' / '_METADATA').write_text('{"')
      case 'more':
        (self.folder / '2' / 'state' / 'more').write_text('')
      case 'checksums':
        (self.folder / '2' / 'checksums.json').write_text('[' * 5000)
    self.assertEqual(bits(self.restore(state())), bits(state(seed=1)))
    (said,) = self.said
    self.assertIn('checkpoints/2', said)
    self.assertTrue((self.workdir / 'checkpoints.damaged' / '2').is_dir())
    self.save(state(seed=3), 2)  # its place is free
    self.assertEqual(bits(self.restore(state())), bits(state(seed=3)))
    self.assertLen(self.said, 1)

  def test_every_flipped_bit_is_noticed(self):
    """In every file, at random places of it; no other values are loaded."""
    random = np.random.default_rng(0)
    for completed in (1, 2):
      self.save(state(seed=completed), completed)
    whole = {p: p.read_bytes() for p in self.files('2')}
    for path, data in whole.items():
      for at in random.integers(0, 8 * max(len(data), 1), 3 if data else 0):
        changed = bytearray(data)
        changed[at // 8] ^= 1 << int(at % 8)
        path.write_bytes(changed)
        sound, damaged = checksums.newest_sound(self.folder, [1, 2])
        self.assertEqual((sound, list(damaged)), (1, [2]), path)
      path.write_bytes(data)
    self.assertEqual(checksums.newest_sound(self.folder, [1, 2]), (2, {}))

  @pytest.mark.slow
  def test_none_that_is_sound(self):
    for completed in (1, 2):
      self.save(state(seed=completed), completed)
      self.files(str(completed))[0].write_bytes(b'?')
    with self.assertRaisesRegex(
      config_lib.ConfigError, 'all checkpoints in .* are damaged: .*Remove them'
    ):
      self.restore(state())
    self.assertTrue((self.folder / '2').is_dir())

  @pytest.mark.slow
  def test_one_without_checksums_is_restored_and_said(self):
    """Its process died before they were written."""
    self.save(state(seed=1))
    (self.folder / '1' / 'checksums.json').unlink()
    self.assertEqual(bits(self.restore(state())), bits(state(seed=1)))
    (said,) = self.said
    self.assertIn('checkpoints/1 has no checksums, so its files', said)
    largest = max(self.files('1'), key=lambda path: path.stat().st_size)
    largest.unlink()
    with self.assertRaisesRegex(
      config_lib.ConfigError, r'checkpoints/1 cannot be read: \w+: .*Remove it'
    ):
      self.restore(state())

  def files(self, step):
    paths = sorted((self.folder / step).rglob('*'))
    return [path for path in paths if path.is_file()]


_PROGRAM = """
import pathlib, sys, threading, time
import jax
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
import jax.numpy as jnp
from covenant import config as config_lib
from covenant.models import sharding
from covenant.protocol import checkpoint
from covenant.protocol import orbax_context
from covenant.protocol import checksums
from covenant.telemetry import machine

what, folder, devices = sys.argv[1:]
orbax_context.IN_FLIGHT = 100 << 20
devices = config_lib.Devices(fsdp=int(devices))
mesh = sharding.mesh(devices, jax.devices())
like = {
  'layers': {'gate': jax.ShapeDtypeStruct((4, 2048, 16384), jnp.float32)},
  'embedding': jax.ShapeDtypeStruct((16384, 2048), jnp.float32),
  'unembedding': jax.ShapeDtypeStruct((2048, 16384), jnp.float32),
  'other': {'gate': jax.ShapeDtypeStruct((2, 2048, 16384), jnp.float32)},
}
like = jax.tree.map(
  lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
  like,
  sharding.shardings(like, mesh),
)

def resident():
  for line in pathlib.Path('/proc/self/status').read_text().splitlines():
    if line.startswith('RssAnon'):
      return int(line.split()[1]) >> 10

def watch():
  global peak
  while not done.wait(0.005):
    peak = max(peak, resident())

tree = None
if what == 'save':
  tree = jax.jit(
    lambda: jax.tree.map(lambda x: jnp.full(x.shape, 1.5), like),
    out_shardings=jax.tree.map(lambda x: x.sharding, like),
  )()
jax.block_until_ready(jax.device_put((jnp.zeros(3), tree)))
before = peak = resident()
done = threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
with checkpoint.Checkpoints(folder, config_lib.Checkpoint()) as checkpoints:
  if what == 'save':
    checkpoints.save_tree(1, tree)
  else:
    jax.block_until_ready(checkpoints.restore_tree(like))
done.set()
watcher.join()
print(peak - before)
"""


class ReadingTest(parameterized.TestCase):
  @parameterized.parameters((True, 1), (False, 2))
  def test_a_shard_at_a_time_is_read_on_the_mesh_of_the_writer(
    self, is_same, attempts
  ):
    """Elsewhere a shard lies across all chunks, which are read at once."""
    x = np.arange(4 * 64 * 64, dtype=np.float32).reshape(4, 64, 64)
    devices = jax.make_mesh((8,), ('tensor',))
    written = jax.NamedSharding(devices, jax.P(None, 'tensor'))
    spec = jax.P(None, 'tensor') if is_same else jax.P(None, None, 'tensor')
    where = jax.NamedSharding(devices, spec)
    like = {'w': jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)}
    folder, limits = self.create_tempdir().full_path, []
    real = orbax_context.reading

    def reading(*args):
      context = real(*args)
      limits.append(context.memory.read_concurrent_bytes)
      return context

    self.enterContext(mock.patch.object(orbax_context, 'IN_FLIGHT', 1 << 10))
    self.enterContext(mock.patch.object(orbax_context, '_CHUNK', 1 << 10))
    self.enterContext(mock.patch.object(orbax_context, 'reading', reading))
    with checkpoint.Checkpoints(folder, config_lib.Checkpoint()) as saved:
      saved.save_tree(1, {'w': jax.device_put(x, written)})
    with checkpoint.Checkpoints(folder, config_lib.Checkpoint()) as saved:
      found = saved.restore_tree(like)['w']
    np.testing.assert_array_equal(found, x)
    self.assertEqual(found.sharding, where)
    self.assertEqual(limits, [1 + x.nbytes // 8, 1 + x.nbytes][:attempts])


class MemoryTest(absltest.TestCase):
  @pytest.mark.slow
  def test_a_gigabyte_takes_little_more(self):
    """Mebibytes of host memory at the most, beside what there was."""
    folder = self.create_tempdir().full_path
    most = {}
    for what, devices in (('save', '8'), ('restore', '8'), ('restore', '4')):
      done = subprocess.run(
        [sys.executable, '-c', _PROGRAM, what, folder, devices],
        capture_output=True,
        text=True,
        cwd=helpers.ROOT,
        timeout=300,
      )
      self.assertEqual(done.returncode, 0, done.stderr)
      most[what, devices] = int(done.stdout)
    print(most)
    self.assertLess(most['save', '8'], 200)
    self.assertLess(most['restore', '8'], 1024 + 700)
    self.assertLess(most['restore', '4'], 1024 + 700)


if __name__ == '__main__':
  absltest.main()
