'use strict';

const data = JSON.parse(document.getElementById('data').textContent);
const byId = (name) => document.getElementById(name);
const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
const percent = (share) => `${(100 * share).toPrecision(share < 0.001 ? 1 : share < 0.995 ? 2 : 3)} %`;
const colours = bytes(data.colours);
const has = (map) => data.rows.some((row) => row.views.some((view) => view.stages.some((stage) => stage[map])));
const merges = has('token_of_patch');
const views = ['kept', ...['attention', 'origin'].filter(has)];
const state = {setting: data.start, view: 'kept', blank: false};

/* Decode the base64 texts of the page to arrays, indexed by patch. */
for (const row of data.rows) {
  for (const view of row.views) {
    for (const stage of view.stages) {
      stage.kept = bytes(stage.kept);
      if (stage.token_of_patch) stage.token_of_patch = new Uint16Array(bytes(stage.token_of_patch).buffer);
      for (const map of [stage.attention, stage.origin]) if (map) map.of = bytes(map.of);
    }
  }
}
const isKept = (stage, patch) => (stage.kept[patch >> 3] >> (7 - (patch & 7))) & 1;
/* The patches that were merged with a patch. A page without token_of_patch has merged none. */
const mergedWith = (stage, patch) => stage.token_of_patch && isKept(stage, patch)
  ? [...stage.token_of_patch.keys()].filter((other) => stage.token_of_patch[other] === stage.token_of_patch[patch]) : [patch];
const entered = (view, stage, patch) => stage === 0 || isKept(view.stages[stage - 1], patch);

function make(parent, tag, kind, text) {
  const element = parent.appendChild(document.createElement(tag));
  if (kind) element.className = kind;
  if (text !== undefined) element.textContent = text;
  return element;
}

/* Create the elements of a row once; its pictures are drawn again whenever the state changes. */
function makeRow(row) {
  const article = make(byId('rows'), 'article');
  const pictures = make(article, 'div', 'pictures');
  row.answer = make(article, 'div', 'answer');
  row.pictures = ['image', ...data.stages].map((title, number) => {
    const figure = make(pictures, 'figure');
    const canvas = make(figure, 'canvas', 'picture');
    const caption = make(figure, 'figcaption', '', number ? `stage ${number}, ${title}` : title);
    canvas.addEventListener('pointermove', (event) => markPatch(row, canvas, number - 1, event));
    canvas.addEventListener('pointerleave', () => markPatch(row));
    return {canvas, count: make(caption, 'span')};
  });
  row.image = Object.assign(new Image(), {src: row.image});
  return row.image.decode().then(() => {
    const size = row.image.width;
    row.side = size / data.patch;
    row.scale = Math.max(1, Math.round(560 / size));
    row.grey = document.createElement('canvas');
    row.grey.width = row.grey.height = size;
    const pen = row.grey.getContext('2d');
    pen.drawImage(row.image, 0, 0);
    const pixels = pen.getImageData(0, 0, size, size);
    row.colours = meanColours(row, pixels);
    for (let at = 0; at < pixels.data.length; at += 4) {
      const [r, g, b] = pixels.data.subarray(at, at + 3);
      pixels.data.fill(0.299 * r + 0.587 * g + 0.114 * b, at, at + 3);
    }
    pen.putImageData(pixels, 0, 0);
    for (const {canvas} of row.pictures) canvas.width = canvas.height = size * row.scale;
  });
}

function eachPatch(row, act) {
  const cell = data.patch * row.scale;
  for (let patch = 0; patch < row.side * row.side; patch++) {
    act(patch, (patch % row.side) * cell, Math.floor(patch / row.side) * cell, cell);
  }
}

/* The mean colour of every patch. */
function meanColours(row, pixels) {
  const means = Array.from({length: row.side ** 2}, () => [0, 0, 0]), size = row.image.width;
  for (let at = 0; at < size * size; at++) {
    const patch = Math.floor(at / size / data.patch) * row.side + Math.floor(at % size / data.patch);
    for (let channel = 0; channel < 3; channel++) means[patch][channel] += pixels.data[4 * at + channel] / data.patch ** 2;
  }
  return means;
}

/* Fill merged patches with their mean colour, and draw a line around each group. */
function drawGroups(row, pen, stage) {
  const groups = [...stage.token_of_patch.keys()].map((patch) => mergedWith(stage, patch));
  eachPatch(row, (patch, x, y, cell) => {
    const members = groups[patch];
    if (members.length === 1) return;
    const mean = [0, 1, 2].map((channel) => members.reduce((sum, member) => sum + row.colours[member][channel], 0));
    pen.fillStyle = `rgb(${mean.map((sum) => Math.round(sum / members.length)).join()})`;
    pen.fillRect(x, y, cell, cell);
  });
  const merged = (patch) => groups[patch].length > 1;
  drawEdges(row, pen, (one, other) => stage.token_of_patch[one] !== stage.token_of_patch[other] && (merged(one) || merged(other)), '#fff');
}

function colour(value) {
  const at = 3 * Math.round(value / 255 * (colours.length / 3 - 1));
  return `rgb(${colours.subarray(at, at + 3).join()})`;
}

function drawStage(row, view, number, style) {
  const {canvas} = row.pictures[number + 1], stage = view.stages[number], map = stage[state.view];
  const pen = canvas.getContext('2d'), side = canvas.width, hidden = state.blank && state.view === 'kept';
  pen.imageSmoothingEnabled = row.image.width >= 128;
  const fill = (paint, alpha, x, y, cell) => {
    pen.globalAlpha = alpha;
    pen.fillStyle = paint;
    pen.fillRect(x, y, cell, cell);
    pen.globalAlpha = 1;
  };
  pen.drawImage(row.grey, 0, 0, side, side);
  pen.save();
  pen.beginPath();
  eachPatch(row, (patch, x, y, cell) => {
    const kept = isKept(stage, patch);
    if (state.view !== 'kept' && map && (state.view === 'attention' ? entered(view, number, patch) : map.of[patch])) {
      fill(colour(map.of[patch]), 0.78, x, y, cell);
    } else if (!kept || state.view !== 'kept') {
      fill(style.faded, hidden ? 1 : kept ? 0.45 : 0.8, x, y, cell);
    } else {
      pen.rect(x, y, cell, cell);
    }
  });
  pen.clip();
  if (state.view === 'kept') pen.drawImage(row.image, 0, 0, side, side);
  pen.restore();
  if (state.view === 'kept' && stage.token_of_patch) drawGroups(row, pen, stage);
  if (state.view !== 'origin') drawEdges(row, pen, (one, other) => isKept(stage, one) !== isKept(stage, other), style.edge);
}

/* Draw a line between neighbouring patches that differ. */
function drawEdges(row, pen, differ, paint) {
  pen.strokeStyle = paint;
  pen.lineWidth = pen.canvas.width / 260;
  pen.beginPath();
  eachPatch(row, (patch, x, y, cell) => {
    if ((patch + 1) % row.side && differ(patch, patch + 1)) {
      pen.moveTo(x + cell, y);
      pen.lineTo(x + cell, y + cell);
    }
    if (patch + row.side < row.side ** 2 && differ(patch, patch + row.side)) {
      pen.moveTo(x, y + cell);
      pen.lineTo(x + cell, y + cell);
    }
  });
  pen.stroke();
}

function count(row, test) {
  let number = 0;
  for (let patch = 0; patch < row.side ** 2; patch++) number += Boolean(test(patch));
  return number;
}

function countText(row, stage) {
  if (state.view === 'attention') return stage.attention ? `brightest ${percent(stage.attention.peak)}` : 'nothing dropped';
  if (state.view === 'origin') {
    if (!stage.origin) return 'nothing fused';
    return `${count(row, (patch) => stage.origin.of[patch])} patches, ${percent(stage.origin.sum)} in all`;
  }
  if (merges) return `${count(row, (patch) => isKept(stage, patch) && mergedWith(stage, patch)[0] === patch)} tokens`;
  const fused = ['', ' and a fused token', ` and ${stage.fused} fused tokens`][Math.min(stage.fused, 2)];
  return `${count(row, (patch) => isKept(stage, patch))} patches${fused}`;
}

function drawRow(row, style) {
  const view = row.views[state.setting], first = row.pictures[0];
  const pen = first.canvas.getContext('2d');
  pen.imageSmoothingEnabled = row.image.width >= 128;
  pen.drawImage(row.image, 0, 0, first.canvas.width, first.canvas.height);
  first.count.textContent = `${row.side ** 2} patches`;
  view.stages.forEach((stage, number) => {
    drawStage(row, view, number, style);
    row.pictures[number + 1].count.textContent = countText(row, stage);
  });
  drawAnswer(row, view);
}

function drawAnswer(row, view) {
  row.answer.replaceChildren();
  row.answer.className = `answer ${view.right === null ? '' : view.right ? 'right' : 'wrong'}`;
  const mark = view.right === null ? '' : view.right ? '✓ ' : '✗ ';
  make(row.answer, 'h2', '', mark + view.guesses[0][0]);
  if (row.truth !== null) make(row.answer, 'p', '', `truth ${row.truth}`);
  const guesses = make(row.answer, 'div');
  for (const [name, share] of view.guesses) {
    const guess = make(guesses, 'div', 'guess');
    make(guess, 'span', '', name);
    make(guess, 'span', '', `${(100 * share).toFixed(1)} %`);
    make(guess, 'i').style.width = `${100 * share}%`;
  }
  make(row.answer, 'p', 'name', row.name);
}

function styleNow() {
  const theme = getComputedStyle(document.documentElement);
  return {faded: theme.getPropertyValue('--faded'),
          edge: state.view === 'attention' ? '#ffffffcc' : theme.getPropertyValue('--edge')};
}

function draw() {
  const setting = data.settings[state.setting], style = styleNow();
  byId('rate-text').textContent = setting.rate;
  if (setting.trained) make(byId('rate-text'), 'small', '', ' as trained');
  byId('rate').value = state.setting;
  byId('rate').setAttribute('aria-valuetext', `keep rate ${setting.rate}`);
  [...byId('marks').children].forEach((mark, number) => mark.classList.toggle('now', number === state.setting));
  byId('tokens').textContent = setting.counts.join(' → ');
  const [unit, power] = setting.macs < 5e8 ? ['M', 1e6] : ['G', 1e9];
  byId('macs').textContent = `${(setting.macs / power).toPrecision(3)} ${unit}, ${Math.round(100 * setting.share)} % of dense`;
  const known = data.rows.filter((row) => row.truth !== null);
  byId('score').hidden = !known.length;
  byId('right').textContent = `${known.filter((row) => row.views[state.setting].right).length} of ${known.length} shown`;
  document.querySelector(`[name=view][value=${state.view}]`).checked = true;
  document.querySelector('.blank').hidden = merges || state.view !== 'kept';
  byId('blank').checked = state.blank;
  byId('scale').hidden = state.view === 'kept';
  for (const row of data.rows) drawRow(row, style);
  const address = `#rate=${setting.rate}&view=${state.view}${state.blank ? '&blank' : ''}`;
  if (location.hash !== address) history.replaceState(null, '', address);
}

function show(change) {
  Object.assign(state, change);
  state.setting = Math.min(Math.max(state.setting, 0), data.settings.length - 1);
  draw();
}

/* Mark the patch under the pointer in every picture of its row, with the patches merged with it. */
function markPatch(row, canvas, number, event) {
  drawRow(row, styleNow());
  byId('tip').hidden = !canvas;
  if (!canvas) return;
  const at = (offset, length) => Math.min(Math.max(Math.floor(offset / length * row.side), 0), row.side - 1);
  const [line, column] = [at(event.offsetY, canvas.clientHeight), at(event.offsetX, canvas.clientWidth)];
  const patch = line * row.side + column, cell = data.patch * row.scale;
  row.pictures.forEach(({canvas}, index) => {
    const pen = canvas.getContext('2d'), stage = index && row.views[state.setting].stages[index - 1];
    pen.lineWidth = canvas.width / 130;
    pen.strokeStyle = '#2f8cff';
    for (const member of stage ? mergedWith(stage, patch) : [patch]) {
      pen.strokeRect(member % row.side * cell, Math.floor(member / row.side) * cell, cell, cell);
    }
  });
  byId('tip').textContent = tipOf(row.views[state.setting], number, patch);
  const left = Math.min(event.clientX + 14, innerWidth - byId('tip').offsetWidth - 8);
  const top = Math.min(event.clientY + 16, innerHeight - byId('tip').offsetHeight - 8);
  Object.assign(byId('tip').style, {left: `${left}px`, top: `${top}px`});
}

function tipOf(view, number, patch) {
  const lines = [`patch ${patch}`], stages = number < 0 ? [] : [view.stages[number]];
  for (const {attention, origin} of stages) {
    if (attention && entered(view, number, patch)) {
      lines.push(`class attention ${percent(attention.of[patch] / 255 * attention.peak)}`);
    }
    if (origin && origin.of[patch]) lines.push(`in the fused token by ${percent(origin.of[patch] / 255 * origin.peak)}`);
  }
  if (merges) {
    for (const stage of stages) {
      lines.push(isKept(stage, patch) ? `in a token of ${mergedWith(stage, patch).length}` : 'dropped');
    }
    return lines.join('\n');
  }
  const gone = view.stages.findIndex((stage) => !isKept(stage, patch));
  lines.push(gone < 0 ? 'kept to the end' : `dropped at stage ${gone + 1}`);
  return lines.join('\n');
}

function fromAddress() {
  const parameters = new URLSearchParams(location.hash.slice(1));
  const setting = data.settings.findIndex(({rate}) => rate === parameters.get('rate'));
  const view = views.find((name) => name === parameters.get('view'));
  return {setting: setting < 0 ? state.setting : setting, view: view || state.view, blank: parameters.has('blank')};
}

function listen() {
  byId('rate').addEventListener('input', (event) => show({setting: Number(event.target.value)}));
  byId('views').addEventListener('change', (event) => show({view: event.target.value}));
  byId('blank').addEventListener('change', (event) => show({blank: event.target.checked}));
  byId('panel').addEventListener('submit', (event) => event.preventDefault());
  addEventListener('hashchange', () => show(fromAddress()));
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', draw);
  addEventListener('keydown', (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const step = {ArrowLeft: -1, ArrowRight: 1}[event.key], view = views[event.key - 1];
    if (step) show({setting: state.setting + step});
    else if (view) show({view});
    else if (event.key.toLowerCase() === 'b') show({blank: !state.blank});
    else return;
    event.preventDefault();
  });
}

function begin() {
  for (const map of ['attention', 'origin']) document.querySelector(`[value=${map}]`).parentElement.hidden = !has(map);
  if (merges) document.querySelector('[value=kept] + span').textContent = 'Merged';
  byId('rate').max = data.settings.length - 1;
  data.settings.forEach(({rate}, number) => {
    make(byId('marks'), 'span', '', rate).addEventListener('click', () => show({setting: number}));
  });
  const scale = document.querySelector('#scale canvas'), pen = scale.getContext('2d');
  for (let at = 0; at < scale.width; at++) {
    pen.fillStyle = colour(at / (scale.width - 1) * 255);
    pen.fillRect(at, 0, 1, 1);
  }
  listen();
  show(fromAddress());
}

Promise.all(data.rows.map(makeRow)).then(begin);
