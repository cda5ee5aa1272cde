"""Labels to indices and indices to labels, through the library.

Knows nothing of edits beyond the reference to a feature in each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from faceteer.v1 import edits_pb2, library_pb2, tensor_pb2
from faceteer_runtime.errors import FaceteerError
from faceteer_runtime.request import request_context

from faceteer_studio.upstreams import Upstream

# BatchGetFeatures and a search's page take this many at once.
_PAGE = 1000


class Names:
    """Asks the library; nothing is kept, since a person may relabel a feature at any time."""

    def __init__(self, library: Upstream) -> None:
        self._library = library

    async def seen(self, indices: Iterable[int], timeout: float | None) -> dict[int, library_pb2.Feature]:
        """Those of the features that the caller may see; gated ones are missing, unless its access key opens them."""
        unique = sorted(set(indices))
        found: dict[int, library_pb2.Feature] = {}
        for start in range(0, len(unique), _PAGE):
            page = unique[start : start + _PAGE]
            hits = await self._search(page, bool(request_context().access_key), timeout)
            found |= {hit.feature.index: hit.feature for hit in hits}
        return found

    async def resolve(self, edits: Sequence[edits_pb2.Edit], timeout: float | None) -> list[edits_pb2.Edit]:
        """The same edits, by index.

        Raises:
            FaceteerError: UNKNOWN_FEATURE with the nearest labels, at ``edits[i].feature.label``.
        """
        labelled = [at for at, edit in enumerate(edits) if edit.feature.WhichOneof("feature") == "label"]
        resolved = list(edits)
        for start in range(0, len(labelled), _PAGE):
            page = labelled[start : start + _PAGE]
            for at, feature in zip(page, await self._by_label(edits, page, timeout), strict=True):
                resolved[at] = edits_pb2.Edit()
                resolved[at].CopyFrom(edits[at])
                resolved[at].feature.index = feature.index
        return resolved

    async def _search(
        self, indices: Sequence[int], gated: bool, timeout: float | None
    ) -> Sequence[library_pb2.FeatureHit]:
        """A search leaves out what its caller may not see, where BatchGetFeatures would fail."""
        request = library_pb2.SearchFeaturesRequest(
            activations=tensor_pb2.SparseFeatures(indices=indices, activations=[1.0] * len(indices)),
            filter=library_pb2.FeatureFilter(include_safety_classes=["*"] if gated else []),
            page_size=_PAGE,
        )
        try:
            answer = await self._library.call("SearchFeatures", request, timeout)
        except FaceteerError as error:
            if gated and error.reason == "NOT_PERMITTED":
                # A key that opens nothing: as without one.
                return await self._search(indices, False, timeout)
            raise
        hits: Sequence[library_pb2.FeatureHit] = answer.hits
        return hits

    async def _by_label(
        self, edits: Sequence[edits_pb2.Edit], page: Sequence[int], timeout: float | None
    ) -> list[library_pb2.Feature]:
        try:
            return list((await self._get([edits[at].feature for at in page], timeout)).features)
        except FaceteerError as error:
            if error.reason not in ("UNKNOWN_FEATURE", "INVALID_FIELD"):
                raise
        # One of them is at fault; asked singly, it shows which.
        found = []
        for at in page:
            try:
                found += (await self._get([edits[at].feature], timeout)).features
            except FaceteerError as error:
                error.field = f"edits[{at}].feature.label"
                raise
        return found

    async def _get(
        self, references: Sequence[edits_pb2.FeatureRef], timeout: float | None
    ) -> library_pb2.BatchGetFeaturesResponse:
        request = library_pb2.BatchGetFeaturesRequest(features=references)
        answer: library_pb2.BatchGetFeaturesResponse = await self._library.call("BatchGetFeatures", request, timeout)
        return answer
