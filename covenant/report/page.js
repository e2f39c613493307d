'use strict';

// Reads values off a figure's own table, by pointer or by arrow keys.
for (const figure of document.querySelectorAll('figure.chart')) {
  const plot = figure.querySelector('.plot');
  if (!plot) continue;
  const svg = plot.querySelector('svg');
  const cursor = svg.querySelector('.cursor');
  const readout = figure.querySelector('.readout');
  const rows = [...figure.querySelectorAll('tbody tr')];
  const names = [...figure.querySelectorAll('thead th')].map(
      (cell) => cell.textContent);
  const most = 12;  // values at once
  let at = -1;
  let picked = -1;

  const show = (index) => {
    at = Math.max(0, Math.min(rows.length - 1, index));
    const [x, ...values] = [...rows[at].cells].map((cell) => cell.textContent);
    const found = values
        .map((value, i) => [i, value])
        .filter(([i, value]) => value && (picked < 0 || i === picked))
        .map(([i, value]) => `${names[i + 1]} ${value}`);
    const more = found.length > most ? ', ...' : '';
    readout.textContent =
        `${names[0]} ${x}: ${found.slice(0, most).join(', ') || 'no value'}` +
        more;
    cursor.setAttribute('transform', `translate(${rows[at].dataset.x} 0)`);
    cursor.style.visibility = 'visible';
  };
  const hide = () => {
    cursor.style.visibility = 'hidden';
    readout.textContent = 'Point, or use arrow keys, to read values.';
  };
  hide();

  plot.addEventListener('pointermove', (event) => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    let nearest = 0;
    rows.forEach((row, i) => {
      const distance = (r) => Math.abs(r.dataset.x - x);
      if (distance(row) < distance(rows[nearest])) nearest = i;
    });
    show(nearest);
  });
  plot.addEventListener('pointerleave', hide);
  plot.addEventListener('blur', hide);
  plot.addEventListener('keydown', (event) => {
    const step = {ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10};
    if (event.key in step) show(at + step[event.key]);
    else if (event.key === 'Home') show(0);
    else if (event.key === 'End') show(rows.length - 1);
    else if (event.key === 'Escape') hide();
    else return;
    event.preventDefault();
  });

  // One curve in front of the others.
  for (const button of figure.querySelectorAll('.legend button')) {
    button.addEventListener('click', () => {
      const index = Number(button.dataset.series);
      picked = picked === index ? -1 : index;
      svg.classList.toggle('picking', picked >= 0);
      for (const other of figure.querySelectorAll('[data-series]')) {
        const on = Number(other.dataset.series) === picked;
        if (other.matches('button')) other.setAttribute('aria-pressed', on);
        else other.classList.toggle('picked', on);
      }
    });
  }
}

// Shows the fields of the config that hold what is searched for.
const search = document.getElementById('search');
if (search) {
  const sections = [...document.querySelectorAll('#fields details')];
  search.addEventListener('input', () => {
    const wanted = search.value.trim().toLowerCase();
    let count = 0;
    for (const section of sections) {
      let here = 0;
      for (const row of section.querySelectorAll('tbody tr')) {
        row.hidden = !row.textContent.toLowerCase().includes(wanted);
        here += !row.hidden;
      }
      section.hidden = !here;
      section.open = wanted !== '' && here > 0;
      count += here;
    }
    document.getElementById('found').textContent =
        wanted ? ` ${count} found` : '';
  });
}
