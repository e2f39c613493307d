'use strict';

// Draws each figure from its own table with uPlot, and makes what uPlot offers
// to the mouse (values, zoom, hidden curves) reachable by keyboard and touch.

const HEIGHT = 300;
const DASHES = [[], [9, 4], [2, 3], [10, 3, 2, 3], [18, 5]];
const ANNOUNCED = 12;  // values that a screen reader is told at once
const HINT = 'hover, or use arrow keys';
const FONT = '13px system-ui, sans-serif';
const STEPS = {ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10};

const style = (name) =>
    getComputedStyle(document.documentElement).getPropertyValue(name);
const charts = [];

// A number on an axis, in powers of 1000.
const short = (value, unit = '') => {
  const power = Math.floor(Math.log10(Math.abs(value) || 1) / 3 + 1e-9);
  const step = Math.max(0, Math.min(5, power));
  const digits = Number((value / 1000 ** step).toPrecision(4));
  return `${digits} ${['', 'k', 'M', 'G', 'T', 'P'][step]}${unit}`.trim();
};

// Powers of ten, with 2 and 5 times of them where there is room.
const logTicks = (min, max) => {
  const ticks = [];
  for (let unit = 10 ** Math.floor(Math.log10(min)); unit <= max; unit *= 10) {
    ticks.push(...(max < 300 * min ? [1, 2, 5] : [1]).map((t) => t * unit));
  }
  return ticks.filter((t) => min <= t && t <= max);
};

const element = (name, attributes, ...children) => {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
};

// uPlot's options of one chart.
const options = (spec, names, cells, data, place) => {
  const axis = (label, unit) => ({
    label, font: FONT, labelFont: FONT, labelSize: 22, stroke: () => style('--soft'),
    grid: {stroke: () => style('--line'), width: 1},
    ticks: {stroke: () => style('--line'), width: 1, size: 4},
    values: (u, ticks) => ticks.map((t) => t === null ? '' : short(t, unit)),
  });
  const {log, top} = spec;
  const name = (look) => look === null ? '--muted' : `--look${look % 5}`;
  // The first curves of the table are drawn last, on top of the others.
  const series = spec.looks.map((look, i) => ({
    label: names[i + 1],
    width: look === null ? 1 : 2,
    dash: look === null ? [] : DASHES[(look + Math.floor(look / 5)) % 5],
    stroke: () => style(name(look)),
    spanGaps: spec.joined,
    value: (u, v, _, at) => v == null ? '' : cells[i + 1][at],
    points: {
      size: 6, fill: () => style(name(look)),
      // Of many points, those without a neighbor to draw a line to.
      filter: (u, at, shown) => shown ? null : u.data[at].flatMap(
          (v, k, all) => v !== null && (all[k - 1] ?? null) === null &&
              (all[k + 1] ?? null) === null ? [k] : []),
    },
  }));
  const colors = [...spec.looks].reverse().map((look) => `var(${name(look)})`);
  return {
    width: place.clientWidth, height: HEIGHT, focus: {alpha: .3},
    series: [
      {label: names[0], value: (u, v, _, at) => cells[0][at] ?? HINT},
      ...series.reverse(),
    ],
    axes: [
      {
        ...axis(names[0], spec.unit), size: 32,
        filter: (u, ticks) => ticks.map(
            (t) => !spec.whole || t % 1 === 0 ? t : null),
        ...(log ? {splits: (u, _, min, max) => logTicks(min, max)} : {}),
      },
      {
        ...axis(spec.y, ''),
        size: (u, ticks) => 16 + 7.5 * Math.max(
            2, ...(ticks ?? []).map((t) => t.length)),
      },
    ],
    scales: {
      x: {
        time: false, distr: log ? 3 : 1,
        range: (u, low, high) => low < high ? [low, high] :
            log ? [low / 2, low * 2] : [low - 1, low + 1],
      },
      y: {
        range: (u, low, high) => {
          if (low === null) return [0, 1];
          if (top !== null && low < top) high = Math.min(high, top);
          // A quantity that starts near zero is shown from zero.
          if (low >= 0 && low <= high / 4) low = 0;
          const pad = (high - low) / 20 || Math.abs(high) / 2 || .5;
          return [low && low - pad, high + pad];
        },
      },
    },
    cursor: {focus: {prox: 24}, hover: {skip: spec.joined ? [null] : []}},
    legend: {
      mount: (u, legend) => place.before(legend),
      markers: {stroke: (u, i) => colors[i - 1], fill: (u, i) => colors[i - 1]},
    },
  };
};

const draw = (figure, place) => {
  const spec = JSON.parse(place.dataset.chart);
  const title = figure.querySelector('h3').textContent;
  const names = [...figure.querySelectorAll('thead th')].map(
      (cell) => cell.textContent);
  const rows = [...figure.querySelectorAll('tbody tr')].map(
      (row) => [...row.cells].map((cell) => cell.textContent));
  const cells = names.map((_, i) => rows.map((row) => row[i]));
  const [xs, ...ys] = cells.map((column) => column.map(
      (cell) => cell === '' ? null : Number(cell.replaceAll(',', ''))));
  const data = [xs, ...ys.reverse()];
  const u = new uPlot(options(spec, names, cells, data, place), data, place);
  charts.push(u);
  place.chart = u;  // for tests
  new ResizeObserver(
      () => u.setSize({width: place.clientWidth, height: HEIGHT})).observe(place);

  // Zoom: by dragging (uPlot) or by buttons, around the cursor.
  const [into, from] = spec.log ? [Math.log, Math.exp] : [Number, Number];
  const [first, last] = [xs[0], xs.at(-1)];
  // A logarithmic axis begins where something can be seen.
  const seen = xs.find((_, i) => !spec.log || spec.top === null ||
      data.slice(1).some((y) => y[i] !== null && y[i] <= spec.top)) ?? first;
  const reset = () => u.setScale('x', {min: seen, max: last});
  if (seen > first && seen < last) reset();
  const zoom = (factor) => {
    const [a, b] = [u.scales.x.min, u.scales.x.max].map(into);
    const at = u.cursor.idx;
    const middle = at == null ? (a + b) / 2 : into(xs[at]);
    const [min, max] = [a, b].map((end) => from(middle + factor * (end - middle)));
    if (xs.filter((x) => min <= x && x <= max).length < 2) return;
    u.setScale('x', {min: Math.max(min, first), max: Math.min(max, last)});
  };
  const button = (text, name, action) => {
    const made = element('button', {type: 'button', 'aria-label': name}, text);
    made.addEventListener('click', action);
    return made;
  };
  place.after(element(
      'div', {class: 'zoom', role: 'group', 'aria-label': `Zoom of ${title}`},
      button('+', 'Zoom in', () => zoom(.5)),
      button('\u2212', 'Zoom out', () => zoom(2)),
      button('Reset', 'Reset zoom', reset)));

  // Values by arrow keys.
  const said = element('output', {'aria-live': 'polite', class: 'said'});
  place.after(said);
  for (const [key, value] of Object.entries({
    tabindex: 0, role: 'group',
    'aria-label': `${title}: left and right arrow keys read values`,
  })) place.setAttribute(key, value);
  let at = -1;
  const leave = () => u.setCursor({left: -10, top: -10});
  const move = (index) => {
    at = Math.max(0, Math.min(xs.length - 1, index));
    const {min, max} = u.scales.x;
    const shift = Math.min(0, into(xs[at]) - into(min)) +
        Math.max(0, into(xs[at]) - into(max));
    if (shift) {
      const [low, high] = [min, max].map((end) => from(into(end) + shift));
      u.setScale('x', {min: low, max: high});
    }
    // After uPlot has moved its scale. Above the curves, none is singled out.
    queueMicrotask(
        () => u.setCursor({left: u.valToPos(xs[at], 'x'), top: -HEIGHT}));
    const values = names.slice(1).flatMap(
        (name, i) => rows[at][i + 1] ? [`${name} ${rows[at][i + 1]}`] : []);
    said.textContent = `${names[0]} ${rows[at][0]}: ` +
        (values.slice(0, ANNOUNCED).join(', ') || 'no value') +
        (values.length > ANNOUNCED ? ', ...' : '');
  };
  place.addEventListener('blur', leave);
  place.addEventListener('keydown', (event) => {
    if (event.key in STEPS) move(at + STEPS[event.key]);
    else if (event.key === 'Home') move(0);
    else if (event.key === 'End') move(xs.length - 1);
    else if (event.key === 'Escape') leave();
    else return;
    event.preventDefault();
  });

  // The legend as a toolbar: one stop of the Tab key, arrow keys within.
  const legend = figure.querySelector('.u-legend');
  const keys = [...legend.querySelectorAll('th')].slice(1).reverse();
  legend.setAttribute('role', 'toolbar');
  legend.setAttribute('aria-label', `Curves of ${title}`);
  keys.forEach((key, i) => {
    key.parentNode.style.order = i + 1;
    key.tabIndex = i ? -1 : 0;
    key.setAttribute('role', 'button');
    key.setAttribute('aria-pressed', true);
    key.title = 'Hide or show this curve';
    key.addEventListener(
        'focus', () => u.setSeries(keys.length - i, {focus: true}));
    key.addEventListener('blur', () => u.setSeries(null, {focus: true}));
  });
  u.hooks.setSeries = [() => keys.forEach((key, i) => key.setAttribute(
      'aria-pressed', u.series[keys.length - i].show))];
  legend.addEventListener('keydown', (event) => {
    const step = STEPS[event.key] ?? {ArrowUp: -1, ArrowDown: 1}[event.key];
    const next = keys.indexOf(event.target) + (step ?? 0);
    if (step) keys[Math.max(0, Math.min(keys.length - 1, next))].focus();
    else if (event.key === 'Enter' || event.key === ' ') event.target.click();
    else return;
    event.preventDefault();
  });
};

for (const place of document.querySelectorAll('.plot')) {
  draw(place.closest('figure'), place);
}

// Canvases do not follow style sheets by themselves. Paper is light.
const redraw = () => charts.forEach((u) => u.redraw(false));
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', redraw);
for (const [event, on] of [['beforeprint', true], ['afterprint', false]]) {
  addEventListener(event, () => {
    document.documentElement.classList.toggle('printing', on);
    redraw();
  });
}

// Shows the fields of the config that contain the text searched for.
const search = document.getElementById('search');
search?.addEventListener('input', () => {
  const wanted = search.value.trim().toLowerCase();
  let count = 0;
  for (const section of document.querySelectorAll('#fields details')) {
    let here = 0;
    for (const row of section.querySelectorAll('tbody tr')) {
      row.hidden = !row.textContent.toLowerCase().includes(wanted);
      here += !row.hidden;
    }
    section.hidden = !here;
    section.open = wanted !== '' && here > 0;
    count += here;
  }
  document.getElementById('found').textContent = wanted ? ` ${count} found` : '';
});
