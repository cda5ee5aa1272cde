"""Names in edits, and in what is said about them: labels to features before the edit, features to labels after it.

The library decides what a name means; this module only brings it the name's embedding where words alone find nothing.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from faceteer.v1 import edits_pb2, encoder_pb2, execution_pb2, library_pb2, tensor_pb2
from faceteer_runtime.errors import FaceteerError

from faceteer_studio.ports import Call
from faceteer_studio.upstreams import Upstreams

_log = logging.getLogger(__name__)
# BatchGetFeatures takes this many at once.
_BATCH = 1000
# How long a search waits for the words' embedding before it matches words alone.
_ENCODER_S = 2.0
# Hits among which the one that is nearest in meaning is looked for; those that only hold the words may stand before it.
_HITS = 20


async def features_of(indices: Iterable[int], call: Call) -> dict[int, library_pb2.Feature]:
    """By index, those that the caller may see. Not remembered: a person may relabel a feature at any time."""
    found: dict[int, library_pb2.Feature] = {}
    for batch in _batches(sorted(set(indices))):
        references = [edits_pb2.FeatureRef(index=index) for index in batch]
        request = library_pb2.BatchGetFeaturesRequest(features=references, allow_missing=True)
        answer = await call.ports.library.batch_get_features(request, call)
        found |= {feature.index: feature for feature in answer.features}
    return found


async def by_index(
    edits: Sequence[edits_pb2.Edit], upstreams: Upstreams, call: Call
) -> tuple[list[edits_pb2.Edit], dict[int, edits_pb2.FeatureMatch]]:
    """The same edits with names resolved, and how each name led to its feature, by the feature's index.

    Raises:
        FaceteerError: what the library raises, at ``edits[i].feature.label``.
    """
    resolved, matches = list(edits), dict[int, edits_pb2.FeatureMatch]()

    def take(at: int, index: int, match: edits_pb2.FeatureMatch) -> None:
        resolved[at] = edits_pb2.Edit()
        resolved[at].CopyFrom(edits[at])
        resolved[at].feature.index = index
        matches[index] = match

    labelled = [at for at, edit in enumerate(edits) if edit.feature.WhichOneof("feature") == "label"]
    unknown: list[int] = []
    for batch in _batches(labelled):
        request = library_pb2.BatchGetFeaturesRequest(features=[edits[at].feature for at in batch], allow_missing=True)
        fields = {f"features[{place}]": f"edits[{at}].feature" for place, at in enumerate(batch)}
        answer = await call.ports.library.batch_get_features(request, call, fields)
        missing = {batch[place] for place in answer.missing}
        unknown += sorted(missing)
        there = [at for at in batch if at not in missing]
        for at, feature, match in zip(there, answer.features, answer.matches, strict=True):
            take(at, feature.index, match)
    for at in unknown:
        hit = await _nearest_in_meaning(edits[at].feature.label, upstreams, call)
        if hit is not None:
            take(at, hit.feature.index, hit.match)
            continue
        request = library_pb2.BatchGetFeaturesRequest(features=[edits[at].feature])
        fields = {"features[0]": f"edits[{at}].feature"}
        # For its error, which suggests labels; a label given just now is found after all.
        answer = await call.ports.library.batch_get_features(request, call, fields)
        take(at, answer.features[0].index, answer.matches[0])
    return resolved, matches


async def _nearest_in_meaning(label: str, upstreams: Upstreams, call: Call) -> library_pb2.FeatureHit | None:
    embeds = await meaning_of(label, upstreams, call)
    if embeds is None:
        return None
    request = library_pb2.SearchFeaturesRequest(words=label, words_embeds=embeds, page_size=_HITS)
    answer = await call.ports.library.search_features(request, call)
    near = (hit for hit in answer.hits if hit.match.kind == edits_pb2.MATCH_KIND_MEANING)
    return next(near, None)


async def meaning_of(words: str, upstreams: Upstreams, call: Call) -> tensor_pb2.Tensor | None:
    """The words' text embedding; None where there is none or it says nothing, and words alone have to do."""
    remaining = call.time_remaining()
    call = call.within(_ENCODER_S if remaining is None else min(_ENCODER_S, remaining / 2))
    try:
        encoder, library = await upstreams.encoder.get(call), await upstreams.library.get(call)
        if not (encoder.has_text_tower and library.searches_meaning):
            return None
        answer = await call.ports.encoder.encode_texts(encoder_pb2.EncodeTextsRequest(texts=[words]), call)
    except FaceteerError as error:
        _log.info("words are matched without their meaning: %s", error.reason)
        return None
    (result,) = answer.results
    if result.WhichOneof("result") != "embedding" or result.unknown_words:
        return None
    return result.embedding.embeds


def label_warnings(warnings: Iterable[execution_pb2.Warning], known: Mapping[int, library_pb2.Feature]) -> None:
    """Puts labels into sentences that name features by index: "#24" becomes "night (#24)"."""
    for warning in warnings:
        for index in warning.feature_indices:
            if index in known and known[index].label:
                # Not one that stands in parentheses: there the label is in place.
                parts = re.split(rf"(?<!\()#{index}\b", warning.message)
                warning.message = f"{known[index].label} (#{index})".join(parts)


def _batches(items: Sequence[int]) -> Iterator[Sequence[int]]:
    return (items[start : start + _BATCH] for start in range(0, len(items), _BATCH))
