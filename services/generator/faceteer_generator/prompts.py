"""What EmbedPrompt asks for: a text, and how to imagine it."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from faceteer_runtime.cache_keys import EMBEDS, cache_key
from faceteer_runtime.errors import InvalidField

DEFAULT_STEPS, DEFAULT_GUIDANCE = 25, 4.0
MAX_STEPS, MAX_GUIDANCE = 200, 30.0
# Longer texts are cut to the text encoder's 77 tokens anyway, and no token has this many characters on average.
MAX_CHARACTERS = 10_000


@dataclass(frozen=True)
class Prompt:
    """A text to imagine, and how; see :class:`faceteer_generator.prior.Imagining`."""

    text: str
    negative: str
    seed: int
    steps: int
    guidance_scale: float

    @classmethod
    def checked(cls, text: str, negative: str, seed: int, steps: int, guidance_scale: float | None) -> Prompt:
        """Fills defaults in for 0 and None.

        Raises:
            InvalidField: a value is out of range.
        """
        if not text.strip():
            raise InvalidField("prompt", "is empty; describe a picture")
        for field, value in (("prompt", text), ("negative_prompt", negative)):
            if len(value) > MAX_CHARACTERS:
                raise InvalidField(field, f"{len(value)} characters are more than {MAX_CHARACTERS}")
        # The scheduler divides by steps - 1.
        steps = steps or DEFAULT_STEPS
        if not 2 <= steps <= MAX_STEPS:
            raise InvalidField("steps", f"must be 2 to {MAX_STEPS}, not {steps}")
        guidance = DEFAULT_GUIDANCE if guidance_scale is None else guidance_scale
        if not 0 <= guidance <= MAX_GUIDANCE:
            raise InvalidField("guidance_scale", f"must be 0 to {MAX_GUIDANCE:g}, not {guidance:g}")
        return cls(text, negative.strip() and negative, seed, steps, float(guidance))

    @property
    def calls(self) -> int:
        """Calls of a model: the text encoder, then the prior for each step."""
        return self.steps + 1

    def key(self, revision: str, precision: str) -> str:
        """The cache key of Record {"embeds": float32 [d]}, by the generator part's revision."""
        return cache_key(
            EMBEDS,
            revision,
            b"prompt",
            precision.encode(),
            self.text.encode(),
            self.negative.encode(),
            struct.pack("<QId", self.seed, self.steps, self.guidance_scale),
        )
