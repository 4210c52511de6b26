const model = JSON.parse(byId('data').textContent);
const colours = bytes(model.colours);
const {plans, dense} = model;
const TIMES = 5;  // measurements of the time of a plan
const RETRY = 1000;  // milliseconds until the next request to a busy server
const isReduced = (name) => plans[name].reductions.length > 0;
const names = Object.keys(plans);
const state = {file: null, name: '', plan: model.default, view: 'kept', results: new Map(), run: 0};

/* The plans with a rate by reducer, in the order of their rates. The dense plan ends every list. */
const byReducer = new Map();
for (const name of names.filter((each) => plans[each].rate !== null && each !== dense)) {
  const {reducer} = plans[name];
  byReducer.set(reducer, [...(byReducer.get(reducer) || []), name]);
}
for (const list of byReducer.values()) {
  list.sort((one, other) => plans[one].rate - plans[other].rate);
  if (dense) list.push(dense);
}
const otherPlans = names.filter((name) => plans[name].rate === null && name !== dense);
let reducer = byReducer.has(plans[model.default].reducer) ? plans[model.default].reducer : [...byReducer.keys()][0];
if (!isReduced(model.default)) {  // begin with a plan that has something to show
  state.plan = (byReducer.get(reducer) || []).filter(isReduced).at(-1) || names.find(isReduced) || model.default;
}

function status(text, problem = false) {
  byId('status').textContent = text;
  byId('status').classList.toggle('problem', problem);
}

async function send(query) {
  const body = new FormData();
  body.append('image', state.file, state.name);
  const response = await fetch(`/predict?${new URLSearchParams(query)}`, {method: 'POST', body});
  const content = await response.json();
  if (!response.ok) throw Object.assign(new Error(content.detail.message || content.detail), {isBusy: response.status === 503});
  if (content.images[0].problem) throw new Error(content.images[0].problem);
  return content.images[0];
}

/* The result of a plan. It is kept until another image is chosen. */
async function predict(plan) {
  const {results} = state;
  if (!results.has(plan)) {
    results.set(plan, {...await send({plan, image: 1, ...(model.returns_kept ? {kept: 1} : {})}), times: 1});
  }
  return results.get(plan);
}

/* Repeat the requests of the shown plans, and show the least time of each: other work on the machine only adds to it. */
async function measure(run) {
  const shown = {[state.shown.plan]: state.shown.result, ...(dense ? {[dense]: state.shown.ofDense} : {})};
  for (const [plan, result] of Object.entries(shown)) {
    while (result.times < TIMES) {
      const {batch_ms: milliseconds} = await send({plan});
      if (run !== state.run) return;
      result.times += 1;
      result.batch_ms = Math.min(result.batch_ms, milliseconds);
      drawCosts(state.shown);
    }
  }
}

async function update() {
  drawPanel();
  if (!state.file) return;
  const run = ++state.run;
  byId('result').classList.add('waiting');
  try {
    const result = await predict(state.plan), ofDense = dense && await predict(dense);
    const image = Object.assign(new Image(), {src: result.image});
    await image.decode();
    if (run !== state.run) return;
    state.shown = {result, ofDense, plan: state.plan, picture: makePicture(image, model.patch_size)};
    byId('result').hidden = false;
    drawResult();
    status(`${state.name}: ${summary()}`);
    measure(run).catch(() => {});  // a busy server refuses; the times so far stay
  } catch (error) {
    if (run !== state.run) return;
    byId('result').hidden = !state.shown;
    status(error instanceof TypeError ? 'The server does not answer.' : `${state.name}: ${error.message}`, !error.isBusy);
    if (error.isBusy) setTimeout(() => run === state.run && update(), RETRY);
  }
  if (run === state.run) byId('result').classList.remove('waiting');
}

function summary() {
  const {result, plan} = state.shown;
  return result.top ? `${planText(plan)} predicts ${result.top[0].name}` : `${planText(plan)} gives ${result.features.length} features`;
}

function planText(name) {
  const {rate} = plans[name];
  if (name === dense) return 'dense';
  return rate === null ? `plan ${name}` : `${plans[name].reducer} ${rate}`;
}

/* The token of each patch; -1 for a patch that is dropped or fused. */
function groupsOf({kept, token_of_patch: tokens}) {
  return tokens.map((token) => token >= 0 && kept[token] >= 0 ? token : -1);
}

function countText(reduction, groups) {
  const tokens = new Set(groups.filter((group) => group >= 0)).size;
  const shown = groups.filter((group) => group >= 0).length, fused = reduction.kept.filter((patch) => patch < 0).length;
  if (shown > tokens) return `${tokens} tokens of ${shown} patches`;
  return `${shown} of ${groups.length} patches${fused ? `, ${fused === 1 ? 'a fused token' : `${fused} fused tokens`}` : ''}`;
}

function figure(title) {
  const element = make(byId('pictures'), 'figure'), canvas = make(element, 'canvas', 'picture');
  const caption = make(element, 'figcaption', '', title);
  canvas.setAttribute('role', 'img');
  return {canvas, describe: (text) => {
    make(caption, 'span', 'count', text);
    canvas.setAttribute('aria-label', `${title}: ${text}`);
  }};
}

/* The reason why there are no pictures of the reductions; empty if there are some. */
function noteOf(reductions, plan) {
  if (!model.returns_kept) {
    return 'This export returns neither kept patches nor class attention: export the model with --kept to see them here.';
  }
  if (!reductions.length) return `${planText(plan)}: nothing is dropped.`;
  if (state.view === 'attention' && !reductions[0].attention) {
    return `${planText(plan)} has no class attention: the model has no class token, or the reducer works before the attention.`;
  }
  return '';
}

function drawPictures({result, picture, plan}) {
  const theme = getComputedStyle(document.documentElement);
  const style = {faded: theme.getPropertyValue('--faded'), edge: theme.getPropertyValue('--edge')};
  byId('pictures').replaceChildren();
  const input = figure('input');
  drawImage(picture, input.canvas);
  input.describe(`${picture.count} patches`);
  const reductions = result.reductions || [], note = noteOf(reductions, plan);
  if (note) {
    make(byId('pictures'), 'p', 'note', note);
    return;
  }
  reductions.forEach((reduction, stage) => {
    const {canvas, describe} = figure(`stage ${stage + 1}, block ${reduction.block}`);
    const groups = groupsOf(reduction), {attention} = reduction;
    if (state.view === 'kept') {
      drawTokens(picture, canvas, groups, style);
      describe(countText(reduction, groups));
    } else {
      const peak = Math.max(...attention);
      const paint = (patch) => attention[patch] === null ? null : heatColour(colours, attention[patch] / (peak || 1));
      const pen = drawHeat(picture, canvas, paint, () => 0.8, style.faded);
      drawEdges(picture, pen, (one, other) => (groups[one] < 0) !== (groups[other] < 0), '#ffffffcc');
      describe(`brightest ${percent(peak)}, outline: kept`);
    }
  });
}

function cosine(one, other) {
  const dot = (a, b) => a.reduce((sum, value, index) => sum + value * b[index], 0);
  return dot(one, other) / Math.sqrt(dot(one, one) * dot(other, other));
}

function drawAnswer(parent, result, ofDense) {
  parent.replaceChildren();
  if (result.top) {
    drawGuesses(parent, result.top.map(({name, probability}) => [name, probability]));
  } else {
    make(parent, 'p', '', `${result.features.length} features`);
    if (ofDense) make(parent, 'p', '', `cosine to dense's ${cosine(result.features, ofDense.features).toFixed(4)}`);
  }
}

const millisecondsText = (value) => (value < 100 ? value.toPrecision(3) : Math.round(value).toLocaleString('en'));

function drawCosts({result, ofDense, plan}) {
  const last = (name) => plans[name].tokens.at(-1) ?? plans[name].patches;
  const rows = [['tokens at the end', last, (value) => value], ['MACs', (name) => plans[name].macs, macsText],
                ['milliseconds', (name) => (name === plan ? result : ofDense).batch_ms, millisecondsText]];
  byId('costs').replaceChildren();
  for (const [title, value, text] of rows) {
    const row = make(byId('costs'), 'tr');
    make(row, 'th', '', title).scope = 'row';
    make(row, 'td', '', text(value(plan)));
    if (!ofDense || plan === dense) continue;
    make(row, 'td', '', text(value(dense)));
    make(row, 'td', '', `${Math.round(100 * value(plan) / value(dense))} %`);
  }
}

function drawResult() {
  const {result, ofDense, plan} = state.shown;
  drawPictures(state.shown);
  for (const id of ['this-plan', 'this-column']) byId(id).textContent = planText(plan);
  byId('dense-answer').hidden = !ofDense || plan === dense;
  for (const head of document.querySelectorAll('.of-dense')) head.hidden = !ofDense || plan === dense;
  drawAnswer(byId('guesses'), result, plan === dense ? null : ofDense);
  if (ofDense) drawAnswer(byId('dense-guesses'), ofDense, null);
  drawCosts(state.shown);
}

function drawPanel() {
  const list = byReducer.get(reducer) || [], position = list.indexOf(state.plan);
  const shown = position < 0 ? '–' : String(plans[state.plan].rate ?? 1);
  byId('rate').max = list.length - 1;
  if (position >= 0) byId('rate').value = position;
  byId('rate-text').textContent = shown;
  if (plans[state.plan].trained) make(byId('rate-text'), 'small', '', ' as trained');
  byId('rate').setAttribute('aria-valuetext', position < 0 ? planText(state.plan) : `keep rate ${shown}`);
  byId('marks').replaceChildren();
  list.forEach((name, index) => {
    const mark = make(byId('marks'), 'span', index === position ? 'now' : '', plans[name].rate ?? 1);
    mark.addEventListener('click', () => choose(name));
  });
  for (const input of document.querySelectorAll('#reducers input')) input.checked = input.value === reducer && position >= 0;
  for (const input of document.querySelectorAll('#plans input')) input.checked = input.value === state.plan;
  byId('scale').hidden = state.view === 'kept';
}

function choose(plan) {
  state.plan = plan;
  update();
}

/* Keep the rate of the slider when the reducer changes, or take the nearest one. */
function chooseReducer(name) {
  const rate = plans[byReducer.get(reducer)[byId('rate').value]].rate ?? 1, distance = (each) => Math.abs((plans[each].rate ?? 1) - rate);
  reducer = name;
  choose(byReducer.get(name).reduce((best, each) => (distance(each) < distance(best) ? each : best)));
}

function chooseImage(file, name, button) {
  Object.assign(state, {file, name, results: new Map()});
  for (const each of document.querySelectorAll('#samples button')) each.setAttribute('aria-pressed', each === button);
  status(`${name}: sending`);
  update();
}

function radio(parent, name, value, text) {
  const label = make(byId(parent), 'label'), input = make(label, 'input');
  Object.assign(input, {type: 'radio', name, value});
  make(label, 'span', '', text);
}

function makePanel() {
  for (const name of byReducer.keys()) radio('reducers', 'reducer', name, name);
  for (const name of otherPlans) radio('plans', 'plan', name, name);
  byId('sliding').hidden = !byReducer.size;
  byId('reducers').hidden = byReducer.size < 2;
  byId('plans').hidden = !otherPlans.length;
  document.querySelector('.choices').hidden = !model.returns_kept;
  drawScale(document.querySelector('#scale canvas'), colours);
  for (const [name, url] of Object.entries(model.samples)) {
    const button = make(byId('samples'), 'button');
    button.type = 'button';
    Object.assign(make(button, 'img'), {src: url, alt: `sample: ${name}`});
    button.addEventListener('click', () => {
      chooseImage(new Blob([bytes(url.split(',')[1])], {type: 'image/jpeg'}), name, button);
    });
  }
}

function listen() {
  byId('rate').addEventListener('input', (event) => choose(byReducer.get(reducer)[event.target.value]));
  byId('reducers').addEventListener('change', (event) => chooseReducer(event.target.value));
  byId('plans').addEventListener('change', (event) => choose(event.target.value));
  byId('views').addEventListener('change', (event) => {
    state.view = event.target.value;
    drawPanel();
    if (state.shown) drawResult();
  });
  byId('panel').addEventListener('submit', (event) => event.preventDefault());
  byId('file').addEventListener('change', (event) => {
    const [file] = event.target.files;
    if (file) chooseImage(file, file.name);
  });
  addEventListener('dragover', (event) => {
    event.preventDefault();
    byId('drop').classList.add('over');
  });
  addEventListener('dragleave', () => byId('drop').classList.remove('over'));
  addEventListener('drop', (event) => {
    event.preventDefault();
    byId('drop').classList.remove('over');
    const [file] = event.dataTransfer.files;
    if (file) chooseImage(file, file.name);
  });
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => state.shown && drawResult());
}

makePanel();
listen();
drawPanel();
const first = document.querySelector('#samples button');
if (first) first.click();
