"""Requests to the server: predictions equal the model's, and bad requests are refused with the reason."""

import concurrent.futures
import dataclasses

import numpy as np
import pytest

import evit_jax
from tests.helpers import http_server, tiny
from tests.helpers.http_server import get, png, predict


@pytest.fixture(scope='module')
def model():
    return tiny.model(reduce_at=(0,))


@pytest.fixture(scope='module')
def service(model):
    return http_server.service_of(model, reducers=['tome'])


@pytest.fixture(scope='module')
def port(service):
    with http_server.running(service) as port:
        yield port


def test_predict_returns_the_guesses_of_the_model(port, model):
    status, content = predict(port, png(), png(1), query='?top=2')
    assert (status, content['plan'], len(content['images'])) == (200, '0.5', 2)
    for seed, image in enumerate(content['images']):
        want, = model.predict(tiny.images(1, seed=seed)[0], top=2)
        assert [guess['name'] for guess in image['top']] == [guess.name for guess in want.top]
        np.testing.assert_allclose([guess['probability'] for guess in image['top']],
                                   [guess.probability for guess in want.top], atol=1e-5)
        assert image['name'] == f'{seed}.png' and 'reductions' not in image


@pytest.mark.parametrize('query, plan', [
    ('', '0.5'), ('?rate=0.5', '0.5'), ('?rate=1', '1.0'), ('?plan=tome-0.5', 'tome-0.5'),
    ('?rate=0.5&reducer=tome', 'tome-0.5'), ('?rate=1&reducer=tome', '1.0')])
def test_predict_chooses_the_plan_of_the_query(port, query, plan):
    status, content = predict(port, png(), query=query)
    assert status == 200 and content['plan'] == plan


@pytest.mark.parametrize('query, reason', [
    ('?rate=0.6', 'there is no plan of rate 0.6 and reducer evit, there are the plans 0.5, 1.0, tome-0.5'),
    ('?plan=a%0Ab', r"there is no plan 'a\\nb', there are 0.5, 1.0, tome-0.5"), ('?reducer=tome', 'needs a rate'),
    ('?rate=0.5&plan=0.5', 'give either plan, or rate and reducer'), ('?top=0', 'greater than or equal to 1'),
    ('?rate=x', 'valid number'), ('?kept=x', 'valid boolean')])
def test_predict_of_an_unknown_plan_or_value_is_refused(port, query, reason):
    status, content = predict(port, png(), query=query)
    assert status == 422 and reason in str(content['detail'])


def test_predict_kept_returns_patches_and_attention_of_the_model(port, model):
    _, content = predict(port, png(), query='?kept=1&image=1')
    image, = content['images']
    reduction, = image['reductions']
    want, = model.predict(tiny.images(1)[0])
    assert reduction['block'] == 0 and reduction['kept'] == want.kept[0].tolist()
    np.testing.assert_allclose(reduction['attention'], want.attention[0], atol=1e-5)
    shown = [patch for patch, token in enumerate(reduction['token_of_patch']) if reduction['kept'][token] >= 0]
    assert shown == sorted(patch for patch in reduction['kept'] if patch >= 0)
    assert image['image'].startswith('data:image/jpeg;base64,')


def test_predict_results_do_not_depend_on_the_other_images_of_a_batch(port):
    def answers(*files):
        return [(image['top'], image['reductions']) for image in predict(port, *files, query='?kept=1')[1]['images']]

    first, second = answers(png(0), png(1))
    assert answers(png(1), png(0)) == [second, first]
    assert answers(png(0), png(2))[0] == first


def test_predict_bad_image_gets_422_and_harms_no_other_request(port):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda number: predict(port, (f'{number}\n.png', b'no') if number % 2 else png(number)),
                                range(16)))
    assert [status for status, _ in results] == [200, 422] * 8
    assert results[1][1]['detail']['images'] == [{
        'name': r'1\n.png', 'problem': "not a readable image (2 bytes, first b'no'): neither JPEG, PNG, WebP, GIF, BMP "
        'nor TIFF'}]


@pytest.mark.parametrize('headers, body, status, reason', [
    ({}, b'abc', 422, 'the request holds no image'),
    ({'Content-Type': 'image/png'}, b'', 422, 'curl -F image=@cat.jpg'),
    ({'Content-Type': 'multipart/form-data'}, b'abc', 400, 'Missing boundary'),
    ({'Content-Type': 'multipart/form-data; boundary=x'}, b'--y\r\n', 400, ''),
    ({'Content-Type': 'multipart/form-data; boundary=x'}, b'--x\r\n\r\n', 400, ''),
    ({'Content-Type': 'multipart/form-data; boundary=x'}, b'', 422, 'holds no image')])
def test_predict_of_another_body_is_refused(port, headers, body, status, reason):
    got, _, content = http_server.request(port, 'POST', '/predict', headers, body)
    assert got == status and reason in content['detail']


def test_models_describes_plans_and_limits(port):
    status, content = get(port, '/models')
    assert status == 200 and content['default'] == '0.5' and content['dense'] == '1.0'
    assert content['plans']['tome-0.5'] | {'macs': 0, 'macs_of_dense': 0} == {
        'rate': 0.5, 'patches': 16, 'reducer': 'tome', 'reductions': [0], 'fused': False, 'tokens': [8], 'drop': [],
        'macs': 0, 'macs_of_dense': 0, 'trained': False}
    assert content['batch_sizes'] == [1, 2] and content['limits']['max_images'] == 16


def test_metrics_count_requests_images_and_batches(port):
    predict(port, png())
    status, content = get(port, '/metrics')
    lines = dict(line.rsplit(' ', 1) for line in content.decode().splitlines() if not line.startswith('#'))
    assert status == 200 and float(lines['evit_requests_total{code="200",path="/predict"}']) >= 1
    assert float(lines['evit_images_total{plan="0.5"}']) >= 1 and lines['evit_ready'] == '1.0'
    assert float(lines['evit_batch_images_count']) >= 1 and lines['evit_queue_images'] == '0.0'
    assert float(lines['evit_request_seconds_count{path="/predict"}']) >= 1


def test_unknown_paths_are_404_and_counted_together(port):
    assert get(port, '/absent')[0] == get(port, '/docs')[0] == 404
    assert b'evit_requests_total{code="404",path="other"}' in get(port, '/metrics')[1]


def test_predict_before_the_programs_are_compiled_gets_503():
    with http_server.running(http_server.service_of(), ready=False) as port:
        assert get(port, '/healthz')[0] == 200 and get(port, '/readyz')[0] == 503
        status, headers, content = http_server.request(port, 'POST', '/predict', *http_server.form(png()))
        assert (status, headers['Retry-After']) == (503, '1') and 'being compiled' in content['detail']


def test_predict_without_a_head_returns_features():
    model = evit_jax.create_model(dataclasses.replace(tiny.CONFIG, classes=0), keep_rate=0.5, reduce_at=(0,))
    with http_server.running(http_server.service_of(model, rates=(0.5,))) as port:
        _, content = predict(port, png())
        image, = content['images']
        assert len(image['features']) == 32 and 'top' not in image
        assert get(port, '/models')[1]['dense'] == 'dense' and get(port, '/')[0] == 200
