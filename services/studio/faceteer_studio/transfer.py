"""Carrying the difference between two pictures onto a third.

Knows nothing of gRPC calls' mechanics; upstreams carry deadlines and errors.
"""

from __future__ import annotations

from collections.abc import Sequence

from faceteer.v1 import edits_pb2, execution_pb2, sae_pb2, studio_pb2, tensor_pb2
from faceteer_runtime.errors import FaceteerError
from faceteer_runtime.tensors import to_array

from faceteer_studio.edit_image import Remaining, edit_embeds, fill_labels
from faceteer_studio.identity import Identity
from faceteer_studio.inputs import Inputs
from faceteer_studio.names import Names
from faceteer_studio.passed_on import in_words_of
from faceteer_studio.upstreams import Upstreams


async def transfer_features(
    request: studio_pb2.TransferFeaturesRequest,
    upstreams: Upstreams,
    inputs: Inputs,
    names: Names,
    identity: Identity,
    remaining: Remaining,
) -> studio_pb2.TransferFeaturesResponse:
    """The edits that carry (source - reference) onto the target; the reference is the target where none is given."""
    target = await inputs.resolve(request.target, "target", remaining())
    source = await inputs.resolve(request.source, "source", remaining())
    start, start_field = target, "target"
    if request.HasField("reference"):
        start, start_field = await inputs.resolve(request.reference, "reference", remaining()), "reference"
    difference = sae_pb2.DiffFeaturesRequest(
        source=start.source, target=source.source, coverage=request.coverage, max_edits=request.max_edits
    )
    try:
        diff = await upstreams.sae.call("DiffFeatures", difference, remaining())
    except FaceteerError as error:
        # The difference goes from the reference to what our caller calls the source.
        raise in_words_of(error, {"source": start_field, "target": "source"}) from None
    edits, coverage = list(diff.edits), diff.coverage
    known = await names.seen([edit.feature.index for edit in edits], remaining())
    if not all(edit.feature.index in known for edit in edits):
        # What the caller may not set is not carried over either.
        edits = [edit for edit in edits if edit.feature.index in known]
        coverage = await _carried(upstreams, start.source, source.source, edits, remaining)
    edited = await edit_embeds(upstreams, target.source, edits, True, remaining(), "target")
    inputs.keep(edited.embedding)
    await fill_labels(edited.report, names, remaining())
    revisions = execution_pb2.Revisions()
    revisions.CopyFrom((await identity.get(remaining())).revisions)
    target_embedding = tensor_pb2.Embedding(embedding_id=target.embedding_id, embeds=target.embeds)
    if not target.embedding_id:
        # Editing nothing gives the target its id.
        unedited = await edit_embeds(upstreams, target.source, [], False, remaining(), "target")
        target_embedding = unedited.embedding
    inputs.keep(target_embedding)
    return studio_pb2.TransferFeaturesResponse(
        edits=edits,
        target=target_embedding,
        embedding=edited.embedding,
        report=edited.report,
        coverage=coverage,
        revisions=revisions,
    )


async def _carried(
    upstreams: Upstreams,
    start: tensor_pb2.EmbedsInput,
    goal: tensor_pb2.EmbedsInput,
    edits: Sequence[edits_pb2.Edit],
    remaining: Remaining,
) -> float:
    """The share of the features' difference that ``edits`` carry: 1 - ||D - c||^2 / ||D||^2, as DiffFeatures has it.

    D is the difference of the two reconstructions, c what the edits add.
    """
    request = sae_pb2.EncodeFeaturesRequest(inputs=[start, goal], include_error=True)
    answer = await upstreams.sae.call("EncodeFeatures", request, remaining())
    before, after = (
        to_array(given.embeds, field="embeds") - to_array(result.encoding.error, field="error")
        for given, result in zip((start, goal), answer.results, strict=True)
    )
    moved = await edit_embeds(upstreams, start, list(edits), False, remaining())
    carried = to_array(moved.embedding.embeds, field="embeds") - to_array(start.embeds, field="embeds")
    difference = after - before
    whole = float(difference @ difference)
    rest = difference - carried
    return max(0.0, 1.0 - float(rest @ rest) / whole) if whole > 0 else 1.0
