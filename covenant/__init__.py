"""Open, trustless pre-training of language models over the internet, in JAX."""

__version__ = '0.1.0'
