"""The pages in a real browser: requests, errors, and use by mouse and keys."""

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
CHARTS = ('run-loss', 'norms', 'timers', 'miner-losses', 'weights', 'scores')
HOSTILE = '<img src=x onerror=intrude()>'  # the name of a folder
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
    hostile = workdirs.write(root / HOSTILE, rounds=4, detail=HOSTILE)
    seeds = [workdirs.write(root / f's{i}', rounds=8, seed=i) for i in range(3)]
    seeds.append(workdirs.write(root / 'other', rounds=8, name='other'))
    cls.pages = {
      'seeds': comparison.write(seeds, root / 'f').page,
      'hostile': comparison.write([other, hostile], root / 'e').page,
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
    for key in CHARTS:
      high, curves, rows = self.browser.ask(
        f"""(() => {{
          const figure = document.getElementById('{key}');
          const u = figure.querySelector('.plot').chart;
          return [
            figure.querySelector('canvas').getBoundingClientRect().height,
            u.series.slice(1).map((s, i) => [
              s.label, u.data[i + 1].filter((v) => v !== null).length]),
            figure.querySelectorAll('tbody tr').length];
        }})()"""
      )
      self.assertGreater(high, 150, key)
      self.assertGreaterEqual(len(curves), 2, key)
      self.assertGreater(min(points for _, points in curves), 100, key)
      self.assertGreaterEqual(rows, 400, key)
    for key in ('refusals', 'standing', 'phases'):
      rows = f"document.querySelectorAll('#{key} tbody tr').length"
      self.assertGreater(self.browser.ask(rows), 0, key)
    strips = "document.querySelectorAll('#refusals .strip path').length"
    self.assertGreater(self.browser.ask(strips), 0)

  def ink(self, key):
    """Returns the colors of a chart and their numbers of pixels."""
    return self.browser.ask(
      f"""(() => {{
        const canvas = document.querySelector('#{key} canvas');
        const {{width, height}} = canvas;
        const image = canvas.getContext('2d').getImageData(0, 0, width, height);
        const pixels = new Uint32Array(image.data.buffer);
        const count = {{}};
        for (const p of pixels) {{
          const hex = '#' + [p & 255, p >> 8 & 255, p >> 16 & 255].map(
              (c) => c.toString(16).padStart(2, '0')).join('');
          if (p >>> 24 === 255) count[hex] = (count[hex] ?? 0) + 1;
        }}
        return count;
      }})()"""
    )

  def test_colors_follow_the_scheme(self):
    for screen, held, trained in (
      ((1280, 800, False), '#d55e00', '#0072b2'),
      ((1280, 800, True), '#e69f00', '#56b4e9'),
    ):
      self.open('run', screen)
      ink = self.ink('run-loss')
      self.assertGreater(ink.get(held, 0), 50)
      self.assertGreater(ink.get(trained, 0), 50)
    # Paper is light, and so is a page whose scheme changes.
    self.browser.ask("dispatchEvent(new Event('beforeprint'))")
    self.assertGreater(self.ink('run-loss').get('#d55e00', 0), 50)
    self.browser.ask("dispatchEvent(new Event('afterprint'))")
    self.assertGreater(self.ink('run-loss').get('#e69f00', 0), 50)

  def test_paper_has_all_content_and_no_buttons(self):
    self.open('run', (790, 1100, True))
    self.browser.send('Emulation.setEmulatedMedia', media='print')
    wide, zoom, ground = self.browser.ask(
      """[document.documentElement.scrollWidth,
          getComputedStyle(document.querySelector('.zoom')).display,
          getComputedStyle(document.body).backgroundColor]"""
    )
    self.assertLessEqual(wide, 790)
    self.assertEqual(zoom, 'none')
    self.assertEqual(ground, 'rgb(255, 255, 255)')

  def test_text_is_large_enough_on_a_phone(self):
    self.open('run', SCREENS[1])
    least = self.browser.ask(
      """Math.min(
          ...[...document.querySelectorAll('td, th, p, button, dd')].map(
              (e) => parseFloat(getComputedStyle(e).fontSize)),
          ...[...document.querySelectorAll('.plot')].flatMap(
              (p) => p.chart.axes.map((axis) => parseFloat(axis.font[0]))))"""
    )
    self.assertGreaterEqual(least, 13)

  def legend(self, key):
    """Returns the names and values in the legend of a chart."""
    return dict(
      self.browser.ask(
        f"""[...document.querySelectorAll('#{key} .u-series')].map(
            (row) => [...row.cells].map((cell) => cell.textContent))"""
      )
    )

  def place(self, key, across, down=0.5):
    """Scrolls to a chart and returns a point of its plotting area."""
    left, top, width, height = self.browser.ask(
      f"""(() => {{
        const over = document.querySelector('#{key} .u-over');
        over.scrollIntoView({{block: 'center'}});
        const box = over.getBoundingClientRect();
        return [box.left, box.top, box.width, box.height];
      }})()"""
    )
    return left + across * width, top + down * height

  def span(self, key):
    """Returns the range of the horizontal axis that is shown."""
    return self.browser.ask(
      f"""(() => {{
        const {{min, max}} = document.querySelector('#{key} .plot')
            .chart.scales.x;
        return [min, max];
      }})()"""
    )

  def test_values_are_read_by_hovering(self):
    self.open('run')
    self.assertEqual(self.legend('weights')['0'], '')
    self.browser.mouse('mouseMoved', *self.place('weights', 0.5))
    values = self.legend('weights')
    self.assertIn(values['rounds completed'], ('200', '201', '202'))
    self.assertEqual(values['0'], '0.1000')
    self.assertEqual(values['9: copier'], '0.1000')
    self.browser.mouse('mouseMoved', 1, 1)
    self.assertEqual(self.legend('weights')['0'], '')

  def test_a_value_is_shown_where_a_curve_has_none(self):
    """Evaluations are rarer than rounds: the nearest one is shown."""
    self.open('run')
    for across in (0.5, 0.5025, 0.505):
      self.browser.mouse('mouseMoved', *self.place('run-loss', across))
      values = self.legend('run-loss')
      self.assertStartsWith(values['held-out'], '1.6')
      self.assertStartsWith(values['training, mean of miners'], '1.5')

  def test_values_are_read_by_keyboard(self):
    self.open('run')
    active = "document.activeElement.closest('figure')?.id"
    for _ in range(40):
      self.browser.press('Tab')
      if self.browser.ask("document.activeElement.className === 'plot'"):
        break
    self.assertEqual(self.browser.ask(active), 'run-loss')
    said = "document.querySelector('#run-loss .said').textContent"
    self.browser.press('Home')
    self.assertEqual(
      self.browser.ask(said), 'tokens trained, all miners 0: held-out 5.6000'
    )
    self.assertEqual(self.legend('run-loss')['held-out'], '5.6000')
    self.browser.press('ArrowRight')
    self.assertIn('5,120: training, mean of miners 5.5', self.browser.ask(said))
    values = self.legend('run-loss')
    self.assertEqual(values['tokens trained, all miners'], '5,120')
    self.browser.press('Escape')
    self.assertEqual(self.legend('run-loss')['held-out'], '')

  def test_dragging_zooms_and_a_double_click_shows_the_whole_range(self):
    self.open('run')
    self.assertEqual(self.span('weights'), [1, 400])
    start, stop = (self.place('weights', across) for across in (0.25, 0.5))
    self.browser.mouse('mouseMoved', *start)
    self.browser.mouse('mousePressed', *start)
    self.browser.mouse('mouseMoved', *stop)
    self.browser.mouse('mouseReleased', *stop)
    low, high = self.span('weights')
    self.assertAlmostEqual(low, 1 + 399 * 0.25, delta=3)
    self.assertAlmostEqual(high, 1 + 399 * 0.5, delta=3)
    self.assertEqual(self.span('scores'), [1, 400])  # others stay
    for clicks in (1, 2):
      self.browser.mouse('mousePressed', *stop, clicks)
      self.browser.mouse('mouseReleased', *stop, clicks)
    self.assertEqual(self.span('weights'), [1, 400])

  def choose(self, key, choice, option):
    """Chooses an option of a chart, such as 'against', 'bytes'."""
    self.browser.ask(
      f"""(() => {{
        const labels = document.querySelectorAll('#{key} .choices label');
        const select = [...labels].find(
            (l) => l.textContent.startsWith('{choice} ')).lastChild;
        select.selectedIndex = [...select.options].findIndex(
            (o) => o.text === '{option}');
        select.dispatchEvent(new Event('change'));
      }})()"""
    )

  def chart(self, key):
    """Returns the data of a chart by label."""
    return self.browser.ask(
      f"""(() => {{
        const u = document.querySelector('#{key} .plot').chart;
        return Object.fromEntries(u.series.map((s, i) => [s.label, u.data[i]]));
      }})()"""
    )

  def test_one_chart_has_all_horizontal_axes(self):
    self.open('run')
    losses = {}
    for against, axis in (
      ('tokens', 'tokens trained, all miners'),
      ('rounds', 'rounds completed'),
      ('bytes', 'payload bytes sent, all miners'),
      ('simulated time', 'simulated days'),
      ('measured time', 'measured minutes'),
    ):
      self.choose('run-loss', 'against', against)
      data = self.chart('run-loss')
      self.assertIn(axis, data)
      self.assertEqual(data[axis], sorted(data[axis]))
      held = [y for y in data['held-out'] if y is not None]
      losses[against] = held[-50:]
      self.assertGreater(self.ink('run-loss').get('#d55e00', 0), 50, against)
      charts = "document.querySelectorAll('#run-loss canvas').length"
      self.assertEqual(self.browser.ask(charts), 1)
    self.assertLen(set(map(str, losses.values())), 1)
    self.assertEqual(self.browser.errors(), [])

  def test_curves_are_smoothed_and_scaled(self):
    self.open('run')
    name = 'training, mean of miners'
    raw = [y for y in self.chart('run-loss')[name] if y is not None]
    self.choose('run-loss', 'smoothing', 'more')
    soft = [y for y in self.chart('run-loss')[name] if y is not None]
    self.assertLen(soft, len(raw))
    self.assertEqual(soft[0], raw[0])
    # A mean of a falling curve and of what came before lies above it.
    self.assertGreater(soft[20], raw[20])
    self.choose('run-loss', 'scale', 'logarithmic')
    scale = "document.querySelector('#run-loss .plot').chart.scales.y.distr"
    self.assertEqual(self.browser.ask(scale), 3)
    self.assertGreater(self.ink('run-loss').get('#d55e00', 0), 50)
    self.assertEqual(self.browser.errors(), [])

  @parameterized.parameters('tokens', 'bytes')
  def test_buttons_zoom(self, against):
    key = 'run-loss'
    self.open('run')
    self.choose(key, 'against', against)
    before = self.span(key)
    press = 'document.querySelector(\'#%s [aria-label="%s"]\').%s()'
    self.browser.ask(press % (key, 'Zoom in', 'focus'))
    for _ in range(3):
      self.browser.press('Enter')
    low, high = self.span(key)
    self.assertGreater(low, before[0])
    self.assertLess(high, before[1])
    self.browser.ask(press % (key, 'Zoom out', 'click'))
    wider = self.span(key)
    self.assertLess(wider[0], low)
    self.assertGreater(wider[1], high)
    # Keys that leave the range move it along.
    self.browser.ask(f"document.querySelector('#{key} .plot').focus()")
    self.browser.press('Home')
    self.assertLessEqual(self.span(key)[0], before[0])
    self.browser.ask(press % (key, 'Reset zoom', 'click'))
    self.assertEqual(self.span(key), before)

  def shown(self, key):
    """Returns the names of the curves that are drawn."""
    return self.browser.ask(
      f"""document.querySelector('#{key} .plot').chart.series.slice(1).filter(
          (s) => s.show).map((s) => s.label)"""
    )

  def test_the_legend_hides_a_curve(self):
    self.open('run')
    self.assertGreater(self.ink('run-loss').get('#d55e00', 0), 50)
    x, y = self.browser.ask(
      """(() => {
        const rows = document.querySelectorAll('#run-loss .u-series');
        const row = [...rows].find(
            (row) => row.textContent.startsWith('held-out'));
        row.scrollIntoView({block: 'center'});
        const box = row.querySelector('.u-label').getBoundingClientRect();
        return [box.left + 5, box.top + 5];
      })()"""
    )
    self.browser.mouse('mousePressed', x, y)
    self.browser.mouse('mouseReleased', x, y)
    self.assertEqual(self.shown('run-loss'), ['training, mean of miners'])
    self.assertEqual(self.ink('run-loss').get('#d55e00', 0), 0)

  def test_the_legend_is_used_by_keyboard(self):
    self.open('run')
    first = 'document.querySelector(\'#weights .u-legend [tabindex="0"]\')'
    every = 'document.querySelectorAll(\'#weights .u-legend [tabindex="0"]\')'
    self.assertEqual(self.browser.ask(f'{every}.length'), 1)
    self.browser.ask(f'{first}.focus()')
    pressed = "document.activeElement.getAttribute('aria-pressed')"
    name = 'document.activeElement.textContent'
    self.assertEqual(self.browser.ask(name), '9: copier')
    self.assertEqual(self.browser.ask(pressed), 'true')
    self.browser.press('Enter')
    self.assertNotIn('9: copier', self.shown('weights'))
    self.assertEqual(self.browser.ask(pressed), 'false')
    self.browser.press('Enter')
    self.assertIn('9: copier', self.shown('weights'))
    self.browser.press('ArrowRight')
    self.assertEqual(self.browser.ask(name), '0')
    self.browser.press('Enter')
    self.assertNotIn('0', self.shown('weights'))

  def test_charts_follow_the_width_of_the_window(self):
    self.open('run')
    wide = self.browser.ask("document.querySelector('canvas').clientWidth")
    self.browser.send(
      'Emulation.setDeviceMetricsOverride', width=400, height=800,
      deviceScaleFactor=1, mobile=False,
    )  # fmt: skip
    narrow = self.browser.ask(
      """new Promise((done) => requestAnimationFrame(
          () => requestAnimationFrame(
              () => done(document.querySelector('canvas').clientWidth))))"""
    )
    self.assertLess(narrow, 400)
    self.assertGreater(wide, narrow)

  def test_fields_are_searched(self):
    self.open('run')
    self.browser.ask("document.getElementById('search').focus()")
    self.browser.send('Input.insertText', text='Block_Seconds')
    found = "document.getElementById('found').textContent"
    self.assertEqual(self.browser.ask(found), ' 1 found')
    shown = """[...document.querySelectorAll('#fields tbody tr')].filter(
        (row) => row.checkVisibility()).length"""
    self.assertEqual(self.browser.ask(shown), 1)

  def test_hostile_names_stay_text_in_charts(self):
    self.open('hostile')
    key = 'held-out-loss'
    self.browser.mouse('mouseMoved', *self.place(key, 0.1))
    self.assertIn(HOSTILE, self.legend(key))
    self.assertIn(HOSTILE, self.shown(key))
    images = "document.querySelectorAll('img').length"
    self.assertEqual(self.browser.ask(images), 0)
    self.assertEqual(self.browser.errors(), [])

  def test_runs_of_a_comparison_are_hidden_with_their_bands(self):
    self.open('seeds')
    group = 's0 (mean of 3 seeds)'
    key = 'held-out-loss'
    edges = {f'{group}, highest seed', f'{group}, lowest seed'}
    self.assertContainsSubset({group, 'other', *edges}, self.shown(key))
    rows = """[...document.querySelectorAll('#runs tbody tr')].filter(
        (row) => row.checkVisibility()).map(
            (row) => row.cells[0].textContent)"""
    self.assertEqual(self.browser.ask(rows), ['s0', 's1', 's2', 'other', group])
    self.browser.ask("document.querySelector('#shown input').click()")
    self.assertEqual(self.shown(key), ['other'])
    self.assertEqual(self.shown('training-loss'), ['other'])
    self.assertEqual(self.browser.ask(rows), ['other'])
    self.browser.ask("document.querySelector('#shown input').click()")
    self.assertContainsSubset({group, *edges}, self.shown(key))
    # The legend has the curve, and its edges follow it.
    self.browser.ask(
      f"""[...document.querySelectorAll('#{key} .u-legend th')].find(
          (th) => th.textContent === '{group}').click()"""
    )
    self.assertEqual(self.shown(key), ['other'])
    self.assertEqual(self.browser.errors(), [])

  def test_the_policy_of_the_page_lets_no_other_script_run(self):
    """The errors and requests tested above would show in this way."""
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
