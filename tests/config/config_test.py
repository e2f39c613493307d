import contextlib
import dataclasses
import json
import pathlib
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.config import config as config_module
from covenant.models import llama
from tests import helpers

SHAKESPEARE = str(helpers.CONFIGS / 'shakespeare.py')


class LoadTest(parameterized.TestCase):
  def write(self, text):
    return self.create_tempfile('experiment.py', text).full_path

  @parameterized.parameters(
    *[(p.name,) for p in sorted(helpers.CONFIGS.glob('*.py'))]
  )
  def test_every_config_of_the_project_is_valid(self, name):
    config = config_lib.load(str(helpers.CONFIGS / name))
    self.assertEqual(config, config_lib.from_json(config_lib.to_json(config)))

  @parameterized.parameters(
    ('optim.inner_steps=20', 'optim.inner_steps', 20),
    ('optim.inner.learning_rate=1', 'optim.inner.learning_rate', 1.0),
    ('optim.inner.learning_rate=1e-4', 'optim.inner.learning_rate', 1e-4),
    ('model.tie_embeddings=false', 'model.tie_embeddings', False),
    ('optim.compression.block=(32, 64)', 'optim.compression.block', (32, 64)),
    ('name=x=y', 'name', 'x=y'),
    ('adversaries=copier, scaled', 'adversaries', ('copier', 'scaled')),
    ('adversaries=', 'adversaries', ()),
    ('pool.workers=5a,5b', 'pool.workers', ('5a', '5b')),
    (
      'islands=2x steps=4; 1x',
      'islands',
      (config_lib.Island(count=2, steps=4), config_lib.Island()),
    ),
  )
  def test_overrides_are_typed(self, override, field, value):
    config = config_lib.load(SHAKESPEARE, [override])
    self.assertEqual(config_lib.flatten(config)[field], value)

  @parameterized.parameters(
    ('optim.inner_stpes=3', 'optim.inner_stpes: no such field; did you mean '
     'optim.inner_steps?'),
    ('inner_steps=3', 'inner_steps: no such field; did you mean '
     'optim.inner_steps?'),
    ('optim=3', 'optim: no such field'),
    ('optim.inner_steps', 'optim.inner_steps: expected --config.optim'),
    ('optim.inner_steps=2.5', "optim.inner_steps: expected int, got '2.5'"),
    ('optim.inner_steps=0', 'optim.inner_steps: expected at least 1, got 0'),
    ('model.scan_layers=perhaps', 'model.scan_layers: expected true or false'),
    ('miners=0', 'miners: expected at least 1, got 0'),
    ('optim.inner.learning_rate=0', 'learning_rate: expected more than 0'),
    ('optim.inner.learning_rate=nan', 'expected a finite number, got nan'),
    ('optim.compression.error_decay=1.5', 'expected at most 1.0, got 1.5'),
    ('optim.compression.k=5000', 'optim.compression.k: expected at most 4096'),
    ('optim.compression.block=(8,)', 'block: expected 2 numbers'),
    ('optim.compression.block=(8, 0)', 'block: expected two positive sides'),
    ('optim.compression.block=3 4', 'block: expected tuple'),
    ('optim.method=adam', 'optim.method: expected one of'),
    ('optim.method=ddp', "optim.inner_steps: expected 1 with optim.method='dd"),
    ('model.heads=5', 'model.heads: model.width must be an even multiple'),
    ('model.kv_heads=3', 'model.kv_heads: must divide model.heads = 4, got 3'),
    ('optim.inner.warmup_steps=1000000', 'warmup_steps: expected fewer than'),
    ('optim.inner.microbatch_size=3', 'must divide optim.inner.batch_size = 8'),
    ('optim.inner.anneal_start=7', 'anneal_start: expected 0, for none, or'),
    ('plan.download=-1', 'plan.download: expected more than 0, got -1.0'),
    ('data.source=text', 'data.path: expected a file or folder'),
    ('data.tokenizer=sentencepiece', 'data.tokenizer_path: expected a .model'),
  )  # fmt: skip
  def test_what_cannot_be_is_one_line_that_names_the_field(
    self, override, message
  ):
    with self.assertRaises(config_lib.ConfigError) as caught:
      config_lib.load(SHAKESPEARE, [override])
    self.assertIn(message, str(caught.exception))
    self.assertNotIn('\n', str(caught.exception))

  @parameterized.parameters(
    ('configs/nowhere.py', "no file 'configs/nowhere.py'; expected a .py or"),
    ('nowhere', "no file 'nowhere'; expected a .py or .*of: 150m, .*, tiny$"),
    ('configs/tiny', "no file 'configs/tiny'; did you mean configs/tiny.py"),
    ('shakespear:smoke', "no file 'shakespear'; did you mean shakespeare"),
    ('tiny:wild', "there is no variant 'wild'; expected one of: '"),
    (SHAKESPEARE + ':wild', "there is no variant 'wild'; expected one of: '"),
  )
  def test_a_missing_file_or_variant(self, source, message):
    with self.assertRaisesRegex(config_lib.ConfigError, message):
      config_lib.load(source)

  def test_a_name_is_a_config_of_the_package_in_any_folder(self):
    with contextlib.chdir(self.create_tempdir().full_path):
      pathlib.Path('tiny').write_text('not a config')
      named = [config_lib.load('tiny'), config_lib.load('shakespeare:smoke')]
    self.assertEqual(named[0], config_lib.load(f'{helpers.CONFIGS}/tiny.py'))
    self.assertEqual(named[1], config_lib.load(SHAKESPEARE + ':smoke'))

  @parameterized.parameters(
    ('def get_config(variant):\n  return 3', 'must return a Config, got int'),
    ('x = 1', "has no attribute 'get_config'"),
    ('raise RuntimeError("oh")', 'RuntimeError: oh'),
    (
      'from covenant.config import Config, Optim\n'
      'get_config = lambda v: Config(optim=Optim(inner_stpes=3))',
      "unexpected keyword argument 'inner_stpes'",
    ),
    (
      'from covenant.config import Config\n'
      'get_config = lambda v: Config(rounds=2.5)',
      'rounds: expected int, got float 2.5',
    ),
    (
      'from covenant.config import Config\n'
      'get_config = lambda v: Config(rounds=True)',
      'rounds: expected int, got bool True',
    ),
  )
  def test_a_broken_config_file(self, text, message):
    with self.assertRaises(config_lib.ConfigError) as caught:
      config_lib.load(self.write(text))
    self.assertIn(message, str(caught.exception))


class EditTest(parameterized.TestCase):
  @parameterized.parameters(
    ('eval.every: expected at least 1', 'eval.every=0'),
    ('checkpoint.keep: expected at least 1', 'checkpoint.keep=0'),
  )
  def test_a_contradiction_names_the_field(self, message, *edits):
    with self.assertRaises(config_lib.ConfigError) as caught:
      config_lib.edit(config_lib.Config(), edits)
    self.assertStartsWith(str(caught.exception), message)
    self.assertNotIn('\n', str(caught.exception))

  def test_edit_does_not_change_the_original(self):
    config = config_lib.Config()
    edited = config_lib.edit(config, ['optim.inner_steps=3', 'islands=8x'])
    self.assertEqual(config, config_lib.Config())
    self.assertEqual(
      config_lib.differences(config, edited),
      [
        "islands: '' there, '8x' here",
        'optim.inner_steps: 10 there, 3 here',
      ],
    )


class JsonTest(parameterized.TestCase):
  @parameterized.parameters(
    ('{', 'not a config in JSON'),
    ('[]', 'expected a section'),
    ('{"adversaries": 3}', 'adversaries: expected a tuple, got 3'),
    ('{"adversaries": [3]}', r'adversaries\[0\]: expected str, got int 3'),
    ('{"islands": "steps=x"}', "islands: 'steps=x': expected each of"),
    ('{"speed": 1}', 'speed: no such field'),
  )
  def test_refuses(self, text, message):
    with self.assertRaisesRegex(config_lib.ConfigError, message):
      config_lib.from_json(text)

  def test_tuples_were_texts_once(self):
    config = config_lib.from_json(
      '{"adversaries": "copier,scaled", "islands": "2x steps=4; 1x"}'
    )
    self.assertEqual(config.adversaries, ('copier', 'scaled'))
    self.assertEqual(config.islands, config_lib.read_islands('2x steps=4; 1x'))
    self.assertEqual(config, config_lib.from_json(config_lib.to_json(config)))

  def test_differences_show_tuples_as_flags_do(self):
    old = config_lib.Config()
    new = dataclasses.replace(
      old,
      adversaries=('copier', 'scaled'),
      islands=(config_lib.Island(count=2, steps=4), config_lib.Island()),
    )
    self.assertEqual(
      config_lib.differences(old, new),
      [
        "adversaries: '' there, 'copier,scaled' here",
        "islands: '' there, '2x steps=4; 1x' here",
      ],
    )

  def test_differences_name_the_fields(self):
    old = config_lib.Config()
    new = dataclasses.replace(old, rounds=7, name='b')
    self.assertEqual(
      config_lib.differences(old, new),
      ["name: 'unnamed' there, 'b' here", 'rounds: 100 there, 7 here'],
    )


class RecipesTest(parameterized.TestCase):
  @parameterized.parameters(
    ('150m', 219_702_272),
    ('512m', 512_398_848),
    ('1b', 1_204_881_408),
    ('8b', 8_053_329_920),
    ('72b', 70_599_843_840),
    ('1t', 1_001_002_229_760),
  )
  def test_have_the_published_number_of_parameters(self, name, count):
    config = config_lib.load(str(helpers.CONFIGS / f'{name}.py'))
    self.assertEqual(llama.num_params(config.model), count)

  def test_72b_untied_has_the_number_that_the_paper_gives(self):
    path = str(helpers.CONFIGS / '72b.py')
    config = config_lib.load(path, ['model.tie_embeddings=false'])
    self.assertEqual(llama.num_params(config.model), 72_747_327_488)

  def test_72b_published_is_72b_with_plain_outer_sgd(self):
    ours, published = (
      config_lib.load(str(helpers.CONFIGS / '72b.py') + variant)
      for variant in ('', ':published')
    )
    self.assertEqual(
      config_lib.differences(ours, published),
      [
        "name: '72b' there, '72b-published' here",
        'optim.outer.learning_rate: 0.7 there, 1.0 here',
        'optim.outer.momentum: 0.3 there, 0.0 here',
      ],
    )

  def test_72b_smoke_is_the_same_program_in_the_small(self):
    large, small = (
      config_lib.flatten(
        config_lib.load(str(helpers.CONFIGS / '72b.py') + variant)
      )
      for variant in ('', ':smoke')
    )
    for field in (
      'model.scan_layers', 'model.remat', 'model.compute_dtype',
      'model.tie_embeddings', 'model.rope_theta', 'optim.method',
      'optim.outer.momentum', 'optim.compression.quantizer',
      'optim.compression.k', 'optim.compression.block',
      'optim.inner.anneal_ratio',
    ):  # fmt: skip
      self.assertEqual(large[field], small[field], field)
    for field in (
      'model.loss_chunk', 'optim.inner.microbatch_size',
      'optim.inner.flat_steps', 'optim.inner.anneal_start',
    ):  # fmt: skip
      self.assertGreater(small[field], 0, field)


class IdentityTest(parameterized.TestCase):
  rewrite_golden = False

  def test_paths_lengths_and_local_settings_are_not_in_it(self):
    base = config_lib.edit(config_lib.Config(), ['data.digest=' + '0' * 64])
    for change in (
      'rounds=7',
      'name=other',
      'miners=3',
      'data.path=/mnt/b/text',
      'data.tokenizer_path=/mnt/b/tokenizer.json',
      'data.cache_gb=1',
      f'data.places={"a" * 64}=/mnt/new',
      'pretrained=',
      'network.path=/elsewhere',
      'checkpoint.every=3',
      'eval.every=3',
      'devices.fsdp=2',
      'model.remat=block',
      'pool.listen=0.0.0.0:1',
    ):
      other = config_lib.edit(base, [change])
      self.assertEqual(
        config_lib.identity(base), config_lib.identity(other), change
      )

  @parameterized.parameters(
    'seed=1',
    'model.width=192',
    'data.context=32',
    'data.digest=' + '1' * 64,
    'optim.outer.learning_rate=0.5',
    'gauntlet.memory=10',
    'phases.round_blocks=200',
  )
  def test_the_rules_are_in_it(self, change):
    base = config_lib.edit(config_lib.Config(), ['data.digest=' + '0' * 64])
    self.assertNotEqual(
      config_lib.identity(base),
      config_lib.identity(config_lib.edit(base, [change])),
    )

  def test_a_model_to_continue_from_is_in_it_but_not_its_folder(self):
    ids = [
      config_lib.identity(
        dataclasses.replace(config_lib.Config(), pretrained=path)
      )
      for path in ('', '/a/llama', '/b/other')
    ]
    self.assertNotEqual(ids[0], ids[1])
    self.assertEqual(ids[1], ids[2])

  def test_other_stores_are_in_it(self):
    plain = config_lib.Config()
    other = dataclasses.replace(plain, store_hosts=('s3.example.org',))
    self.assertNotEqual(config_lib.identity(plain), config_lib.identity(other))
    for bad in ('https://s3.example.org', 's3.example.org/a', 'S3.org', '.org'):
      with self.assertRaisesRegex(config_lib.ConfigError, 'store_hosts'):
        config_lib.edit(plain, [f'store_hosts={bad}'])

  def test_a_config_from_before_a_field_meets_a_new_one(self):
    """A release that lacks fields, of any depth, is in the run of this one."""
    now = config_lib.load(f'{helpers.CONFIGS}/tiny.py')
    raw = json.loads(config_lib.to_json(now))
    del raw['gauntlet']['burn'], raw['optim']['overlap'], raw['data']['field']
    before = config_lib.parse(raw)
    self.assertEqual(config_lib.identity(before), config_lib.identity(now))
    # What that release computed: it knows nothing of the fields.
    text = config_lib.identity(now)
    for name in ('burn', 'overlap', 'data.field'):
      self.assertNotIn(name, text)

  def test_a_config_of_a_release_with_more_fields(self):
    """A field that was deleted, at its default, changes no run."""
    now = config_lib.load(f'{helpers.CONFIGS}/tiny.py')
    raw = json.loads(config_lib.to_json(now))
    raw['optim'] |= {'staleness': 0, 'staleness_discount': 0.5}
    self.assertEqual(config_lib.from_json(json.dumps(raw)), now)
    raw['optim']['staleness'] = 2
    with self.assertRaisesRegex(config_lib.ConfigError, 'an earlier release'):
      config_lib.from_json(json.dumps(raw))

  def test_defaults_never_change(self):
    """A changed default would be two rules in one run; add a field instead."""
    path = helpers.GOLDEN / 'identity.json'
    known = json.loads(path.read_text())
    here = json.loads(json.dumps(config_lib.flatten(config_lib.Config())))
    if self.rewrite_golden:
      kept = {k: known.get(k, v) for k, v in here.items()}
      own = config_module._OWN
      kept = {k: v for k, v in kept.items() if not k.startswith(own)}
      path.write_text(json.dumps(kept, indent=1) + '\n')
    for name, value in known.items():
      self.assertEqual(here[name], value, name)
    missing = [k for k in here if k not in known]
    self.assertEmpty(
      [k for k in missing if not k.startswith(config_module._OWN)]
    )


class HomeTest(absltest.TestCase):
  def test_a_tilde_in_any_field_is_the_home_folder(self):
    edits = [
      'data.source=shards',
      'data.phases=[{"start": 0, "mixture": [{"path": "~/a"}]}]',
      'pretrained=~/llama',
      'network.path=~/net',
      'pool.key=~/own.key',
    ]
    with mock.patch.dict('os.environ', HOME='/home/x'):
      made = config_lib.edit(config_lib.Config(), edits)
    self.assertEqual(made.data.paths, ('/home/x/a',))
    self.assertEqual(
      (made.pretrained, made.network.path, made.pool.key),
      ('/home/x/llama', '/home/x/net', '/home/x/own.key'),
    )
    self.assertEqual(
      config_lib.edit(config_lib.Config(), []).pool.key, config_lib.Pool().key
    )


if __name__ == '__main__':
  absltest.main()
