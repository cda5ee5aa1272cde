"""The blocking client: each call runs one operation of the shared core.

Knows nothing of what the operations do; a test holds it against :mod:`faceteer._async_client`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, overload

import numpy as np
from PIL import Image

from faceteer._bases import Bound, EditBase, PhotoBase
from faceteer._bulk import OnError, encode_pictures, encode_texts
from faceteer._channels import Endpoint, TlsOption
from faceteer._client_features import FeatureLibrary
from faceteer._comparing import Difference, diff, transfer
from faceteer._editing import EditPlan, edit_events, edit_recipe, edit_render, edit_report
from faceteer._edits import FeatureEdit
from faceteer._events import EditEvent, Preview
from faceteer._opening import Context, open_embeds, open_picture
from faceteer._pictures import Picture
from faceteer._progress import Bar, ProgressOption
from faceteer._recipe import Recipe
from faceteer._report import EditReport
from faceteer._retries import Retries, Timeouts
from faceteer._server import ServerStatus, server_status
from faceteer._sync_driver import SyncDriver
from faceteer._values import Scheduler, Settings

if TYPE_CHECKING:
    import numpy.typing as npt


def connect(
    address: str | None = None,
    *,
    timeout: float | Timeouts | None = None,
    tls: TlsOption = False,
    retries: int | Retries | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Client:
    """A client of the Faceteer server at ``address``. It connects at its first call; close it, or use ``with``.

    Args:
        address: host:port; FACETEER_ADDRESS, then localhost:50050 when left out.
        timeout: seconds for every operation, or a :class:`Timeouts`.
        tls: True, or a :class:`Tls`.
        retries: how often to try again, or a :class:`Retries`.
        metadata: sent with every call ("authorization", say).

    Raises:
        InvalidArgumentError: the address is none, or timeout or retries are negative.
    """
    endpoint = Endpoint.of(address, tls, metadata)
    context = Context(endpoint.address, Retries.of(retries), Timeouts.of(timeout))
    return Client(SyncDriver(endpoint), context)


class Client(Bound[SyncDriver]):
    """One Faceteer server. Made by :func:`connect`; usable from several threads."""

    @property
    def address(self) -> str:
        """Where the server is."""
        return self._context.address

    @property
    def features(self) -> FeatureLibrary:
        """What each feature means."""
        return FeatureLibrary(self._driver, self._context)

    def open(self, picture: Picture, *, max_features: int = 1000, timeout: float | None = None) -> Photo:
        """Encodes a picture and names its features.

        Args:
            picture: a path, a whole file's bytes, a PIL image, or a uint8 array [height, width(, 3 or 4)].
            max_features: how many of the strongest to keep; 0 keeps all.
            timeout: seconds, retries included.

        Raises:
            OSError: the file cannot be read.
            InvalidArgumentError: no picture, or one that the server cannot read or finds too large.
        """
        operation = open_picture(self._context, picture, max_features=max_features, timeout=timeout)
        opened = self._driver.run(operation)
        return Photo(self._driver, self._context, opened)

    def open_embeds(self, embeds: npt.NDArray[Any], *, max_features: int = 1000, timeout: float | None = None) -> Photo:
        """Names the features of an embedding [d] without a picture; otherwise as :meth:`open`."""
        operation = open_embeds(self._context, embeds, max_features=max_features, timeout=timeout)
        opened = self._driver.run(operation)
        return Photo(self._driver, self._context, opened)

    def diff(
        self,
        photo: Photo,
        other: Photo,
        *,
        coverage: float = 0.9,
        max_edits: int | None = None,
        timeout: float | None = None,
    ) -> Difference:
        """What leads from ``photo`` to ``other``: the fewest edits that carry the share ``coverage`` of it."""
        return self._driver.run(
            diff(
                self._context,
                photo._opened,
                other._opened,
                coverage=coverage,
                max_edits=max_edits,
                timeout=timeout,
            )
        )

    def transfer(
        self,
        photo: Photo,
        other: Photo,
        *,
        reference: Photo | None = None,
        coverage: float = 0.9,
        max_edits: int | None = None,
        timeout: float | None = None,
    ) -> Edit:
        """An edit of ``photo`` that carries over what ``other`` has and ``reference`` (``photo`` by default) lacks."""
        plan = self._driver.run(
            transfer(
                self._context,
                photo._opened,
                other._opened,
                None if reference is None else reference._opened,
                coverage=coverage,
                max_edits=max_edits,
                timeout=timeout,
            )
        )
        return Edit(self._driver, self._context, plan)

    def encode(
        self,
        pictures: Iterable[Picture],
        *,
        batch_size: int = 32,
        progress: ProgressOption = False,
        on_error: OnError = "raise",
        timeout: float | None = None,
    ) -> npt.NDArray[np.float32]:
        """The embeddings of many pictures, float32 [n, d], in their order. Nothing but the embeddings is kept.

        Args:
            pictures: read as the server takes them, at most 2 * batch_size at a time.
            batch_size: pictures that the server should have at hand at once.
            progress: True shows a bar on a terminal's stderr; a function is called with (done, total or None).
            on_error: "raise" the first error, with ``.index``; "skip" the row; "nan"; or a function of (index, error).
            timeout: seconds for all of them; None (the default) only bounds how long an answer may take.
        """
        total = len(pictures) if isinstance(pictures, Sized) else None
        return self._driver.run(
            encode_pictures(
                self._context,
                pictures,
                batch_size=batch_size,
                bar=Bar(progress, "encoding", total),
                total=total,
                on_error=on_error,
                timeout=timeout,
            )
        )

    def encode_texts(self, texts: Sequence[str], *, timeout: float | None = None) -> npt.NDArray[np.float32]:
        """The embeddings of texts in the pictures' space, float32 [n, d]. NotInBundleError without a text tower."""
        return self._driver.run(encode_texts(self._context, texts, timeout=timeout))

    def status(self, *, timeout: float | None = None) -> ServerStatus:
        """What the server runs, its limits, and whether its services are well."""
        return self._driver.run(server_status(self._context, timeout=timeout))

    def close(self) -> None:
        """Cancels what is under way and lets the connection go."""
        self._driver.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.address}>"


class Photo(PhotoBase[SyncDriver]):
    """An opened picture. Made by :meth:`Client.open`."""

    def edit(self, edits: Recipe | Iterable[FeatureEdit] | None = None) -> Edit:
        """An edit of this photo: without any edits yet, or those of a recipe, a difference, or a list.

        Raises:
            RevisionMismatchError: the recipe was made with other models.
        """
        return Edit(self._driver, self._context, EditPlan.of(self._opened, edits))


class Edit(EditBase[SyncDriver]):
    """A photo and edits of its features. Every method that adds one returns a new edit; none changes this one."""

    def report(self, *, measure: bool = True, timeout: float | None = None) -> EditReport:
        """Applies the edit without drawing: before, requested, achieved, and the drift of the rest.

        Args:
            measure: encode the edited embedding anew, for what was achieved and the drift.
            timeout: seconds.
        """
        return self._driver.run(edit_report(self._context, self._plan, measure=measure, timeout=timeout))

    @overload
    def render(
        self,
        *,
        seed: int | None = None,
        seeds: None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        size: int | tuple[int, int] | None = None,
        scheduler: Scheduler | None = None,
        progress: ProgressOption = False,
        previews: Callable[[Preview], Any] | None = None,
        preview_every: int | None = None,
        timeout: float | None = None,
    ) -> Image.Image: ...
    @overload
    def render(
        self,
        *,
        seed: None = None,
        seeds: Iterable[int],
        steps: int | None = None,
        guidance_scale: float | None = None,
        size: int | tuple[int, int] | None = None,
        scheduler: Scheduler | None = None,
        progress: ProgressOption = False,
        previews: Callable[[Preview], Any] | None = None,
        preview_every: int | None = None,
        timeout: float | None = None,
    ) -> list[Image.Image]: ...
    def render(
        self,
        *,
        seed: int | None = None,
        seeds: Iterable[int] | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        size: int | tuple[int, int] | None = None,
        scheduler: Scheduler | None = None,
        progress: ProgressOption = False,
        previews: Callable[[Preview], Any] | None = None,
        preview_every: int | None = None,
        timeout: float | None = None,
    ) -> Image.Image | list[Image.Image]:
        """Draws the edited photo: one picture, or with ``seeds`` a list of one each.

        A picture's ``.info`` holds "seed", "revisions", "embedding_id" and "recipe" (JSON that draws it again).

        Args:
            seed: the same seed draws the same picture. Left out: the edit's own, or one that the server picks.
            seeds: several pictures in one call.
            steps: denoising steps. Left out, as all that follows: the edit's own settings, then the server's defaults.
            guidance_scale: classifier-free guidance; 1 or less draws without.
            size: pixels, or (width, height).
            scheduler: "ddpm", "ddim", "dpm_solver_pp" or "lcm".
            progress: True shows a bar on a terminal's stderr; a function is called with (done, total) steps.
            previews: called with each rough picture.
            preview_every: steps between two previews; 5 when ``previews`` is given.
            timeout: seconds, retries included.
        """
        settings = Settings.of(
            seed=seed, seeds=seeds, steps=steps, guidance_scale=guidance_scale, size=size, scheduler=scheduler
        )
        pictures = self._driver.run(
            edit_render(
                self._context,
                self._plan,
                settings if seeds is not None else self._single(settings),
                bar=Bar(progress, "drawing"),
                previews=previews,
                preview_every=preview_every,
                timeout=timeout,
            )
        )
        return pictures if seeds is not None else pictures[0]

    def events(
        self,
        *,
        seed: int | None = None,
        seeds: Iterable[int] | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        size: int | tuple[int, int] | None = None,
        scheduler: Scheduler | None = None,
        preview_every: int = 0,
        timeout: float | None = None,
    ) -> Iterator[EditEvent]:
        """Draws as :meth:`render` does and yields every event. Leaving the loop stops the drawing at the next step."""
        settings = Settings.of(
            seed=seed, seeds=seeds, steps=steps, guidance_scale=guidance_scale, size=size, scheduler=scheduler
        )
        return self._driver.iterate(
            edit_events(self._context, self._plan, settings, preview_every=preview_every, timeout=timeout)
        )

    def recipe(
        self,
        *,
        seed: int | None = None,
        seeds: Iterable[int] | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        size: int | tuple[int, int] | None = None,
        scheduler: Scheduler | None = None,
        timeout: float | None = None,
    ) -> Recipe:
        """The edit as data. The settings are those given, else those it was drawn with last, else its own."""
        settings = Settings.of(
            seed=seed, seeds=seeds, steps=steps, guidance_scale=guidance_scale, size=size, scheduler=scheduler
        )
        return self._driver.run(edit_recipe(self._context, self._plan, settings, timeout=timeout))
