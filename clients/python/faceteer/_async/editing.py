"""Edits of a photo: report, pictures, events, recipes."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any, Self, Unpack, overload

from PIL import Image

from faceteer._async.connection import AsyncConnection
from faceteer._errors import EmbeddingExpiredError, FaceteerError, InternalError, NoiseExpiredError
from faceteer._files import write_atomically
from faceteer._models.difference import TransferPart
from faceteer._models.edit_stream import EditStream
from faceteer._models.edits import FeatureEdit, FeatureKey, Unit, chained, without
from faceteer._models.events import Drawn, EditEvent, Finished, Preview, Progress, Queued, Started
from faceteer._models.plan import EditPlan
from faceteer._models.recipe import Recipe
from faceteer._models.report import EditReport
from faceteer._models.values import DrawingOptions, Settings
from faceteer._transport.aio import fetch_for_view, sleep, tell, work
from faceteer._transport.methods import EDIT_IMAGE
from faceteer._transport.retries import Attempts
from faceteer._views.html import NOTEBOOK_SECONDS
from faceteer._views.photos import edit_view
from faceteer._views.progress import Bar, ProgressOption


class AsyncEdit:
    """A photo and edits of its features. Every method that adds one returns a new edit; none changes this one.

    Edits commute: each refers to the activations of the unedited photo. A feature is named by label or index.
    """

    def __init__(self, connection: AsyncConnection, plan: EditPlan) -> None:
        self._connection = connection
        self._plan = plan

    @property
    def edits(self) -> tuple[FeatureEdit, ...]:
        """The edits so far."""
        return self._plan.edits

    @property
    def settings(self) -> Settings:
        """How it will be drawn, unless render says otherwise."""
        return self._plan.settings

    @property
    def coverage(self) -> float | None:
        """For an edit made by transfer: the share of the difference that it carries. None otherwise."""
        return self._plan.coverage

    @property
    def parts(self) -> tuple[TransferPart, ...]:
        """For an edit made by transfer: the parts of the difference, taken or not, largest first. Empty otherwise."""
        return self._plan.parts

    def set(self, feature: FeatureKey, value: float = 1.0, *, unit: Unit = "scaled") -> Self:
        """The activation becomes ``value``; "scaled": 1.0 is the feature's 99th percentile where it fires."""
        return self._plus(FeatureEdit(feature, "set", value, unit))

    def add(self, feature: FeatureKey, value: float, *, unit: Unit = "scaled") -> Self:
        """The activation rises by ``value`` (or falls, when negative)."""
        return self._plus(FeatureEdit(feature, "add", value, unit))

    def scale(self, feature: FeatureKey, factor: float) -> Self:
        """The activation is multiplied by ``factor``."""
        return self._plus(FeatureEdit(feature, "scale", factor))

    def ablate(self, feature: FeatureKey) -> Self:
        """The activation becomes 0."""
        return self._plus(FeatureEdit(feature, "ablate"))

    def switch(self, feature: FeatureKey, value: float = 1.0, *, unit: Unit = "scaled") -> Self:
        """The activation becomes ``value``, and the feature's rivals (which rarely or never fire with it) become 0."""
        return self._plus(FeatureEdit(feature, "switch", value, unit))

    def extend(self, edits: Iterable[FeatureEdit]) -> Self:
        """All of these edits too."""
        return self._plus(*edits)

    def without(self, feature: FeatureKey) -> Self:
        """The same without the edit of this feature."""
        return self._changed(edits=without(self._plan.edits, feature))

    def using(
        self, *, seed: int | None = None, seeds: Iterable[int] | None = None, **options: Unpack[DrawingOptions]
    ) -> Self:
        """The same, drawn with these settings unless render says otherwise."""
        given = Settings.of(seed=seed, seeds=seeds, **options)
        return self._changed(settings=self._plan.settings.overlaid(given))

    async def report(self, *, measure: bool = True, timeout: float | None = None) -> EditReport:
        """Applies the edit without drawing: before, requested, achieved, and the drift of the other features.

        Args:
            measure: encode the edited embedding again, to measure what was achieved and the drift.
            timeout: seconds.
        """
        known = self._plan.outcome.report
        if known is not None and (known.measured or not measure):
            return known
        attempts = self._connection.attempts(timeout, self._connection.timeouts.open)
        async with aclosing(
            self._events(EditStream(self._plan, Settings(), report_only=True, measure=measure), attempts)
        ) as events:
            async for _ in events:
                pass
        report = self._plan.outcome.report
        assert report is not None  # _events raises unless Edited came
        return report

    @overload
    async def render(
        self,
        *,
        seed: int | None = None,
        seeds: None = None,
        progress: ProgressOption = False,
        previews: Callable[[Preview], Any] | None = None,
        preview_every: int | None = None,
        measure: bool = False,
        timeout: float | None = None,
        **options: Unpack[DrawingOptions],
    ) -> Image.Image: ...
    @overload
    async def render(
        self,
        *,
        seed: None = None,
        seeds: Iterable[int],
        progress: ProgressOption = False,
        previews: Callable[[Preview], Any] | None = None,
        preview_every: int | None = None,
        measure: bool = False,
        timeout: float | None = None,
        **options: Unpack[DrawingOptions],
    ) -> list[Image.Image]: ...
    async def render(
        self,
        *,
        seed: int | None = None,
        seeds: Iterable[int] | None = None,
        progress: ProgressOption = False,
        previews: Callable[[Preview], Any] | None = None,
        preview_every: int | None = None,
        measure: bool = False,
        timeout: float | None = None,
        **options: Unpack[DrawingOptions],
    ) -> Image.Image | list[Image.Image]:
        """Draws the edited photo: one picture, or with ``seeds`` a list of one each.

        A picture's ``.info`` holds "seed", "revisions", "embedding_id" and "recipe" (JSON that draws it again).

        Args:
            seed: the same seed draws the same picture. Left out: the edit's own, or one that the server picks.
            seeds: several pictures in one call.
            progress: True shows a bar in a notebook or on a terminal; a function is called with (done, total) steps.
            previews: called with each rough picture, and awaited when it is a coroutine function; so are all callbacks.
            preview_every: steps between two previews; 5 when ``previews`` is given.
            measure: encode each finished picture again; ``report()`` then says what it shows of each edit, beside what
                the edited embedding holds.
            timeout: seconds, retries included.
            options: steps, guidance_scale, size, scheduler, keep_layout, strength: :class:`DrawingOptions`.

        Raises:
            InvalidArgumentError: an option cannot be used; keep_layout for a photo opened without a picture.
            NotInBundleError: keep_layout, and the server's decoder cannot read pictures.
        """
        settings = Settings.of(seed=seed, seeds=seeds, **options)
        if seeds is None and not settings.seeds and self._plan.settings.seeds:
            # One picture, so of the edit's own seeds only the first.
            settings = settings.overlaid(Settings(seeds=self._plan.settings.seeds[:1]))
        every = preview_every if preview_every is not None else (5 if previews is not None else 0)
        pictures: dict[int, Image.Image] = {}
        steps_done: dict[int, int] = {}
        n = 1
        with Bar(progress, "drawing") as bar:
            async with aclosing(self._drawing(settings, every, timeout, measure)) as events:
                async for event in events:
                    match event:
                        case Queued(position):
                            bar.say(f"waiting, {position} ahead" if position else "waiting")
                        case Started(drawn_with):
                            n = max(1, len(drawn_with.seeds))
                            bar.say("drawing")
                        case Progress(index, step, steps):
                            steps_done[index] = step
                            done, total = sum(steps_done.values()), steps * n
                            bar.update(done, total)
                            if bar.callback is not None:
                                await tell(bar.callback, done, total)
                        case Preview() if previews is not None:
                            await tell(previews, event)
                        case Drawn(index, _, _, image):
                            pictures[index] = image
        found = [pictures[index] for index in sorted(pictures)]
        return found if seeds is not None else found[0]

    def events(
        self,
        *,
        seed: int | None = None,
        seeds: Iterable[int] | None = None,
        preview_every: int = 0,
        measure: bool = False,
        timeout: float | None = None,
        **options: Unpack[DrawingOptions],
    ) -> AsyncIterator[EditEvent]:
        """Draws as :meth:`render` does and yields every event. Leaving the loop stops the drawing at the next step."""
        return self._drawing(Settings.of(seed=seed, seeds=seeds, **options), preview_every, timeout, measure)

    async def recipe(
        self,
        *,
        seed: int | None = None,
        seeds: Iterable[int] | None = None,
        timeout: float | None = None,
        **options: Unpack[DrawingOptions],
    ) -> Recipe:
        """The edit as data. The settings are those given, else those it was drawn with last, else its own."""
        given = Settings.of(seed=seed, seeds=seeds, **options)
        report = await self.report(measure=False, timeout=timeout)
        drawn_with = self._plan.outcome.drawn_with or Settings()
        return self._plan.recipe(report, self._plan.settings.overlaid(drawn_with).overlaid(given))

    def save_html(self, path: str | os.PathLike[str]) -> Path:
        """Writes the edit as a page of its own, with what was drawn and reported of it so far, and returns the path."""
        return write_atomically(path, edit_view(self._plan, page=True).encode())

    def __str__(self) -> str:
        return "; ".join(map(str, self.edits)) or "no edits"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._plan.photo.name}: {self}>"

    def _repr_html_(self) -> str:
        trouble: list[str] = []
        fetch_for_view(lambda: self._report_for_view(trouble))
        return edit_view(self._plan, trouble)

    async def _report_for_view(self, trouble: list[str]) -> None:
        """Asks for the report that a view lacks; what the server says against the edit is part of the view."""
        try:
            await self.report(measure=False, timeout=NOTEBOOK_SECONDS)
        except FaceteerError as error:
            trouble.append(str(error))

    def _plus(self, *edits: FeatureEdit) -> Self:
        return self._changed(edits=chained(self._plan.edits, edits))

    def _changed(self, **changes: Any) -> Self:
        return type(self)(self._connection, self._plan.changed(**changes))

    async def _drawing(
        self, settings: Settings, preview_every: int, timeout: float | None, measure_pictures: bool = False
    ) -> AsyncGenerator[EditEvent, None]:
        """Applies the edit and draws it."""
        attempts = self._connection.attempts(timeout, self._connection.timeouts.render)
        known = self._plan.outcome.report
        measure = known is None or not known.measured
        drawn_with = self._plan.settings.overlaid(settings)
        stream = EditStream(
            self._plan, drawn_with, measure=measure, preview_every=preview_every, measure_pictures=measure_pictures
        )
        async with aclosing(self._events(stream, attempts)) as events:
            async for event in events:
                yield event

    async def _events(self, edit: EditStream, attempts: Attempts) -> AsyncGenerator[EditEvent, None]:
        """One edit's stream with retries: nothing is requested or reported twice."""
        noise_lost = False
        while True:
            try:
                with self._connection.transport.stream(EDIT_IMAGE, edit.request(), attempts.remaining) as stream:
                    while (message := await stream.receive()) is not None:
                        decodes = message.WhichOneof("event") in ("preview", "image")
                        event = await work(partial(edit.take, message)) if decodes else edit.take(message)
                        if isinstance(event, Drawn):
                            attempts.progress()
                        if event is not None:
                            yield event
                if not edit.complete:
                    raise InternalError("the server ended the stream before the edit was done")
                return
            except EmbeddingExpiredError as error:
                await self._connection.reopen([self._plan.photo], attempts, error)
            except NoiseExpiredError:
                # The cache dropped the noise between the inversion and the drawing; the same call inverts again.
                if noise_lost:
                    raise
                noise_lost = True
            except FaceteerError as error:
                if edit.complete:  # every picture arrived; only Finished was lost
                    yield Finished(None)
                    return
                await sleep(attempts.pause(error))
