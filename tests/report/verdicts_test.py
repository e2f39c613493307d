import pathlib

from absl.testing import absltest

from covenant.gauntlet import findings
from covenant.report import page
from tests.report import reader
from tests.report import workdirs


class VerdictsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path, 'run')

  def rows(self, **kwargs):
    path = page.write(workdirs.write(self.folder, **kwargs))
    return reader.Reader(path.read_text()).rows

  def test_who_was_refused_why_and_when(self):
    row = next(r for r in self.rows(rounds=6) if r[1:2] == ['REPLAY'])
    meaning = findings.CheckFinding.REPLAY.value
    self.assertEqual(
      row, ['3: copier', 'REPLAY', meaning, '3', '', '1, 3, 5', 'of uid 0']
    )
    text = (self.folder / 'report.html').read_text()
    self.assertIn('<path d="M0 0H1V1H0zM2 0H3V1H2zM4 0H5V1H4z">', text)

  def test_nobody_was_refused(self):
    workdirs.write(self.folder, rounds=2, verdict='VALID')
    text = page.write(self.folder).read_text()
    self.assertIn('No miner was refused or penalized in 2 rounds.', text)

  def test_penalties_are_told(self):
    workdirs.write(self.folder, rounds=2, verdict='VALID')
    path = self.folder / 'verdicts.jsonl'
    path.write_text(
      path.read_text().replace('"penalty": 1.0', '"penalty": 0.5')
    )
    rows = reader.Reader(page.write(self.folder).read_text()).rows
    self.assertIn('PENALTY', {row[1] for row in rows if len(row) > 1})

  def test_state_after_the_last_verdict(self):
    rows = self.rows(rounds=6)
    row = next(r for r in rows if r[:2] == ['3: copier', '0.1250'])
    self.assertEqual(row[2:6], ['1.375', '20.0', '1', '3 of 6'])
    self.assertEqual(row[6:], ['because of of uid 0', '5Abc'])

  def test_texts_from_peers_are_clipped(self):
    rows = self.rows(rounds=2, detail='x' * 500)
    self.assertIn('x' * 200 + '...', {row[-1] for row in rows})
    self.assertNotIn('x' * 201, (self.folder / 'report.html').read_text())

  def test_the_first_validator_is_told_of(self):
    workdirs.write(self.folder, rounds=2)
    path = self.folder / 'verdicts.jsonl'
    other = path.read_text().replace('"validator": 4', '"validator": 5')
    path.write_text(path.read_text() + other.replace('REPLAY', 'LATE'))
    text = page.write(self.folder).read_text()
    self.assertIn('The validator is uid 4.', text)
    self.assertNotIn('LATE', text)

  def test_actions_and_errors_of_a_process(self):
    workdirs.events(self.folder, error='no route')
    rows = reader.Reader(page.write(self.folder).read_text()).rows
    self.assertIn(['train', '1', '0'], rows)
    self.assertIn(['upload', '0', '1'], rows)
    self.assertIn(['2001-09-09 01:46:49', '1', 'upload', 'no route'], rows)


if __name__ == '__main__':
  absltest.main()
