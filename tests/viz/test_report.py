"""The HTML page of kept patches and the pictures of single views: their data, and the page in a browser."""

import base64
import functools
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from evit_jax.viz.example import Example, ReductionView, Setting, View
from evit_jax.viz.report import report_page
from evit_jax.viz.sheet import example_sheet
from tests.helpers.pictures import data_of

SIDE, PATCH, PATCHES = 24, 4, 36
RATES = {'0.3': (13, 4), '0.7': (26, 19), '1': (36, 36)}  # patches kept at both stages
BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)


def make_view(rng, counts, truth):
    first, second = (counts[0], counts[1])
    order = rng.permutation(PATCHES)
    attention = rng.dirichlet(np.ones(PATCHES)).astype(np.float32)
    later = np.where(np.isin(np.arange(PATCHES), order[:first]), attention, np.nan)
    gone = ~np.isin(np.arange(PATCHES), order[:first])
    fused = (-1,) if gone.any() else ()
    stages = (ReductionView((*order[:first].tolist(), *fused), attention, attention * gone if fused else None),
              ReductionView((*order[:second].tolist(), *fused), later, None))
    guess = 'cat' if counts[0] > 20 else 'dog'
    return View(((guess, 0.8), ('cow', 0.15)), stages, None if truth is None else guess == truth)


def make_examples(names=('a.png', 'b.png'), truths=('cat', 'dog')):
    rng = np.random.default_rng(0)
    return [Example(name, rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8), truth,
                    tuple(make_view(rng, counts, truth) for counts in RATES.values()))
            for name, truth in zip(names, truths, strict=True)]


def make_merged_examples():
    """Examples whose stages merge two and four neighbouring patches."""
    stages = [ReductionView(tuple(range(0, PATCHES, number)), None, None, np.arange(PATCHES) // number)
              for number in (2, 4)]
    return [example._replace(views=tuple(view._replace(stages=tuple(
        merged._replace(attention=stage.attention) for stage, merged in zip(view.stages, stages)))
        for view in example.views)) for example in make_examples()]


def make_settings():
    return [Setting(rate, (PATCHES, *counts), 1000 * counts[0], counts[0] / PATCHES, rate == '0.7')
            for rate, counts in RATES.items()]


def make_page(examples=None, title='What it keeps', metadata='a run'):
    return report_page(make_examples() if examples is None else examples, make_settings(), patch_size=PATCH, start=1,
                       stages=['block 1', 'block 3'], title=title, metadata=metadata)


def test_report_page_holds_each_image_once_and_the_kept_patches_of_each_rate():
    examples = make_examples()
    data = data_of(make_page(examples))
    assert (data['patch'], data['start'], data['stages']) == (PATCH, 1, ['block 1', 'block 3'])
    for example, row in zip(examples, data['rows'], strict=True):
        with Image.open(io.BytesIO(base64.b64decode(row['image'].partition(',')[2]))) as image:
            assert np.abs(np.asarray(image, int) - example.image).mean() < 12  # a JPEG of noise
        for view, view_data in zip(example.views, row['views'], strict=True):
            for stage, stage_data in zip(view.stages, view_data['stages'], strict=True):
                bits = np.unpackbits(np.frombuffer(base64.b64decode(stage_data['kept']), np.uint8))[:PATCHES]
                assert set(np.flatnonzero(bits)) == {patch for patch in stage.kept if patch >= 0}
                assert stage_data['fused'] == len(stage.kept) - bits.sum()


def test_report_page_has_token_of_patch_where_patches_are_merged():
    stages = data_of(make_page(make_merged_examples()))['rows'][0]['views'][0]['stages']
    for stage, number in zip(stages, (2, 4), strict=True):
        index = np.frombuffer(base64.b64decode(stage['token_of_patch']), '<u2')
        np.testing.assert_array_equal(index, np.arange(PATCHES) // number)
        assert np.unpackbits(np.frombuffer(base64.b64decode(stage['kept']), np.uint8))[:PATCHES].all()
    assert 'token_of_patch' not in str(data_of(make_page()))


def test_report_page_with_token_of_patch_of_kept_tokens_equals_that_of_kept_ids():
    example, = make_examples(names=('a.png',), truths=('cat',))
    stages = []
    for stage in example.views[0].stages:
        token_of_patch = np.full(PATCHES, len(stage.kept) - 1)  # the last token is the fused one
        for index, patch in enumerate(stage.kept):
            token_of_patch[patch] = index if patch >= 0 else token_of_patch[patch]
        stages.append(stage._replace(token_of_patch=token_of_patch))
    other = example._replace(views=(example.views[0]._replace(stages=tuple(stages)), *example.views[1:]))
    assert make_page([other]) == make_page([example])


def test_report_page_maps_have_255_levels_and_keep_small_values():
    values = np.full(PATCHES, np.nan, np.float32)
    values[:5] = 0.5, 0.25, 1e-7, 0, 0.1
    example = make_examples()[0]
    stage = example.views[0].stages[0]._replace(attention=values)
    view = example.views[0]._replace(stages=(stage, example.views[0].stages[1]))
    page = make_page([example._replace(views=(view, *example.views[1:]))])
    levels_data = data_of(page)['rows'][0]['views'][0]['stages'][0]['attention']
    levels = np.frombuffer(base64.b64decode(levels_data['of']), np.uint8)
    np.testing.assert_allclose(levels * levels_data['peak'] / 255, np.nan_to_num(values), atol=0.5 / 255)
    assert levels[2] == 1 and not levels[3] and not levels[5:].any() and levels_data['sum'] == pytest.approx(0.85)


def test_report_page_escapes_names():
    evil = '</script><script>alert(1)</script><!--{{script}}'
    page = make_page(make_examples(names=(evil, 'b'), truths=(evil, 'dog')), title=evil, metadata=evil)
    assert page.count('</script>') == 2 and 'alert(1)</script>' not in page
    assert data_of(page)['rows'][0]['name'] == evil
    assert page.count("'use strict'") == 1


def test_report_page_links_to_nothing():
    page = make_page()
    assert "default-src 'none'" in page
    assert not re.findall(r'(?:https?:|ftp:)?//[\w-]+\.\w|@import|(?:src|href)=', page.replace(data_of(page)['rows'][0][
        'image'], ''))


def test_report_page_without_images_raises():
    with pytest.raises(ValueError, match='no image to draw'):
        make_page([])


def test_example_sheet_has_a_row_for_each_known_map():
    examples, settings = make_examples(truths=('cat', None)), make_settings()
    draw = functools.partial(example_sheet, patch_size=PATCH, stages=['block 1', 'block 3'])
    known, dense, blind = draw(examples[0], 1, settings[1]), draw(examples[1], 2, settings[2]), [
        stage._replace(attention=None, fused_weights=None) for stage in examples[0].views[1].stages]
    least = draw(examples[0]._replace(views=(examples[0].views[1]._replace(stages=blind),)), 0, settings[1])
    assert known.height > dense.height > least.height and known.width == dense.width == least.width


PROBE = '''<script>
const found = {errors: [], states: {}};
addEventListener('error', (event) => found.errors.push(String(event.message)));
addEventListener('unhandledrejection', (event) => found.errors.push(String(event.reason)));
addEventListener('securitypolicyviolation', (event) => found.errors.push(event.blockedURI));
</script>'''
DRIVER = '''<script>
const look = (name) => { found.states[name] = {
  pictures: [...document.querySelectorAll('canvas.picture')].map((canvas) => canvas.toDataURL()),
  text: document.body.innerText, address: location.hash, slider: byId('rate').value,
  marks: document.querySelectorAll('.answer.right').length}; };
const press = (key) => document.body.dispatchEvent(
  new KeyboardEvent('keydown', {key, bubbles: true, cancelable: true}));
const slide = (value) => {
  byId('rate').value = value;
  byId('rate').dispatchEvent(new Event('input', {bubbles: true}));
};
const waiting = setInterval(() => {
  if (byId('rate').max !== '2') return;
  clearInterval(waiting);
  look('start');
  slide(0); look('low');
  slide(2); look('dense');
  press('ArrowLeft'); look('back');
  press('2'); look('attention');
  press('3'); look('origin');
  press('1'); press('b'); look('blank');
  press('b'); press('ArrowLeft'); press('ArrowLeft'); press('ArrowLeft'); look('end');
  const at = document.querySelectorAll('canvas.picture')[1].getBoundingClientRect();
  document.querySelectorAll('canvas.picture')[1].dispatchEvent(new PointerEvent('pointermove',
    {clientX: at.x + 5, clientY: at.y + 5, bubbles: true})); look('pointed');
  const loaded = performance.getEntriesByType('resource').map(({name}) => name);
  found.loaded = loaded.filter((name) => !name.startsWith('data:'));
  found.wide = document.documentElement.scrollWidth <= innerWidth;
  const out = document.createElement('pre');
  out.id = 'found';
  out.textContent = btoa(unescape(encodeURIComponent(JSON.stringify(found))));
  document.body.append(out);
}, 20);
</script>'''


def browse(page, folder, *, width=1200, address=''):
    """Returns the page in each state that the driver sets, and the error messages of the browser."""
    file = folder / 'page.html'
    file.write_text(page.replace('<head>', '<head>' + PROBE).replace('</body>', DRIVER + '</body>'), encoding='utf-8')
    done = subprocess.run(
        [BROWSER, '--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
         '--disable-background-networking', '--disable-component-update', '--disable-sync', '--disable-dev-shm-usage',
         '--host-resolver-rules=MAP * ~NOTFOUND', f'--user-data-dir={folder / "profile"}', f'--window-size={width},900',
         '--enable-logging=stderr', '--virtual-time-budget=20000', '--dump-dom', f'file://{file}{address}'],
        capture_output=True, text=True, timeout=120)
    match = re.search(r'<pre id="found">([\w+/=]+)</pre>', done.stdout)
    assert match, done.stderr[-2000:]
    complaints = [line for line in done.stderr.splitlines() if 'CONSOLE' in line]
    return json.loads(base64.b64decode(match[1])), complaints


@pytest.fixture(scope='module')
def browsed(tmp_path_factory):
    if BROWSER is None:
        pytest.skip('no Chromium is installed')
    return browse(make_page(), tmp_path_factory.mktemp('browser'))


def test_browser_shows_the_page_without_network_and_errors(browsed):
    found, complaints = browsed
    assert (found['errors'], found['loaded'], complaints) == ([], [], [])


def test_browser_slider_changes_every_row(browsed):
    states = browsed[0]['states']
    start, low, dense = (states[name] for name in ('start', 'low', 'dense'))
    assert (start['slider'], low['slider'], dense['slider']) == ('1', '0', '2')
    assert len(start['pictures']) == 6
    for index, pictures in enumerate(zip(start['pictures'], low['pictures'], dense['pictures'])):
        assert len(set(pictures)) == (1 if index % 3 == 0 else 3)  # the image stays, its stages change
    for state, text in ((start, '26 patches and a fused token'), (low, '13 patches'), (dense, '36 patches')):
        assert text in state['text']
    assert 'as trained' in start['text'] and 'as trained' not in low['text']
    assert '36 → 13 → 4' in low['text'] and low['address'] == '#rate=0.3&view=kept'
    assert start['marks'] == low['marks'] == 1 and '✗ cat' in start['text'] and '✓ dog' in low['text']


def test_browser_keys_have_the_effect_of_the_panel(browsed):
    states = browsed[0]['states']
    assert states['back']['pictures'] == states['start']['pictures']
    assert states['end']['pictures'] == states['low']['pictures']  # the slider stops at its end
    shown = [states[name]['pictures'][1] for name in ('start', 'attention', 'origin', 'blank')]
    assert len(set(shown)) == 4
    assert 'brightest' in states['attention']['text'] and '10 patches' in states['origin']['text']
    assert states['blank']['address'] == '#rate=0.7&view=kept&blank'


def test_browser_pointer_marks_a_patch_in_its_row_only(browsed):
    before, after = (browsed[0]['states'][name] for name in ('end', 'pointed'))
    changed = [one != other for one, other in zip(before['pictures'], after['pictures'])]
    assert changed == [True] * 3 + [False] * 3
    assert 'patch 0' in after['text'] and 'class attention' in after['text']


def test_browser_narrow_window_fits_and_address_sets_the_state(browsed, tmp_path):
    examples = make_examples(names=('a' * 200, 'b'), truths=(None, None))
    found, complaints = browse(make_page(examples), tmp_path, width=500, address='#rate=1&view=attention')
    assert found['wide'] and not complaints
    assert found['states']['start']['slider'] == '2' and 'brightest' in found['states']['start']['text']
    assert not re.search(r'of \d shown', found['states']['start']['text'])  # no true class is known


def test_browser_shows_merged_tokens_without_errors(tmp_path):
    if BROWSER is None:
        pytest.skip('no Chromium is installed')
    found, complaints = browse(make_page(make_merged_examples()), tmp_path)
    assert not found['errors'] and not complaints
    start, pointed = found['states']['start'], found['states']['pointed']
    assert 'Merged' in start['text'] and '18 tokens' in start['text'] and '9 tokens' in start['text']
    assert 'in a token of 2' in pointed['text']
    assert len(set(start['pictures'])) == len(start['pictures']) == 6
