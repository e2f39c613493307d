"""Every test runs on eight CPU devices, in JAX's strict modes."""

import collections
import inspect
import os
import pathlib

# For the processes that tests start; this one is set below. What is compiled
# for one of eight devices is found again only where there are eight.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['JAX_NUM_CPU_DEVICES'] = '8'

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402
from absl.testing import absltest  # noqa: E402, F401 (defines test_tmpdir)

# No test is about time. The unit tier looks at the same few examples always;
# `--hypothesis-profile=thorough` looks at more, at others every time.
hypothesis.settings.register_profile(
  'unit', deadline=None, max_examples=20, derandomize=True
)
hypothesis.settings.register_profile(
  'thorough', deadline=None, max_examples=100
)
hypothesis.settings.load_profile('unit')
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_numpy_dtype_promotion', 'strict')
# Many tests compile the same tiny model; on disk it is compiled once.
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


def pytest_addoption(parser):
  parser.addoption(
    '--rewrite-golden',
    action='store_true',
    help='write the golden files from what the code computes now',
  )


def pytest_xdist_auto_num_workers(config):
  """Processes of `-n auto`: each takes seconds to start, and up to 3 GB."""
  one_file = len(config.args) == 1 and '.py' in config.args[0]
  cores = os.cpu_count() or 1
  return 0 if one_file or cores == 1 else min(cores, 4)  # 0: none but this one


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items):
  """Marks the later rows of a test, where `rows(fast, slow)` says so.

  Rows after the first `fast` ones are slow, and thorough after the first `slow`
  ones.
  """
  seen = collections.Counter()
  for item in items:
    mark = item.get_closest_marker('rows')
    if mark is not None:
      whole = inspect.unwrap(item.function).__qualname__
      seen[item.parent.nodeid, whole] += 1
      row, (fast, *slow) = seen[item.parent.nodeid, whole], mark.args
      if slow and row > slow[0]:
        item.add_marker(pytest.mark.thorough)
      elif row > fast:
        item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True, scope='session')
def _absl(tmp_path_factory):
  """Does the work of absltest.main(), with a folder of this session's own."""
  flags.FLAGS.mark_as_parsed()
  flags.FLAGS.test_tmpdir = str(tmp_path_factory.mktemp('absl'))
  base = tmp_path_factory.getbasetemp()
  several = 'PYTEST_XDIST_WORKER' in os.environ  # which share the cache
  cache = (base.parent if several else base) / 'cache'
  # .ci/run lets all tiers find what one has compiled.
  cache = pathlib.Path(os.environ.get('COVENANT_TEST_CACHE') or cache)
  os.environ['XDG_CACHE_HOME'] = str(cache)  # for the processes tests start
  compiled = cache / 'covenant' / 'compiled'  # where these keep it
  compiled.mkdir(parents=True, exist_ok=True)
  jax.config.update('jax_compilation_cache_dir', str(compiled))


@pytest.fixture(autouse=True, scope='class')
def _golden(request):
  """Gives every test class `rewrite_golden`, as absltest takes no fixtures."""
  if request.cls is not None:
    request.cls.rewrite_golden = request.config.getoption('--rewrite-golden')
