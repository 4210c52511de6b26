"""Runs the HTTP server: binds the port early, compiles while it listens, and drains on SIGTERM."""

import os
import resource
import signal
import socket
import sys
import threading

import uvicorn
from absl import logging
from uvicorn.protocols.http.h11_impl import H11Protocol

from evit_jax.serving.http_app import create_app
from evit_jax.serving.service import Service
from evit_jax.serving.uploads import Limits

_BACKLOG = 2048
_KEEP_ALIVE = 15  # seconds that an idle connection stays open


def bind(host: str, port: int) -> socket.socket:
    """Opens the socket that the server listens on.

    Args:
      port: 0 takes a free port.

    Raises:
      ValueError: the port is in use or not allowed, or this machine has no such address.
    """
    family = socket.AF_INET6 if ':' in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        # Connections inherit this. asyncio does not set it for a socket of create_server, and a response, which is sent
        # in two parts, would then wait 40 ms for the delayed acknowledgement of the first part.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        reason = os.strerror(error.errno) if (error.errno or 0) > 0 else error.strerror or error
        raise ValueError(f'--host={host} --port={port}: cannot listen there ({reason}): give another --port, or 0 '
                         'for a free one') from error


def address(listener: socket.socket) -> str:
    """Returns the URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f'http://[{host}]:{port}' if ':' in host else f'http://{host}:{port}'


def create(service: Service) -> uvicorn.Server:
    """Returns the server. It ends after all accepted requests are answered, and waits for them as long as their limits.
    """
    limits = service.limits
    return uvicorn.Server(uvicorn.Config(
        create_app(service), http=_protocol(limits), loop='asyncio', ws='none', lifespan='off', log_config=None,
        log_level='error', access_log=False, server_header=False, backlog=_BACKLOG, timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=round(limits.body_seconds + limits.seconds + 5)))


def run(service: Service, listener: socket.socket) -> None:
    """Prints the address and serves until SIGTERM or Ctrl-C.

    Programs are compiled while the server listens; until then, /readyz answers 503. After a signal, accepted requests
    are answered before this returns.

    Raises:
      Exception: an exception of the compilation.
    """
    _raise_open_files()
    # A server that has drained ends with code 0. uvicorn handles the signal while it runs, and raises it again after.
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    server, failures = create(service), []

    def warm_up():
        try:
            service.warm_up()
        except Exception as error:
            failures.append(error)
            server.should_exit = True

    thread = threading.Thread(target=warm_up, name='warm up')
    thread.start()
    print(address(listener), flush=True)
    try:
        server.run(sockets=[listener])
    finally:
        service.close()
        thread.join()
        signal.signal(signal.SIGTERM, before)
        logging.info('all accepted requests are answered, the server ends')
    if failures:
        raise failures[0]


def _protocol(limits: Limits) -> type[H11Protocol]:
    """Returns the protocol of connections, which closes one that takes too long for the head of a request."""
    class Protocol(H11Protocol):
        _timer = None

        def connection_made(self, transport):
            super().connection_made(transport)
            self._timer = self.loop.call_later(limits.body_seconds, self._close_if_idle)

        def data_received(self, data):
            super().data_received(data)
            idle = self.cycle is None or self.cycle.response_complete
            if idle and self._timer is None:
                self._timer = self.loop.call_later(limits.body_seconds, self._close_if_idle)
            elif not idle:
                self._stop_timer()

        def connection_lost(self, exc):
            self._stop_timer()
            super().connection_lost(exc)

        def _stop_timer(self):
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _close_if_idle(self):
            self._timer = None
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()

    return Protocol


def _raise_open_files() -> None:
    """Raises the limit of open files, which bounds the connections, to the largest allowed value."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
