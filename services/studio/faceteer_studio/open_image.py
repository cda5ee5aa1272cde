"""Opening a picture: encode, find features, name them.

Knows nothing of gRPC calls' mechanics; upstreams carry deadlines and errors.
"""

from __future__ import annotations

from faceteer.v1 import execution_pb2, sae_pb2, studio_pb2, tensor_pb2
from faceteer_runtime.errors import FaceteerError

from faceteer_studio.identity import Identity
from faceteer_studio.inputs import Inputs
from faceteer_studio.names import Names
from faceteer_studio.passed_on import PassedOn, in_words_of
from faceteer_studio.upstreams import Upstreams

_WORDS = {"inputs[0]": "input"}


async def open_image(
    request: studio_pb2.OpenImageRequest,
    upstreams: Upstreams,
    inputs: Inputs,
    names: Names,
    identity: Identity,
    timeout: float | None,
) -> studio_pb2.OpenImageResponse:
    """Picture (or id, or embeds) -> embedding and named features, strongest first."""
    resolved = await inputs.resolve(request.input, "input", timeout)
    features_request = sae_pb2.EncodeFeaturesRequest(inputs=[resolved.source], max_features=request.max_features)
    try:
        answer = await upstreams.sae.call("EncodeFeatures", features_request, timeout)
    except FaceteerError as error:
        raise in_words_of(error, _WORDS) from None
    (result,) = answer.results
    if result.WhichOneof("result") == "error":
        raise in_words_of(PassedOn(result.error), _WORDS)
    encoding = result.encoding
    embedding = tensor_pb2.Embedding(
        embedding_id=resolved.embedding_id or encoding.embedding_id, embeds=resolved.embeds
    )
    inputs.keep(embedding)
    indices = encoding.features.indices
    known = await names.seen(indices, timeout)
    actual = (await identity.get(timeout)).revisions
    revisions = execution_pb2.Revisions()
    revisions.CopyFrom(actual)
    # What this very answer came from, even if an upstream has just been replaced.
    revisions.encoder = resolved.execution.model_revision or actual.encoder
    revisions.sae = answer.execution.model_revision
    scaled = encoding.features.scaled or [0.0] * len(indices)
    return studio_pb2.OpenImageResponse(
        embedding=embedding,
        features=[
            studio_pb2.NamedFeature(
                index=index,
                label=known[index].label,
                activation=activation,
                scaled=strength,
                firing_share=known[index].firing_share,
            )
            for index, activation, strength in zip(indices, encoding.features.activations, scaled, strict=True)
            # Gated features are not listed; l0 counts them all the same.
            if index in known
        ],
        l0=encoding.l0,
        explained_variance=encoding.explained_variance,
        cosine=encoding.cosine,
        norm=encoding.norm,
        warnings=encoding.warnings,
        revisions=revisions,
        encoder_execution=resolved.execution,
        sae_execution=answer.execution,
    )
