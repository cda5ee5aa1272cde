"""A back end that edits its users' pictures: FastAPI in front, Faceteer behind, one connection for all requests.

FACETEER_ADDRESS=localhost:50050 uvicorn app:app --app-dir examples/fastapi_backend
curl --data-binary @PICTURE localhost:8000/features
curl --data-binary @PICTURE 'localhost:8000/edit?feature=night&value=1&seed=7' -o night.png
"""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import faceteer
from fastapi import Body, FastAPI, Request, Response
from fastapi.responses import JSONResponse

# What a caller of ours should see for each failure, the most particular first.
STATUSES: list[tuple[type[faceteer.FaceteerError], int]] = [
    (faceteer.InvalidArgumentError, 400),
    (faceteer.NotFoundError, 404),
    (faceteer.PermissionDeniedError, 403),
    (faceteer.ResourceExhaustedError, 429),
    (faceteer.UnavailableError, 503),
    (faceteer.DeadlineExceededError, 504),
]

Picture = Annotated[bytes, Body(media_type="application/octet-stream")]


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with faceteer.connect_async() as client:
        app.state.faceteer = client
        yield


app = FastAPI(title="Pictures by their features", lifespan=lifespan)


@app.exception_handler(faceteer.FaceteerError)
async def failed(request: Request, error: faceteer.FaceteerError) -> JSONResponse:
    status = next((status for kind, status in STATUSES if isinstance(error, kind)), 500)
    retry_after = getattr(error, "retry_after", None)
    headers = {} if retry_after is None else {"Retry-After": str(max(1, round(retry_after)))}
    return JSONResponse({"error": str(error), "reason": error.reason}, status, headers)


@app.post("/features")
async def features(request: Request, picture: Picture, top: int = 12) -> dict[str, Any]:
    """What is in a picture, strongest first."""
    photo = await request.app.state.faceteer.open(picture, max_features=top)
    return {"l0": photo.l0, "features": photo.features.to_list(), "warnings": [str(one) for one in photo.warnings]}


@app.post("/edit")
async def edit(request: Request, picture: Picture, feature: str, value: float = 1.0, seed: int = 0) -> Response:
    """The picture with one feature set, as a PNG; the recipe's hash in a header."""
    photo = await request.app.state.faceteer.open(picture)
    edited = photo.edit().set(feature, value)
    image = await edited.render(seed=seed)
    recipe = await edited.recipe()
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return Response(buffer.getvalue(), media_type="image/png", headers={"X-Recipe": recipe.hash})
