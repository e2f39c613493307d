'use strict';

// Draws each chart from the table of its figure with uPlot, and makes what
// uPlot offers to the mouse (values, zoom, hidden curves) reachable by keyboard
// and touch.

const HEIGHT = 300;
const DASHES = [[], [9, 4], [2, 3], [10, 3, 2, 3], [18, 5]];
const MARKED = 30;  // points of a curve that are all marked, at most
const ANNOUNCED = 12;  // values that a screen reader is told at once
const HINT = 'hover, or use arrow keys';
const FONT = '13px system-ui, sans-serif';
const STEPS = {ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10};
const SMOOTHINGS = [0, .6, .9, .97];  // weights of what came before
const charts = [];

const style = (name) =>
    getComputedStyle(document.documentElement).getPropertyValue(name);
const color = (look) => look === null ? '--muted' : `--look${look % 5}`;
const clamp = (value, low, high) => Math.max(low, Math.min(high, value));

// A number on an axis, in powers of 1000.
const short = (value, unit) => {
  const power = Math.floor(Math.log10(Math.abs(value) || 1) / 3 + 1e-9);
  const step = clamp(power, 0, 5);
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

// A running mean of each curve, which weighs a point by its age.
const smoothed = (ys, weight) => {
  let [sum, norm] = [0, 0];
  return weight === 0 ? ys : ys.map((y) => {
    if (y === null) return null;
    [sum, norm] = [weight * sum + y, weight * norm + 1];
    return sum / norm;
  });
};

const axis = (label, unit) => ({
  label, font: FONT, labelFont: FONT, labelSize: 22,
  stroke: () => style('--soft'),
  grid: {stroke: () => style('--line'), width: 1},
  ticks: {stroke: () => style('--line'), width: 1, size: 4},
  values: (u, ticks) => ticks.map((t) => t === null ? '' : short(t, unit)),
});

// Points that get a mark: all if few, else those that no line reaches.
const marked = (ys, joined) => {
  const found = ys.flatMap((y, i) => y === null ? [] : [i]);
  if (found.length <= MARKED) return found;
  return joined ? [] :
      found.filter((i) => ys[i - 1] == null && ys[i + 1] == null);
};

const curve = (label, look, joined, cells, thin) => ({
  label, spanGaps: joined,
  width: thin ? .5 : look === null ? 1 : 2,
  dash: look === null ? [] : DASHES[(look + Math.floor(look / 5)) % 5],
  stroke: () => style(color(look)),
  points: {
    show: !thin, size: 6, fill: () => style(color(look)),
    filter: (u, series) => thin ? [] : marked(u.data[series], joined),
  },
  value: (u, y, _, at) => y == null ? '' : cells[at],
});

// uPlot's options; curves are in the order of the table, the last ones below.
const options = (spec, names, columns, place, logY) => {
  const looks = [...spec.looks].reverse();
  const paint = (u, i) => `var(${color(looks[i - 1])})`;
  const x = axis(names[0], spec.unit);
  const y = axis(spec.y, '');
  if (spec.log) x.splits = (u, _, min, max) => logTicks(min, max);
  if (logY) y.splits = (u, _, min, max) => logTicks(min, max);
  const edges = new Set(spec.bands.flat());
  const at = (column) => spec.looks.length - column;  // in uPlot's order
  x.filter = (u, ticks) => ticks.map(
      (t) => spec.whole && t % 1 !== 0 ? null : t);
  x.size = 32;
  y.size = (u, ticks) => 16 + 7.5 * Math.max(
      2, ...(ticks ?? []).map((t) => t.length));
  const rangeX = (u, low, high) => low < high ? [low, high] :
      spec.log ? [low / 2, low * 2] : [low - 1, low + 1];
  const rangeY = (u, low, high) => {
    if (low === null) return logY ? [1, 10] : [0, 1];
    if (logY) return [low / 1.1, high * 1.1];
    if (spec.top !== null && low < spec.top) high = Math.min(high, spec.top);
    // A quantity that starts near zero is shown from zero.
    if (low >= 0 && low <= high / 4) low = 0;
    const pad = (high - low) / 20 || Math.abs(high) / 2 || .5;
    return [low && low - pad, high + pad];
  };
  return {
    width: place.clientWidth, height: HEIGHT, focus: {alpha: .3},
    axes: [x, y],
    scales: {
      x: {time: false, distr: spec.log ? 3 : 1, range: rangeX},
      y: {range: rangeY, distr: logY ? 3 : 1},
    },
    series: [
      {label: names[0], value: (u, v, _, at) => columns[0][at] ?? HINT},
      ...spec.looks.map((look, i) => curve(
          names[i + 1], look, spec.joined, columns[i + 1],
          edges.has(i))).reverse(),
    ],
    bands: spec.bands.map(([high, low]) => ({
      series: [at(high), at(low)],
      fill: () => style(color(spec.looks[high])).trim() + '33',
    })),
    cursor: {focus: {prox: 24}, hover: {skip: spec.joined ? [null] : []}},
    legend: {
      mount: (u, legend) => place.before(legend),
      markers: {stroke: paint, fill: paint},
    },
  };
};

// Buttons that zoom around the cursor; uPlot zooms by dragging.
const addZoom = (u, place, spec, title) => {
  const [into, from] = spec.log ? [Math.log, Math.exp] : [Number, Number];
  const [xs, ...curves] = u.data;
  const [first, last] = [xs[0], xs.at(-1)];
  // A logarithmic axis begins where something can be seen.
  const seen = xs.find((_, i) => !spec.log || spec.top === null ||
      curves.some((y) => y[i] !== null && y[i] <= spec.top)) ?? first;
  const zoom = (factor) => {
    const {min, max} = u.scales.x;
    const middle = u.cursor.idx == null ?
        (into(min) + into(max)) / 2 : into(xs[u.cursor.idx]);
    const [low, high] = [min, max].map((end) => clamp(
        from(middle + factor * (into(end) - middle)), first, last));
    if (xs.filter((x) => low <= x && x <= high).length < 2) return;
    u.setScale('x', {min: low, max: high});
  };
  const reset = () => u.setScale('x', {min: seen, max: last});
  const group = document.createElement('div');
  group.className = 'zoom';
  group.role = 'group';
  group.ariaLabel = `Zoom of ${title}`;
  for (const [text, name, action] of [
    ['+', 'Zoom in', () => zoom(.5)], ['\u2212', 'Zoom out', () => zoom(2)],
    ['Reset', 'Reset zoom', reset],
  ]) {
    const button = group.appendChild(document.createElement('button'));
    button.type = 'button';
    button.ariaLabel = name;
    button.textContent = text;
    button.addEventListener('click', action);
  }
  place.after(group);
  if (first < seen && seen < last) reset();
};

// Moves the cursor by arrow keys, and says the values of its row.
const addKeys = (u, place, spec, title, names, rows) => {
  const into = spec.log ? Math.log : Number;
  const [xs] = u.data;
  let at = -1;
  const said = document.createElement('output');
  said.className = 'said';
  said.ariaLive = 'polite';
  place.after(said);
  place.tabIndex = 0;
  place.role = 'group';
  place.ariaLabel = `${title}: left and right arrow keys read values`;
  const move = (index) => {
    at = clamp(index, 0, xs.length - 1);
    const {min, max} = u.scales.x;
    if (xs[at] < min || xs[at] > max) {  // the range moves along
      const shift = into(xs[at]) - into(xs[at] < min ? min : max);
      const [low, high] = [min, max].map((end) => spec.log ?
          end * Math.exp(shift) : end + shift);
      u.setScale('x', {min: low, max: high});
    }
    // Once uPlot has moved its range. Above the chart, no curve is in focus.
    queueMicrotask(
        () => u.setCursor({left: u.valToPos(xs[at], 'x'), top: -HEIGHT}));
    const values = rows[at].slice(1).flatMap(
        (cell, i) => cell ? [`${names[i + 1]} ${cell}`] : []);
    said.textContent = `${names[0]} ${rows[at][0]}: ` +
        (values.slice(0, ANNOUNCED).join(', ') || 'no value') +
        (values.length > ANNOUNCED ? ', ...' : '');
  };
  const leave = () => u.setCursor({left: -10, top: -10});
  place.addEventListener('blur', leave);
  place.addEventListener('keydown', (event) => {
    if (event.key in STEPS) move(at + STEPS[event.key]);
    else if (event.key === 'Home') move(0);
    else if (event.key === 'End') move(xs.length - 1);
    else if (event.key === 'Escape') leave();
    else return;
    event.preventDefault();
  });
};

// Makes the legend a toolbar: one stop of the Tab key, arrow keys within.
const addToolbar = (u, legend, title) => {
  const keys = [...legend.querySelectorAll('th')].slice(1).reverse();
  const series = (i) => keys.length - i;
  legend.role = 'toolbar';
  legend.ariaLabel = `Curves of ${title}`;
  const update = (_, focused) => keys.forEach((key, i) => {
    key.ariaPressed = u.series[series(i)].show;
    const row = key.parentNode;
    row.classList.toggle('focused', focused === series(i));
    if (focused === series(i)) {  // below the first row, which stays
      legend.scrollTop = row.offsetTop - 2 * row.offsetHeight;
    }
  });
  keys.forEach((key, i) => {
    key.parentNode.style.order = i + 1;
    key.role = 'button';
    key.tabIndex = i ? -1 : 0;
    key.title = 'Hide or show this curve';
    const focus = (index) => () => u.setSeries(index, {focus: true});
    key.addEventListener('focus', focus(series(i)));
    key.addEventListener('blur', focus(null));
  });
  update();
  u.hooks.setSeries = [update];
  legend.addEventListener('keydown', (event) => {
    const step = STEPS[event.key] ?? {ArrowUp: -1, ArrowDown: 1}[event.key];
    const next = keys.indexOf(event.target) + (step ?? 0);
    if (step) keys[clamp(next, 0, keys.length - 1)].focus();
    else if ([' ', 'Enter'].includes(event.key)) event.target.click();
    else return;
    event.preventDefault();
  });
};

// The edges of a band have no place in the legend and follow their curve.
const addBands = (u, spec, legend) => {
  const at = (column) => spec.looks.length - column;
  const rows = [...legend.querySelectorAll('tr')];
  const edges = new Set(spec.bands.flat());
  for (const edge of edges) rows[at(edge)].hidden = true;
  u.hooks.setSeries.push((_, series, {show}) => {
    const column = at(series ?? 0);
    if (show === undefined || edges.has(column)) return;
    for (const edge of edges) {
      if (spec.looks[edge] === spec.looks[column]) {
        u.setSeries(at(edge), {show});
      }
    }
  });
};

// Reads a table: names of its columns, cells by row, and numbers by column.
const readTable = (table) => {
  const [names, ...rows] = [...table.querySelectorAll('tr')].map(
      (row) => [...row.cells].map((cell) => cell.textContent));
  const columns = names.map((_, i) => rows.map((row) => row[i]));
  const numbers = columns.map((column) => column.map(
      (cell) => cell === '' ? null : Number(cell.replaceAll(',', ''))));
  return {names, rows, columns, numbers};
};

const addChoice = (group, text, values, change) => {
  const label = group.appendChild(document.createElement('label'));
  label.append(`${text} `);
  const select = label.appendChild(document.createElement('select'));
  values.forEach((value, i) => select.append(new Option(value, i)));
  select.addEventListener('change', () => change(Number(select.value)));
};

// A chart, and the choices of its reader: axis, smoothing, logarithm.
const addChart = (place) => {
  const figure = place.closest('figure');
  const specs = JSON.parse(place.dataset.chart);
  const title = figure.querySelector('h3').textContent;
  const tables = [...figure.querySelectorAll('table')].map(readTable);
  const notes = [...figure.querySelectorAll(':scope > .note')];
  const chosen = {view: 0, weight: 0, logY: false};
  const group = document.createElement('div');
  group.className = 'choices';
  place.before(group);
  const draw = () => {
    const spec = specs[chosen.view];
    const {names, rows, columns, numbers} = tables[chosen.view];
    const [xs, ...curves] = numbers;
    const drawn = curves.map((ys) => smoothed(ys, chosen.weight).map(
        (y) => chosen.logY && y !== null && y <= 0 ? null : y));
    const hidden = new Set(place.chart?.series.slice(1).filter(
        (series) => !series.show).map((series) => series.label));
    if (place.chart) {
      charts.splice(charts.indexOf(place.chart), 1);
      place.chart.destroy();
      for (const old of figure.querySelectorAll('.zoom, .said, .u-legend')) {
        old.remove();
      }
    }
    const fresh = place.cloneNode(false);  // without its listeners
    place.replaceWith(fresh);
    place = fresh;
    const u = new uPlot(
        options(spec, names, columns, place, chosen.logY),
        [xs, ...drawn.reverse()], place);
    place.chart = u;  // for tests
    charts.push(u);
    notes.forEach((note, i) => note.hidden = i !== chosen.view);
    addZoom(u, place, spec, title);
    addKeys(u, place, spec, title, names, rows);
    const legend = figure.querySelector('.u-legend');
    addToolbar(u, legend, title);
    addBands(u, spec, legend);
    u.series.forEach((series, i) => {
      if (i && hidden.has(series.label)) u.setSeries(i, {show: false});
    });
    new ResizeObserver(() => u.setSize(
        {width: place.clientWidth, height: HEIGHT})).observe(place);
  };
  const choose = (key) => (value) => {
    chosen[key] = value;
    draw();
  };
  if (specs.length > 1) {
    addChoice(group, 'against', specs.map((spec) => spec.name), choose('view'));
  }
  addChoice(group, 'smoothing', ['none', 'some', 'more', 'most'],
      (i) => choose('weight')(SMOOTHINGS[i]));
  addChoice(group, 'scale', ['linear', 'logarithmic'],
      (i) => choose('logY')(i === 1));
  draw();
};
document.querySelectorAll('.plot').forEach(addChart);

// Hides and shows a run in all charts and tables of a comparison.
for (const box of document.querySelectorAll('#shown input')) {
  box.addEventListener('change', () => {
    const names = new Set([box.value, ...JSON.parse(box.dataset.runs)]);
    const is = (name) => names.has(name);
    for (const u of charts) {
      u.series.forEach((series, i) => {
        if (i && is(series.label)) u.setSeries(i, {show: box.checked});
      });
    }
    for (const row of document.querySelectorAll('#runs tbody tr')) {
      if (is(row.cells[0].textContent)) row.hidden = !box.checked;
    }
  });
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
