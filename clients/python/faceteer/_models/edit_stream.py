"""What one edit's stream has delivered, over all its attempts: what to ask for next, and which events are new."""

from __future__ import annotations

from dataclasses import replace

from faceteer._errors import InternalError, invalid
from faceteer._models.events import Drawn, Edited, EditEvent, Finished, Measured, Preview, Progress, Queued, Started
from faceteer._models.picture_recipe import RenderedPicture
from faceteer._models.pictures import decode_picture, small
from faceteer._models.plan import EditPlan
from faceteer._models.report import EditReport, MeasuredPicture
from faceteer._models.values import Execution, Settings
from faceteer.v1 import generator_pb2, studio_pb2

_PICTURES_KEPT = 4


class EditStream:
    """One edit being applied, and drawn unless only its report is wanted.

    Raises:
        InvalidArgumentError: ``preview_every`` or the settings' layout cannot be used.
    """

    def __init__(
        self,
        plan: EditPlan,
        settings: Settings,
        *,
        report_only: bool = False,
        measure: bool,
        preview_every: int = 0,
        measure_pictures: bool = False,
    ) -> None:
        if preview_every < 0:
            raise invalid("preview_every", f"{preview_every} is negative; 0 sends no previews")
        self._plan = plan
        self._settings = settings
        self._layout = None if report_only else plan.layout(settings)
        self._report_only = report_only
        self._measure = measure
        self._measure_pictures = measure_pictures
        self._preview_every = preview_every
        self._report: EditReport | None = None
        self._started: Settings | None = None
        self._drawn: set[int] = set()
        self._finished = False
        # Positions, in the whole order, of the seeds that the current try asked for.
        self._positions: list[int] = []

    @property
    def complete(self) -> bool:
        """Whether all that was asked for is there."""
        if self._report_only:
            return self._report is not None
        return self._finished or (self._started is not None and len(self._drawn) == len(self._started.seeds) > 0)

    def request(self) -> studio_pb2.EditImageRequest:
        """The next try's request: only the pictures that are still missing, with the seeds the server picked."""
        settings = self._started or self._settings
        self._positions = [position for position in range(len(settings.seeds)) if position not in self._drawn]
        wanted = replace(settings, seeds=tuple(settings.seeds[position] for position in self._positions))
        return studio_pb2.EditImageRequest(
            input=self._plan.photo.image_input(),
            edits=[edit.to_proto() for edit in self._plan.edits],
            settings=wanted.to_proto(),
            expected_revisions=self._plan.expected.to_proto(),
            report_only=self._report_only,
            skip_measuring=not self._measure or self._report is not None,
            preview_every=self._preview_every,
            keep_layout=self._layout,
            measure_picture=self._measure_pictures,
        )

    def take(self, message: studio_pb2.EditImageResponse) -> EditEvent | None:
        """One message's event, or None if an earlier try reported it. Decodes pictures."""
        kind = message.WhichOneof("event")
        if kind == "edited":
            return self._edited(message.edited)
        if self._report is None:
            raise InternalError(f"the server sent {kind} before edited")
        match kind:
            case "queued":
                return Queued(message.queued.position)
            case "started":
                return self._start(message.started)
            case "progress":
                progress = message.progress
                return Progress(self._position(progress.index), progress.step, progress.steps)
            case "preview":
                preview = message.preview
                return Preview(self._position(preview.index), preview.step, decode_picture(preview.data))
            case "image":
                return self._draw(message.image, self._report)
            case "measured":
                return self._measured(message.measured)
            case "finished":
                self._finished = True
                return Finished(Execution.from_proto(message.finished.execution))
        return None

    def _edited(self, edited: studio_pb2.Edited) -> Edited | None:
        if self._report is not None:
            return None
        known, new = self._plan.outcome.report, EditReport.from_edited(edited)
        self._report = replace(known, pictures=()) if known is not None and known.measured and not new.measured else new
        self._plan.outcome.report = self._report
        return Edited(self._report)

    def _start(self, started: generator_pb2.Started) -> Started | None:
        if self._started is not None:
            return None
        self._started = replace(
            Settings.from_proto(started.settings),
            seeds=tuple(started.seeds),
            keep_layout=self._settings.keep_layout,
            strength=self._settings.strength,
        )
        self._positions = list(range(len(self._started.seeds)))
        self._plan.outcome.pictures = ()
        self._plan.outcome.drawn_with = self._started
        return Started(self._started)

    def _draw(self, drawn: generator_pb2.Image, report: EditReport) -> Drawn:
        index, settings = self._position(drawn.index), self._started or self._settings
        decoded = decode_picture(
            drawn.data,
            seed=drawn.seed,
            revisions=dict(vars(report.revisions)),
            recipe=self._plan.recipe(report, replace(settings, seeds=(drawn.seed,))).to_json(),
            embedding_id=report.embedding_id,
        )
        image = RenderedPicture.of(decoded)
        if len(self._plan.outcome.pictures) < _PICTURES_KEPT:
            self._plan.outcome.pictures += ((drawn.seed, small(image)),)
        self._drawn.add(index)
        return Drawn(index, drawn.seed, drawn.cached, image)

    def _measured(self, measured: studio_pb2.MeasuredPicture) -> Measured:
        picture = MeasuredPicture.from_proto(measured)
        assert self._report is not None  # take() has looked
        self._report = replace(self._report, pictures=(*self._report.pictures, picture))
        self._plan.outcome.report = self._report
        return Measured(self._position(measured.index), picture)

    def _position(self, index: int) -> int:
        """A try's index into the seeds it asked for, as the position in the whole order."""
        return self._positions[index] if index < len(self._positions) else index
