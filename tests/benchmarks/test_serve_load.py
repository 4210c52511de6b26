"""Load tests of the server: a run of a few seconds, and hostile uploads that are all refused."""

import asyncio

import pytest

from evit_jax.benchmarks import hostile_uploads, http_client, serve_load
from evit_jax.benchmarks.http_client import Address, form, post
from evit_jax.serving.live_page import samples
from evit_jax.serving.uploads import Limits
from tests.helpers import exports, http_server

IMAGE = samples(())['cat']
checkpoint = exports.checkpoint


@pytest.fixture(scope='module')
def address():
    limits = Limits(max_batch=2, max_queue=4, body_seconds=0.5)
    with http_server.running(http_server.service_of(limits=limits)) as port:
        yield Address('127.0.0.1', port)


def test_closed_loop_counts_answers_and_latencies(address):
    load = asyncio.run(http_client.closed_loop(address, post(form(IMAGE)), clients=2, seconds=0.3))
    assert load.statuses[200] == len(load.latencies) > 0 and {*load.statuses} == {200} and load.seconds >= 0.3


def test_open_loop_beyond_the_capacity_gets_only_200_and_503(address):
    load = asyncio.run(http_client.open_loop(address, post(form(IMAGE)), rate=2000, seconds=0.5, connections=64))
    assert {*load.statuses} == {200, 503} and load.statuses.total() + load.skipped == 1000


def test_attack_of_every_kind_is_refused_and_the_server_survives(address):
    results = asyncio.run(hostile_uploads.attack(address, IMAGE, count=60, clients=4, slow_share=0.05))
    assert {*results} == {*hostile_uploads.requests(IMAGE), 'slow body'}
    for kind, statuses in results.items():
        assert {*statuses} <= {*hostile_uploads.REFUSED, http_client.GONE}, kind
    assert results['slow body'] == {408: 3}
    assert asyncio.run(hostile_uploads.is_alive(address, IMAGE))


def test_send_to_a_closed_port_is_gone():
    connection = http_client.Connection(Address('127.0.0.1', 1))
    assert asyncio.run(connection.send(b'GET / HTTP/1.1\r\n\r\n')) == http_client.GONE


def test_remarks_name_what_was_not_refused():
    hostile = {'seconds': 1.0, 'count': 3, 'statuses': {'good': {200: 1}, 'bad': {422: 2}}, 'alive': True,
               'memory_mb': [1.0, 2.0], 'memory_mb_peak': 3.0}
    line, = serve_load.remarks({'overload': None, 'hostile': hostile})
    assert '3 hostile uploads in 1 s: the server predicts as before' in line
    assert line.endswith("not refused: {'good': {200: 1}}")


def test_measure_of_a_checkpoint_gives_loads_overload_and_attack(checkpoint):
    settings = serve_load.ServeSettings(str(checkpoint), max_batches=(1,), clients=(2,), seconds=0.4,
                                        overload_seconds=0.5, hostile=30)
    results = serve_load.measure(settings, IMAGE)
    assert [(row['plan'], row['max_batch']) for row in results['loads']] == [('default', 1), ('dense', 1)]
    assert all(row['requests_per_second'] > 0 and {*row['statuses']} == {'200'} for row in results['loads'])
    assert {*results['overload']['statuses']} <= {'200', '503'}
    assert results['hostile']['alive'] and results['hostile']['count'] == 30
    lines = [*serve_load.table(results).splitlines(), *serve_load.remarks(results)]
    assert any('requests/s' in line for line in lines) and '30 hostile uploads' in lines[-1]
    assert lines[-1].endswith('not refused: none')
