"""Small facts that answers share: revisions, warnings, executions, generation settings."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict, get_args

import numpy as np

from faceteer._errors import invalid
from faceteer._models.wire import copied, number, word
from faceteer.v1 import execution_pb2, generator_pb2

#: Noise schedulers by name; the server's GetGenerator lists those it serves.
Scheduler = Literal["ddpm", "ddim", "dpm_solver_pp", "lcm"]
SCHEDULERS: tuple[str, ...] = get_args(Scheduler)
#: How a drawing keeps the photo's layout: from the photo's own latents, part of the noise added; from the noise that
#: draws the photo again; or not at all, whatever the edit or recipe says.
LayoutMethod = Literal["image_to_image", "inversion", "none"]
LAYOUT_METHODS: tuple[str, ...] = get_args(LayoutMethod)
UINT64_MAX = 2**64 - 1
UINT32_MAX = 2**32 - 1


@dataclass(frozen=True)
class Revisions:
    """The revisions of the models behind an answer; empty where unknown. ``library`` is informative."""

    encoder: str = ""
    sae: str = ""
    generator: str = ""
    library: str = ""

    @classmethod
    def from_proto(cls, message: execution_pb2.Revisions) -> Revisions:
        """From the wire."""
        return copied(cls, message)

    def to_proto(self) -> execution_pb2.Revisions:
        """To the wire, where it says what the caller expects."""
        return execution_pb2.Revisions(encoder=self.encoder, sae=self.sae, generator=self.generator)


@dataclass(frozen=True)
class Notice:
    """A warning that came with a successful call.

    Attributes:
        code: for programs; "UNLIKE_THE_CORPUS" says that the bundle was not made from pictures of this kind.
        message: for people, with what to do.
        value: what was measured; 0 where the warning is not about a number.
        limit: what it passed.
        feature_indices: the features that it is about.
    """

    code: str
    message: str
    value: float = 0.0
    limit: float = 0.0
    feature_indices: tuple[int, ...] = ()

    @classmethod
    def all_of(cls, messages: Iterable[Any]) -> tuple[Notice, ...]:
        """From the wire: an answer's warnings."""
        return tuple(copied(cls, message) for message in messages)

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Execution:
    """How an answer came about. Times in microseconds."""

    model_revision: str
    cached: bool
    queue_us: int
    compute_us: int
    cache_us: int
    request_id: str

    @classmethod
    def from_proto(cls, message: execution_pb2.Execution) -> Execution:
        """From the wire."""
        return copied(cls, message)


class DrawingOptions(TypedDict, total=False):
    """How to draw, beside the seeds. Left out or None: the edit's own settings, then the server's defaults.

    Attributes:
        steps: denoising steps.
        guidance_scale: classifier-free guidance; 1 or less draws without.
        size: pixels, or (width, height).
        scheduler: "ddpm", "ddim", "dpm_solver_pp" or "lcm".
        keep_layout: keep the layout of the photo, whose bytes are sent along: "inversion" starts from the noise that
            draws the photo again (needs "ddim", which it sets), "image_to_image" from the photo with part of the noise
            added; "none" from pure noise, whatever the edit or recipe says.
        strength: for "image_to_image": how much is redrawn, in (0, 1]; 0.7 when left out.
    """

    steps: int | None
    guidance_scale: float | None
    size: int | tuple[int, int] | None
    scheduler: Scheduler | None
    keep_layout: LayoutMethod | None
    strength: float | None


@dataclass(frozen=True)
class Settings:
    """How to draw; None and empty mean the server's defaults.

    Attributes:
        seeds: one picture each, 0 to 2**64 - 1; empty draws one picture with a seed that the server picks.
        steps: denoising steps.
        guidance_scale: classifier-free guidance; 1 or less draws without.
        size: (width, height) in pixels.
        scheduler: the noise scheduler's name.
        keep_layout: keep the photo's layout by "inversion" or "image_to_image"; None or "none" draws from pure noise.
        strength: for "image_to_image": how much is redrawn, in (0, 1]; the server's 0.7 when left out.

    Raises:
        InvalidArgumentError: names the attribute at fault.
    """

    seeds: tuple[int, ...] = ()
    steps: int | None = None
    guidance_scale: float | None = None
    size: tuple[int, int] | None = None
    scheduler: Scheduler | None = None
    keep_layout: LayoutMethod | None = None
    strength: float | None = None

    def __post_init__(self) -> None:
        # frozen: the checked forms are put in place here, once.
        seeds = tuple(_integer("seeds", seed, 0, UINT64_MAX) for seed in self.seeds)
        object.__setattr__(self, "seeds", seeds)
        if self.steps is not None:
            object.__setattr__(self, "steps", _integer("steps", self.steps, 1, UINT32_MAX))
        if self.guidance_scale is not None:
            object.__setattr__(self, "guidance_scale", float32("guidance_scale", self.guidance_scale))
        if self.size is not None:
            pair = tuple(self.size) if isinstance(self.size, tuple | list) else ()
            if len(pair) != 2:
                raise invalid("size", f"{self.size!r} is neither a number of pixels nor (width, height)")
            object.__setattr__(self, "size", tuple(_integer("size", side, 1, UINT32_MAX) for side in pair))
        if self.scheduler is not None and self.scheduler not in SCHEDULERS:
            raise invalid("scheduler", f"{self.scheduler!r} is unknown; one of {', '.join(SCHEDULERS)}")
        if self.keep_layout is not None and self.keep_layout not in LAYOUT_METHODS:
            raise invalid("keep_layout", f"{self.keep_layout!r} is unknown; one of {', '.join(LAYOUT_METHODS)}")
        if self.strength is not None:
            object.__setattr__(self, "strength", float32("strength", self.strength))
            if not 0 < self.strength <= 1:
                raise invalid("strength", f"{self.strength:g} is not more than 0 and at most 1")

    @classmethod
    def of(
        cls,
        *,
        seed: int | None = None,
        seeds: Iterable[int] | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        size: int | tuple[int, int] | None = None,
        scheduler: Scheduler | None = None,
        keep_layout: LayoutMethod | None = None,
        strength: float | None = None,
    ) -> Settings:
        """Settings from a call's arguments. Raises InvalidArgumentError naming the one at fault, as the class does."""
        if seed is not None and seeds is not None:
            raise invalid("seed", "given together with seeds; pass one of them")
        chosen = (seed,) if seed is not None else tuple(seeds if seeds is not None else ())
        if seeds is not None and not chosen:
            raise invalid("seeds", "is empty; pass at least one seed, or leave it out")
        square = size is not None and not isinstance(size, tuple | list)
        width_height: Any = (size, size) if square else size
        return cls(chosen, steps, guidance_scale, width_height, scheduler, keep_layout, strength)

    @classmethod
    def from_proto(cls, message: generator_pb2.GenerationSettings) -> Settings:
        """From the wire: zero and absent become None."""
        scheduler: Any = word(generator_pb2.Scheduler, message.scheduler)
        return cls(
            seeds=tuple(message.seeds),
            steps=message.steps or None,
            guidance_scale=shortest(message.guidance_scale) if message.HasField("guidance_scale") else None,
            size=(message.width, message.height) if message.width and message.height else None,
            scheduler=scheduler if scheduler in SCHEDULERS else None,
        )

    def to_proto(self) -> generator_pb2.GenerationSettings:
        """To the wire; the layout is sent separately."""
        message = generator_pb2.GenerationSettings(
            seeds=self.seeds, steps=self.steps or 0, guidance_scale=self.guidance_scale
        )
        if self.size is not None:
            message.width, message.height = self.size
        if self.scheduler is not None:
            message.scheduler = number(generator_pb2.Scheduler, self.scheduler)
        return message

    def overlaid(self, other: Settings) -> Settings:
        """These settings, replaced by whatever ``other`` gives. ``keep_layout`` brings its strength along."""
        given: dict[str, Any] = {name: value for name, value in vars(other).items() if value not in (None, ())}
        if other.keep_layout is not None:
            given["strength"] = other.strength
        return replace(self, **given)


def check_strength(settings: Settings) -> None:
    """Raises InvalidArgumentError when there is a strength that nothing takes."""
    if settings.strength is not None and settings.keep_layout != "image_to_image":
        raise invalid("strength", "is only for keep_layout='image_to_image'; pass that too, or leave strength out")


def shortest(value: float) -> float:
    """The float that a float32 is written as with the fewest digits: 0.1, not 0.10000000149011612."""
    return float(str(np.float32(value)))


def float32(field: str, value: float) -> float:
    """``value`` as it will travel, in its shortest form. Raises InvalidArgumentError unless it is a finite number."""
    if isinstance(value, bool | str | bytes) or value is None:
        raise invalid(field, f"{value!r} is not a number")
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise invalid(field, f"{value!r} is not a number") from error
    with np.errstate(over="ignore"):
        fits = bool(np.isfinite(np.float32(number)))
    if not fits:
        raise invalid(field, f"{number!r} is not a finite float32")
    return shortest(number)


def _integer(field: str, value: Any, lowest: int, highest: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise invalid(field, f"{value!r} is not a whole number") from None
    if isinstance(value, bool) or not lowest <= number <= highest:
        raise invalid(field, f"{value!r} is not a whole number from {lowest} to {highest}")
    return number
