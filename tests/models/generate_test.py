"""Generation with a cache equals the model without one."""

import collections
import dataclasses
import functools

import jax
import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config
from covenant.models import generate
from covenant.models import llama

MODEL = config.Model(
  vocab_size=61, width=32, layers=2, heads=4, kv_heads=2, ffn_width=48
)
GREEDY = generate.Sampling(temperature=0.0)


def params_of(model):
  draw = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: np.float32(draw.normal(x.ndim == 1, 0.2, x.shape)),
    llama.abstract(model),
  )


def by_hand(model, params, prompt, count):
  """Returns the likeliest continuation, computed anew for each token."""
  apply = jax.jit(functools.partial(llama.apply, model))
  ids = np.zeros((1, len(prompt) + count), np.int32)
  ids[0, : len(prompt)] = prompt
  for n in range(len(prompt), ids.size):
    ids[0, n] = np.argmax(apply(params, ids)[0, n - 1])
  return ids[0, len(prompt) :].tolist()


class GenerateTest(parameterized.TestCase):
  @parameterized.parameters(
    ({}, 5), ({'scan_layers': True}, 2), ({'tie_embeddings': False}, 4)
  )
  @pytest.mark.rows(1)
  def test_the_cache_changes_nothing(self, changes, length):
    model = dataclasses.replace(MODEL, **changes)
    params = params_of(model)
    prompt = np.random.default_rng(1).integers(0, 61, length)
    got = list(generate.generate(model, params, prompt, 6, GREEDY))
    self.assertEqual(got, by_hand(model, params, prompt, 6))

  def test_a_stop_ends_it(self):
    params = params_of(MODEL)
    ids = list(generate.generate(MODEL, params, [3], 6, GREEDY))
    stop = ids[2]
    got = list(generate.generate(MODEL, params, [3], 6, GREEDY, stop))
    self.assertEqual(got, ids[: ids.index(stop)])

  def test_the_seed_decides(self):
    params = params_of(MODEL)

    def draw(seed):
      sampling = generate.Sampling(seed=seed)
      return list(generate.generate(MODEL, params, [3], 8, sampling))

    self.assertEqual(draw(1), draw(1))
    self.assertNotEqual(draw(1), draw(2))

  @parameterized.parameters(
    (generate.Sampling(), {0: 0.5, 1: 0.3, 2: 0.15, 3: 0.05}),
    (generate.Sampling(top_k=2), {0: 0.625, 1: 0.375}),
    (generate.Sampling(top_p=0.6), {0: 0.625, 1: 0.375}),
    (generate.Sampling(top_p=0.01), {0: 1.0}),
    (generate.Sampling(temperature=0.0), {0: 1.0}),
    (generate.Sampling(temperature=0.5, top_k=2), {0: 0.735, 1: 0.265}),
  )
  def test_the_draw_has_the_probabilities(self, sampling, expected):
    logits_V = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    keys = jax.random.split(jax.random.key(0), 2000)
    drawn = jax.vmap(lambda key: generate._draw(key, logits_V, sampling))(keys)
    found = collections.Counter(np.asarray(drawn).tolist())
    self.assertEqual(set(found), set(expected))
    for token, share in expected.items():
      self.assertAlmostEqual(found[token] / 2000, share, delta=0.04)

  @parameterized.parameters(
    ([], {}, '--prompt: expected one token'),
    ([61], {}, '--prompt: expected one token or more below 61'),
    ([1], {'temperature': -1.0}, '--temperature: expected 0 or more'),
    ([1], {'top_p': 0.0}, '--top_p: expected above 0'),
    ([1], {'top_k': -1}, '--top_k: expected 0 or more'),
  )
  def test_what_cannot_be_is_refused(self, prompt, changes, message):
    sampling = generate.Sampling(**changes)
    with self.assertRaisesRegex(config.ConfigError, message):
      next(generate.generate(MODEL, params_of(MODEL), prompt, 1, sampling))


if __name__ == '__main__':
  absltest.main()
