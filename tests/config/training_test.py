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
    (
      "optim.staleness: expected 0 with optim.method='ddp'",
      'optim.method=ddp',
      'optim.inner_steps=1',
      'optim.staleness=1',
    ),
    ('gauntlet.power: expected at most 4.0', 'gauntlet.power=5'),
  )
  def test_a_contradiction_names_the_field(self, message, *edits):
    with self.assertRaises(config_lib.ConfigError) as caught:
      config_lib.edit(config_lib.Config(), edits)
    self.assertStartsWith(str(caught.exception), message)
    self.assertNotIn('\n', str(caught.exception))


if __name__ == '__main__':
  absltest.main()
