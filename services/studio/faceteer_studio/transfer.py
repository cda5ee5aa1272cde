"""Carrying the difference between two pictures onto a third.

Knows nothing of gRPC calls' mechanics; upstreams carry deadlines and errors.
"""

from __future__ import annotations

from faceteer.v1 import execution_pb2, sae_pb2, studio_pb2, tensor_pb2
from faceteer_runtime.errors import FaceteerError

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
    edited = await edit_embeds(upstreams, target.source, list(diff.edits), True, remaining(), "target")
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
        edits=diff.edits,
        target=target_embedding,
        embedding=edited.embedding,
        report=edited.report,
        coverage=diff.coverage,
        revisions=revisions,
    )
