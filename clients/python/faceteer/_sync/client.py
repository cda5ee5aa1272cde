# Generated from faceteer/_async/client.py by clients/python/unasync.py: edit that file, then run `make client`.
"""The client of one server: opening, encoding, comparing."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from google.protobuf import wrappers_pb2

from faceteer._errors import FaceteerError, invalid, name_picture
from faceteer._models.difference import Difference, FeatureDifference, TransferPart
from faceteer._models.edits import FeatureEdit, FeatureKey, feature_ref
from faceteer._models.photo import OpenedPhoto
from faceteer._models.pictures import Picture, picture_name
from faceteer._models.plan import EditPlan, Outcome
from faceteer._models.report import EditReport
from faceteer._models.server import HEALTH, SERVICES, ServerStatus
from faceteer._models.tensors import to_tensor
from faceteer._models.values import Settings
from faceteer._sync.connection import Connection, read_picture
from faceteer._sync.editing import Edit
from faceteer._sync.encoding import Encoder
from faceteer._sync.features import FeatureLibrary
from faceteer._sync.photo import Photo
from faceteer._transport.channels import Endpoint, TlsOption
from faceteer._transport.methods import DIFF_FEATURES, EMBED_PROMPT, HEALTH_CHECK, OPEN_IMAGE, TRANSFER_FEATURES
from faceteer._transport.retries import Attempts, Retries, Timeouts
from faceteer.v1 import generator_pb2, sae_pb2, studio_pb2

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
        InvalidArgumentError: address, timeout, retries or access_key cannot be used.
    """
    endpoint = Endpoint.of(address, tls, metadata, access_key)
    return Client(Connection(endpoint, Retries.of(retries), Timeouts.of(timeout)))


class Client(Encoder):
    """One Faceteer server. Made by :func:`connect`; usable from several threads."""

    @property
    def address(self) -> str:
        """Where the server is."""
        return self._connection.address

    @property
    def features(self) -> FeatureLibrary:
        """What each feature means."""
        return FeatureLibrary(self._connection)

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
        data = read_picture(picture)
        source = studio_pb2.ImageInput(image=data)
        return self._open(source, picture_name(picture), max_features, timeout, data)

    def open_embeds(self, embeds: npt.NDArray[Any], *, max_features: int = 1000, timeout: float | None = None) -> Photo:
        """Names the features of an embedding [d] without a picture; otherwise as :meth:`open`."""
        source = studio_pb2.ImageInput(embeds=to_tensor(embeds))
        return self._open(source, "embedding", max_features, timeout)

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
        """Opens the image embedding that the bundle's prior generates for a text: a photo without a picture.

        Args:
            prompt: what should be in it.
            negative_prompt: what to steer away from.
            seed: of the prior's noise; another seed gives another embedding.
            steps: the prior's denoising steps; 25 when left out.
            guidance_scale: the prior's; 4 when left out.
            max_features: how many of the strongest features to keep; 0 keeps all.
            timeout: seconds, retries included.

        Raises:
            InvalidArgumentError: an empty prompt, or a value out of range.
            NotInBundleError: the server's bundle has no prior.
        """
        if not isinstance(prompt, str) or not prompt.strip():
            raise invalid("prompt", "is empty; say what should be in the picture")
        checked = Settings(seeds=(seed,), steps=steps, guidance_scale=guidance_scale)
        attempts = self._connection.attempts(timeout, self._connection.timeouts.render)
        request = generator_pb2.EmbedPromptRequest(
            prompt=prompt,
            negative_prompt=negative_prompt,
            seed=checked.seeds[0],
            steps=checked.steps or 0,
            guidance_scale=checked.guidance_scale,
        )
        answer = self._connection.call(EMBED_PROMPT, request, attempts)
        # The values are kept, so a server that no longer has the embedding gets them back instead of running the prior.
        source = studio_pb2.ImageInput(embeds=answer.embedding.embeds)
        words = " ".join(prompt.split())
        name = words if len(words) <= 60 else words[:59] + "…"
        photo = self._open(source, name, max_features, attempts.remaining)
        photo._opened.prompt = prompt
        return photo

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

        Features that the operator gates appear in it without a name, and an edit that turns one on is refused without
        the access key; :meth:`transfer` leaves them out.
        """
        _check_share(coverage, max_edits)
        source, target = photo._opened, other._opened
        attempts = self._connection.attempts(timeout, self._connection.timeouts.open)

        def request() -> sae_pb2.DiffFeaturesRequest:
            inputs = source.embeds_input(), target.embeds_input()
            return sae_pb2.DiffFeaturesRequest(
                source=inputs[0], target=inputs[1], coverage=coverage, max_edits=max_edits or 0
            )

        answer = self._connection.call_with_photos(DIFF_FEATURES, request, [source, target], attempts)
        labels = {feature.index: feature.label for each in (source, target) for feature in each.features}
        unknown = [edit.feature.index for edit in answer.edits if edit.feature.index not in labels]
        labels |= self.features._labels(unknown, attempts)
        edits = tuple(FeatureEdit.from_proto(edit, labels.get(edit.feature.index, "")) for edit in answer.edits)
        features = tuple(
            FeatureDifference(
                index=int(edit.feature),
                label=edit.label,
                source=source.features.activation(int(edit.feature)),
                target=target.features.activation(int(edit.feature)),
                change=edit.value,
            )
            for edit in edits
        )
        return Difference(features, edits, answer.coverage, answer.differing_features, answer.unexplained)

    def transfer(
        self,
        photo: Photo,
        other: Photo,
        *,
        reference: Photo | None = None,
        coverage: float = 0.98,
        max_edits: int | None = None,
        only: Iterable[FeatureKey] = (),
        without: Iterable[FeatureKey] = (),
        timeout: float | None = None,
    ) -> Edit:
        """An edit of ``photo`` that carries over what ``other`` has and ``reference`` (``photo`` by default) lacks.

        What the difference turns on among rivals ("night" for "day") is switched to, so that the photo's own value
        gives way. The edit's ``parts`` say what makes up the difference.

        Args:
            photo: the picture to change.
            other: the picture to take from.
            reference: what ``other`` is compared with.
            coverage: the share of the difference to carry.
            max_edits: most edits; the server's limit when left out.
            only: carry only these parts, by label or index.
            without: leave these parts out.
            timeout: seconds.

        Raises:
            InvalidArgumentError: a part that is none; the message lists those there are.
        """
        kept, left_out = [[feature_ref(one) for one in _several(given)] for given in (only, without)]
        _check_share(coverage, max_edits)
        target, source = photo._opened, other._opened
        attempts = self._connection.attempts(timeout, self._connection.timeouts.open)
        photos = [target, source] if reference is None else [target, source, reference._opened]

        def request() -> studio_pb2.TransferFeaturesRequest:
            return studio_pb2.TransferFeaturesRequest(
                target=target.image_input(),
                source=source.image_input(),
                reference=None if reference is None else reference._opened.image_input(),
                coverage=coverage,
                max_edits=max_edits or 0,
                only=kept,
                without=left_out,
            )

        answer = self._connection.call_with_photos(TRANSFER_FEATURES, request, photos, attempts)
        report = EditReport.from_proto(answer.report, answer.edits, answer.revisions, answer.embedding, None)
        plan = EditPlan.of(target, report.edits)
        parts = tuple(map(TransferPart.from_proto, answer.parts))
        made = replace(plan, coverage=answer.coverage, parts=parts, outcome=Outcome(report))
        return Edit(self._connection, made)

    def status(self, *, timeout: float | None = None) -> ServerStatus:
        """What the server runs, its limits, and whether its services are well.

        A service that is down is listed in ``.down`` with the reason, and ``.works`` says what can be done without it.
        """
        attempts = self._connection.attempts(timeout, self._connection.timeouts.query)
        answer = self._connection.facts(attempts)
        health = {service: self._health(service, attempts) for service in SERVICES}
        started = time.monotonic()
        self._health("studio", attempts)
        round_trip = time.monotonic() - started
        return ServerStatus.from_proto(answer, address=self.address, health=health, round_trip=round_trip)

    def close(self) -> None:
        """Cancels running calls and closes the connection."""
        self._connection.transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.address}>"

    def _open(
        self,
        source: studio_pb2.ImageInput,
        name: str,
        max_features: int,
        timeout: float | None,
        data: bytes | None = None,
    ) -> Photo:
        if max_features < 0:
            raise invalid("max_features", f"{max_features} is negative; 0 keeps all that fire")
        attempts = self._connection.attempts(timeout, self._connection.timeouts.open)
        request = studio_pb2.OpenImageRequest(input=source, max_features=max_features)
        try:
            answer = self._connection.call(OPEN_IMAGE, request, attempts)
        except FaceteerError as error:
            name_picture(error, name)
            raise
        return Photo(self._connection, OpenedPhoto.from_proto(answer, name=name, data=data))

    def _health(self, service: str, attempts: Attempts) -> str:
        """One service's health, without retries: a failure is an answer too."""
        request = wrappers_pb2.StringValue(value=f"faceteer.v1.{service.capitalize()}Service")
        try:
            answer = self._connection.transport.unary(HEALTH_CHECK, request, attempts.remaining)
        except FaceteerError as error:
            if error.status in ("NOT_FOUND", "UNIMPLEMENTED"):
                return "unknown"
            raise
        return HEALTH.get(answer.value, "unknown")


def _several(features: Iterable[FeatureKey]) -> Iterable[FeatureKey]:
    """One label is a label, not a list of letters."""
    return (features,) if isinstance(features, str) else features


def _check_share(coverage: float, max_edits: int | None) -> None:
    if not 0 < coverage <= 1:
        raise invalid("coverage", f"{coverage!r} is not a share above 0 and up to 1")
    if max_edits is not None and max_edits < 1:
        raise invalid("max_edits", f"{max_edits!r} is not positive; leave it out for the server's limit")
