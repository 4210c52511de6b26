"""Load tests of the HTTP server, in a process of its own on loopback: throughput, overload and hostile uploads."""

import asyncio
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from evit_jax.benchmarks import hostile_uploads, http_client, report
from evit_jax.benchmarks.http_client import Address, Load, form, post
from evit_jax.serving import manifest

_START_SECONDS = 600
_ATTACKERS = 16
_PERCENTILES = 50, 95, 99


class ServeSettings(NamedTuple):
    """Settings of the load tests."""

    path: str
    engine: str = 'jax'
    max_batches: Sequence[int] = (1, 16)  # largest batches of the servers that are measured, one after another
    clients: Sequence[int] = (1, 8, 64)
    seconds: float = 30.0            # of all loads together
    overload_seconds: float = 60.0   # 0: no overload
    hostile: int = 10_000            # number of hostile uploads


class ServerProcess:
    """A server in another process.

    Args:
      flags: flags of `evit_jax.serve`, besides those of the port and the engine.
    """

    def __init__(self, settings: ServeSettings, *flags: str):
        command = [sys.executable, '-m', 'evit_jax.serve', settings.path, '--port=0', f'--engine={settings.engine}']
        self._process = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True)
        line = self._process.stdout.readline()
        if not line:
            raise ValueError(f'the server ended with code {self._process.wait()}: its error is above')
        self._url = line.strip()
        self.address = Address('127.0.0.1', int(self._url.rpartition(':')[2]))

    def wait_until_ready(self) -> None:
        """Waits until all programs are compiled.

        Raises:
          TimeoutError: this takes more than 10 minutes.
        """
        end = time.monotonic() + _START_SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            with contextlib.suppress(urllib.error.URLError):
                urllib.request.urlopen(f'{self._url}/readyz', timeout=10).close()
                return
            time.sleep(0.1)
        raise TimeoutError(f'the server was not ready within {_START_SECONDS} s')

    def paths(self) -> dict[str, str]:
        """Returns the path of predictions under the default plan, and under the dense plan if there is another one."""
        with urllib.request.urlopen(f'{self._url}/models', timeout=10) as response:
            model = json.load(response)
        dense = {'dense': '/predict?rate=1'} if model['dense'] not in (None, model['default']) else {}
        return {'default': '/predict'} | dense

    def resident_mb(self) -> float:
        """Returns the resident memory of the server in MB; NaN if the system does not report it."""
        file = pathlib.Path(f'/proc/{self._process.pid}/statm')
        return int(file.read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 1e6 if file.exists() else float('nan')

    def stop(self) -> int:
        """Sends SIGTERM. Returns the exit code."""
        self._process.terminate()
        return self._process.wait()


@contextlib.contextmanager
def _running(settings, *flags) -> Iterator[ServerProcess]:
    server = ServerProcess(settings, *flags)
    try:
        server.wait_until_ready()
        yield server
    finally:
        code = server.stop()
    if code:
        raise ValueError(f'the server ended with code {code}')


@contextlib.contextmanager
def _memory(server: ServerProcess) -> Iterator[list[float]]:
    """Samples the memory of the server in MB, ten times a second."""
    samples, stopped = [server.resident_mb()], threading.Event()

    def sample():
        while not stopped.wait(0.1):
            samples.append(server.resident_mb())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        stopped.set()
        thread.join()


def measure(settings: ServeSettings, image: bytes) -> dict[str, Any]:
    """Runs the load tests.

    Args:
      image: content of the JPEG file that the clients send.

    Returns:
      'loads': rows of throughput and latency; 'overload' and 'hostile': their results, or None.
    """
    results: dict[str, Any] = {'loads': [], 'overload': None, 'hostile': None}
    is_export = (pathlib.Path(settings.path) / manifest.FILE).is_file()  # an export fixes the plans
    seconds = settings.seconds / (2 * len(settings.max_batches) * len(settings.clients))
    plans = () if is_export else ('--rates=1.0',)  # dense and the plan of training
    for max_batch in settings.max_batches:
        with _running(settings, *plans, f'--max_batch={max_batch}', '--body_seconds=2') as server:
            for plan, path in server.paths().items():
                request = post(form(image), path=path)
                asyncio.run(http_client.closed_loop(server.address, request, clients=8, seconds=1))  # warms up
                for clients in settings.clients:
                    load = asyncio.run(http_client.closed_loop(server.address, request, clients=clients,
                                                               seconds=seconds))
                    results['loads'].append({'plan': plan, 'max_batch': max_batch, 'clients': clients} | _figures(load))
            if max_batch == max(settings.max_batches):
                capacity = max(row['requests_per_second'] for row in results['loads']
                               if (row['plan'], row['max_batch']) == ('default', max_batch))
                if settings.overload_seconds:
                    results['overload'] = _overload(server, settings, post(form(image)), capacity)
                if settings.hostile:
                    results['hostile'] = _hostile(server, settings, image)
    return results


def _overload(server, settings, request, capacity):
    """Sends requests at twice the capacity."""
    with _memory(server) as samples:
        load = asyncio.run(http_client.open_loop(server.address, request, rate=2 * capacity,
                                                 seconds=settings.overload_seconds, connections=512))
    quarter = max(len(samples) // 4, 1)
    return _figures(load) | {
        'offered_per_second': 2 * capacity, 'skipped': load.skipped, 'memory_mb': [
            round(float(np.median(part)), 1) for part in (samples[:quarter], samples[-quarter:])],
        'memory_mb_peak': round(max(samples), 1)}


def _hostile(server, settings, image):
    """Sends hostile uploads, and checks that the server still predicts."""
    begin = time.perf_counter()
    with _memory(server) as samples:
        results = asyncio.run(hostile_uploads.attack(server.address, image, count=settings.hostile, clients=_ATTACKERS))
    return {
        'seconds': round(time.perf_counter() - begin, 1), 'count': sum(map(sum, map(dict.values, results.values()))),
        'statuses': {kind: dict(statuses) for kind, statuses in results.items()},
        'alive': asyncio.run(hostile_uploads.is_alive(server.address, image)),
        'memory_mb': [round(samples[0], 1), round(samples[-1], 1)], 'memory_mb_peak': round(max(samples), 1)}


def _figures(load: Load) -> dict[str, Any]:
    latencies = load.latencies or [float('nan')]
    return {'requests_per_second': round(load.statuses[200] / load.seconds, 1),
            **{f'p{percent}_ms': round(1e3 * float(np.percentile(latencies, percent)), 2) for percent in _PERCENTILES},
            'statuses': {str(status): count for status, count in sorted(load.statuses.items())}}


def table(results: dict[str, Any]) -> str:
    """Returns the loads as a table."""
    headers = ('plan', 'batches', 'clients', 'requests/s', *(f'p{percent}, ms' for percent in _PERCENTILES), 'not 200')
    return report.table(headers, [
        (row['plan'], f'up to {row["max_batch"]}', str(row['clients']), f'{row["requests_per_second"]:,.0f}',
         *(f'{row[f"p{percent}_ms"]:.1f}' for percent in _PERCENTILES),
         str(sum(count for status, count in row['statuses'].items() if status != '200'))) for row in results['loads']])


def remarks(results: dict[str, Any]) -> list[str]:
    """Returns the results of overload and hostile uploads as sentences."""
    lines = []
    if overload := results['overload']:
        first, last = overload['memory_mb']
        others = {status: count for status, count in overload['statuses'].items() if status not in ('200', '503')}
        lines.append(f'{overload["offered_per_second"]:,.0f} requests/s offered: '
                     f'{overload["requests_per_second"]:,.0f} requests/s got 200, with p99 {overload["p99_ms"]:.0f} '
                     f'ms; {overload["statuses"].get("503", 0):,} requests got 503, {sum(others.values())} something '
                     f'else {others or ""}, {overload["skipped"]:,} were not sent; memory {first} to {last} MB')
    if hostile := results['hostile']:
        first, last = hostile['memory_mb']
        wrong = {kind: statuses for kind, statuses in hostile['statuses'].items()
                 if {*statuses} - {*hostile_uploads.REFUSED, http_client.GONE}}
        lines.append(f'{hostile["count"]:,} hostile uploads in {hostile["seconds"]:.0f} s: the server '
                     f'{"predicts as before" if hostile["alive"] else "does not predict any more"}; memory {first} to '
                     f'{last} MB, peak {hostile["memory_mb_peak"]} MB; not refused: {wrong or "none"}')
    return lines
