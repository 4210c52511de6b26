"""A bounded HTTP/1.1 client for load tests on loopback: closed loops, open loops, and single raw requests."""

import asyncio
import collections
import contextlib
import time
from typing import NamedTuple

BOUNDARY = 'evit-benchmark'
GONE = 0  # status of a request whose connection was closed or refused without a response
_TIMEOUT = 60.0  # seconds for a response


class Load(NamedTuple):
    """The result of a load test."""

    seconds: float
    statuses: collections.Counter   # status code -> number of responses; `GONE`: no response
    latencies: list[float]          # seconds of each request with status 200
    skipped: int = 0                # requests that were not sent, because too many connections were open


class Address(NamedTuple):
    """Address of a server on this machine."""

    host: str
    port: int


def post(body: bytes, *, path: str = '/predict', content_type: str = f'multipart/form-data; boundary={BOUNDARY}',
         length: int | None = None) -> bytes:
    """Returns the bytes of a POST request.

    Args:
      length: the declared length of the body; None: its true length.
    """
    return (f'POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {content_type}\r\n'
            f'Content-Length: {len(body) if length is None else length}\r\n\r\n').encode() + body


def form(content: bytes, name: str = 'image.jpg') -> bytes:
    """Returns the multipart body with one file."""
    return (f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n'.encode()
            + content + f'\r\n--{BOUNDARY}--\r\n'.encode())


class Connection:
    """A connection that stays open between requests, and is opened again after it was closed."""

    def __init__(self, address: Address):
        self._address = address
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def send(self, request: bytes) -> int:
        """Sends a request. Returns the status of the response; `GONE` if there is none.

        A server closes idle connections. If this one was idle, the request is repeated once on a new connection.
        """
        is_new = self._streams is None
        try:
            async with asyncio.timeout(_TIMEOUT):
                return await self._exchange(request)
        except (OSError, EOFError, TimeoutError) as error:
            self.close()
            return GONE if is_new or isinstance(error, TimeoutError) else await self.send(request)

    async def _exchange(self, request):
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self._address)
        reader, writer = self._streams
        writer.write(request)
        await writer.drain()
        head = (await reader.readuntil(b'\r\n\r\n')).lower()
        await reader.readexactly(int(head.partition(b'content-length:')[2].partition(b'\r\n')[0] or 0))
        if b'connection: close' in head:
            self.close()
        return int(head.split(None, 2)[1])

    def close(self) -> None:
        """Closes the connection."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def closed_loop(address: Address, request: bytes, *, clients: int, seconds: float) -> Load:
    """Measures clients that each send the next request after the response to the last one."""
    statuses, latencies = collections.Counter(), []
    begin = time.perf_counter()

    async def client():
        with contextlib.closing(Connection(address)) as connection:
            while (start := time.perf_counter()) < begin + seconds:
                status = await connection.send(request)
                statuses[status] += 1
                if status == 200:
                    latencies.append(time.perf_counter() - start)

    await asyncio.gather(*(client() for _ in range(clients)))
    return Load(time.perf_counter() - begin, statuses, latencies)


async def open_loop(address: Address, request: bytes, *, rate: float, seconds: float, connections: int) -> Load:
    """Measures requests that are sent at a fixed rate, whether or not the earlier ones were answered.

    Args:
      rate: requests per second.
      connections: largest number of open connections; a request beyond it is skipped.
    """
    statuses, latencies, skipped, tasks = collections.Counter(), [], 0, set()
    free = [Connection(address) for _ in range(connections)]
    begin = time.perf_counter()

    async def send(connection):
        start = time.perf_counter()
        status = await connection.send(request)
        statuses[status] += 1
        if status == 200:
            latencies.append(time.perf_counter() - start)
        free.append(connection)

    for number in range(int(rate * seconds)):
        await asyncio.sleep(begin + number / rate - time.perf_counter())
        if free:
            tasks.add(task := asyncio.create_task(send(free.pop())))
            task.add_done_callback(tasks.discard)
        else:
            skipped += 1
    await asyncio.gather(*tasks)
    for connection in free:
        connection.close()
    return Load(time.perf_counter() - begin, statuses, latencies, skipped)
