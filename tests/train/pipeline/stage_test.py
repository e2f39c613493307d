"""Stages that pass bytes, against the same pipeline on one device."""

import jax
import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.data import dataset
from covenant.optim import weight
from covenant.train import island as island_lib
from covenant.train import local as local_lib
from covenant.train import shared_state as shared_state_lib
from covenant.train import trainer as trainer_lib
from covenant.train.pipeline import stage as stage_lib
from covenant.train.pipeline import stage_programs
from covenant.train.pipeline import subspace
from tests import helpers


def make_config(island, *changes):
  return config_lib.load(
    f'{helpers.CONFIGS}/tiny.py',
    [
      'model.layers=3', 'miners=1', f'islands={island}',
      'optim.inner.microbatch_size=2', 'optim.outer.momentum=0.5', *changes,
    ],
  )  # fmt: skip


def train(stages, config, task, split):
  """Trains a round by hand, in the order of microbatches; returns the rest."""
  ids_HxB = local_lib.batch_ids(config, task, split)
  context = config.data.context
  tokens = split.read(ids_HxB.flat[: subspace.FITTED], context)
  fits, crossing = {}, b''
  for s, stage in enumerate(stages):
    wanted = {i: fits[i] for i in (s, 1) if i in fits}
    sent, crossing = stage.begin(tokens, crossing, wanted, s)
    if sent:
      fits[s + 1] = sent
  tied, last = config.model.tie_embeddings, len(stages) - 1
  b, losses = config.optim.inner.microbatch_size, []
  for h, ids_B in enumerate(ids_HxB):
    tokens_BxL1 = split.read(ids_B, context)
    divisor = float(max(np.sum(tokens_BxL1[:, 1:] >= 0), 1))
    nats = np.float32(0)
    for m in range(len(ids_B) // b):
      some = tokens_BxL1[m * b : (m + 1) * b]
      c = stages[-1].look_up(some) if tied else b''
      for s, stage in enumerate(stages[:-1]):
        c = stage.forward(m, some, c, s)
      c, part = stages[-1].last(m, some, c, last, divisor)
      nats += np.float32(part)
      for stage in reversed(stages[:-1]):
        c = stage.backward(m, c)
      if tied:
        stages[-1].backward(m, c)
    norm = combined_norm(stages)
    step = task.round * config.optim.inner_steps + h
    for stage in stages:
      stage.update(norm, nats, step)
    losses.append((float(nats), norm))
  return losses


def combined_norm(stages):
  total = {}
  for stage in stages:
    names = stage.programs.names.own
    tree = stage_programs.pick(stage.shared.params, names)
    structure = jax.tree.structure(tree)
    total |= structure.unflatten(stage.squares())
  return float(
    np.sqrt(sum(map(np.float32, jax.tree.leaves(total)), np.float32(0)))
  )


class StageTest(parameterized.TestCase):
  @parameterized.parameters(
    ('1x stages=3,rank=8,bits=4', True, 2),
    ('1x stages=2,rank=4,layers=2-1', False, 1),
    ('1x stages=2,rank=8,bits=8,layers=1-2', True, 4),
  )
  @pytest.mark.rows(0, 2)
  def test_two_rounds_equal_the_emulated_pipeline(self, text, tied, size):
    config = make_config(
      text,
      f'model.tie_embeddings={tied}',
      f'optim.inner.microbatch_size={size}',
    )
    island = island_lib.of(config, 0)
    shared_model = shared_state_lib.SharedModel(config)
    trainer = trainer_lib.Trainer(config, shared_model, dataset.load(config))
    shared = shared_model.init()
    state = trainer.init(shared.params)
    stages = [stage_lib.Stage(config, island, s) for s in range(island.stages)]
    for r in range(2):
      task = local_lib.Task(0, r, 5, bytes(32))
      trained, state = trainer.train(
        shared.params, state, task, trainer.batches(task)
      )
      losses = train(stages, config, task, trainer.split)
      self.assertEqual(
        losses, list(zip(trained.losses, trained.norms, strict=True))
      )
      contribution = trainer.seal(trained, task, lambda text: bytes(64))
      ends = stage_lib.payload.section_ends(
        contribution.payload, shared_model.spec
      )
      names = [t.name for t in shared_model.spec.tensors]
      spans = zip(ends[:-1], ends[1:], strict=True)
      whole = dict(zip(names, spans, strict=True))
      for stage in stages:
        sections, _ = stage.seal()
        for tensor, got in zip(stage.spec.tensors, sections, strict=True):
          start, stop = whole[tensor.name]
          self.assertEqual(got, contribution.payload[start:stop], tensor.name)
      self.apply(
        stages, shared_model, shared, trained, contribution.payload, whole
      )
      shared, _ = shared_model.apply_round(shared, {0: trained.message})
      want = shared_state_lib.named_leaves(shared)
      for stage in stages:
        got = shared_state_lib.named_leaves(stage.shared)
        for name, x in got.items():
          np.testing.assert_array_equal(x, want[name], name)

  def apply(self, stages, shared_model, shared, trained, data, whole):
    update = shared_model.factors(
      shared_model.norms(trained.message)[None],
      [weight.Weight()],
      np.asarray(shared.steps),
    )
    for stage in stages:
      tensors = stage.held_spec.tensors
      sections = [data[slice(*whole[t.name])] for t in tensors]
      places = [list(whole).index(t.name) for t in tensors]
      stage.apply(
        [sections],
        stage_lib.StageUpdate(
          update.factors_RxP[:, places], update.parts_R, update.totals
        ),
      )


if __name__ == '__main__':
  absltest.main()
