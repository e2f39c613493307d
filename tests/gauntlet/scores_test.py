import dataclasses
import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized
from hypothesis import given
from hypothesis import strategies as st

from covenant import config as config_lib
from covenant.data import assignment
from covenant.gauntlet import scores
from covenant.gauntlet import units
from covenant.models import llama
from covenant.models import loss as loss_lib
from covenant.models import sharding
from covenant.optim import algorithm as algorithm_lib
from covenant.optim import sparseloco
from covenant.train import placement as placement_lib

SEQUENCES = 1000


class ScoresTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.config = config_lib.Config(
      model=config_lib.Model(
        vocab_size=64, width=16, layers=1, heads=2, kv_heads=2, ffn_width=32
      ),
      data=config_lib.Data(context=16),
      optim=config_lib.Optim(
        compression=config_lib.Compression(k=16, block=(16, 16))
      ),
    )
    cls.method = algorithm_lib.make(cls.config)
    init = functools.partial(llama.init, cls.config.model)
    cls.params = jax.jit(init)(jax.random.key(0))
    cls.scorer = scores.Scorer(cls.config, cls.method, cls.params)
    draw = np.random.default_rng(0)
    shape = (24, cls.config.data.context + 1)
    tokens = draw.integers(0, cls.config.model.vocab_size, shape, np.int32)
    cls.random, cls.own, cls.other = tokens[:8], tokens[8:16], tokens[16:]

    def compressed(params, tokens, scale):
      """Returns the message of a peer that took one step on `tokens`."""
      _, delta = loss_lib.next_token_gradient(cls.config.model, params, tokens)
      delta = jax.tree.map(lambda x: scale * x, delta)
      return sparseloco.compress(delta, None, cls.method.compression, None)[0]

    cls.compressed = staticmethod(jax.jit(compressed))
    cls.honest = cls.message(3.0)

  @classmethod
  def message(cls, scale):
    return jax.device_get(cls.compressed(cls.params, cls.own, scale))

  def open(self, messages=()):
    return self.scorer.open(
      self.params, self.params, dict(enumerate(messages)), self.random
    )

  def test_matches_the_formula(self):
    score = self.scorer.score(self.open([self.honest]), self.honest, self.own)
    rate = 0.2 * self.config.optim.outer.learning_rate

    @jax.jit
    def step(params, message):
      compression = self.method.compression
      delta = sparseloco.decompress(message, params, compression)
      return jax.tree.map(lambda p, d: p - rate * d, params, delta)

    @jax.jit
    def nats(params, tokens):
      return loss_lib.next_token_loss(self.config.model, params, tokens).nats

    def loss(params, tokens):
      return float(nats(params, tokens))

    after = step(self.params, self.honest)

    own = loss(self.params, self.own) - loss(after, self.own)
    random = loss(self.params, self.random) - loss(after, self.random)
    self.assertAlmostEqual(score.own_gain, own, places=5)
    self.assertAlmostEqual(score.gain, random, places=5)
    proof = self.worse(after, self.own) - self.worse(after, self.random)
    self.assertAlmostEqual(score.proof, proof, places=5)
    noise = self.excess(after, self.random).std()
    own, random = (
      np.clip(self.excess(after, tokens) / noise, -8, 8)
      for tokens in (self.own, self.random)
    )
    self.assertAlmostEqual(score.noise, noise, places=5)
    self.assertAlmostEqual(
      score.level, noise * (own.mean() - random.mean()), places=5
    )
    self.assertAlmostEqual(
      score.square, noise * ((own**2).mean() - (random**2).mean()), places=5
    )
    self.assertAlmostEqual(
      sum(score.parts) / 16, score.own_gain - score.gain, places=5
    )
    self.assertAlmostEqual(
      score.loss_random, loss(self.params, self.random), places=5
    )

  def worse(self, after, tokens):
    """The mean excess gain of the half of the units that gain least."""
    excess = np.sort(np.ravel(self.excess(after, tokens)))
    return float(excess[: 2 * len(tokens)].mean())

  def excess(self, after, tokens):
    """What the quarters of sequences gain, less the mean on random data."""

    def gain(tokens):
      before_Nx16, after_Nx16 = (
        np.asarray(self.scorer.losses(p, tokens), np.float64)
        for p in (self.params, after)
      )
      return (before_Nx16 - after_Nx16).reshape(len(tokens), 4, 4).mean(2)

    return gain(tokens) - gain(self.random).mean(0)

  @pytest.mark.slow
  def test_measured_on_the_way_of_the_rounds_step(self):
    """Elements that others send, too, gain less after a part of their step."""
    delta = sparseloco.decompress(
      self.honest, self.params, self.method.compression
    )
    after = jax.tree.map(lambda p, d: p - 3 * d, self.params, delta)
    messages = {0: self.honest}
    alone = self.open([self.honest])
    shared = self.scorer.open(self.params, after, messages, self.random)
    expected = jax.tree.map(lambda p, a: p + 0.2 * (a - p), self.params, after)
    for x, y in zip(
      jax.tree.leaves(shared.params), jax.tree.leaves(expected), strict=True
    ):
      np.testing.assert_allclose(x, y, atol=1e-6)
    self.assertLess(
      self.scorer.score(shared, self.honest, self.own).own_gain,
      self.scorer.score(alone, self.honest, self.own).own_gain,
    )

  def test_half_trained_data_prove_less_than_half(self):
    """The half that was not trained on is the worse half."""
    mixed = np.concatenate([self.own[:4], self.other[:4]])
    shared = self.open([self.honest])
    whole = self.scorer.score(shared, self.honest, self.own)
    half = self.scorer.score(shared, self.honest, mixed)
    self.assertLess(half.proof, 0.5 * whole.proof)

  def test_trained_halves_of_sequences_prove_less(self):
    """Nearly as much is learned in the mean, and little of the worse half."""
    whole = self.scorer.score(self.open(), self.honest, self.own)
    end = self.own.shape[1] // 2 + 1
    first = jax.device_get(self.compressed(self.params, self.own[:, :end], 3.0))
    half = self.scorer.score(self.open(), first, self.own)
    learned, usual = (s.own_gain - s.gain for s in (half, whole))
    self.assertGreater(learned, 0.6 * usual)
    self.assertLess(half.proof, 0.4 * whole.proof)
    early, late = np.split(np.array(half.parts), 2)
    self.assertGreater(early.mean(), 4 * abs(late.mean()))

  @given(st.lists(st.floats(-9, 9), min_size=4, max_size=40))
  def test_the_worse_half(self, values):
    x_NxH = np.array(values)[:, None] + np.array([0.0, 1.0])
    mean, error = units.worse_half(x_NxH)
    self.assertLessEqual(mean, x_NxH.mean() + 1e-9)
    shifted, same = units.worse_half(x_NxH + 1)
    self.assertAlmostEqual(shifted, mean + 1)
    self.assertAlmostEqual(same, error)

  @parameterized.parameters((1.2, 0.51), (2.0, 0.75), (20.0, 1.23))
  def test_a_half_that_is_trained_more_strongly_proves_more(self, times, part):
    """The limit of the rule in docs/gauntlet.md, for normal noise."""
    gain, normal = 0.65, statistics.NormalDist()

    def noise(size):
      ranks = (np.arange(size) + 0.5) / size
      return np.array([*map(normal.inv_cdf, ranks)])

    def proof(found):
      return units.worse_half(found[:, None])[0] - lowest

    lowest = units.worse_half(noise(512)[:, None])[0]
    half = np.concatenate([noise(256) + times * gain, noise(256)])
    ratio = proof(half) / proof(noise(512) + gain)
    self.assertAlmostEqual(ratio, part, delta=0.01)

  def test_the_error_of_the_worse_half(self):
    draw = np.random.default_rng(0)
    found = [units.worse_half(x) for x in draw.normal(size=(4000, 16, 2))]
    means, errors = np.array(found).T
    self.assertAlmostEqual(errors.mean() / means.std(), 1.0, delta=0.1)

  @pytest.mark.slow
  def test_on_a_mesh_scores_are_the_same(self):
    """Within 1e-5 nats, and the parameters stay as they are, bit for bit."""
    self.on_a_mesh(1, 2, 2)

  @parameterized.parameters((1, 4, 1), (2, 2, 1), (4, 1, 1))
  @pytest.mark.slow
  def test_on_other_meshes_scores_are_the_same(self, data, fsdp, tensor):
    self.on_a_mesh(data, fsdp, tensor)

  def on_a_mesh(self, data, fsdp, tensor):
    """Compares the scores on a mesh with those on one device."""
    config = dataclasses.replace(
      self.config,
      model=dataclasses.replace(self.config.model, width=64, ffn_width=64),
      data=dataclasses.replace(self.config.data, context=16),
    )
    init = functools.partial(llama.init, config.model)
    params = jax.jit(init)(jax.random.key(0))
    _, delta = jax.jit(
      functools.partial(loss_lib.next_token_gradient, config.model)
    )(params, self.own)
    delta = jax.tree.map(lambda x: 3.0 * x, delta)
    message, _ = sparseloco.compress(delta, None, self.method.compression, None)
    message = jax.device_get(message)
    after = jax.tree.map(lambda x: x * np.float32(0.999), params)
    alone = scores.Scorer(config, self.method, params)
    whole = alone.open(params, after, {0: message}, self.random)
    expected = alone.score(whole, message, self.own)

    devices = config_lib.Devices(data=data, fsdp=fsdp, tensor=tensor)
    place = placement_lib.Placement(sharding.mesh(devices, jax.devices()))
    scorer = scores.Scorer(config, self.method, params, place, budget=512)
    before = place.to_home(params, fresh=True)
    shared = scorer.open(
      before,
      place.to_home(after),
      {0: message},
      self.random,
      consume=True,
    )
    self.assertTrue(jax.tree.leaves(before)[0].is_deleted())
    start = jax.device_get(shared.params)
    for _ in range(2):  # the second peer finds what the first one found
      score = scorer.score(shared, message, self.own)
      for field in dataclasses.fields(scores.Score):
        np.testing.assert_allclose(
          getattr(score, field.name), getattr(expected, field.name), atol=5e-6
        )
    for x, y in zip(
      jax.tree.leaves(shared.params), jax.tree.leaves(start), strict=True
    ):
      np.testing.assert_array_equal(x, y)

  def test_own_data_gains_where_it_was_trained_on(self):
    shared = self.open([self.honest])
    honest = self.scorer.score(shared, self.honest, self.own)
    self.assertGreater(honest.proof, 3 * honest.proof_error)
    copier = self.scorer.score(shared, self.honest, self.other)
    self.assertLess(abs(copier.proof), 2 * copier.proof_error)

  def test_sign_flipped_update_loses(self):
    flipped = self.message(-3.0)
    score = self.scorer.score(self.open([self.honest]), flipped, self.own)
    self.assertLess(score.own_gain, -2 * score.own_gain_error)

  def test_clipped_to_the_median_norm(self):
    shared = self.open([self.honest, self.honest, self.message(300.0)])
    huge = self.scorer.score(shared, self.message(300.0), self.own)
    honest = self.scorer.score(shared, self.honest, self.own)
    self.assertAlmostEqual(huge.gain, honest.gain, places=5)
    free = self.scorer.score(self.open(), self.message(300.0), self.own)
    self.assertGreater(abs(free.gain - honest.gain), 0.01)

  @pytest.mark.slow
  def test_a_second_validator_gets_the_same_bits(self):
    other = scores.Scorer(self.config, self.method, self.params)
    messages = [self.honest, self.message(1.0), self.message(-1.0)]
    numbered = dict(enumerate(messages))
    backwards = dict(reversed(numbered.items()))
    one = self.scorer.open(self.params, self.params, numbered, self.random)
    two = other.open(self.params, self.params, backwards, self.random)
    first = [self.scorer.score(one, m, self.own) for m in messages]
    second = [other.score(two, m, self.own) for m in reversed(messages)]
    self.assertEqual(first, second[::-1])

  def test_an_overflow_is_a_number(self):
    broken = jax.tree.map(
      lambda x: x if x.dtype.kind in 'iu' else np.full_like(x, 1e30),
      self.message(1.0),
    )
    score = self.scorer.score(self.open(), broken, self.own)
    for value in dataclasses.astuple(score):
      self.assertTrue(np.isfinite(value).all())
    self.assertLess(score.gain, -1)

  def test_diverged_parameters_are_named(self):
    params = jax.tree.map(lambda x: x * jnp.nan, self.params)
    with self.assertRaisesRegex(ValueError, 'diverged'):
      self.scorer.open(params, params, {}, self.random)


class SequencesTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.config = config_lib.Config(
      optim=config_lib.Optim(
        inner_steps=5, inner=config_lib.Inner(batch_size=8)
      )
    )
    self.assigned = {
      uid: set(assignment.assign(b'block', uid, 7, 40, SEQUENCES).tolist())
      for uid in range(20)
    }

  def own(self, uid, seed=b'later'):
    ids = scores.own_ids(self.config, uid, 7, SEQUENCES, b'block', seed)
    return ids.tolist()

  def random(self, uids=20, seed=b'later'):
    ids = scores.random_ids(self.config, uids, 7, SEQUENCES, b'block', seed)
    return ids.tolist()

  def test_own_are_assigned_and_random_are_nobodys(self):
    for uid, assigned in self.assigned.items():
      own = self.own(uid)
      self.assertLen(set(own), 16)
      self.assertContainsSubset(own, assigned)
    random = self.random()
    self.assertLen(set(random), 16)
    self.assertEmpty(set(random) & set.union(*self.assigned.values()))

  def test_who_says_less_is_evaluated_on_that_but_for_the_number(self):
    assigned = assignment.assign(b'block', 3, 7, 40, SEQUENCES).tolist()
    for claimed, seen in ((40, 40), (24, 24), (3, 16)):
      own = scores.own_ids(
        self.config, 3, 7, SEQUENCES, b'block', b'later', claimed
      )
      self.assertLen(set(own.tolist()), 16)
      self.assertContainsSubset(own.tolist(), assigned[:seen])

  def test_the_seed_decides(self):
    self.assertEqual(self.own(3), self.own(3))
    self.assertNotEqual(self.own(3), self.own(3, b'x'))
    self.assertNotEqual(self.random(), self.random(seed=b'x'))

  def test_too_little_data_is_said(self):
    self.assertLen(self.random(uids=24), 16)
    with self.assertRaisesRegex(ValueError, 'beyond the 1000 of 25 miners'):
      self.random(uids=25)


if __name__ == '__main__':
  absltest.main()
