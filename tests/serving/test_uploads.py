"""Limits of uploads: too large, too slow, too many; a refused request leaves the server unharmed."""

import concurrent.futures
import socket
import threading
import time

import numpy as np
import pytest

from evit_jax.serving.engines import Outputs
from evit_jax.serving.uploads import Limits
from tests.helpers import http_server
from tests.helpers.encoded import grey_png
from tests.helpers.http_server import form, get, png, predict, request, wait_for

LIMITS = Limits(max_batch=2, max_queue=3, max_images=2, max_bytes=100_000, max_pixels=10_000, body_seconds=0.5,
                seconds=1.0)


class SlowEngine:
    """Waits for `go` after the programs are compiled."""

    def __init__(self):
        self.go = threading.Event()
        self.go.set()

    def __call__(self, plan, images):
        assert self.go.wait(20)
        zeros = [0.0, 0.0, 0.0]
        return Outputs(np.array([zeros] * len(images), 'float32'))


@pytest.fixture
def engine():
    engine = SlowEngine()
    yield engine
    engine.go.set()


@pytest.fixture
def port(engine):
    with http_server.running(http_server.service_of(engine=engine, limits=LIMITS)) as port:
        yield port
        engine.go.set()


def raw(port, data, second=b''):
    """Sends bytes, and after the first answer the second bytes. Returns all that arrives until the server closes."""
    with socket.create_connection(('127.0.0.1', port)) as connection:
        connection.settimeout(20)
        connection.sendall(data)
        received = b''
        while part := connection.recv(65536):
            received += part
            connection.sendall(second)
            second = b''
        return received


def test_predict_of_a_bomb_is_refused_without_decoding(port):
    status, content = predict(port, grey_png(200, 200))
    assert status == 422 and '200 x 200 pixels, more than max_pixels=10000' in content['detail']['message']


def test_predict_of_too_many_images_is_refused(port):
    status, content = predict(port, png(), png(), png())
    assert status == 422 and content['detail'] == 'the request holds more than 2 images: send several requests'
    assert predict(port, *[png()] * 4)[0] == 400


@pytest.mark.parametrize('header', ('Content-Length: 196608', 'Transfer-Encoding: chunked'))
def test_predict_of_a_large_body_is_refused_and_closed(port, header):
    body = b'x' * 0x30000
    body = b'30000\r\n' + body + b'\r\n0\r\n\r\n' if 'chunked' in header else body
    head = f'POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: multipart/form-data; boundary=x\r\n{header}\r\n\r\n'
    answer = raw(port, head.encode() + body)
    assert answer.startswith(b'HTTP/1.1 413 ') and b'more than 100,000 bytes' in answer


def test_slow_bodies_and_heads_are_closed(port):
    head = b'POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: multipart/form-data; boundary=x\r\n'
    answer = raw(port, head + b'Content-Length: 1000\r\n\r\n--x')
    assert answer.startswith(b'HTTP/1.1 408 ') and b'the body did not arrive within 0.5 s' in answer
    assert raw(port, head) == b'' and raw(port, b'') == b''
    begin = time.monotonic()
    answer = raw(port, b'GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n', b'GET /heal')
    assert answer.startswith(b'HTTP/1.1 200 ') and time.monotonic() - begin < 10


def test_requests_beyond_the_queue_get_503_and_the_others_an_answer(engine, port):
    engine.go.clear()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = [pool.submit(request, port, 'POST', '/predict', *form(png())) for _ in range(8)]
        wait_for(lambda: sum(result.done() for result in results) == 5)
        engine.go.set()
        answers = [result.result(20) for result in results]
    assert sorted(status for status, _, _ in answers) == [200] * 3 + [503] * 5
    assert all(headers['Retry-After'] == '1' for status, headers, _ in answers if status == 503)
    assert predict(port, png())[0] == 200


def test_predict_that_takes_too_long_gets_504_and_leaves_the_queue(engine, port):
    engine.go.clear()
    begin = time.monotonic()
    status, content = predict(port, png())
    assert status == 504 and content['detail'] == 'there was no answer within 1 s' and time.monotonic() - begin < 10
    engine.go.set()
    assert predict(port, png())[0] == 200
    assert b'evit_open_uploads 0.0' in get(port, '/metrics')[1]


def test_client_that_leaves_harms_nothing(engine, port):
    engine.go.clear()
    headers, body = form(png())
    head = f'POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: {headers["Content-Type"]}\r\n'
    for sent in (body, body[:50]):
        with socket.create_connection(('127.0.0.1', port)) as connection:
            connection.sendall(head.encode() + f'Content-Length: {len(body)}\r\n\r\n'.encode() + sent)
    engine.go.set()
    assert predict(port, png())[0] == 200
    wait_for(lambda: b'evit_open_uploads 0.0' in get(port, '/metrics')[1])
