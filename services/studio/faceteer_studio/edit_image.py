"""Editing a picture: check revisions, resolve, edit, name, draw.

Knows nothing of gRPC calls' mechanics; upstreams carry deadlines and errors.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable

from faceteer.v1 import edits_pb2, execution_pb2, generator_pb2, sae_pb2, studio_pb2, tensor_pb2
from faceteer_runtime.errors import FaceteerError, UnknownFeature

from faceteer_studio.identity import Identity
from faceteer_studio.inputs import Inputs
from faceteer_studio.layout import Layout
from faceteer_studio.names import Names
from faceteer_studio.passed_on import in_words_of
from faceteer_studio.upstreams import Upstreams

Remaining = Callable[[], float | None]
"""Seconds left of the caller's deadline, or None: asked anew before every child call."""


async def edit_image(
    request: studio_pb2.EditImageRequest,
    upstreams: Upstreams,
    inputs: Inputs,
    names: Names,
    identity: Identity,
    remaining: Remaining,
) -> AsyncIterator[studio_pb2.EditImageResponse]:
    """Edited first, then the generator's events unless ``report_only``."""
    layout = Layout.of(request)
    revisions = await identity.check(request.expected_revisions, remaining())
    resolved = await inputs.resolve(request.input, "input", remaining())
    edits = await names.resolve(request.edits, remaining())
    answer = await edit_embeds(upstreams, resolved.source, edits, not request.skip_measuring, remaining())
    await fill_labels(answer.report, names, remaining())
    inputs.keep(answer.embedding)
    yield studio_pb2.EditImageResponse(
        edited=studio_pb2.Edited(
            embedding=answer.embedding,
            report=answer.report,
            revisions=execution_pb2.Revisions(
                encoder=resolved.execution.model_revision or revisions.encoder,
                sae=answer.execution.model_revision,
                generator=revisions.generator,
                library=revisions.library,
            ),
            edits=edits,
            sae_execution=answer.execution,
        )
    )
    if request.report_only:
        return
    drawing = generator_pb2.GenerateRequest(
        input=tensor_pb2.EmbedsInput(embeds=answer.embedding.embeds),
        settings=request.settings,
        preview_every=request.preview_every,
    )
    if layout is not None:
        start = await layout.start(upstreams.generator, resolved.source, drawing.settings, remaining())
        drawing.start.CopyFrom(start)
    try:
        # Closed as soon as our caller leaves, so that the denoising stops at its next step.
        async with contextlib.aclosing(upstreams.generator.stream("Generate", drawing, remaining())) as events:
            async for event in events:
                kind = event.WhichOneof("event")
                yield studio_pb2.EditImageResponse(**{kind: getattr(event, kind)})
    except FaceteerError as error:
        raise in_words_of(error, layout.words if layout is not None else {}) from None


async def edit_embeds(
    upstreams: Upstreams,
    source: tensor_pb2.EmbedsInput,
    edits: list[edits_pb2.Edit],
    measure: bool,
    timeout: float | None,
    field: str = "input",
) -> sae_pb2.EditEmbedsResponse:
    """SaeService.EditEmbeds; faults of the embedding are reported at ``field``."""
    request = sae_pb2.EditEmbedsRequest(input=source, edits=edits, measure=measure)
    try:
        answer: sae_pb2.EditEmbedsResponse = await upstreams.sae.call("EditEmbeds", request, timeout)
    except FaceteerError as error:
        raise in_words_of(error, {"input": field}) from None
    return answer


async def fill_labels(report: edits_pb2.EditReport, names: Names, timeout: float | None) -> None:
    """Writes the features' labels into a report; those of features that the caller may not see stay empty.

    Raises:
        UnknownFeature: an edit sets such a feature. Turning one off is open to everybody.
    """
    indices = [outcome.feature_index for outcome in report.outcomes]
    indices += [drift.feature_index for drift in report.drifted]
    known = await names.seen(indices, timeout)
    for at, outcome in enumerate(report.outcomes):
        if outcome.feature_index in known:
            outcome.label = known[outcome.feature_index].label
        elif outcome.operation != edits_pb2.EDIT_OPERATION_ABLATE:
            error = UnknownFeature(f"there is no feature {outcome.feature_index} in this library")
            error.field = f"edits[{at}].feature.index"
            raise error
    for drift in report.drifted:
        if drift.feature_index in known:
            drift.label = known[drift.feature_index].label
