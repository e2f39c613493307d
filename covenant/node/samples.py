"""Samples of text while a run trains: samples.jsonl, a line per sample."""

import json
import os
import pathlib

import jax

from covenant import config as config_lib
from covenant import files
from covenant import typing as ct
from covenant.models import generate
from covenant.node import sample

FILE = 'samples.jsonl'
_SAMPLING = generate.Sampling(temperature=0.8)


def read(workdir: str | os.PathLike[str]) -> list[dict[str, ct.Json]]:
  """Returns the samples of a folder: their round, prompt and text."""
  path = pathlib.Path(workdir, FILE)
  return list(files.read_records(path, 'round', 'prompt', 'text').objects)


class Sampler:
  """Continues `eval.prompt` by the model of a run, every `eval.samples` rounds.

  The draws are the same in every round, so that texts differ by the model.

  Args:
    config: the config of the run.
    workdir: the folder of the node, with the tokenizer of the run.
    resume: the rounds completed; samples of later ones are dropped. None keeps
      all.

  Raises:
    ConfigError: the run has no tokenizer, such as shards without one.
  """

  def __init__(
    self,
    config: config_lib.Config,
    workdir: str | os.PathLike[str],
    resume: int | None = None,
  ):
    self._config = config
    self._path = pathlib.Path(workdir, FILE)
    if resume is not None and self._path.exists():
      kept = [x for x in read(workdir) if x['round'] <= resume]
      files.write_lines(self._path, map(json.dumps, kept))
    self._tokenizer: sample.Tokenizer | None = None
    if config.eval.samples:
      self._tokenizer = sample.tokenizer_of(config, workdir)

  def is_due(self, completed: int, last: bool) -> bool:
    """Returns whether a sample follows so many rounds, or the last one."""
    every = self._config.eval.samples
    return bool(every) and (last or completed % every == 0)

  def add(self, completed: int, params: ct.Params) -> None:
    """Draws a sample and appends it to the file.

    Args:
      completed: the number of rounds completed.
      params: the shared parameters, which fit one device.
    """
    assert self._tokenizer is not None  # it is due
    params = jax.device_put(jax.device_get(params), jax.local_devices()[0])
    source = sample.Source(self._config.model, params, *self._tokenizer)
    prompt, count = self._config.eval.prompt, self._config.eval.sample_tokens
    text = ''.join(sample.continued(source, prompt, count, _SAMPLING))
    line = {'round': completed, 'prompt': prompt, 'text': text}
    files.append_jsonl(self._path, line)
