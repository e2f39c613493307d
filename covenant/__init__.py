"""Open, trustless pre-training of language models over the internet, in JAX."""
