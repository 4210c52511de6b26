"""Uploads that a server must survive: truncated and wrong files, decompression bombs, broken forms, slow bodies."""

import asyncio
import collections
import functools
import io
import itertools
import struct
import zlib

import numpy as np
from PIL import Image

from evit_jax.benchmarks.http_client import GONE, Address, Connection, form, post

REFUSED = 400, 408, 413, 422, 503  # statuses that are right for a hostile upload; a closed connection is, too
_SLOW_PAUSE = 0.05  # seconds between the bytes of a slow body


def requests(image: bytes, seed: int = 0) -> dict[str, bytes]:
    """Returns a hostile request of each kind, except slow bodies.

    Args:
      image: content of a good JPEG file.
      seed: seed of the random bytes.
    """
    rng = np.random.default_rng(seed)
    cut, noise = int(rng.integers(10, len(image) - 10)), rng.bytes(int(rng.integers(1, 5000)))
    body = form(image)
    return {
        'truncated JPEG': post(form(image[:cut])),
        'truncated PNG': post(form(_png(200, 200)[:cut % 300 + 40])),
        'PNG of 2.5 billion pixels': post(form(_png_header(50_000, 50_000))),
        'PNG of 100 million pixels, 0.1 MB': post(form(_png(10_000, 10_000))),
        'random bytes': post(form(noise)), 'random bytes after a JPEG head': post(form(image[:200] + noise)),
        'HTML as image': post(form(b'<!doctype html><script>alert(1)</script>', 'page.jpg')),
        'empty file': post(form(b'')), 'no form': post(noise, content_type='application/json'),
        'form cut in the middle': post(body[:len(body) // 2]),
        'form without a boundary': post(body, content_type='multipart/form-data'),
        'one hundred files': post(b''.join(form(b'x')[:-len('evit-benchmark--\r\n') - 2] for _ in range(100))),
        'declared length of 1 GB': post(body, length=10**9), 'negative length': post(body, length=-1),
        'no HTTP': noise.replace(b'\r\n', b'') + b'\r\n\r\n',
        'unknown plan': post(body, path='/predict?plan=' + 'x' * 1000)}


async def attack(address: Address, image: bytes, *, count: int, clients: int,
                 slow_share: float = 0.02) -> dict[str, collections.Counter]:
    """Sends hostile requests of all kinds in turn.

    Args:
      slow_share: fraction of the requests that are slow bodies, which take as long as the server waits for them.

    Returns:
      For each kind, the number of responses by status code.
    """
    results: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    variants = [list(requests(image, seed).items()) for seed in range(4)]
    kinds = itertools.cycle(itertools.chain.from_iterable(variants))
    every = max(round(1 / slow_share), 1) if slow_share else 0
    queue = ([('slow body', post(form(image)))] if every and number % every == every - 1 else [next(kinds)]
             for number in range(count))

    async def client():
        for (kind, request), in queue:
            results[kind][await (_send_slowly if kind == 'slow body' else _send)(address, request)] += 1

    await asyncio.gather(*(client() for _ in range(clients)))
    return dict(results)


async def _send(address, request):
    """Sends a request on a connection of its own, and closes the sending side, so that a short body ends."""
    try:
        async with asyncio.timeout(60):
            reader, writer = await asyncio.open_connection(*address)
            writer.write(request)
            if writer.can_write_eof():
                writer.write_eof()
            return _status(await _read(reader, writer))
    except (OSError, TimeoutError):
        return GONE


async def _send_slowly(address, request):
    """Sends the head of a request and then single bytes, until the server answers or closes the connection."""
    try:
        reader, writer = await asyncio.open_connection(*address)
        head = request.index(b'\r\n\r\n') + 4
        writer.write(request[:head])
        answer = asyncio.create_task(_read(reader, writer))
        for byte in request[head:]:
            if answer.done():
                break
            writer.write(bytes([byte]))
            await asyncio.wait([answer], timeout=_SLOW_PAUSE)
        return _status(await answer)
    except OSError:
        return GONE


async def _read(reader, writer):
    try:
        return await reader.read()
    except OSError:
        return b''
    finally:
        writer.close()


def _status(answer):
    return int(answer.split(None, 2)[1]) if answer.startswith(b'HTTP/1.1 ') else GONE


@functools.cache
def _png(width, height):
    """Returns a grey PNG. A large one has few bytes."""
    file = io.BytesIO()
    Image.new('L', (width, height), 128).save(file, 'PNG')
    return file.getvalue()


def _png_header(width, height):
    """Returns a PNG whose header promises more pixels than it has."""
    def chunk(kind, content):
        return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))

    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)) + chunk(
        b'IDAT', zlib.compress(bytes(1000))) + chunk(b'IEND', b'')


async def is_alive(address: Address, image: bytes) -> bool:
    """Returns True if the server predicts a good image."""
    connection = Connection(address)
    try:
        return await connection.send(post(form(image))) == 200
    finally:
        connection.close()
