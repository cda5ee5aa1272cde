"""Opened pictures: opening, and opening again when the server has let an embedding go.

Knows nothing of how calls are made: its functions are operations (:mod:`faceteer._effects`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from google.protobuf.message import Message

from faceteer._effects import Operation, Work
from faceteer._errors import EmbeddingExpiredError, InvalidArgumentError, RevisionMismatchError
from faceteer._fired import FiredFeature, FiredFeatures
from faceteer._methods import EMBED_PROMPT, OPEN_IMAGE, Method
from faceteer._pictures import Picture, picture_bytes, picture_name
from faceteer._retries import Attempts, Retries, Timeouts, call, check_timeout
from faceteer._tensors import to_array, to_tensor
from faceteer._values import Execution, Notice, Revisions, Settings
from faceteer.v1 import generator_pb2, studio_pb2, tensor_pb2

if TYPE_CHECKING:
    import numpy.typing as npt

R = TypeVar("R", bound=Message)


@dataclass(frozen=True)
class Context:
    """What every operation of one client shares."""

    address: str
    retries: Retries
    timeouts: Timeouts

    def attempts(self, timeout: float | None, default: float | None) -> Attempts:
        """A new operation's deadline: the caller's, or the default of its kind."""
        check_timeout(timeout)
        return Attempts(self.retries, default if timeout is None else timeout)


@dataclass
class OpenedPhoto:
    """An opened picture. All but ``inline`` stays as it was; ``embeds`` are made anew when the server lost them.

    Attributes:
        name: what to call it in front of people.
        data: the whole file; None for a photo opened from an embedding or a prompt.
        inline: send the values rather than the id, because the server has let the id go once.
        prompt: the text that it was imagined for; empty for all others.
    """

    name: str
    data: bytes | None
    embedding_id: str
    embeds: npt.NDArray[np.float32]
    features: FiredFeatures
    explained_variance: float
    cosine: float
    norm: float
    warnings: tuple[Notice, ...]
    revisions: Revisions
    encoder_execution: Execution
    sae_execution: Execution
    inline: bool = field(default=False)
    prompt: str = ""

    def image_input(self) -> studio_pb2.ImageInput:
        """The photo as a studio call's input."""
        if self.inline:
            return studio_pb2.ImageInput(embeds=to_tensor(self.embeds))
        return studio_pb2.ImageInput(embedding_id=self.embedding_id)

    def embeds_input(self) -> tensor_pb2.EmbedsInput:
        """The photo as another service's input."""
        if self.inline:
            return tensor_pb2.EmbedsInput(embeds=to_tensor(self.embeds))
        return tensor_pb2.EmbedsInput(embedding_id=self.embedding_id)


def read_picture(picture: Picture) -> Operation[bytes]:
    """The picture as a whole file; only what takes time is worth a thread."""
    if isinstance(picture, bytes):
        return picture_bytes(picture)
    data: bytes = yield Work(partial(picture_bytes, picture))
    return data


def open_picture(
    context: Context, picture: Picture, *, max_features: int, timeout: float | None
) -> Operation[OpenedPhoto]:
    """Reads the picture and opens it."""
    data = yield from read_picture(picture)
    source = studio_pb2.ImageInput(image=data)
    return (yield from _open(context, source, picture_name(picture), data, max_features, timeout))


def open_embeds(
    context: Context, embeds: npt.NDArray[Any], *, max_features: int, timeout: float | None
) -> Operation[OpenedPhoto]:
    """Opens an embedding [d] without a picture."""
    source = studio_pb2.ImageInput(embeds=to_tensor(embeds))
    return (yield from _open(context, source, "embedding", None, max_features, timeout))


def embed_prompt(
    context: Context,
    prompt: str,
    *,
    negative_prompt: str,
    seed: int,
    steps: int | None,
    guidance_scale: float | None,
    max_features: int,
    timeout: float | None,
) -> Operation[OpenedPhoto]:
    """Imagines the image embedding of a text and opens it. Its values are kept, so that a server that lets it go is
    handed them again rather than asked to imagine anew."""
    if not isinstance(prompt, str) or not prompt.strip():
        raise InvalidArgumentError("prompt: is empty", field="prompt", description="say what should be in the picture")
    checked = Settings(seeds=(seed,), steps=steps, guidance_scale=guidance_scale)
    attempts = context.attempts(timeout, context.timeouts.render)
    request = generator_pb2.EmbedPromptRequest(
        prompt=prompt,
        negative_prompt=negative_prompt,
        seed=checked.seeds[0],
        steps=checked.steps or 0,
        guidance_scale=checked.guidance_scale,
    )
    answer = yield from call(EMBED_PROMPT, request, attempts)
    source = studio_pb2.ImageInput(embeds=answer.embedding.embeds)
    words = " ".join(prompt.split())
    name = words if len(words) <= 60 else words[:59] + "…"
    opened = yield from _open(context, source, name, None, max_features, attempts.remaining)
    return replace(opened, prompt=prompt)


def call_with_photos(
    context: Context,
    method: Method[R],
    build: Callable[[], Message],
    photos: Sequence[OpenedPhoto],
    attempts: Attempts,
) -> Operation[R]:
    """A call that names ``photos``; when the server has let one go, they are opened again and sent whole, once."""
    try:
        return (yield from call(method, build(), attempts))
    except EmbeddingExpiredError as error:
        yield from reopen(photos, attempts, error)
    return (yield from call(method, build(), attempts))


def reopen(photos: Sequence[OpenedPhoto], attempts: Attempts, error: EmbeddingExpiredError) -> Operation[None]:
    """Encodes the photos again, and has them sent inline from now on: a server that shares no cache with the one that
    encodes would not find the new ids either.

    Raises:
        EmbeddingExpiredError: all of them were sent inline already.
        RevisionMismatchError: the server has other models now, so the photos' features mean something else.
    """
    lost = [photo for photo in dict.fromkeys(map(_ById, photos)) if not photo.photo.inline]
    if not lost:
        raise error
    for one in lost:
        photo = one.photo
        if photo.data is not None:
            source = studio_pb2.ImageInput(image=photo.data)
        else:
            source = studio_pb2.ImageInput(embeds=to_tensor(photo.embeds))
        answer = yield from call(OPEN_IMAGE, studio_pb2.OpenImageRequest(input=source, max_features=1), attempts)
        _same_models(photo, Revisions.from_proto(answer.revisions))
        photo.embeds = to_array(answer.embedding.embeds)
        photo.embedding_id = answer.embedding.embedding_id
        photo.inline = True


class _ById:
    """A photo told from others by identity, so that one passed twice is opened once."""

    def __init__(self, photo: OpenedPhoto) -> None:
        self.photo = photo

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and self.photo is other.photo

    def __hash__(self) -> int:
        return id(self.photo)


def _same_models(photo: OpenedPhoto, now: Revisions) -> None:
    for part in ("encoder", "sae"):
        before, after = getattr(photo.revisions, part), getattr(now, part)
        if before and after and before != after:
            raise RevisionMismatchError(
                f"{photo.name} was opened with {part} revision {before}, but the server runs {after} now; "
                "open the picture again",
                reason="REVISION_MISMATCH",
                metadata={"part": part, "expected": before, "actual": after},
            )


def _open(
    context: Context,
    source: studio_pb2.ImageInput,
    name: str,
    data: bytes | None,
    max_features: int,
    timeout: float | None,
) -> Operation[OpenedPhoto]:
    if max_features < 0:
        raise InvalidArgumentError(
            f"max_features: {max_features} is negative; 0 keeps all that fire",
            field="max_features",
            description="must be 0 or more",
        )
    attempts = context.attempts(timeout, context.timeouts.open)
    request = studio_pb2.OpenImageRequest(input=source, max_features=max_features)
    answer = yield from call(OPEN_IMAGE, request, attempts)
    return OpenedPhoto(
        name=name,
        data=data,
        embedding_id=answer.embedding.embedding_id,
        embeds=to_array(answer.embedding.embeds),
        features=FiredFeatures(map(FiredFeature.from_proto, answer.features), answer.l0),
        explained_variance=answer.explained_variance,
        cosine=answer.cosine,
        norm=answer.norm,
        warnings=tuple(Notice(w.code, w.message) for w in answer.warnings),
        revisions=Revisions.from_proto(answer.revisions),
        encoder_execution=Execution.from_proto(answer.encoder_execution),
        sae_execution=Execution.from_proto(answer.sae_execution),
    )
