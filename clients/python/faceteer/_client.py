"""The blocking client: each call runs one operation of the shared core.

Knows nothing of what the operations do; a test holds it against :mod:`faceteer._async_client`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack, overload

import numpy as np
from PIL import Image

from faceteer._bases import Bound, EditBase, PhotoBase
from faceteer._bulk import OnError, encode_pictures, encode_texts
from faceteer._channels import Endpoint, TlsOption
from faceteer._client_features import FeatureLibrary
from faceteer._comparing import Difference, diff, transfer
from faceteer._editing import EditPlan, edit_events, edit_recipe, edit_render, edit_report
from faceteer._edits import FeatureEdit
from faceteer._errors import FaceteerError
from faceteer._events import EditEvent, Preview
from faceteer._features import (
    Decodable,
    FeatureEncoding,
    OnItemError,
    decodables_of,
    decode_features,
    embeddings_of,
    encode_features,
)
from faceteer._opening import Context, embed_prompt, open_embeds, open_picture
from faceteer._pictures import Picture
from faceteer._progress import Bar, ProgressOption
from faceteer._recipe import Recipe
from faceteer._report import EditReport
from faceteer._retries import Retries, Timeouts
from faceteer._server import ServerStatus, server_status
from faceteer._sync_driver import SyncDriver
from faceteer._values import DrawingOptions, Settings

if TYPE_CHECKING:
    import numpy.typing as npt


def connect(
    address: str | None = None,
    *,
    timeout: float | Timeouts | None = None,
    tls: TlsOption = False,
    retries: int | Retries | None = None,
    metadata: Mapping[str, str] | None = None,
    access_key: str | None = None,
) -> Client:
    """A client of the Faceteer server at ``address``. It connects at its first call; close it, or use ``with``.

    Args:
        address: host:port; FACETEER_ADDRESS, then localhost:50050 when left out.
        timeout: seconds for every operation, or a :class:`Timeouts`.
        tls: True, or a :class:`Tls`.
        retries: how often to try again, or a :class:`Retries`.
        metadata: sent with every call ("authorization", say).
        access_key: for features whose safety class the operator gates; FACETEER_ACCESS_KEY when left out. Use TLS with
            it anywhere but on one machine: it travels as metadata.

    Raises:
        InvalidArgumentError: the address is none, timeout or retries are negative, or the key cannot travel.
    """
    endpoint = Endpoint.of(address, tls, metadata, access_key)
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

    def embed_prompt(
        self,
        prompt: str,
        *,
        negative_prompt: str = "",
        seed: int = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
        max_features: int = 1000,
        timeout: float | None = None,
    ) -> Photo:
        """A photo that was never taken: the embedding that the bundle's prior imagines for a text, opened.

        Args:
            prompt: what should be in it.
            negative_prompt: what to steer away from.
            seed: of the prior's noise; another seed imagines another picture.
            steps: the prior's denoising steps; 25 when left out.
            guidance_scale: the prior's; 4 when left out.
            max_features: how many of the strongest features to keep; 0 keeps all.
            timeout: seconds, retries included.

        Raises:
            InvalidArgumentError: an empty prompt, or a value out of range.
            NotInBundleError: the server's bundle has no prior.
        """
        opened = self._driver.run(
            embed_prompt(
                self._context,
                prompt,
                negative_prompt=negative_prompt,
                seed=seed,
                steps=steps,
                guidance_scale=guidance_scale,
                max_features=max_features,
                timeout=timeout,
            )
        )
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
        """What leads from ``photo`` to ``other``: the fewest edits that carry the share ``coverage`` of it.

        Features that the operator gates stand in it without a name, and an edit that turns one on is refused without
        the access key; :meth:`transfer` leaves them out.
        """
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

    @overload
    def encode_features(
        self,
        embeds: Photo | npt.NDArray[Any] | Iterable[Photo | npt.NDArray[Any]],
        *,
        max_features: int = 0,
        include_error: bool = False,
        on_error: Literal["raise"] = "raise",
        timeout: float | None = None,
    ) -> list[FeatureEncoding]: ...
    @overload
    def encode_features(
        self,
        embeds: Photo | npt.NDArray[Any] | Iterable[Photo | npt.NDArray[Any]],
        *,
        max_features: int = 0,
        include_error: bool = False,
        on_error: Literal["return"],
        timeout: float | None = None,
    ) -> list[FeatureEncoding | FaceteerError]: ...
    def encode_features(
        self,
        embeds: Photo | npt.NDArray[Any] | Iterable[Photo | npt.NDArray[Any]],
        *,
        max_features: int = 0,
        include_error: bool = False,
        on_error: OnItemError = "raise",
        timeout: float | None = None,
    ) -> Any:
        """The features of embeddings, as numbers, without names: one :class:`FeatureEncoding` each.

        Args:
            embeds: a photo, an embedding [d], embeddings [n, d], or several of these.
            max_features: only this many of the strongest; 0 for all that fire.
            include_error: also the reconstruction error, which :meth:`decode_features` adds back.
            on_error: "raise" the first item's error, with ``.index``; "return" errors in their items' places.
            timeout: seconds for all of them.
        """
        return self._driver.run(
            encode_features(
                self._context,
                embeddings_of(embeds),
                max_features=max_features,
                include_error=include_error,
                on_error=on_error,
                timeout=timeout,
            )
        )

    @overload
    def decode_features(
        self,
        features: Decodable | Iterable[Decodable],
        *,
        on_error: Literal["raise"] = "raise",
        timeout: float | None = None,
    ) -> npt.NDArray[np.float32]: ...
    @overload
    def decode_features(
        self, features: Decodable | Iterable[Decodable], *, on_error: Literal["return"], timeout: float | None = None
    ) -> list[npt.NDArray[np.float32] | FaceteerError]: ...
    def decode_features(
        self,
        features: Decodable | Iterable[Decodable],
        *,
        on_error: OnItemError = "raise",
        timeout: float | None = None,
    ) -> Any:
        """Features to embeddings, float32 [n, d]: W_dec f + b_dec, and the error where an encoding brings it.

        Args:
            features: a :class:`FeatureEncoding`, a mapping of indices to activations (RAW), or several of these.
            on_error: as for :meth:`encode_features`; with "return" the answer is a list.
            timeout: seconds for all of them.
        """
        return self._driver.run(
            decode_features(self._context, decodables_of(features), on_error=on_error, timeout=timeout)
        )

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
        progress: ProgressOption = False,
        previews: Callable[[Preview], Any] | None = None,
        preview_every: int | None = None,
        timeout: float | None = None,
        **options: Unpack[DrawingOptions],
    ) -> Image.Image: ...
    @overload
    def render(
        self,
        *,
        seed: None = None,
        seeds: Iterable[int],
        progress: ProgressOption = False,
        previews: Callable[[Preview], Any] | None = None,
        preview_every: int | None = None,
        timeout: float | None = None,
        **options: Unpack[DrawingOptions],
    ) -> list[Image.Image]: ...
    def render(
        self,
        *,
        seed: int | None = None,
        seeds: Iterable[int] | None = None,
        progress: ProgressOption = False,
        previews: Callable[[Preview], Any] | None = None,
        preview_every: int | None = None,
        timeout: float | None = None,
        **options: Unpack[DrawingOptions],
    ) -> Image.Image | list[Image.Image]:
        """Draws the edited photo: one picture, or with ``seeds`` a list of one each.

        A picture's ``.info`` holds "seed", "revisions", "embedding_id" and "recipe" (JSON that draws it again).

        Args:
            seed: the same seed draws the same picture. Left out: the edit's own, or one that the server picks.
            seeds: several pictures in one call.
            progress: True shows a bar on a terminal's stderr; a function is called with (done, total) steps.
            previews: called with each rough picture.
            preview_every: steps between two previews; 5 when ``previews`` is given.
            timeout: seconds, retries included.
            options: steps, guidance_scale, size, scheduler, keep_layout, strength: :class:`DrawingOptions`.

        Raises:
            InvalidArgumentError: an option cannot be used; keep_layout for a photo opened without a picture.
            NotInBundleError: keep_layout, and the server's decoder cannot read pictures.
        """
        settings = Settings.of(seed=seed, seeds=seeds, **options)
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
        preview_every: int = 0,
        timeout: float | None = None,
        **options: Unpack[DrawingOptions],
    ) -> Iterator[EditEvent]:
        """Draws as :meth:`render` does and yields every event. Leaving the loop stops the drawing at the next step."""
        settings = Settings.of(seed=seed, seeds=seeds, **options)
        return self._driver.iterate(
            edit_events(self._context, self._plan, settings, preview_every=preview_every, timeout=timeout)
        )

    def recipe(
        self,
        *,
        seed: int | None = None,
        seeds: Iterable[int] | None = None,
        timeout: float | None = None,
        **options: Unpack[DrawingOptions],
    ) -> Recipe:
        """The edit as data. The settings are those given, else those it was drawn with last, else its own."""
        settings = Settings.of(seed=seed, seeds=seeds, **options)
        return self._driver.run(edit_recipe(self._context, self._plan, settings, timeout=timeout))
