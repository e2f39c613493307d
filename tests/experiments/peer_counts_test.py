"""Peers that share a batch, and what is chosen for each number of them."""

from absl.testing import absltest

from experiments import grids
from experiments import peer_counts
from experiments import study


def _run(cell, seed, loss):
  return study.Run(cell, seed, '', 1, 1, 1, 1, loss, 1.0, 'cpu', '')


def _tuning(grid, losses):
  """Returns tuning runs; others that the grid asks for are worse."""
  runs = []
  while True:
    missing = {grid.trial(p) for p in grids.candidates(grid, runs)}
    missing -= {c for c in missing if c.name in {r.cell for r in runs}}
    if not missing:
      return runs
    runs += [
      _run(c.name, 0, losses.get(c.name.rpartition(' ')[2], 9.0))
      for c in missing
    ]


class PeerCountsTest(absltest.TestCase):
  def test_all_cells_have_the_same_tokens_and_values_per_step(self):
    tokens, values = set(), set()
    for peers in peer_counts.PEERS:
      for steps in peer_counts.STEPS:
        config = study.make_config(peer_counts.grid(peers, steps).cell((0.01,)))
        inner = config.optim.inner
        tokens.add(config.rounds * steps * config.miners * inner.batch_size)
        values.add(round(config.optim.compression.k / steps, 1))
    config = study.make_config(peer_counts.REFERENCE.cell((0.01,)))
    tokens.add(config.rounds * 15 * config.optim.inner.batch_size)
    self.assertEqual(tokens, {1200 * 32})
    self.assertLessEqual(max(values) - min(values), 0.1)

  def test_the_best_of_all_inner_steps_and_rates_has_the_seeds(self):
    runs = []
    for steps, losses in (
      (5, {'0.006': 2.0, '0.012': 1.9}),
      (15, {'0.006': 1.8, '0.012': 1.85}),
    ):
      runs += _tuning(peer_counts.grid(4, steps), losses)
    self.assertIsNone(peer_counts.best(runs, 4))
    runs += _tuning(peer_counts.grid(4, 30), {'0.006': 2.1, '0.012': 2.2})
    self.assertEqual(peer_counts.best(runs, 4), (15, (0.006,)))
    finals = [c for c in peer_counts.plan(runs, 3) if c.name == '4 peers']
    self.assertLen(finals, 3)
    self.assertIn('optim.inner_steps=15', finals[0].sets)

  def test_verdicts(self):
    runs = [
      _run(name, seed, loss + 0.001 * seed)
      for name, loss in (
        (peer_counts.ADAMW, 2.0),
        ('1 peer', 2.0),
        ('4 peers', 2.02),
        ('32 peers', 2.2),
      )
      for seed in range(3)
    ]
    found = peer_counts.judge(runs, study.RESULTS)
    self.assertEqual(
      {v.claim: v.outcome for v in found},
      {
        'P1, 1 peer': 'PASS',
        'P1, 4 peers': 'FAIL',
        'P1, 32 peers': 'FAIL',
        'P2': 'FAIL',
      },
    )


if __name__ == '__main__':
  absltest.main()
