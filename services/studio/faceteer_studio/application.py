"""StudioService's jobs: opening a picture, editing it, carrying features from one to another.

Walks each job through the ports of its :class:`Call`. The messages of the contract are this module's own terms, since
all it does is pass messages from one service to the next.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine, Sequence
from typing import Any, NamedTuple, TypeVar

from faceteer.v1 import (
    edits_pb2,
    encoder_pb2,
    execution_pb2,
    generator_pb2,
    library_pb2,
    sae_pb2,
    studio_pb2,
    tensor_pb2,
)
from faceteer_runtime.cache import Cache
from faceteer_runtime.cache_keys import embeds_content_id, embeds_key
from faceteer_runtime.embeddings import from_record, to_record
from faceteer_runtime.errors import EmbeddingExpired, FaceteerError, InvalidField, UnknownFeature
from faceteer_runtime.tensors import to_array, to_tensor

from faceteer_studio.layout import Layout
from faceteer_studio.names import by_index, features_of, label_warnings
from faceteer_studio.ports import Call
from faceteer_studio.upstream_errors import at_our_field, from_item
from faceteer_studio.upstreams import Upstreams

T = TypeVar("T")


class Source(NamedTuple):
    """A job's picture as an embedding.

    Attributes:
        embedding: id and values, shape [d].
        execution: of the encoder; empty unless a picture was given.
    """

    embedding: tensor_pb2.Embedding
    execution: execution_pb2.Execution

    @property
    def input(self) -> tensor_pb2.EmbedsInput:
        """For a child call: always inline, so that no child depends on a cache that it may not share."""
        return tensor_pb2.EmbedsInput(embeds=self.embedding.embeds)


class Studio:
    """The jobs, and what they share: the cache, and what the other services said of themselves."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self.upstreams = Upstreams()

    # -- what runs -------------------------------------------------------------------------------

    async def describe(self, call: Call) -> studio_pb2.GetStudioResponse:
        """GetStudio's answer, as this caller may see it."""
        answer = await self.upstreams.describe(call)
        if call.access_key and self.upstreams.library.error is None:
            # It counts gated features only for those who may see them.
            answer.library.CopyFrom(await call.ports.library.get_library(library_pb2.GetLibraryRequest(), call))
        return answer

    async def _revisions(
        self, call: Call, *, encoder: execution_pb2.Execution, sae: execution_pb2.Execution
    ) -> execution_pb2.Revisions:
        """All revisions, the first two those that this very answer came from: an upstream may just have changed.

        Those of a part that has been down ever since we started stay empty.
        """
        known_encoder, known_generator, known_library = await asyncio.gather(
            self.upstreams.encoder.latest(call), self.upstreams.generator.latest(call),
            self.upstreams.library.latest(call),
        )  # fmt: skip
        return execution_pb2.Revisions(
            encoder=encoder.model_revision or known_encoder.revision,
            sae=sae.model_revision,
            generator=known_generator.revision,
            library=known_library.revision,
        )

    # -- jobs ------------------------------------------------------------------------------------

    async def open_image(self, request: studio_pb2.OpenImageRequest, call: Call) -> studio_pb2.OpenImageResponse:
        """Picture (or id, or embeds) -> embedding and named features, strongest first."""
        source = await self.source(request.input, "input", call)
        encoding, execution = await self.encode_features(source.input, "input", request.max_features, call)
        fired = encoding.features
        known = await features_of(fired.indices, call)
        scaled = fired.scaled or [0.0] * len(fired.indices)
        return studio_pb2.OpenImageResponse(
            embedding=source.embedding,
            features=[
                studio_pb2.NamedFeature(
                    index=index,
                    label=known[index].label,
                    activation=activation,
                    scaled=strength,
                    firing_share=known[index].firing_share,
                    label_rank=known[index].label_rank,
                    label_count=known[index].label_count,
                )
                for index, activation, strength in zip(fired.indices, fired.activations, scaled, strict=True)
                # Gated features are not listed; l0 still counts them.
                if index in known
            ],
            l0=encoding.l0,
            explained_variance=encoding.explained_variance,
            cosine=encoding.cosine,
            norm=encoding.norm,
            warnings=encoding.warnings,
            revisions=await self._revisions(call, encoder=source.execution, sae=execution),
            encoder_execution=source.execution,
            sae_execution=execution,
        )

    async def edit_image(
        self, request: studio_pb2.EditImageRequest, call: Call
    ) -> AsyncGenerator[studio_pb2.EditImageResponse, None]:
        """Edited first, then the generator's events unless ``report_only``."""
        layout = Layout.of(request) if request.HasField("keep_layout") else None
        await self.upstreams.check_revisions(request.expected_revisions, call, draws=not request.report_only)
        source = await self.source(request.input, "input", call)
        edits, matches = await by_index(request.edits, self.upstreams, call)
        answer = await self._edit(source, edits, "input", call, measure=not request.skip_measuring)
        for outcome in answer.report.outcomes:
            if outcome.feature_index in matches and not outcome.HasField("rival_of"):
                outcome.match.CopyFrom(matches[outcome.feature_index])
        edited = studio_pb2.Edited(
            embedding=answer.embedding,
            report=answer.report,
            revisions=await self._revisions(call, encoder=source.execution, sae=answer.execution),
            # As they count: of two edits of one feature the last one, in the place of the first.
            edits={edit.feature.index: edit for edit in edits}.values(),
            sae_execution=answer.execution,
        )
        yield studio_pb2.EditImageResponse(edited=edited)
        if request.report_only:
            return
        drawing = generator_pb2.GenerateRequest(
            input=tensor_pb2.EmbedsInput(embeds=answer.embedding.embeds),
            settings=request.settings,
            preview_every=request.preview_every,
        )
        if layout is not None:
            drawing.start.CopyFrom(await layout.start(source.input, drawing.settings, call))
        fields = layout.fields if layout is not None else {}
        # Closed as soon as our caller leaves, so that the denoising stops at its next step.
        async with contextlib.aclosing(call.ports.generator.generate(drawing, call, fields)) as events:
            async for event in events:
                kind = event.WhichOneof("event")
                if kind is not None:
                    yield studio_pb2.EditImageResponse(**{kind: getattr(event, kind)})
                if kind == "image" and request.measure_picture:
                    measured = await self._measure_picture(event.image, answer.report.outcomes, call)
                    yield studio_pb2.EditImageResponse(measured=measured)

    async def _measure_picture(
        self, image: generator_pb2.Image, outcomes: Sequence[edits_pb2.EditOutcome], call: Call
    ) -> studio_pb2.MeasuredPicture:
        """The edited features of a finished picture: it goes the way of any picture that is opened."""
        source = await self._encode_image(image.data, "measure_picture", call)
        encoding, _ = await self.encode_features(source.input, "measure_picture", 0, call)
        fired = encoding.features
        scaled = fired.scaled or [0.0] * len(fired.indices)
        found = dict(zip(fired.indices, zip(fired.activations, scaled, strict=True), strict=True))
        measured = studio_pb2.MeasuredPicture(index=image.index, seed=image.seed)
        for outcome in outcomes:
            activation, in_units = found.get(outcome.feature_index, (0.0, 0.0))
            measured.outcomes.add(feature_index=outcome.feature_index, activation=activation, scaled=in_units)
        return measured

    async def transfer_features(
        self, request: studio_pb2.TransferFeaturesRequest, call: Call
    ) -> studio_pb2.TransferFeaturesResponse:
        """The edits that carry (source - reference) onto the target; the target is the reference if none is given."""
        target = await self.source(request.target, "target", call)
        source = await self.source(request.source, "source", call)
        start, start_field = target, "target"
        if request.HasField("reference"):
            start, start_field = await self.source(request.reference, "reference", call), "reference"
        difference = sae_pb2.DiffFeaturesRequest(
            source=start.input,
            target=source.input,
            coverage=request.coverage,
            max_edits=request.max_edits,
            for_another=True,
        )
        # The difference goes from the reference to what our caller calls the source.
        fields = {"source": start_field, "target": "source"}
        diff = await call.ports.sae.diff_features(difference, call, fields)
        known = await features_of([edit.feature.index for edit in diff.edits], call)
        # What the caller may not set is not carried over either.
        parts = [
            studio_pb2.TransferPart(
                feature_index=edit.feature.index, label=known[edit.feature.index].label, share=share, taken=True
            )
            for edit, share in zip(diff.edits, diff.shares or [0.0] * len(diff.edits), strict=True)
            if edit.feature.index in known
        ]
        await self._take(parts, request, call)
        taken = {part.feature_index for part in parts if part.taken}
        edits, coverage = [edit for edit in diff.edits if edit.feature.index in taken], diff.coverage
        if len(edits) < len(diff.edits):
            coverage = await _coverage(start.input, source.input, edits, call)
        edited = await self._edit(target, edits, "target", call, measure=True)
        return studio_pb2.TransferFeaturesResponse(
            edits=edits,
            target=target.embedding,
            embedding=edited.embedding,
            report=edited.report,
            coverage=coverage,
            revisions=await self._revisions(call, encoder=target.execution, sae=edited.execution),
            parts=parts,
        )

    async def _take(
        self, parts: Sequence[studio_pb2.TransferPart], request: studio_pb2.TransferFeaturesRequest, call: Call
    ) -> None:
        """Writes into ``parts`` which of them ``only`` and ``without`` leave to be carried.

        Raises:
            InvalidField: one that they name is no part of the difference.
            UnknownFeature: there is no such feature.
        """
        chosen: dict[str, set[int]] = {"only": set(), "without": set()}
        for field in chosen:
            for at, reference in enumerate(getattr(request, field)):
                chosen[field] |= await self._parts_meant(parts, reference, f"{field}[{at}]", call)
        for part in parts:
            named = not request.only or part.feature_index in chosen["only"]
            part.taken = named and part.feature_index not in chosen["without"]

    async def _parts_meant(
        self, parts: Sequence[studio_pb2.TransferPart], reference: edits_pb2.FeatureRef, field: str, call: Call
    ) -> set[int]:
        label = reference.label.casefold()
        found = {part.feature_index for part in parts if label and part.label.casefold() == label}
        if not found:
            try:
                ((edit,), _) = await by_index([edits_pb2.Edit(feature=reference)], self.upstreams, call)
            except FaceteerError as error:
                raise at_our_field(error, {"edits[0].feature": field}) from None
            found = {part.feature_index for part in parts if part.feature_index == edit.feature.index}
        if not found:
            names = dict.fromkeys(part.label or f"#{part.feature_index}" for part in parts)
            raise InvalidField(field, f"is no part of the difference; its parts are {', '.join(names) or 'none'}")
        return found

    # -- pictures and embeddings -----------------------------------------------------------------

    async def source(self, given: studio_pb2.ImageInput, field: str, call: Call) -> Source:
        """The embedding of what the request gives in ``field``; remembered under its id.

        Raises:
            InvalidField: nothing given, or no embedding. EmbeddingExpired: the id is not cached.
            FaceteerError: what the encoder raises on a picture.
        """
        match given.WhichOneof("source"):
            case "image":
                return await self._encode_image(given.image, field, call)
            case "embedding_id":
                embedding = await self.look_up(given.embedding_id)
                return Source(embedding, execution_pb2.Execution(cached=True))
            case "embeds":
                sae, encoder = await asyncio.gather(self.upstreams.sae.get(call), self.upstreams.encoder.latest(call))
                x = to_array(given.embeds, field=f"{field}.embeds", shape=(sae.d_in,))
                embedding_id = embeds_content_id(encoder.revision or sae.encoder_revision, x)
                embedding = tensor_pb2.Embedding(embedding_id=embedding_id, embeds=given.embeds)
                self._keep(embedding)
                return Source(embedding, execution_pb2.Execution())
        raise InvalidField(field, "is missing; give image, embedding_id or embeds")

    async def look_up(self, embedding_id: str) -> tensor_pb2.Embedding:
        """The embedding with this id. Raises EmbeddingExpired."""
        record = await self._cache.get(embeds_key(embedding_id))
        x = from_record(record) if record is not None else None
        if x is None:
            raise EmbeddingExpired(embedding_id)
        return tensor_pb2.Embedding(embedding_id=embedding_id, embeds=to_tensor(x))

    def _keep(self, embedding: tensor_pb2.Embedding) -> None:
        """Remembers an embedding under its id, also for when another process' cache forgets."""
        embeds = to_array(embedding.embeds, field="embeds")
        self._cache.put(embeds_key(embedding.embedding_id), to_record(embeds))

    async def _encode_image(self, image: bytes, field: str, call: Call) -> Source:
        fields = {"images[0]": f"{field}.image", "images": f"{field}.image"}
        request = encoder_pb2.EncodeImagesRequest(images=[image])
        answer = await call.ports.encoder.encode_images(request, call, fields)
        (result,) = answer.results
        if result.WhichOneof("result") == "error":
            raise at_our_field(from_item(result.error), fields)
        self._keep(result.embedding)
        return Source(result.embedding, answer.execution)

    async def encode_features(
        self, source: tensor_pb2.EmbedsInput, field: str, max_features: int, call: Call
    ) -> tuple[sae_pb2.FeatureEncoding, execution_pb2.Execution]:
        """The features that fire on an embedding, strongest first; 0 for all. Raises what is wrong, at ``field``."""
        fields = {"inputs[0]": field}
        request = sae_pb2.EncodeFeaturesRequest(inputs=[source], max_features=max_features)
        answer = await call.ports.sae.encode_features(request, call, fields)
        (result,) = answer.results
        if result.WhichOneof("result") == "error":
            raise at_our_field(from_item(result.error), fields)
        return result.encoding, answer.execution

    # -- edits and names -------------------------------------------------------------------------

    async def _edit(
        self, source: Source, edits: Sequence[edits_pb2.Edit], field: str, call: Call, *, measure: bool
    ) -> sae_pb2.EditEmbedsResponse:
        """The edited embedding, remembered, and the report with labels; those the caller may not see stay empty.

        Raises:
            UnknownFeature: an edit sets a feature that the caller may not see. Turning one off is open to everybody.
        """
        request = sae_pb2.EditEmbedsRequest(input=source.input, edits=edits, measure=measure)
        answer = await call.ports.sae.edit_embeds(request, call, {"input": field})
        outcomes, drifted = answer.report.outcomes, answer.report.drifted
        warnings = answer.report.warnings
        mentioned = [outcome.feature_index for outcome in outcomes] + [drift.feature_index for drift in drifted]
        mentioned += [index for warning in warnings for index in warning.feature_indices]
        known = await features_of(mentioned, call)
        label_warnings(warnings, known)
        for outcome in outcomes:
            if outcome.feature_index in known:
                outcome.label = known[outcome.feature_index].label
            elif outcome.operation != edits_pb2.EDIT_OPERATION_ABLATE:
                unknown = UnknownFeature(f"there is no feature {outcome.feature_index} in this library")
                at = [edit.feature.index for edit in edits].index(outcome.feature_index)
                raise unknown.at(f"edits[{at}].feature.index")
        for drift in drifted:
            if drift.feature_index in known:
                drift.label = known[drift.feature_index].label
        self._keep(answer.embedding)
        return answer


async def together(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order; when one fails, or the caller leaves, the others are stopped before the error goes on."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _coverage(
    start: tensor_pb2.EmbedsInput, goal: tensor_pb2.EmbedsInput, edits: Sequence[edits_pb2.Edit], call: Call
) -> float:
    """The share of the features' difference that ``edits`` carry: 1 - ||D - c||^2 / ||D||^2, as DiffFeatures has it.

    D is the difference of the two reconstructions, c what the edits add.
    """
    request = sae_pb2.EncodeFeaturesRequest(inputs=[start, goal], include_error=True)
    answer = await call.ports.sae.encode_features(request, call)
    before, after = (
        to_array(given.embeds, field="embeds") - to_array(result.encoding.error, field="error")
        for given, result in zip((start, goal), answer.results, strict=True)
    )
    moved = await call.ports.sae.edit_embeds(sae_pb2.EditEmbedsRequest(input=start, edits=edits), call)
    carried = to_array(moved.embedding.embeds, field="embeds") - to_array(start.embeds, field="embeds")
    difference = after - before
    whole = float(difference @ difference)
    rest = difference - carried
    return max(0.0, 1.0 - float(rest @ rest) / whole) if whole > 0 else 1.0
