"""The events of drawing an edit, as a stream delivers them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from PIL import Image

from faceteer._models.report import EditReport, MeasuredPicture
from faceteer._models.values import Execution, Settings


@dataclass(frozen=True)
class Edited:
    """The edit was applied. Always the first event."""

    report: EditReport


@dataclass(frozen=True)
class Queued:
    """Accepted and waiting; ``position`` pictures are ahead."""

    position: int


@dataclass(frozen=True)
class Started:
    """Drawing has begun, with these seeds and settings, the server's defaults filled in."""

    settings: Settings


@dataclass(frozen=True)
class Progress:
    """``step`` of ``steps`` denoising steps of picture ``index`` are done."""

    index: int
    step: int
    steps: int


@dataclass(frozen=True)
class Preview:
    """A rough picture ``index`` after ``step`` steps."""

    index: int
    step: int
    image: Image.Image = field(repr=False)


@dataclass(frozen=True)
class Drawn:
    """Picture ``index`` is finished; ``cached`` when the server had drawn it before."""

    index: int
    seed: int
    cached: bool
    image: Image.Image = field(repr=False)


@dataclass(frozen=True)
class Measured:
    """Picture ``index`` was encoded again; the report's ``pictures`` hold it too."""

    index: int
    picture: MeasuredPicture


@dataclass(frozen=True)
class Finished:
    """All pictures are done. Always the last event."""

    execution: Execution | None


EditEvent: TypeAlias = Edited | Queued | Started | Progress | Preview | Drawn | Measured | Finished
