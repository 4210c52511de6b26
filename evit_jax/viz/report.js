const data = JSON.parse(byId('data').textContent);
const colours = bytes(data.colours);
const has = (map) => data.rows.some((row) => row.views.some((view) => view.stages.some((stage) => stage[map])));
const merges = has('token_of_patch');
const views = ['kept', ...['attention', 'origin'].filter(has)];
const state = {setting: data.start, view: 'kept', blank: false};

/* Decode the base64 texts of a row to arrays, indexed by patch. A group is the token of a patch; -1: hidden. */
function decodeRow(row) {
  for (const stage of row.views.flatMap((view) => view.stages)) {
    const kept = bytes(stage.kept), tokens = stage.token_of_patch && new Uint16Array(bytes(stage.token_of_patch).buffer);
    stage.groups = Array.from({length: row.picture.count}, (_, patch) => (
      (kept[patch >> 3] >> (7 - (patch & 7))) & 1 ? (tokens ? tokens[patch] : patch) : -1));
    for (const map of [stage.attention, stage.origin]) if (map) map.of = bytes(map.of);
  }
}
const isKept = (stage, patch) => stage.groups[patch] >= 0;
/* The patches that were merged with a patch. */
const mergedWith = (stage, patch) => isKept(stage, patch)
  ? [...stage.groups.keys()].filter((other) => stage.groups[other] === stage.groups[patch]) : [patch];
const entered = (view, stage, patch) => stage === 0 || isKept(view.stages[stage - 1], patch);

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
  const image = Object.assign(new Image(), {src: row.image});
  return image.decode().then(() => {
    row.picture = makePicture(image, data.patch);
    decodeRow(row);
  });
}

function drawStage(row, view, number, style) {
  const {canvas} = row.pictures[number + 1], stage = view.stages[number], map = stage[state.view];
  if (state.view === 'kept') {
    return drawTokens(row.picture, canvas, stage.groups, {...style, fade: state.blank ? 1 : 0.8});
  }
  const shown = (patch) => map && (state.view === 'attention' ? entered(view, number, patch) : map.of[patch]);
  const paint = (patch) => shown(patch) ? heatColour(colours, map.of[patch] / 255) : null;
  const pen = drawHeat(row.picture, canvas, paint, (patch) => isKept(stage, patch) ? 0.45 : 0.8, style.faded);
  if (state.view === 'attention') {
    drawEdges(row.picture, pen, (one, other) => isKept(stage, one) !== isKept(stage, other), style.edge);
  }
}

function count(row, test) {
  let number = 0;
  for (let patch = 0; patch < row.picture.count; patch++) number += Boolean(test(patch));
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
  drawImage(row.picture, first.canvas);
  first.count.textContent = `${row.picture.count} patches`;
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
  drawGuesses(make(row.answer, 'div'), view.guesses);
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
  byId('macs').textContent = `${macsText(setting.macs)}, ${Math.round(100 * setting.share)} % of dense`;
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
  const {rows, columns, scale} = row.picture, cell = data.patch * scale;
  const at = (offset, length, count) => Math.min(Math.max(Math.floor(offset / length * count), 0), count - 1);
  const patch = at(event.offsetY, canvas.clientHeight, rows) * columns + at(event.offsetX, canvas.clientWidth, columns);
  row.pictures.forEach(({canvas}, index) => {
    const pen = canvas.getContext('2d'), stage = index && row.views[state.setting].stages[index - 1];
    pen.lineWidth = canvas.width / 130;
    pen.strokeStyle = '#2f8cff';
    for (const member of stage ? mergedWith(stage, patch) : [patch]) {
      pen.strokeRect(member % columns * cell, Math.floor(member / columns) * cell, cell, cell);
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
  drawScale(document.querySelector('#scale canvas'), colours);
  listen();
  show(fromAddress());
}

Promise.all(data.rows.map(makeRow)).then(begin);
