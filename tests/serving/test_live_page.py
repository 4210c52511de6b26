"""The live page: its samples and data; in a browser, an image is uploaded, and slider and choices change the result."""

import dataclasses
import os
import pathlib
import re
import shutil

import pytest

import evit_jax
from evit_jax.reduction.plan import make_plan
from evit_jax.reduction.plan_file import PlanFile
from evit_jax.serving.live_page import live_page, samples
from tests.helpers import http_server, tiny

WAIT = 60  # seconds
SCREENSHOTS = os.environ.get('EVIT_JAX_SCREENSHOTS')  # folder to write screenshots to
MODEL = {'reduce_at': (0, 1), 'batch_size': 1}


def test_samples_are_digits_for_a_model_of_digits_else_photos():
    photos, digits = samples(('cat', 'dog')), samples(tuple('0123456789'))
    assert [*photos] == ['cat', 'coffee', 'rocket'] and [*digits] == ['digits 1', 'digits 2', 'digits 3']
    assert all(content.startswith(b'\xff\xd8') for content in [*photos.values(), *digits.values()])


def test_live_page_links_to_nothing_and_escapes_names():
    served = http_server.service_of().served._replace(path='</script><b>')
    page = live_page(served)
    assert page.count('</script>') == 2 and '<b>' not in page and 'http' not in page.replace('http-equiv', '')
    assert "connect-src 'self'" in page and "default-src 'none'" in page


@pytest.fixture(scope='module')
def port():
    with http_server.running(http_server.service_of(tiny.model(**MODEL), reducers=['tome'], rates=(0.5, 0.75))) as port:
        yield port


@pytest.fixture(scope='module')
def driver():
    if not (shutil.which('chromium') and shutil.which('chromedriver')):
        pytest.skip('Chromium or its driver is not installed: apt-get install chromium chromium-driver')
    webdriver = pytest.importorskip('selenium.webdriver', reason='selenium is not installed')
    options = webdriver.ChromeOptions()
    for flag in ('headless=new', 'no-sandbox', 'disable-gpu', 'disable-dev-shm-usage', 'disable-background-networking'):
        options.add_argument(f'--{flag}')
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which('chromedriver')))
    yield driver
    driver.quit()


@pytest.fixture
def page(driver, port, tmp_path):
    """The page after an image was uploaded."""
    driver.set_window_size(1280, 1000)
    driver.get(f'http://127.0.0.1:{port}/')
    page = Page(driver)
    page.wait_for('cat: evit 0.5 predicts ')
    (tmp_path / 'mine.png').write_bytes(http_server.png(seed=3, size=24))
    page.element('#file').send_keys(str(tmp_path / 'mine.png'))
    page.wait_for('mine.png: evit 0.5 predicts ')
    return page


class Page:
    """Reads the page, and waits for its changes."""

    def __init__(self, driver):
        self.driver = driver

    def element(self, selector):
        return self.driver.find_element('css selector', selector)

    def texts(self, selector):
        return self.driver.execute_script(  # in one step: the page may replace the elements
            'return [...document.querySelectorAll(arguments[0])].filter((node) => node.checkVisibility())'
            '.map((node) => node.innerText.trim()).filter(Boolean)', selector)

    def wait_for(self, text):
        http_server.wait_for(lambda: self.element('#status').text.startswith(text), WAIT)

    def click(self, selector):
        self.driver.execute_script('arguments[0].click()', self.element(selector))

    def pictures(self):
        return self.driver.execute_script(
            "return [...document.querySelectorAll('canvas.picture')].map((canvas) => canvas.toDataURL())")

    def screenshot(self, name):
        if SCREENSHOTS:
            (pathlib.Path(SCREENSHOTS) / name).write_bytes(self.driver.get_screenshot_as_png())


@pytest.mark.browser
def test_browser_shows_kept_patches_and_prediction_of_an_uploaded_image(page, port):
    _, content = http_server.predict(port, http_server.png(seed=3, size=24), query='?kept=1')
    guess = content['images'][0]['top'][0]
    assert page.texts('figure .count') == ['16 patches', '8 of 16 patches, a fused token',
                                           '4 of 16 patches, 2 fused tokens']
    assert page.texts('#guesses .guess span')[:2] == [guess['name'], f'{100 * guess["probability"]:.1f} %']
    assert len(page.texts('#dense-guesses .guess')) == 3
    assert [row.split()[0] for row in page.texts('#costs tr')] == ['tokens', 'MACs', 'milliseconds']
    assert re.search(r'\d+ % *$', page.texts('#costs tr')[1])
    page.screenshot('tiny.png')


@pytest.mark.browser
def test_browser_slider_and_reducer_change_kept_patches_and_prediction(page):
    from selenium.webdriver.common.keys import Keys
    before = page.pictures()
    page.element('#rate').send_keys(Keys.ARROW_RIGHT)
    page.wait_for('mine.png: evit 0.75 predicts ')
    assert page.texts('figure .count')[1:] == ['12 of 16 patches, a fused token', '9 of 16 patches, 2 fused tokens']
    assert page.pictures()[0] == before[0] and page.pictures()[1] != before[1]
    page.element('#rate').send_keys(Keys.ARROW_RIGHT)
    page.wait_for('mine.png: dense predicts ')
    assert page.texts('#pictures .note') == ['dense: nothing is dropped.'] and not page.element('#dense-answer').text
    page.click('#reducers input[value=tome]')
    page.element('#rate').send_keys(Keys.ARROW_LEFT)
    page.wait_for('mine.png: tome 0.75 predicts ')
    assert page.texts('figure .count')[1:] == ['12 tokens of 16 patches', '9 tokens of 16 patches']


@pytest.mark.browser
def test_browser_shows_class_attention_and_labels_every_picture(page):
    before = page.pictures()
    page.click('#views input[value=attention]')
    assert all(text.startswith('brightest ') for text in page.texts('figure .count')[1:])
    assert page.pictures()[1] != before[1]
    labels = [canvas.accessible_name for canvas in page.driver.find_elements('css selector', 'canvas.picture')]
    assert labels[0] == 'input: 16 patches' and labels[1].startswith('stage 1, block 0: brightest ')
    names = [element.accessible_name for element in page.driver.find_elements('css selector', 'input, #samples button')]
    assert all(names) and page.element('#rate').get_attribute('aria-valuetext') == 'keep rate 0.5'


@pytest.mark.browser
@pytest.mark.parametrize('returns_kept, note', [
    (False, 'This export returns neither kept patches nor class attention: export the model with --kept to see them'),
    (True, 'evit 0.5 has no class attention: the model has no class token, or the reducer works before the attention')])
def test_browser_without_kept_patches_or_class_attention_shows_the_reason(driver, returns_kept, note):
    model = evit_jax.create_model(dataclasses.replace(tiny.CONFIG, class_token=False, pooling='avg'), keep_rate=0.5,
                                  reduce_at=(0,), class_names=tiny.NAMES)
    service = http_server.service_of(model, rates=(0.5,))
    service.served = service.served._replace(returns_kept=returns_kept)
    with http_server.running(service) as port:
        driver.get(f'http://127.0.0.1:{port}/')
        page = Page(driver)
        page.wait_for('cat: evit 0.5 predicts ')
        assert page.element('.choices').is_displayed() == returns_kept
        if returns_kept:
            page.click('#views input[value=attention]')
        assert page.texts('figure .count') == ['16 patches'] and page.texts('#pictures .note')[0].startswith(note)


@pytest.mark.browser
def test_browser_waits_for_the_server_and_begins_with_a_plan_that_reduces(driver):
    service = http_server.service_of(tiny.model(keep_rate=1.0, reduce_at=(0,)), rates=(0.5, 1.0))
    with http_server.running(service, ready=False) as port:
        driver.get(f'http://127.0.0.1:{port}/')
        page = Page(driver)
        page.wait_for('cat: the programs are being compiled')
        service.warm_up()
        page.wait_for('cat: evit 0.5 predicts ')
        page.click('#marks span:last-child')
        page.wait_for('cat: dense predicts ')
        assert page.texts('#costs tr')[0].startswith('tokens') and len(page.texts('thead th')) == 1
    driver.get_log('browser')  # the 503 responses, which no other test expects


@pytest.mark.browser
def test_browser_plan_without_a_rate_deselects_the_reducers(driver, tmp_path):
    model = tiny.model(**MODEL)
    service = http_server.service_of(model, rates=(0.5, 0.75), reducers=['tome'], files={'mine': PlanFile.of(
        make_plan(16, 2, tokens=(7,), reduce_at=(1,)), model.loaded.name, 16)})
    with http_server.running(service) as port:
        driver.get(f'http://127.0.0.1:{port}/')
        page = Page(driver)
        page.click('#plans input[value=mine]')
        page.wait_for('cat: plan mine predicts ')
        assert page.element('#rate-text').text == '–' and not page.element('#reducers input').is_selected()
        page.click('#reducers input[value=tome]')
        page.wait_for('cat: tome 0.5 predicts ')


@pytest.mark.browser
def test_browser_reports_an_image_that_cannot_be_read_and_recovers(page, tmp_path):
    (tmp_path / 'torn.png').write_bytes(http_server.png()[:60])
    page.element('#file').send_keys(str(tmp_path / 'torn.png'))
    page.wait_for('torn.png: cannot be read: torn.png: not a readable image')
    page.click('#samples button:nth-child(2)')
    page.wait_for('coffee: evit 0.5 predicts ')
    errors = [entry['message'] for entry in page.driver.get_log('browser') if '422' not in entry['message']]
    assert not errors


@pytest.mark.browser
def test_browser_narrow_window_fits_and_requests_stay_on_the_server(page, port):
    page.driver.set_window_size(500, 900)
    assert page.driver.execute_script('return document.documentElement.scrollWidth <= innerWidth')
    requests = page.driver.execute_script("return performance.getEntriesByType('resource').map(({name}) => name)")
    assert all(name.startswith((f'http://127.0.0.1:{port}/', 'data:')) for name in requests)
