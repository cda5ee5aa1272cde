"""An opened picture, and what it is to the server."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from faceteer._errors import RevisionMismatchError
from faceteer._models.fired import FiredFeature, FiredFeatures
from faceteer._models.tensors import to_array, to_tensor
from faceteer._models.values import Execution, Notice, Revisions
from faceteer._models.wire import copied
from faceteer.v1 import studio_pb2, tensor_pb2

if TYPE_CHECKING:
    import numpy.typing as npt


@dataclass
class OpenedPhoto:
    """An opened picture. Only opening it again changes it: ``embeds``, ``embedding_id`` and ``inline``.

    Attributes:
        name: what to call it in front of people.
        data: the whole file; None for a photo opened from an embedding or a prompt.
        inline: send the values rather than the id, because the server has let the id go once.
        prompt: the text that its embedding was generated from; empty for all others.
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
    inline: bool = False
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

    @classmethod
    def from_proto(cls, message: studio_pb2.OpenImageResponse, *, name: str, data: bytes | None = None) -> OpenedPhoto:
        """From the wire."""
        return copied(
            cls,
            message,
            name=name,
            data=data,
            embedding_id=message.embedding.embedding_id,
            embeds=to_array(message.embedding.embeds),
            features=FiredFeatures(map(FiredFeature.from_proto, message.features), message.l0),
            warnings=Notice.all_of(message.warnings),
            revisions=Revisions.from_proto(message.revisions),
            encoder_execution=Execution.from_proto(message.encoder_execution),
            sae_execution=Execution.from_proto(message.sae_execution),
        )

    @property
    def source(self) -> studio_pb2.ImageInput:
        """What it can be opened from again."""
        if self.data is not None:
            return studio_pb2.ImageInput(image=self.data)
        return studio_pb2.ImageInput(embeds=to_tensor(self.embeds))

    @property
    def digest(self) -> str:
        """SHA-256 of the file, hexadecimal; empty when it was opened without one."""
        return hashlib.sha256(self.data).hexdigest() if self.data is not None else ""

    def reopened(self, message: studio_pb2.OpenImageResponse) -> None:
        """Takes in what opening it again gave, and has it sent inline from now on: a server that shares no cache with
        the one that encodes would not find the new id either.

        Raises:
            RevisionMismatchError: the server has other models now, so the photo's features mean something else.
        """
        for part in ("encoder", "sae"):
            before, after = getattr(self.revisions, part), getattr(message.revisions, part)
            if before and after and before != after:
                raise RevisionMismatchError(
                    f"{self.name} was opened with {part} revision {before}, but the server runs {after} now; "
                    "open the picture again",
                    reason="REVISION_MISMATCH",
                    metadata={"part": part, "expected": before, "actual": after},
                )
        self.embeds = to_array(message.embedding.embeds)
        self.embedding_id = message.embedding.embedding_id
        self.inline = True
