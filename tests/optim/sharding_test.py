"""SparseLoCo where each peer's parameters are sharded over devices of its own.

How much of the parameters a shard holds, JAX says in their types: 'fsdp' and
'tensor' are explicit mesh axes.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.optim import diloco
from covenant.optim import inner as inner_lib
from covenant.optim import sparseloco as sl
from covenant.optim import topk_variants
from covenant.optim.baselines import demo
from covenant.optim.baselines import sparta

P = jax.P
AUTO = jax.sharding.AxisType.Auto

# Shards of whole 16 x 16 blocks, so that cutting them changes nothing.
WHOLE = {
  'rows': ((64, 32), P('fsdp', None)),
  'columns': ((16, 128), P(None, 'fsdp')),
  'norm': ((48,), P()),
}
TARGETS = np.array([0.5, 3.0], np.float32)  # of two peers
TILES = sl.TopK(k=8, block=(16, 16))
# Ranks 0 to 3, two dtypes, shards that no block divides.
ODD = {
  'scalar': ((), P()),
  'vector': ((40,), P('fsdp')),
  'rows': ((24, 7), P('fsdp', None)),
  'half': ((5, 16), P(None, 'fsdp')),
  'stack': ((8, 3, 8), P(None, None, 'fsdp')),
}
FEW = {name: ODD[name] for name in ('vector', 'rows')}
ODD_2D = ODD | {
  'rows': ((24, 12), P('fsdp', 'tensor')),
  'half': ((5, 16), P(None, ('fsdp', 'tensor'))),
  'stack': ((8, 3, 8), P('tensor', None, 'fsdp')),
}
SMALL = sl.TopK(k=4, block=(4, 4))


def random_params(layout, mesh=None, peers=None):
  """Arrays of `layout`, one a peer if there are peers, sharded on `mesh`."""
  rng = np.random.default_rng(0)
  params = {}
  for name, (shape, spec) in layout.items():
    x = np.asarray(rng.standard_normal(shape))
    x = x.astype(jnp.bfloat16 if name == 'half' else np.float32)
    if peers:
      x = np.stack([x] * peers)
      spec = P('peers' if mesh and 'peers' in mesh.axis_names else None, *spec)
    sharding = jax.NamedSharding(mesh, spec) if mesh else None
    params[name] = jax.device_put(x, sharding)
  return params


def train(tx, params, target):
  """Parameters and state after two exchanges."""

  def step(_, carry):
    params, state = carry
    gradient = jax.tree.map(lambda p: p - target, params)
    updates, state = tx.update(gradient, state, params)
    return optax.apply_updates(params, updates), state

  return jax.lax.fori_loop(0, 4, step, (params, tx.init(params)))


def train_step(tx, params, state):
  updates, state = tx.update(params, state, params)
  return optax.apply_updates(params, updates), state


def transformation(compression=None, **arguments):
  return sl.sparseloco(
    optax.sgd(0.1, momentum=0.9),
    outer=sl.nesterov(0.7, 0.5),
    inner_steps=2,
    compression=compression,
    **arguments,
  )


def types(tree):
  return jax.tree.map(jax.typeof, tree)


def collectives(text, inside='/cond/'):
  """Elements of the largest array in each collective of an exchange.

  By default only inside of `lax.cond`: a `jax.shard_map` of some of the axes
  gathers its arguments and results of its own accord before JAX 0.12, whatever
  it does.
  """
  pattern = re.compile(
    r'= (.*?) (?:all-gather|all-reduce|all-to-all|collective-permute'
    r'|reduce-scatter|collective-broadcast)(?:-start)?\('
  )
  found = []
  for line in text.splitlines():
    if inside in line and (match := pattern.search(line)):
      shapes = re.findall(r'\w+\[([\d,]*)\]', match[1])
      found.append(
        max(math.prod(int(n) for n in s.split(',') if n) for s in shapes)
      )
  return found


def assert_close(got, want):
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
    jax.device_get(got),
    jax.device_get(want),
  )


class TypesTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('fsdp', (8,), ('fsdp',), ODD, SMALL),
    ('fsdp_and_tensor', (2, 4), ('fsdp', 'tensor'), ODD_2D, SMALL),
    ('dct', (8,), ('fsdp',), FEW, topk_variants.DCTTopK(4, (4, 4))),
    ('per_tensor', (8,), ('fsdp',), FEW, sl.TopK(4, (4, 4), sl.Statistical())),
    ('dense', (8,), ('fsdp',), FEW, sl.Dense()),
  )
  @pytest.mark.slow
  def test_are_stable_and_nothing_recompiles(
    self, sizes, names, layout, compression
  ):
    mesh = jax.make_mesh(sizes, names)
    with jax.set_mesh(mesh):
      params = random_params(layout, mesh)
      tx = transformation(compression)
      state = jax.jit(tx.init)(params)
      want = types(state)
      step = jax.jit(lambda p, s: train_step(tx, p, s))
      for _ in range(4):
        params, state = step(params, state)
        self.assertEqual(types(state), want)
      self.assertEqual(step._cache_size(), 1)
      abstract = jax.eval_shape(tx.init, params)
      jax.tree.map(
        lambda a, x: self.assertEqual((a.shape, a.dtype), (x.shape, x.dtype)),
        abstract,
        state,
      )
      for tree in (
        state.anchor,
        state.error,
        state.inner[0].trace,
        state.outer.trace,
      ):
        for name, x in tree.items():
          spec = jax.typeof(params[name]).sharding.spec
          self.assertEqual(jax.typeof(x).sharding.spec, spec)

  @pytest.mark.slow
  def test_of_eager_updates_and_donated_states(self):
    mesh = jax.make_mesh((8,), ('fsdp',))
    with jax.set_mesh(mesh):
      params = random_params({'vector': ODD['vector']}, mesh)
      tx = transformation(SMALL)
      state = tx.init(params)
      want = types(state)
      for _ in range(2):
        _, state = tx.update(params, state, params)
      self.assertEqual(types(state), want)
      state = tx.init(params)
      jax.jit(tx.update, donate_argnums=1)(params, state, params)


class CommunicationTest(parameterized.TestCase):
  @parameterized.parameters(SMALL, sl.Dense())
  @pytest.mark.slow
  def test_of_one_peer_is_norms_and_statistics(self, compression):
    mesh = jax.make_mesh((2, 4), ('fsdp', 'tensor'))
    with jax.set_mesh(mesh):
      params = random_params(
        {'large': ((256, 64), P('fsdp', 'tensor')), **FEW}, mesh
      )
      tx = transformation(compression)
      step = jax.jit(tx.update).lower(params, tx.init(params), params)
      found = collectives(step.compile().as_text())
    self.assertNotEmpty(found)
    self.assertLessEqual(max(found), 64)

  @pytest.mark.slow
  def test_leaves_on_different_axes_take_four_collectives(self):
    mesh = jax.make_mesh((2, 2, 2), ('peers', 'fsdp', 'tensor'))
    specs = P('fsdp', 'tensor'), P('fsdp'), P(None, 'tensor'), P()
    layout = {f'w{i}': ((32, 32), spec) for i, spec in enumerate(specs)}
    with jax.set_mesh(mesh):
      params = random_params(layout, mesh, peers=2)
      tx = transformation(SMALL, axis_name='peers')
      state = on_peers(tx.init)(params)
      step = on_peers(functools.partial(train_step, tx)).lower(params, state)
      found = collectives(step.compile().as_text())
    self.assertLen(found, 4)

  @pytest.mark.slow
  def test_of_two_peers_is_the_messages_of_shards(self):
    mesh = jax.make_mesh((2, 4), ('peers', 'fsdp'))
    with jax.set_mesh(mesh):
      params = random_params({'w': ((256, 64), P('fsdp', None))}, mesh, peers=2)
      tx = transformation(sl.TopK(k=50), axis_name='peers')
      state = on_peers(tx.init)(params)
      step = on_peers(functools.partial(train_step, tx)).lower(params, state)
      found = collectives(step.compile().as_text())
    # Of 2 peers one block each: 464 bits in 15 words, a scale, weight and flag.
    # A dense shard has 4096 elements.
    self.assertEqual(max(found), 2 * 18)


def on_peers(f):
  """`f` of one peer on arrays that have a leading axis of peers."""

  def one(*arrays):
    mine = jax.tree.map(lambda x: x[0], arrays)
    return jax.tree.map(lambda x: x[None], f(*mine))

  spec = P('peers')
  return jax.jit(
    jax.shard_map(one, in_specs=spec, out_specs=spec, axis_names={'peers'})
  )


@functools.cache
def two_unsharded_peers():
  """Their norms differ, so that the larger is clipped, per tensor."""
  run = functools.partial(train, transformation(TILES, axis_name='peers'))
  by_vmap = jax.jit(jax.vmap(run, axis_name='peers'))
  return by_vmap(random_params(WHOLE, peers=2), TARGETS)


class NumericsTest(absltest.TestCase):
  """Shards that are whole blocks give the result of whole tensors."""

  @pytest.mark.slow
  def test_of_one_peer(self):
    tx, target = transformation(TILES), jnp.float32(0.5)
    want = jax.jit(functools.partial(train, tx))(random_params(WHOLE), target)
    mesh = jax.make_mesh((2, 4), ('other', 'fsdp'))
    with jax.set_mesh(mesh):
      got = jax.jit(functools.partial(train, tx))(
        random_params(WHOLE, mesh), target
      )
    self.assertGreater(want[1].stats.error_norm, 0)
    assert_close(got, want)

  @pytest.mark.slow
  def test_of_two_peers(self):
    tx = transformation(TILES, axis_name='peers')
    run = functools.partial(train, tx)
    want = two_unsharded_peers()
    mesh = jax.make_mesh((2, 4), ('peers', 'fsdp'))
    with jax.set_mesh(mesh):
      params = random_params(WHOLE, mesh, peers=2)
      targets = jax.device_put(TARGETS, jax.NamedSharding(mesh, P('peers')))
      assert_close(on_peers(run)(params, targets), want)
    mesh = jax.make_mesh((4,), ('fsdp',), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
      params = random_params(WHOLE, mesh, peers=2)
      by_vmap = jax.jit(jax.vmap(run, axis_name='peers'))
      assert_close(by_vmap(params, TARGETS), want)

  @pytest.mark.slow
  def test_of_shards_by_hand(self):
    """All axes manual: what there is to do where they are automatic."""
    tx = transformation(TILES, axis_name='peers')
    run = functools.partial(train, tx)
    want, _ = two_unsharded_peers()
    mesh = jax.make_mesh((2, 4), ('peers', 'fsdp'), (AUTO, AUTO))
    specs = {name: P('peers', *spec) for name, (_, spec) in WHOLE.items()}

    def shard(params, targets):
      params = jax.tree.map(lambda x: x[0], params)
      params, state = run(params, targets[0])
      return jax.tree.map(lambda x: x[None], (params, state.stats.error_norm))

    got, _ = jax.jit(
      jax.shard_map(
        shard,
        mesh=mesh,
        in_specs=(specs, P('peers')),
        out_specs=(specs, P('peers')),
      )
    )(random_params(WHOLE, peers=2), TARGETS)
    assert_close(got, want)


def baselines(axis_name):
  """Algorithms that are not `sparseloco` with other arguments."""
  return {
    'demo': demo.demo(
      0.1,
      compression=topk_variants.DCTTopK(8, (16, 16), sl.Exact()),
      error_decay=0.5,
      axis_name=axis_name,
    ),
    'sparta': sparta.sparta(optax.sgd(0.1), p=0.05, axis_name=axis_name),
    'streaming': diloco.streaming_diloco(
      optax.sgd(0.1), inner_steps=2, fragments=2, overlap=1, mixing=0.5,
      axis_name=axis_name,
    ),
  }  # fmt: skip


class BaselinesTest(parameterized.TestCase):
  """Two peers by `jax.vmap`, whose shards share the devices of 'fsdp'."""

  def setUp(self):
    super().setUp()
    self.mesh = jax.make_mesh((4,), ('fsdp',), devices=jax.devices()[:4])

  def compile(self, name, mesh):
    run = functools.partial(train, baselines('peers')[name])
    arguments = random_params(WHOLE, mesh, peers=2), TARGETS
    lowered = jax.jit(jax.vmap(run, axis_name='peers')).lower(*arguments)
    return lowered.compile(), arguments

  @parameterized.parameters('demo', 'sparta', 'streaming')
  @pytest.mark.slow
  def test_nothing_leaves_a_shard_and_its_blocks_are_those_of_the_whole(
    self, name
  ):
    whole, arguments = self.compile(name, None)
    want = whole(*arguments)
    with jax.set_mesh(self.mesh):
      compiled, arguments = self.compile(name, self.mesh)
      params, state = compiled(*arguments)
      self.assertEqual(types(params), types(arguments[0]))
    # But whether a delta is finite, and weights: a few numbers per peer.
    found = collectives(compiled.as_text(), '')
    self.assertLessEqual(max(found, default=0), 0 if name == 'sparta' else 10)
    if name != 'sparta':  # which draws other elements
      assert_close((params, state), want)

  @pytest.mark.slow
  def test_every_shard_of_sparta_draws_its_own(self):
    """Peers agree just where it was averaged, as their gradients differ."""
    tx = baselines('peers')['sparta']

    def step(params, target):
      gradient = jax.tree.map(lambda p: p - target, params)
      updates, _ = tx.update(gradient, tx.init(params), params)
      return optax.apply_updates(params, updates)

    with jax.set_mesh(self.mesh):
      params = random_params(WHOLE, self.mesh, peers=2)
      step = jax.jit(jax.vmap(step, axis_name='peers'))
      rows_2x64x32 = np.asarray(step(params, TARGETS)['rows'])
    agreed_4xN = np.isclose(*rows_2x64x32, atol=1e-6).reshape(4, -1)
    self.assertEqual(agreed_4xN.sum(axis=1).tolist(), [26] * 4)  # of 512
    self.assertLess(np.all(agreed_4xN, axis=0).sum(), 5)


class CompositionTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.mesh = jax.make_mesh((8,), ('fsdp',))
    self.enter_context(jax.set_mesh(self.mesh))
    self.params = random_params(FEW, self.mesh)

  def check(self, tx):
    state = jax.jit(tx.init)(self.params)
    want = types(state)
    step = jax.jit(lambda p, s: train_step(tx, p, s))
    params = self.params
    for _ in range(3):
      params, state = step(params, state)
      self.assertEqual(types(state), want)
    self.assertEqual(step._cache_size(), 1)
    return params, state

  @pytest.mark.slow
  def test_inject_hyperparams(self):
    inject = optax.inject_hyperparams(sl.sparseloco, static_args='inner_steps')
    arguments = dict(inner_steps=2, compression=SMALL)
    tx = inject(
      optax.sgd(0.1), error_decay=optax.constant_schedule(0.5), **arguments
    )
    got, state = self.check(tx)
    self.assertEqual(state.hyperparams['error_decay'], 0.5)
    plain = sl.sparseloco(optax.sgd(0.1), error_decay=0.5, **arguments)
    want, _ = self.check(plain)
    assert_close(got, want)

  def test_masked_and_chain(self):
    _, state = self.check(
      optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.masked(transformation(SMALL), {'vector': True, 'rows': False}),
      )
    )
    error = state[1].inner_state.error
    self.assertIsInstance(error['rows'], optax.MaskedNode)
    self.assertEqual(jax.typeof(error['vector']).sharding.spec, P('fsdp'))

  def test_nothing_to_train(self):
    nothing = {'vector': False, 'rows': False}
    self.check(optax.masked(transformation(SMALL), nothing))


class InnerTest(absltest.TestCase):
  def test_muon_of_the_nodes_refuses_sharded_matrices(self):
    tx = inner_lib.make(config_lib.Inner(kind='muon'))
    mesh = jax.make_mesh((2, 4), ('fsdp', 'tensor'))
    with jax.set_mesh(mesh):
      whole = random_params({'rows': ((8, 8), P()), 'v': ODD['vector']}, mesh)
      jax.jit(tx.update)(whole, tx.init(whole), whole)
      for spec in (P('fsdp', None), P(None, 'tensor')):
        params = random_params({'rows': ((8, 8), spec)}, mesh)
        with self.assertRaisesRegex(
          ValueError, r"muon .* \['rows'\] is sharded on \('(fsdp|tensor)',\)"
        ):
          tx.init(params)

  @pytest.mark.slow
  def test_muon_descends(self):
    with jax.numpy_dtype_promotion('standard'):
      params = {'w': jnp.ones((8, 8)), 'b': jnp.ones(8)}
      tx = sl.sparseloco(
        optax.contrib.muon(0.1),
        inner_steps=3,
        compression=sl.TopK(block=(8, 8)),
      )
      state = tx.init(params)
      step = jax.jit(functools.partial(train_step, tx))  # of |params|^2 / 2
      losses = [optax.tree.norm(params)]
      for _ in range(3):
        params, state = step(params, state)
        losses.append(optax.tree.norm(params))
    self.assertEqual(losses, sorted(losses, reverse=True))
    self.assertLess(losses[3], losses[0])


if __name__ == '__main__':
  absltest.main()
