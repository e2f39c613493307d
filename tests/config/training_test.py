"""The rules of the sections about training: one error that names the field."""

from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib


class SectionsTest(parameterized.TestCase):
  @parameterized.parameters(
    (
      'model.heads: model.width must be an even multiple',
      'model.heads=5',
    ),
    ('model.kv_heads: must divide model.heads = 4', 'model.kv_heads=3'),
    ('data.path: expected a file or folder', 'data.source=shards'),
    ('data.tokenizer_path: expected a .model', 'data.tokenizer=sentencepiece'),
    (
      'optim.inner.microbatch_size: must divide',
      'optim.inner.microbatch_size=3',
    ),
    (
      'optim.inner.anneal_start: expected 0, for none, or a step after',
      'optim.inner.warmup_steps=9',
      'optim.inner.anneal_start=7',
    ),
    (
      'optim.inner.warmup_steps: expected fewer than the 20 steps',
      'rounds=2',
      'optim.inner.warmup_steps=20',
    ),
    (
      'optim.compression.block: expected two positive sides',
      'optim.compression.block=(0, 64)',
    ),
    ('optim.compression.k: expected at most 4096', 'optim.compression.k=5000'),
    (
      "optim.compression.kind: expected 'dct' with optim.method='demo'",
      'optim.method=demo',
      'optim.inner_steps=1',
    ),
    (
      "optim.inner.kind: expected 'adamw'",
      'optim.method=demo',
      'optim.compression.kind=dct',
      'optim.inner.kind=muon',
      'optim.inner_steps=1',
    ),
    (
      "optim.inner_steps: expected 1 with optim.method='ddp'",
      'optim.method=ddp',
    ),
    (
      'optim.overlap: expected fewer than optim.inner_steps = 10, got 10',
      'optim.overlap=10',
    ),
    ('gauntlet.sequences: expected at least 4', 'gauntlet.sequences=3'),
  )
  def test_a_contradiction_names_the_field(self, message, *edits):
    with self.assertRaises(config_lib.ConfigError) as caught:
      config_lib.edit(config_lib.Config(), edits)
    self.assertStartsWith(str(caught.exception), message)
    self.assertNotIn('\n', str(caught.exception))


class DataPhasesTest(parameterized.TestCase):
  PHASES = (
    '[{"start": 0, "mixture": [{"path": "a"}]}, {"start": 9, "mixture": '
    '[{"path": "b", "weight": 3}, {"path": "c"}]}]'
  )

  def edit(self, *sets: str) -> config_lib.Config:
    return config_lib.edit(config_lib.Config(), ['data.source=shards', *sets])

  def test_as_a_flag_and_back(self):
    made = self.edit(f'data.phases={self.PHASES}')
    self.assertEqual(made.data.paths, ('a', 'b', 'c'))
    self.assertEqual(made.data.phases[1].mixture[0].weight, 3.0)
    self.assertEqual(config_lib.from_json(config_lib.to_json(made)), made)
    self.assertLen(config_lib.differences(made, self.edit('data.path=a')), 2)

  @parameterized.parameters(
    ('[', 'data.phases: expected JSON, such as'),
    ('[{"start": 1, "mixture": [{"path": "a"}]}]', 'begin with 0 and ascend'),
    ('[{"start": 0}]', 'expected a mixture, got none'),
    ('[{"start": 0, "mixture": [{"weight": 1}]}]', 'expected the path of a'),
    (
      '[{"start": 0, "mixture": [{"path": "a"}, {"path": "a"}]}]',
      'expected each path once',
    ),
    (
      '[{"start": 0, "mixture": [{"path": "a", "digest": "x"}]}]',
      'expected 64 hex digits',
    ),
    (
      '[{"start": 0, "mixture": [{"path": "a"}, {"path": "b", '
      '"weight": 0.00001}]}]',
      'expected weights of at least 1 in 10000 of their sum',
    ),
    ('[{"start": 0, "mixture": [{"path": "a", "weight": 0}]}]', 'more than 0'),
  )
  def test_invalid(self, phases, message):
    with self.assertRaisesRegex(config_lib.ConfigError, message):
      self.edit(f'data.phases={phases}')

  def test_beside_a_path(self):
    with self.assertRaisesRegex(
      config_lib.ConfigError, 'neither data.path nor'
    ):
      self.edit(f'data.phases={self.PHASES}', 'data.path=x')


if __name__ == '__main__':
  absltest.main()
