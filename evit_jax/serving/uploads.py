"""Bounds the number, size and duration of requests, and reads the images of an upload."""

import asyncio
import time
from collections.abc import Callable, Collection
from typing import NamedTuple

import numpy as np
from fastapi import HTTPException, Request
from starlette.datastructures import UploadFile
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from evit_jax.data.names import in_one_line
from evit_jax.data.transforms.decode import decode
from evit_jax.serving.metrics import Metrics

BUSY = 503
RETRY = {'Retry-After': '1'}
_CLOSE = {'Connection': 'close'}
_MAX_FIELDS = 8  # fields of a form that are no files; they are ignored


class Limits(NamedTuple):
    """Limits of the server."""

    max_batch: int = 8               # images in a batch
    max_wait: float = 0.002          # seconds that an image waits for others while the engine is idle
    max_queue: int = 128             # images that wait, and requests that are handled at a time
    max_images: int = 16             # images in a request
    max_bytes: int = 16 * 2**20      # bytes of the body of a request
    max_pixels: int = 40_000_000     # pixels of an image
    body_seconds: float = 10.0       # time for the head, and for the body of a request
    seconds: float = 30.0            # time for the answer after the body has arrived


class RequestGate:
    """ASGI middleware that refuses requests beyond the limits, and counts all requests.

    A request beyond the limit is read to its end before it is refused: a client that still sends would not read the
    response.

    Args:
      paths: paths that the metrics name; all others are counted as 'other'.
    """

    def __init__(self, app: ASGIApp, limits: Limits, metrics: Metrics, paths: Collection[str]):
        self._app, self._limits, self._metrics, self._paths = app, limits, metrics, paths
        self.num_open = 0  # uploads that are handled now

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request."""
        if scope['type'] != 'http':
            return await self._app(scope, receive, send)
        begin, code = time.perf_counter(), 499  # 499: the client has gone

        async def counted_send(message: Message) -> None:
            nonlocal code
            if message['type'] == 'http.response.start':
                code = message['status']
            await send(message)

        try:
            await self._handle(scope, _limited(receive, scope, self._limits), counted_send)
        except HTTPException as error:  # raised by `receive`, while a body is read to its end
            await _respond(error, scope, receive, counted_send)
        finally:
            path = scope['path'] if scope['path'] in self._paths else 'other'
            self._metrics.observe_request(path, code, begin)

    async def _handle(self, scope, receive, send):
        if scope['method'] != 'POST':
            return await self._app(scope, receive, send)
        if self.num_open >= self._limits.max_queue:
            while (await receive()).get('more_body'):
                pass
            raise busy('too many requests are handled now')
        self.num_open += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self.num_open -= 1


def busy(reason: str) -> HTTPException:
    """Returns the error for a request that the client may repeat later."""
    return HTTPException(BUSY, f'{reason}: try again later', headers=RETRY)


async def _respond(error, scope, receive, send):
    response = JSONResponse({'detail': error.detail}, error.status_code, headers=error.headers)
    await response(scope, receive, send)


def _limited(receive: Receive, scope: Scope, limits: Limits) -> Receive:
    """Returns a `receive` that raises an HTTPException if the body is too large or takes too long.

    The rest of a body that is too large is read and discarded before, as long as its time lasts.
    """
    deadline, num_bytes, complete = time.monotonic() + limits.body_seconds, 0, False
    declared = dict(scope['headers']).get(b'content-length', b'')
    if declared.isdigit() and int(declared) > limits.max_bytes:
        num_bytes = int(declared)

    async def next_message() -> Message:
        nonlocal num_bytes, complete
        async with asyncio.timeout(deadline - time.monotonic()):
            message = await receive()
        num_bytes += len(message.get('body', b''))
        complete = not message.get('more_body', False)
        return message

    async def limited() -> Message:
        if complete:  # only a disconnect follows
            return await receive()
        try:
            message = await next_message()
            while num_bytes > limits.max_bytes and not complete:
                await next_message()
        except TimeoutError:
            if num_bytes <= limits.max_bytes:
                raise HTTPException(408, f'the body did not arrive within {limits.body_seconds:g} s',
                                    headers=_CLOSE) from None
        if num_bytes > limits.max_bytes:
            raise HTTPException(413, f'the body has more than {limits.max_bytes:,} bytes: send fewer or smaller images',
                                headers=_CLOSE)
        return message

    return limited


async def read_images(request: Request, limits: Limits, transform: Callable[[np.ndarray], np.ndarray],
                      executor) -> tuple[list[str], list[np.ndarray]]:
    """Returns the names and the transformed pixels of the images of a multipart request.

    Raises:
      HTTPException: the request holds no images or too many (422), an image cannot be read (422), the form is damaged
        (400), or the body is too large (413) or too slow (408).
    """
    loop = asyncio.get_running_loop()
    async with request.form(max_files=limits.max_images + 1, max_fields=_MAX_FIELDS) as form:
        files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
        if not files:
            raise HTTPException(422, 'the request holds no image: send multipart/form-data with one or several files, '
                                'as curl -F image=@cat.jpg does')
        if len(files) > limits.max_images:
            raise HTTPException(422, f'the request holds more than {limits.max_images} images: send several requests')
        names = [in_one_line(file.filename or f'image {number}') for number, file in enumerate(files)]
        results = await asyncio.gather(*(loop.run_in_executor(executor, _read, file, limits, transform)
                                         for file in files))
    problems = [{'name': name, 'problem': result} for name, result in zip(names, results) if isinstance(result, str)]
    if problems:
        text = '; '.join(f'{problem["name"]}: {problem["problem"]}' for problem in problems)
        raise HTTPException(422, {'message': f'cannot be read: {text}', 'images': problems})
    return names, results


def _read(file: UploadFile, limits: Limits, transform: Callable) -> np.ndarray | str:
    """Returns the transformed pixels of a file; the reason if it cannot be read."""
    try:
        return transform(decode(file.file.read(), max_pixels=limits.max_pixels))
    except ValueError as error:
        return in_one_line(' '.join(str(error).split()))
