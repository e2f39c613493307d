"""The pages in a real browser: what it loads, says, and lets one do."""

import pathlib
import tempfile
import unittest

import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant.report import comparison
from covenant.report import page
from tests.report import browser
from tests.report import workdirs

PROGRAM = browser.find()
SCREENS = ((1280, 800, False), (390, 844, True))


@unittest.skipIf(PROGRAM is None, 'no Chromium on the path')
@pytest.mark.browser
class BrowserTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    folder = tempfile.TemporaryDirectory()
    cls.addClassCleanup(folder.cleanup)
    root = pathlib.Path(folder.name)
    assert PROGRAM is not None
    cls.browser = browser.Browser(PROGRAM, root / 'profile')
    cls.addClassCleanup(cls.browser.close)
    long = 'x' * 300
    run = workdirs.write(
      root / 'a', rounds=400, miners=10, detail=long, hotkey=long
    )
    other = workdirs.write(root / 'b', rounds=8, miners=10)
    process = workdirs.events(root / 'c', error=long)
    cls.pages = {
      'run': page.write(run),
      'process': page.write(process),
      'comparison': comparison.write([run, other], root / 'd').page,
    }

  def open(self, name, screen=SCREENS[0]):
    url = self.pages[name].as_uri()
    self.browser.open(url, *screen)
    return url

  @parameterized.product(name=('run', 'process', 'comparison'), screen=SCREENS)
  def test_loads_nothing_complains_of_nothing_and_fits(self, name, screen):
    url = self.open(name, screen)
    for _ in ('folded', 'unfolded'):
      self.assertEqual(self.browser.errors(), [])
      self.assertEqual(self.browser.requests(), [url])
      wide = self.browser.ask('document.documentElement.scrollWidth')
      self.assertLessEqual(wide, screen[0])
      self.browser.ask(
        "document.querySelectorAll('details').forEach((d) => d.open = true)"
      )

  @parameterized.parameters(*SCREENS)
  def test_figures_are_drawn_and_have_tables(self, *screen):
    self.open('run', screen)
    for key in (
      'loss-tokens', 'loss-bytes', 'loss-simulated', 'loss-measured',
      'miner-losses', 'weights', 'scores',
    ):  # fmt: skip
      high, curves, rows = self.browser.ask(
        f"""(() => {{
          const figure = document.getElementById('{key}');
          return [
            figure.querySelector('.plot svg').getBoundingClientRect().height,
            [...figure.querySelectorAll('.plot .line')].filter(
                (line) => line.getTotalLength() > 50).length,
            figure.querySelectorAll('tbody tr').length];
        }})()"""
      )
      self.assertGreater(high, 150, key)
      self.assertGreaterEqual(curves, 2, key)
      self.assertGreaterEqual(rows, 400, key)
    for key in ('refusals', 'phases'):
      bars = f"document.querySelectorAll('#{key} .bar').length"
      self.assertGreater(self.browser.ask(bars), 0, key)
    for key in ('refused-table', 'standing', 'phases-table'):
      rows = f"document.querySelectorAll('#{key} tbody tr').length"
      self.assertGreater(self.browser.ask(rows), 0, key)

  def test_text_is_large_enough_on_a_phone(self):
    self.open('run', SCREENS[1])
    least = self.browser.ask(
      """Math.min(...[...document.querySelectorAll('svg text')].map(
          (text) => text.getBoundingClientRect().height))"""
    )
    self.assertGreater(least, 11)

  def test_values_are_read_by_keyboard(self):
    self.open('run')
    active = "document.activeElement.closest('figure')?.id"
    for _ in range(40):
      self.browser.press('Tab')
      if self.browser.ask("document.activeElement.className === 'plot'"):
        break
    self.assertEqual(self.browser.ask(active), 'loss-tokens')
    readout = "document.querySelector('#loss-tokens .readout').textContent"
    self.browser.press('Home')
    self.assertEqual(
      self.browser.ask(readout), 'tokens trained, all miners 0: held-out 5.6000'
    )
    self.browser.press('ArrowRight')
    self.assertIn(
      '5,120: training, mean of miners 5.5', self.browser.ask(readout)
    )
    cursor = "document.querySelector('#loss-tokens .cursor')"
    self.assertEqual(self.browser.ask(f'{cursor}.style.visibility'), 'visible')

  def test_one_curve_is_put_in_front(self):
    self.open('run')
    button = "document.querySelector('#weights .legend button')"
    self.browser.ask(f'{button}.focus()')
    picked = "document.querySelectorAll('#weights .plot .picked').length"
    self.browser.press('Enter')
    self.assertEqual(self.browser.ask(picked), 1)
    self.assertEqual(self.browser.ask(f'{button}.ariaPressed'), 'true')
    self.browser.press('Enter')
    self.assertEqual(self.browser.ask(picked), 0)

  def test_fields_are_searched(self):
    self.open('run')
    self.browser.ask("document.getElementById('search').focus()")
    self.browser.send('Input.insertText', text='Block_Seconds')
    found = "document.getElementById('found').textContent"
    self.assertEqual(self.browser.ask(found), ' 1 found')
    shown = """[...document.querySelectorAll('#fields tbody tr')].filter(
        (row) => row.checkVisibility()).length"""
    self.assertEqual(self.browser.ask(shown), 1)

  def test_the_policy_of_the_page_lets_no_other_script_run(self):
    """What the errors and requests above would show, if there were any."""
    self.open('run')
    self.browser.ask(
      """(() => {
        const script = document.createElement('script');
        script.textContent = 'window.intruder = true';
        document.body.append(script);
        const image = document.createElement('img');
        image.src = 'http://127.0.0.1:9/pixel';
        document.body.append(image);
      })()"""
    )
    self.assertIsNone(self.browser.ask('window.intruder'))
    self.assertNotEmpty(self.browser.errors())


if __name__ == '__main__':
  absltest.main()
