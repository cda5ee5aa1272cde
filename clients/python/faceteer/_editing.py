"""Edits as operations: report, events, pictures, recipes.

Knows nothing of how calls are made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from PIL import Image

from faceteer._edits import FeatureEdit, chained
from faceteer._effects import END, Close, Emit, OpenStream, Operation, Receive, Tell, Work
from faceteer._errors import (
    EmbeddingExpiredError,
    FaceteerError,
    InternalError,
    InvalidArgumentError,
    NoiseExpiredError,
)
from faceteer._events import Drawn, Edited, EditEvent, Finished, Preview, Progress, Queued, Started
from faceteer._layout import kept_layout, photo_digest
from faceteer._methods import EDIT_IMAGE
from faceteer._opening import Context, OpenedPhoto, reopen
from faceteer._pictures import decode_picture, small
from faceteer._progress import Bar
from faceteer._recipe import Recipe
from faceteer._report import EditReport
from faceteer._retries import Attempts
from faceteer._values import Execution, Revisions, Settings
from faceteer.v1 import studio_pb2

T = TypeVar("T")
_PICTURES_KEPT = 4


@dataclass
class Outcome:
    """What the server has said about an edit so far, kept so that it is asked once."""

    report: EditReport | None = None
    drawn_with: Settings | None = None
    #: (seed, small picture) of the last drawing, for a notebook; full-size pictures are their owner's to keep.
    pictures: tuple[tuple[int, Image.Image], ...] = ()


@dataclass(frozen=True)
class EditPlan:
    """A photo, edits, and how to draw. Never changes but for ``outcome``, the memory of what came of it.

    Attributes:
        expected: the models that the photo was opened with, or a recipe made for; the server refuses to run on others,
            where the same index is another feature.
        coverage: the share of a difference that the edits carry, for those made by transfer; None otherwise.
        recipe_photo: SHA-256 of the picture that a recipe was made from, where it keeps a layout; empty otherwise.
    """

    photo: OpenedPhoto
    edits: tuple[FeatureEdit, ...] = ()
    settings: Settings = field(default_factory=Settings)
    expected: Revisions = field(default_factory=Revisions)
    coverage: float | None = None
    recipe_photo: str = ""
    outcome: Outcome = field(default_factory=Outcome, compare=False)

    def changed(self, **changes: Any) -> EditPlan:
        """A new plan with these changes and no outcome yet."""
        return replace(self, outcome=Outcome(), **changes)

    @classmethod
    def of(cls, photo: OpenedPhoto, edits: Recipe | Any | None) -> EditPlan:
        """A plan from nothing, a recipe, or any iterable of FeatureEdit."""
        opened_with = Revisions(encoder=photo.revisions.encoder, sae=photo.revisions.sae)
        if edits is None:
            return cls(photo, expected=opened_with)
        if isinstance(edits, Recipe):
            edits.check(photo.revisions)
            made_for = replace(opened_with, **{part: name for part, name in vars(edits.revisions).items() if name})
            return cls(photo, edits.edits, edits.settings, made_for, recipe_photo=edits.photo)
        try:
            given = tuple(edits)
        except TypeError:
            given = (edits,)
        for edit in given:
            if not isinstance(edit, FeatureEdit):
                raise InvalidArgumentError(
                    f"edits: {edit!r} is neither a Recipe nor FeatureEdits",
                    field="edits",
                    description="pass a Recipe, FeatureEdits, or nothing",
                )
        return cls(photo, chained((), given), expected=opened_with)


def edit_report(context: Context, plan: EditPlan, *, measure: bool, timeout: float | None) -> Operation[EditReport]:
    """Applies the edit without drawing."""
    known = plan.outcome.report
    if known is not None and (known.measured or not measure):
        return known
    attempts = context.attempts(timeout, context.timeouts.open)
    yield from _intercept(_events(plan, Settings(), attempts, report_only=True, measure=measure), _nothing)
    report = plan.outcome.report
    assert report is not None  # _events raises unless Edited came
    return report


def edit_recipe(context: Context, plan: EditPlan, settings: Settings, *, timeout: float | None) -> Operation[Recipe]:
    """The edit as data: labels resolved by the server, settings as drawn last unless given."""
    report = yield from edit_report(context, plan, measure=False, timeout=timeout)
    drawn_with = plan.settings.overlaid(plan.outcome.drawn_with or Settings()).overlaid(settings)
    return _recipe(report, drawn_with, plan.photo)


def edit_events(
    context: Context, plan: EditPlan, settings: Settings, *, preview_every: int, timeout: float | None
) -> Operation[None]:
    """Applies the edit and draws it; emits each event."""
    attempts = context.attempts(timeout, context.timeouts.render)
    known = plan.outcome.report
    measure = known is None or not known.measured
    drawn_with = plan.settings.overlaid(settings)
    yield from _events(plan, drawn_with, attempts, measure=measure, preview_every=preview_every)


def edit_render(
    context: Context,
    plan: EditPlan,
    settings: Settings,
    *,
    bar: Bar,
    previews: Callable[[Preview], Any] | None,
    preview_every: int | None,
    timeout: float | None,
) -> Operation[list[Image.Image]]:
    """Applies the edit, draws it, and returns the pictures in the order of their seeds."""
    pictures: dict[int, Image.Image] = {}
    steps_done: dict[int, int] = {}

    def handle(event: EditEvent) -> Operation[None]:
        match event:
            case Queued(position):
                yield from bar.say(f"waiting, {position} ahead" if position else "waiting")
            case Started(drawn_with):
                yield from bar.say("drawing")
            case Progress(index, step, steps):
                steps_done[index] = step
                drawn_with = plan.outcome.drawn_with or Settings()
                yield from bar.update(sum(steps_done.values()), steps * max(1, len(drawn_with.seeds)))
            case Preview() if previews is not None:
                yield Tell(previews, (event,))
            case Drawn(index, _, _, image):
                pictures[index] = image

    every = preview_every if preview_every is not None else (5 if previews is not None else 0)
    with bar:
        yield from _intercept(edit_events(context, plan, settings, preview_every=every, timeout=timeout), handle)
    return [pictures[index] for index in sorted(pictures)]


def _recipe(report: EditReport, settings: Settings, photo: OpenedPhoto) -> Recipe:
    digest = photo_digest(photo) if settings.keep_layout in ("inversion", "image_to_image") else ""
    return Recipe(report.edits, replace(report.revisions, library=""), settings, digest)


def _nothing(event: EditEvent) -> Operation[None]:
    yield from ()


def _events(
    plan: EditPlan,
    settings: Settings,
    attempts: Attempts,
    *,
    report_only: bool = False,
    measure: bool = True,
    preview_every: int = 0,
) -> Operation[None]:
    """One edit's stream with retries: what was reported or drawn already is neither asked for nor told again."""
    if preview_every < 0:
        raise InvalidArgumentError(
            f"preview_every: {preview_every} is negative", field="preview_every", description="0 sends no previews"
        )
    layout = None if report_only else kept_layout(settings, plan.photo, plan.recipe_photo)
    state = _Stream(plan, settings, layout, report_only, measure, preview_every)
    stream, noise_lost = None, False
    while True:
        try:
            stream = yield OpenStream(EDIT_IMAGE, state.request(), attempts.remaining)
            while (message := (yield Receive(stream))) is not END:
                drawn_before = len(state.drawn)
                yield from state.event(message)
                if len(state.drawn) > drawn_before:
                    attempts.progress()
            if not state.complete:
                raise InternalError("the server ended the stream before the edit was done")
            return
        except EmbeddingExpiredError as error:
            yield Close(stream)
            yield from reopen([plan.photo], attempts, error)
        except NoiseExpiredError:
            # The cache let the noise go between the inversion and the drawing; the same call inverts again.
            yield Close(stream)
            if noise_lost:
                raise
            noise_lost = True
        except FaceteerError as error:
            yield Close(stream)
            if state.complete:  # all is there, only the farewell was lost
                yield Emit(Finished(None))
                return
            yield from attempts.after(error)


class _Stream:
    """What has come of one edit's stream, over all its tries."""

    def __init__(
        self,
        plan: EditPlan,
        settings: Settings,
        layout: studio_pb2.KeepLayout | None,
        report_only: bool,
        measure: bool,
        preview_every: int,
    ) -> None:
        self.plan = plan
        self.settings = settings
        self.layout = layout
        self.report_only = report_only
        self.measure = measure
        self.preview_every = preview_every
        self.report: EditReport | None = None
        self.started: Settings | None = None
        self.drawn: set[int] = set()
        self.finished = False
        # Positions, in the whole order, of the seeds that the current try asked for.
        self._positions: list[int] = []

    @property
    def complete(self) -> bool:
        if self.report_only:
            return self.report is not None
        return self.finished or (self.started is not None and len(self.drawn) == len(self.started.seeds) > 0)

    def request(self) -> studio_pb2.EditImageRequest:
        """The next try's request: only the pictures that are still missing, with the seeds the server picked."""
        settings = self.started or self.settings
        self._positions = [position for position in range(len(settings.seeds)) if position not in self.drawn]
        wanted = replace(settings, seeds=tuple(settings.seeds[position] for position in self._positions))
        return studio_pb2.EditImageRequest(
            input=self.plan.photo.image_input(),
            edits=[edit.to_proto() for edit in self.plan.edits],
            settings=wanted.to_proto(),
            expected_revisions=self.plan.expected.to_proto(),
            report_only=self.report_only,
            skip_measuring=not self.measure or self.report is not None,
            preview_every=self.preview_every,
            keep_layout=self.layout,
        )

    def event(self, message: studio_pb2.EditImageResponse) -> Operation[None]:
        """Takes one message in and emits what is new."""
        kind = message.WhichOneof("event")
        if kind != "edited" and self.report is None:
            raise InternalError(f"the server sent {kind} before edited")
        if kind == "edited":
            if self.report is None:
                known, new = self.plan.outcome.report, EditReport.from_edited(message.edited)
                self.report = known if known is not None and known.measured and not new.measured else new
                self.plan.outcome.report = self.report
                yield Emit(Edited(self.report))
        elif kind == "queued":
            yield Emit(Queued(message.queued.position))
        elif kind == "started":
            if self.started is None:
                drawn_with = Settings.from_proto(message.started.settings)
                self.started = replace(
                    drawn_with,
                    seeds=tuple(message.started.seeds),
                    keep_layout=self.settings.keep_layout,
                    strength=self.settings.strength,
                )
                self.plan.outcome.pictures = ()
                self._positions = list(range(len(self.started.seeds)))
                self.plan.outcome.drawn_with = self.started
                yield Emit(Started(self.started))
        elif kind == "progress":
            progress = message.progress
            yield Emit(Progress(self._position(progress.index), progress.step, progress.steps))
        elif kind == "preview":
            preview = message.preview
            image = yield Work(partial(decode_picture, preview.data))
            yield Emit(Preview(self._position(preview.index), preview.step, image))
        elif kind == "image":
            yield from self._image(message)
        elif kind == "finished":
            self.finished = True
            yield Emit(Finished(Execution.from_proto(message.finished.execution)))

    def _image(self, message: studio_pb2.EditImageResponse) -> Operation[None]:
        drawn = message.image
        report, started = self.report, self.started or self.settings
        assert report is not None
        index = self._position(drawn.index)
        recipe = _recipe(report, replace(started, seeds=(drawn.seed,)), self.plan.photo)
        image = yield Work(
            partial(
                decode_picture,
                drawn.data,
                seed=drawn.seed,
                revisions=dict(vars(report.revisions)),
                recipe=recipe.to_json(),
                embedding_id=report.embedding_id,
            )
        )
        if len(self.plan.outcome.pictures) < _PICTURES_KEPT:
            kept = yield Work(partial(small, image))
            self.plan.outcome.pictures += ((drawn.seed, kept),)
        self.drawn.add(index)
        yield Emit(Drawn(index, drawn.seed, drawn.cached, image))

    def _position(self, index: int) -> int:
        """A try's index into the seeds it asked for, as the position in the whole order."""
        return self._positions[index] if index < len(self._positions) else index


def _intercept(operation: Operation[T], handle: Callable[[Any], Operation[None]]) -> Operation[T]:
    """Runs ``operation`` with what it emits handed to ``handle``; all its other effects pass through.

    An error in ``handle`` (a callback's, say) is the caller's and is not shown to ``operation``.
    """
    try:
        effect = next(operation)
        while True:
            if isinstance(effect, Emit):
                yield from handle(effect.value)
                effect = operation.send(None)
                continue
            try:
                result = yield effect
            except GeneratorExit:
                raise
            except BaseException as error:
                effect = operation.throw(error)
            else:
                effect = operation.send(result)
    except StopIteration as stop:
        value: T = stop.value
        return value
    finally:
        operation.close()
