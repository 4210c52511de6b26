"""The HTTP interface of a served model: prediction, plans, health, metrics and the live page."""

import asyncio
import time
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.types import ASGIApp

from evit_jax.serving.live_page import live_page
from evit_jax.serving.service import ResultOptions, Service
from evit_jax.serving.uploads import RETRY, RequestGate, read_images

_MAX_TOP = 100


def create_app(service: Service) -> ASGIApp:
    """Returns the application. It loads nothing from other machines, also not for documentation."""
    app = FastAPI(title=f'{service.served.name}, served by evit_jax', docs_url=None, redoc_url=None)
    _add_predict(app, service)
    _add_status(app, service)
    _add_page(app, service)
    paths = {route.path for route in app.routes}
    gate = RequestGate(app, service.limits, service.metrics, paths)
    service.metrics.watch('evit_open_uploads', 'Uploads that are handled now', lambda: gate.num_open)
    return gate


def _add_predict(app: FastAPI, service: Service) -> None:
    limits, served = service.limits, service.served

    @app.post('/predict')
    async def predict(request: Request, plan: str | None = None, rate: float | None = None, reducer: str | None = None,
                      top: Annotated[int, Query(ge=1, le=_MAX_TOP)] = 5, kept: bool = False,
                      image: bool = False) -> dict[str, Any]:
        """Predicts the images of a multipart request under a plan, or under a keep rate and a reducer."""
        begin = time.perf_counter()
        try:
            plan = served.find_plan(plan, rate, reducer)
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        if kept and not served.returns_kept:
            raise HTTPException(422, 'the programs return no kept patches: leave kept out, or export with --kept')
        try:
            async with asyncio.timeout(limits.body_seconds + limits.seconds):
                names, images = await read_images(request, limits, served.transform, service.executor)
                results = await service.predict(plan, names, images, ResultOptions(top, kept, image))
        except TimeoutError:
            raise HTTPException(504, f'there was no answer within {limits.seconds:g} s') from None
        return {'model': served.name, 'plan': plan, 'images': results,
                'ms': round(1e3 * (time.perf_counter() - begin), 3)}


def _add_status(app: FastAPI, service: Service) -> None:
    served, limits = service.served, service.limits

    @app.get('/models')
    def models() -> dict[str, Any]:
        """Describes the model, its plans and the limits."""
        return {'name': served.name, 'path': served.path, 'engine': served.engine, 'classes': len(served.class_names),
                'image_size': served.image_size, 'patch_size': served.patch_size, 'returns_kept': served.returns_kept,
                'default': served.default, 'dense': served.dense, 'plans': served.plans,
                'batch_sizes': service.batcher.sizes,
                'limits': {name: getattr(limits, name) for name in ('max_images', 'max_bytes', 'max_pixels')}}

    @app.get('/healthz')
    def healthz() -> dict[str, str]:
        """Answers while the process runs."""
        return {'status': 'ok'}

    @app.get('/readyz')
    def readyz() -> Response:
        """Answers 200 after all programs are compiled, and 503 before."""
        if service.is_ready:
            return JSONResponse({'status': 'ready'})
        return JSONResponse({'status': 'the programs are being compiled'}, 503, headers=RETRY)

    @app.get('/metrics')
    def metrics() -> Response:
        """Returns the metrics for Prometheus."""
        return PlainTextResponse(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _add_page(app: FastAPI, service: Service) -> None:
    page = live_page(service.served)

    @app.get('/')
    def index() -> Response:
        """Returns the live page."""
        return HTMLResponse(page)
