"""The program serve: it drains on SIGTERM, and refuses bad arguments in one line before it compiles."""

import concurrent.futures
import os
import signal
import socket
import subprocess
import sys

import pytest

from tests.helpers import exports, http_server, program_modules, programs
from tests.helpers.http_server import get, png, predict, wait_for

serve = program_modules.module_fixture('serve')
checkpoint = exports.checkpoint


@pytest.fixture(scope='module')
def run(serve):
    return lambda *words: programs.run(serve, ('PATH',), *words)


@pytest.fixture
def process(checkpoint):
    """A server that has compiled its programs, and its port."""
    command = [sys.executable, '-m', 'evit_jax.serve', checkpoint, '--port=0', '--rates=0.5', '--max_batch=2',
               '--max_wait_ms=500']
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env=os.environ | {'JAX_PLATFORMS': 'cpu'}) as process:
        process.port = int(process.stdout.readline().rpartition(':')[2])
        wait_for(lambda: get(process.port, '/readyz')[0] == 200, seconds=120)
        yield process
        process.kill()


def test_serve_answers_and_on_sigterm_loses_no_accepted_request(process):
    def count():
        lines = get(process.port, '/metrics')[1].decode().splitlines()
        return float(next(line for line in lines if line.startswith('evit_open_uploads ')).split()[1])

    assert predict(process.port, png(size=40))[0] == 200
    with concurrent.futures.ThreadPoolExecutor(9) as pool:
        results = [pool.submit(predict, process.port, png(size=40)) for _ in range(9)]
        wait_for(lambda: count() >= 1 or all(result.done() for result in results))
        process.send_signal(signal.SIGTERM)
        statuses = [result.exception(60) or result.result()[0] for result in results]
    assert process.wait(60) == 0
    # A connection that the server had not accepted yet is refused by the system, before the request is sent.
    assert 200 in statuses and all(status == 200 or isinstance(status, ConnectionError) for status in statuses)
    log = process.stderr.read()
    assert 'all accepted requests are answered, the server ends' in log and 'Traceback' not in log


def test_serve_on_a_port_in_use_is_refused(run, checkpoint):
    with socket.create_server(('127.0.0.1', 0)) as taken:
        code, errors = run(checkpoint, f'--port={taken.getsockname()[1]}')
    assert code == 2 and 'cannot listen there (Address already in use): give another --port' in errors


@pytest.mark.parametrize('words, message', [
    (['--engine=tensorrt'], '--engine=tensorrt is unknown, there are jax, onnxruntime, openvino'),
    (['--rates=0.5,x'], '--rates=0.5,x is no list of numbers'), (['--rates=0'], 'keep rate'),
    (['--plan=absent.json'], '--plan=absent.json cannot be read'), (['--reducers=tomme'], 'tomme'),
    (['--host=203.0.113.1'], '--host=203.0.113.1 --port=0: cannot listen there'),
    (['--max_images=9', '--max_queue=8'], '--max_images=9 is more than --max_queue=8')])
def test_serve_with_a_bad_flag_is_refused_in_one_line(run, checkpoint, words, message):
    code, errors = run(checkpoint, '--port=0', *words)
    assert code == 2 and message in errors and len(errors.splitlines()) == 1


def test_serve_without_its_packages_names_the_extra(run, checkpoint, serve, monkeypatch):
    monkeypatch.setattr(serve.importlib.util, 'find_spec', lambda name: None)
    code, errors = run(checkpoint)
    assert code == 2 and errors == "error: the server needs the package fastapi: pip install 'evit_jax[serve]'"


def test_serve_of_a_missing_path_is_refused(run, tmp_path):
    code, errors = run(tmp_path / 'absent', '--port=0')
    assert code == 2 and 'absent' in errors and len(errors.splitlines()) == 1


def test_server_listens_on_loopback_by_default_and_delays_no_response(serve):
    with http_server.server.bind(serve._HOST.default, 0) as listener:
        assert listener.getsockname()[0] == '127.0.0.1'
        assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
