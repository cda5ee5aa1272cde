"""Pages: sizes at their bounds, tokens that fit one request, and lists longer than any page."""

from __future__ import annotations

import base64

import numpy as np
import pytest
from faceteer.v1 import library_pb2, tensor_pb2
from faceteer_library.access import AccessPolicy
from faceteer_library.application import Library
from faceteer_library.pages import Page, next_token, read_page
from faceteer_library.person_labels import PersonLabels
from faceteer_library.servicer import LibraryServicer
from faceteer_library.store import Store
from faceteer_library.writer import ExampleRow, FeatureRow, LibraryWriter
from faceteer_runtime.errors import FaceteerError, InvalidField

N = 1105
Request = library_pb2.ListFeaturesRequest


@pytest.mark.parametrize(("asked", "size"), [(0, 50), (1, 1), (1000, 1000), (1001, 1000), (2**31 - 1, 1000)])
def test_a_page_holds_what_was_asked_the_default_or_the_most(asked: int, size: int) -> None:
    assert read_page(Request(page_size=asked), default=50, most=1000) == Page(0, size)


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(InvalidField) as caught:
        read_page(Request(page_size=-1), default=50, most=1000)
    assert caught.value.field == "page_size"


def test_the_token_is_empty_on_the_last_page_only() -> None:
    request = Request(order=1)
    assert next_token(request, Page(10, 5), 15) == ""
    assert next_token(request, Page(10, 5), 14) == ""
    request.page_token = next_token(request, Page(10, 5), 16)
    assert read_page(request, default=50, most=1000) == Page(15, 50)
    request.page_size = 3
    assert read_page(request, default=50, most=1000) == Page(15, 3), "the size may change between pages"
    request.order = 2  # type: ignore[assignment]
    with pytest.raises(InvalidField) as caught:
        read_page(request, default=50, most=1000)
    assert caught.value.field == "page_token"


@pytest.mark.parametrize(("offset", "taken"), [(0, True), (2**31 - 1, True), (2**31, False), (-1, False)])
def test_a_token_leads_to_a_place_that_a_list_can_have(offset: int, taken: bool) -> None:
    digest = base64.urlsafe_b64decode(next_token(Request(), Page(0, 1), 2)).decode().split(".")[1]
    request = Request(page_token=base64.urlsafe_b64encode(f"{offset}.{digest}".encode()).decode())
    if taken:
        assert read_page(request, default=50, most=1000).offset == offset
    else:
        with pytest.raises(InvalidField):
            read_page(request, default=50, most=1000)


def test_what_is_computed_again_for_every_page_does_not_bind_a_token() -> None:
    def activations(*values: float, indices: tuple[int, ...] = (1, 2)) -> library_pb2.SearchFeaturesRequest:
        features = tensor_pb2.SparseFeatures(indices=indices, activations=values, scaled=values)
        return library_pb2.SearchFeaturesRequest(activations=features)

    def words(*values: int) -> library_pb2.SearchFeaturesRequest:
        return library_pb2.SearchFeaturesRequest(words="x", words_embeds=tensor_pb2.Tensor(data=bytes(values)))

    for first, second in ((activations(1, 2), activations(1, 2.001)), (words(1), words(2))):
        second.page_token = next_token(first, Page(0, 7), 8)
        assert read_page(second, default=50, most=1000).offset == 7
    other = activations(1, 2, indices=(1, 3))
    other.page_token = next_token(activations(1, 2), Page(0, 7), 8)
    with pytest.raises(InvalidField):
        read_page(other, default=50, most=1000)


@pytest.fixture(scope="module")
def servicer(tmp_path_factory: pytest.TempPathFactory) -> LibraryServicer:
    """A library with more features, and more examples of one, than a page holds."""
    directory = tmp_path_factory.mktemp("pages")
    edges, counts = np.ones(1, np.float32), np.ones(1, np.int64)
    with LibraryWriter(directory / "library.sqlite", sae_revision="s", corpus="c", n_pictures=1) as writer:
        for index in range(N):
            writer.feature(FeatureRow(index, "same" if index else "other", 0.5, 1.0, 1.0, 2.0, 3.0, edges, counts))
        writer.examples(0, [ExampleRow(f"{n}", float(N - n), b"webp") for n in range(105)])
        writer.relatives(0, "nearest", [(other, 1 - other / N) for other in range(1, N)])
    labels = PersonLabels(directory / "labels.sqlite")
    library = Library(Store(directory / "library.sqlite", labels.path), labels, AccessPolicy())
    return LibraryServicer(library, revision="lib1", bundle="b")


EVERY = tensor_pb2.SparseFeatures(indices=range(1, N), activations=[1.0] * (N - 1))


@pytest.mark.parametrize(
    ("query", "total"),
    [({"words": "same"}, N - 1), ({"activations": EVERY}, N - 1), ({"similar_to": {"index": 0}}, N - 1), (None, N)],
    ids=["words", "activations", "similar", "list"],
)
async def test_pages_of_at_most_a_thousand_make_up_the_whole(
    servicer: LibraryServicer, query: dict[str, object] | None, total: int
) -> None:
    async def page(**more: object) -> tuple[list[int], str, int]:
        if query is None:
            listed = await servicer.ListFeatures(Request(**more), None)
            return [one.index for one in listed.features], listed.next_page_token, listed.total_size
        found = await servicer.SearchFeatures(library_pb2.SearchFeaturesRequest(**query, **more), None)
        return [hit.feature.index for hit in found.hits], found.next_page_token, found.total_size

    usual, token, _ = await page()
    assert (len(usual), bool(token)) == (50, True)
    first, token, size = await page(page_size=5000)
    rest, end, _ = await page(page_size=5000, page_token=token)
    assert (len(first), first[:50], size, end) == (1000, usual, total, "")
    assert first + rest == list(range(N - total, N))


async def test_examples_come_by_the_dozen_and_at_most_a_hundred_at_once(servicer: LibraryServicer) -> None:
    def request(**more: object) -> library_pb2.ListFeatureExamplesRequest:
        return library_pb2.ListFeatureExamplesRequest(feature={"index": 0}, **more)  # type: ignore[arg-type]

    assert len((await servicer.ListFeatureExamples(request(), None)).examples) == 12
    first = await servicer.ListFeatureExamples(request(page_size=500), None)
    rest = await servicer.ListFeatureExamples(request(page_size=500, page_token=first.next_page_token), None)
    assert [one.picture for one in (*first.examples, *rest.examples)] == [str(n) for n in range(105)]
    assert (len(first.examples), first.total_size, rest.next_page_token) == (100, 105, "")
    assert first.execution.model_revision == "lib1"


@pytest.mark.parametrize(
    ("call", "request_", "field"),
    [
        ("SearchFeatures", library_pb2.SearchFeaturesRequest(words="x" * 1001), "words"),
        ("SearchFeatures", library_pb2.SearchFeaturesRequest(words="x", page_size=-1), "page_size"),
        ("SearchFeatures", library_pb2.SearchFeaturesRequest(similar_to={}), "similar_to"),
        ("SearchFeatures", library_pb2.SearchFeaturesRequest(similar_to={"index": N}), "similar_to.index"),
        ("ListFeatures", Request(order=99), "order"),  # type: ignore[arg-type]
        ("ListFeatures", Request(filter={"min_causal_score": float("nan")}), "filter.min_causal_score"),
        ("ListFeatures", Request(filter={"label_sources": [1, 9]}), "filter.label_sources[1]"),
        ("ListFeatureExamples", library_pb2.ListFeatureExamplesRequest(feature={"label": "no"}), "feature.label"),
        ("GetFeature", library_pb2.GetFeatureRequest(feature={"index": N}), "feature.index"),
        ("GetFeatureIcon", library_pb2.GetFeatureIconRequest(feature={"label": " "}), "feature"),
        ("SetFeatureLabel", library_pb2.SetFeatureLabelRequest(feature={"index": 1}, label="x" * 121), "label"),
        ("SetFeatureLabel", library_pb2.SetFeatureLabelRequest(feature={"index": 1}, author="a\nb"), "author"),
        ("SetFeatureLabel", library_pb2.SetFeatureLabelRequest(feature={"label": "no"}, label="x"), "feature.label"),
    ],
)
async def test_what_cannot_be_answered_is_refused_at_its_field(
    servicer: LibraryServicer, call: str, request_: object, field: str
) -> None:
    with pytest.raises(FaceteerError) as caught:
        await getattr(servicer, call)(request_, None)
    assert caught.value.field == field


async def test_texts_of_just_the_longest_are_taken(servicer: LibraryServicer) -> None:
    await servicer.SearchFeatures(library_pb2.SearchFeaturesRequest(words="x" * 1000), None)
    request = library_pb2.SetFeatureLabelRequest(feature={"index": 7}, label=f" {'x' * 120} ", author="y" * 120)
    assert (await servicer.SetFeatureLabel(request, None)).feature.label == "x" * 120
    taken_back = library_pb2.SetFeatureLabelRequest(feature={"index": 7})
    assert (await servicer.SetFeatureLabel(taken_back, None)).feature.label == "same"
