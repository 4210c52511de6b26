"""Runs the HTTP server in a thread of the test, and sends requests to it on loopback."""

import contextlib
import http.client
import json
import threading
import time

import pytest

pytest.importorskip('fastapi', reason="the server is not installed: pip install 'evit_jax[serve]'")

from evit_jax.serving import server
from evit_jax.serving.engines import JaxEngine
from evit_jax.serving.served_model import ServedModel, plans_of
from evit_jax.serving.service import Service
from evit_jax.serving.uploads import Limits
from tests.helpers import encoded, tiny

BOUNDARY = 'boundary of the test'


def service_of(model=None, limits=None, engine=None, **plans):
    """Returns a service of a tiny model. `plans` are arguments of `plans_of`."""
    loaded = (model or tiny.model()).loaded
    plans = plans_of(loaded, **{'rates': (0.5, 1.0)} | plans)
    return Service(ServedModel.of_loaded(loaded, plans, 'jax'), engine or JaxEngine(loaded, plans),
                   limits or Limits(max_batch=2))


@contextlib.contextmanager
def running(service, ready=True):
    """Serves in a thread. Yields the port; if `ready`, after the programs are compiled."""
    uvicorn_server, listener = server.create(service), server.bind('127.0.0.1', 0)
    port = listener.getsockname()[1]
    if ready:
        service.warm_up()
    thread = threading.Thread(target=uvicorn_server.run, kwargs={'sockets': [listener]})
    thread.start()
    try:
        yield port
    finally:
        uvicorn_server.should_exit = True
        thread.join()
        service.close()
        listener.close()


def png(seed=0, size=16):
    """Returns the PNG file of a random image."""
    return encoded.encoded(encoded.Image.fromarray(tiny.images(1, size, seed)[0]), 'PNG')


def form(*files):
    """Returns the headers and the body of a multipart request. A file is its content, or a pair (name, content)."""
    parts = []
    for number, file in enumerate(files):
        name, content = file if isinstance(file, tuple) else (f'{number}.png', file)
        parts.append(f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
                     'Content-Type: image/png\r\n\r\n'.encode() + content + b'\r\n')
    body = b''.join(parts) + f'--{BOUNDARY}--\r\n'.encode()
    return {'Content-Type': f'multipart/form-data; boundary="{BOUNDARY}"'}, body


def request(port, method, path, headers=(), body=b'', timeout=30):
    """Sends a request. Returns status, headers and content; JSON is parsed."""
    connection = http.client.HTTPConnection('127.0.0.1', port, timeout=timeout)
    try:
        connection.request(method, path, body, dict(headers))
        response = connection.getresponse()
        content = response.read()
        is_json = response.headers['Content-Type'] == 'application/json'
        return response.status, response.headers, json.loads(content) if is_json else content
    finally:
        connection.close()


def get(port, path):
    """Returns status and content of a GET request."""
    status, _, content = request(port, 'GET', path)
    return status, content


def predict(port, *files, query=''):
    """Sends images to /predict. Returns status and content."""
    status, _, content = request(port, 'POST', f'/predict{query}', *form(*files))
    return status, content


def wait_for(condition, seconds=20):
    """Waits until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'the condition does not hold in time'
        time.sleep(0.01)
