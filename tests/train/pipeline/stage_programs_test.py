"""Tests of the layers of each stage; stage_test.py tests its programs."""

import dataclasses

import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.train.pipeline import stage_programs

MODEL = config_lib.Model(width=32, layers=3, heads=2, kv_heads=1)
ISLAND = config_lib.Island(stages=2, rank=6, bits=4, layers=(2, 1))


class NamesTest(parameterized.TestCase):
  @parameterized.parameters(True, False)
  def test_every_tensor_is_trained_by_one_stage(self, tied):
    model = dataclasses.replace(MODEL, tie_embeddings=tied)
    first, last = (stage_programs.names(model, ISLAND, s) for s in range(2))
    own = [*first.own, *last.own]
    want = ['embedding', 'final_norm', 'layers_0', 'layers_1', 'layers_2']
    self.assertCountEqual(own, want if tied else [*want, 'unembedding'])
    self.assertContainsSubset(['layers_0', 'layers_1'], first.own)
    self.assertEqual('embedding' in last.own, tied)
    for names in first, last:
      self.assertCountEqual(names.held, {*names.own, 'embedding'})


class StageProgramsTest(parameterized.TestCase):
  @parameterized.parameters(
    (dict(model=dataclasses.replace(MODEL, scan_layers=True)), 'scan_layers'),
    (dict(optim=config_lib.Optim(method='ddp', inner_steps=1)), 'method'),
  )
  def test_refuses(self, changes, message):
    config = dataclasses.replace(config_lib.Config(model=MODEL), **changes)
    with self.assertRaisesRegex(config_lib.ConfigError, message):
      stage_programs.StagePrograms(config, ISLAND, 0)

  @parameterized.parameters((0, 6 * 4), (4, 5), (8, 8))
  def test_coordinates_take_the_bytes_of_their_bits(self, bits, position):
    island = dataclasses.replace(ISLAND, bits=bits)
    found = stage_programs.coordinates(MODEL, island, 2, 7)
    leaves = [found] if not bits else list(found)
    size = sum(np.prod(x.shape) * x.dtype.itemsize for x in leaves)
    self.assertEqual(size, 2 * 7 * position)


if __name__ == '__main__':
  absltest.main()
