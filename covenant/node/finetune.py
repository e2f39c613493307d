"""Supervised fine-tuning on chats, on one host: `--role=finetune`.

A chat is a line of JSON, {"messages": [{"role": "user", "content": "..."}]},
with more messages. Only the answers (role assistant) and the end of text after
each count for the loss. Several chats share a sequence, and attend to
themselves alone.
"""

import functools
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from covenant import config as config_lib
from covenant import files as files_lib
from covenant import typing as ct
from covenant.data import pretrained
from covenant.models import hf
from covenant.models import llama
from covenant.node import sample
from covenant.optim import inner

FOLDER = 'finetuned'
# The same text as `_segments` has, for transformers.
TEMPLATE = (
  "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] }}"
  "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}"
  '{% endfor %}{% if add_generation_prompt %}'
  "{{ '<|assistant|>\\n' }}{% endif %}"
)
_ROLES = ('system', 'user', 'assistant')
_SETTINGS = 'tokenizer_config.json'

_CHATS = flags.DEFINE_string('chats', None, 'finetune: a file of chats, JSONL.')
_EPOCHS = flags.DEFINE_integer('epochs', 3, 'finetune: epochs.', lower_bound=1)
_RATE = flags.DEFINE_float('rate', 2e-5, 'finetune: the highest learning rate.')
_BATCH = flags.DEFINE_integer(
  'batch', 8, 'finetune: sequences per step.', lower_bound=1
)
_LENGTH = flags.DEFINE_integer(
  'length', 512, 'finetune: tokens per sequence.', lower_bound=2
)


class Settings(NamedTuple):
  """The settings of a fine-tuning."""

  epochs: int = 3
  rate: float = 2e-5  # highest, after a tenth of the steps; it falls to zero
  batch: int = 8  # sequences per step
  length: int = 512  # tokens per sequence
  seed: int = 0  # of the order


class Packed(NamedTuple):
  """Chats in sequences. Tokens that start a chat are complements of ids."""

  tokens_NxL1: np.ndarray
  counts_NxL: np.ndarray  # float32; 1: the next token is of an answer


def finetune(config: config_lib.Config, workdir: str) -> None:
  """Fine-tunes --model, or the newest checkpoint of a workdir, on --chats."""
  if not _CHATS.value:
    raise config_lib.ConfigError('--chats: expected a file of chats, got none')
  folder = pathlib.Path(workdir, FOLDER)
  if folder.exists():
    raise config_lib.ConfigError(f'{folder} exists: remove it first')
  if sample.MODEL.value:
    origin = pathlib.Path(sample.MODEL.value).expanduser()
    source = sample.of_folder(origin)
    names = (_SETTINGS, pretrained.JSON)
    files = {
      n: (origin / n).read_bytes() for n in names if (origin / n).exists()
    }
  else:
    source = sample.of_workdir(config, workdir)
    files, _ = pretrained.kept(workdir, config)
  settings = Settings(
    _EPOCHS.value, _RATE.value, _BATCH.value, _LENGTH.value, config.seed
  )
  if source.end_of_text is None:
    raise config_lib.ConfigError('--model: expected an eos_token_id, got none')
  chats = list(read(pathlib.Path(_CHATS.value).expanduser()))
  packed = pack(chats, source.encode, source.end_of_text, settings.length)
  params = train(
    source.model,
    source.params,
    packed,
    settings,
    lambda text: print(text, file=sys.stderr, flush=True),
  )
  hf.export(
    folder,
    source.model,
    params,
    context=settings.length,
    end_of_text=source.end_of_text,
    files=with_template(files),
  )
  print(f'the model is in {folder}; its tokenizer has the template of chats')


def read(path: pathlib.Path) -> Iterator[list[tuple[str, str]]]:
  """Yields chats: the role and content of each message.

  Raises:
    ConfigError: a line is no chat; names the line and what is expected.
  """
  for number, line in enumerate(files_lib.read_lines(path), start=1):
    try:
      messages = json.loads(line)['messages']
      chat = [(m['role'], m['content']) for m in messages]
      good = all(r in _ROLES and isinstance(c, str) for r, c in chat)
    except (KeyError, TypeError, ValueError):
      chat, good = [], False
    if not good or all(role != 'assistant' for role, _ in chat):
      raise config_lib.ConfigError(
        f'{path}:{number}: expected {{"messages": [{{"role": one of '
        f'{", ".join(_ROLES)}, "content": text}}, ...]}} with an answer of '
        'role assistant'
      )
    yield chat


def _segments(
  chat: Sequence[tuple[str, str]],
) -> Iterator[tuple[str, bool]]:
  """Yields the texts of a chat, and whether each is an answer."""
  for role, content in chat:
    yield f'<|{role}|>\n', False
    yield content, role == 'assistant'
    yield '\n', False


def pack(
  chats: Sequence[Sequence[tuple[str, str]]],
  encode: sample.Encode,
  end_of_text: int,
  length: int,
) -> Packed:
  """Puts chats into sequences of `length` tokens and one, the first that fits.

  Chats that are longer than a sequence are left out, which it says.

  Raises:
    ConfigError: none is left.
  """
  rows: list[tuple[list[int], list[int]]] = []
  left_out = 0
  for chat in chats:
    ids, counts = list[int](), list[int]()
    for text, is_answer in _segments(chat):
      new = [int(i) for i in encode(text)] + [end_of_text] * is_answer
      ids += new
      counts += [int(is_answer)] * len(new)
    if len(ids) > length + 1:
      left_out += 1
      continue
    ids[0] = ~ids[0]
    room = (r for r in rows[-64:] if len(r[0]) + len(ids) <= length + 1)
    row = next(room, None)
    if row is None:
      rows.append(row := ([], []))
    row[0].extend(ids)
    row[1].extend(counts)
  if left_out:
    print(
      f'{left_out} of {len(chats)} chats are longer than --length={length} '
      'tokens and left out',
      file=sys.stderr,
    )
  if not rows:
    raise config_lib.ConfigError(f'--chats: none fits --length={length}')
  tokens = np.zeros((len(rows), length + 1), np.int32)
  counts_NxL1 = np.zeros(tokens.shape, np.float32)
  for i, (ids, counts) in enumerate(rows):
    tokens[i, : len(ids)] = ids
    tokens[i, len(ids) : len(ids) + 1] = ~0  # padding is a chat of its own
    counts_NxL1[i, : len(ids)] = counts
  return Packed(tokens, counts_NxL1[:, 1:])


def answer_loss(
  model: config_lib.Model,
  params: ct.Params,
  tokens_BxL1: jax.Array,
  counts_BxL: jax.Array,
) -> jax.Array:
  """Returns the mean loss of the tokens of answers, in nats.

  The model is a packed one.
  """
  logits_BxLxV = llama.apply(model, params, tokens_BxL1[:, :-1])
  nats_BxL = optax.softmax_cross_entropy_with_integer_labels(
    logits_BxLxV, llama.ids(model, tokens_BxL1)[:, 1:]
  )
  return jnp.sum(nats_BxL * counts_BxL) / jnp.maximum(jnp.sum(counts_BxL), 1)


def train(
  model: config_lib.Model,
  params: ct.Params,
  packed: Packed,
  settings: Settings,
  say: Callable[[str], None],
) -> ct.Params:
  """Trains with AdamW; all devices share the sequences of a step.

  Raises:
    ConfigError: the batch cannot be divided among the devices.
  """
  devices = jax.local_devices()
  if settings.batch % len(devices):
    raise config_lib.ConfigError(
      f'--batch: expected a multiple of the {len(devices)} devices, got '
      f'{settings.batch}'
    )
  kinds = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((len(devices),), ('data',), kinds, devices=devices)
  spread = jax.NamedSharding(mesh, jax.P('data'))
  model = config_lib.PackedModel(**vars(model))
  per_epoch = -(-len(packed.tokens_NxL1) // settings.batch)
  steps = per_epoch * settings.epochs
  chosen = config_lib.Inner(
    learning_rate=settings.rate,
    warmup_steps=steps // 10,
    final_ratio=0.0,
    weight_decay=0.0,
  )
  optimizer, rate = inner.make(chosen), inner.schedule(chosen, steps)
  params = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
  state = optimizer.init(params)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, state, rate, tokens_BxL1, counts_BxL):
    loss, grads = jax.value_and_grad(answer_loss, argnums=1)(
      model, params, tokens_BxL1, counts_BxL
    )
    updates, state = optimizer.update(grads, state, params)
    updates = jax.tree.map(lambda x: rate * x, updates)
    return optax.apply_updates(params, updates), state, loss

  rng = np.random.default_rng(settings.seed)
  for epoch in range(settings.epochs):
    # The last batch begins again with the first sequences.
    order = rng.permutation(len(packed.tokens_NxL1))
    order = np.resize(order, per_epoch * settings.batch)
    losses = []
    for i, rows in enumerate(order.reshape(per_epoch, settings.batch)):
      batch = (jax.device_put(x[rows], spread) for x in packed)
      now = jnp.float32(rate(epoch * per_epoch + i))
      params, state, loss = step(params, state, now, *batch)
      losses.append(loss)
    mean = float(np.mean(jax.device_get(losses)))
    say(f'epoch {epoch + 1}/{settings.epochs}: {mean:.4f} nats per token')
  return params


def with_template(files: Mapping[str, bytes]) -> dict[str, bytes]:
  """Returns the files of a tokenizer whose chats have this text."""
  settings = json.loads(files.get(_SETTINGS, b'{}'))
  # Or the end of text that the template writes would be read as text.
  settings |= {'chat_template': TEMPLATE, 'split_special_tokens': False}
  return dict(files) | {_SETTINGS: json.dumps(settings, indent=2).encode()}
