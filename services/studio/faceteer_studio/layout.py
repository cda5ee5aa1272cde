"""Keeping a photo's layout while it is edited: what the decoder starts from instead of pure noise.

Image to image hands the photo itself to the generator; inversion first asks it for the noise
that draws the photo again from its own, unedited embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

from faceteer.v1 import generator_pb2, studio_pb2, tensor_pb2
from faceteer_runtime.errors import InvalidField

from faceteer_studio.ports import Call
from faceteer_studio.upstream_errors import Fields


@dataclass(frozen=True)
class Layout:
    """The layout to keep, as the request has it.

    Attributes:
        image: the photo, a whole file.
        field: its path in the request.
        inverts: whether by inversion.
        strength: for image to image; None for the generator's default.
    """

    image: bytes
    field: str
    inverts: bool
    strength: float | None

    @classmethod
    def of(cls, request: studio_pb2.EditImageRequest) -> Layout:
        """What ``keep_layout`` asks for.

        Raises:
            InvalidField: no method, no photo, a strength out of range, or a scheduler that cannot invert.
        """
        keep = request.keep_layout
        if keep.method not in (studio_pb2.LAYOUT_METHOD_IMAGE_TO_IMAGE, studio_pb2.LAYOUT_METHOD_INVERSION):
            raise InvalidField("keep_layout.method", "must be IMAGE_TO_IMAGE or INVERSION")
        inverts = keep.method == studio_pb2.LAYOUT_METHOD_INVERSION
        strength = keep.strength if keep.HasField("strength") else None
        if strength is not None and inverts:
            raise InvalidField("keep_layout.strength", "is for IMAGE_TO_IMAGE; leave it out with INVERSION")
        if strength is not None and not 0 < strength <= 1:
            raise InvalidField("keep_layout.strength", f"must be more than 0 and at most 1, not {strength:g}")
        usable = (generator_pb2.SCHEDULER_UNSPECIFIED, generator_pb2.SCHEDULER_DDIM)
        if inverts and request.settings.scheduler not in usable:
            raise InvalidField("settings.scheduler", "must be DDIM, or left out, with INVERSION")
        if keep.image:
            return cls(keep.image, "keep_layout.image", inverts, strength)
        if request.input.WhichOneof("source") == "image":
            return cls(request.input.image, "input.image", inverts, strength)
        raise InvalidField("keep_layout.image", "is missing; give the photo here or as input.image")

    @property
    def fields(self) -> Fields:
        """The generator's fields by their path in our request."""
        return {"image": self.field, "start.image": self.field, "start.strength": "keep_layout.strength",
                "start": "keep_layout"}  # fmt: skip

    async def start(
        self, unedited: tensor_pb2.EmbedsInput, settings: generator_pb2.GenerationSettings, call: Call
    ) -> generator_pb2.GenerationStart:
        """What to start from. ``settings`` are the drawing's; inversion sets their scheduler.

        Raises:
            FaceteerError: what the generator raises, at the request's own fields.
        """
        if not self.inverts:
            return generator_pb2.GenerationStart(image=self.image, strength=self.strength)
        # Guidance, seeds and format concern only the drawing.
        inversion = generator_pb2.GenerationSettings(width=settings.width, height=settings.height, steps=settings.steps)
        request = generator_pb2.InvertImageRequest(image=self.image, input=unedited, settings=inversion)
        answer = await call.ports.generator.invert_image(request, call, self.fields)
        settings.scheduler = generator_pb2.SCHEDULER_DDIM
        return generator_pb2.GenerationStart(noise_id=answer.noise_id)
