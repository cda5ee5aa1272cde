"""The feature library: one feature, lists, searches, examples, icons, labels."""

from __future__ import annotations

from typing import Any

import faceteer
import pytest
from unit.sdk.fake_server import FakeServer, png


def test_a_feature_is_looked_up_by_index_or_label_whole(either: Any) -> None:
    night = either.features[3]
    assert night == either.features["Night"] == either.features.get(3)
    assert (night.index, night.label, night.label_source) == (3, "night", "automatic")
    assert night.statistics.p99 == pytest.approx(2.0)
    assert night.statistics.detection_score == pytest.approx(0.9)
    assert night.statistics.causal_score is None
    assert night.statistics.histogram == faceteer.Histogram((1.0, 2.0), (30, 10))
    assert [related.label for related in night.rivals] == ["day"]
    assert repr(night).endswith("#3 'night', fires on 25.0%>")
    assert either.features[412].name == "#412"


def test_a_search_finds_features_by_words_best_first_with_scores(either: Any, server: FakeServer) -> None:
    found = either.features.search("n", limit=2)
    assert [(feature.label, feature.score) for feature in found] == [("night", 1.0), ("snow", 0.5)]
    assert server.calls[-1][1].page_size == 2
    assert either.features.search("nothing like it") == []


def test_a_search_takes_a_photo_or_a_feature_too(either: Any) -> None:
    photo = either.open(png(0, 9, 9))
    assert [feature.index for feature in either.features.search(photo)] == [1, 2]
    assert [feature.index for feature in either.features.search(either.features[3])] == [5, 7]
    assert [feature.index for feature in either.features[3].similar(1)] == [5]


def test_a_search_filters(either: Any, server: FakeServer) -> None:
    either.features.search("n", alive=True, min_firing_share=0.1, label_sources=["person", "model"])
    sent = server.calls[-1][1].filter
    assert sent.alive
    assert sent.min_firing_share == pytest.approx(0.1)
    assert not sent.HasField("labelled")
    assert list(sent.label_sources) == [3, 2]
    with pytest.raises(faceteer.InvalidArgumentError, match="automatic, model or person"):
        either.features.search("n", label_sources=["hearsay"])


def test_a_list_fetches_its_pages_as_they_are_asked_for(either: Any, server: FakeServer) -> None:
    listed = either.features.list(labelled=True, order="label")
    assert server.calls == []
    assert next(listed).index == 3
    assert server.names() == ["ListFeatures"]
    assert [feature.index for feature in listed] == [4, 5, 7, 12, 13]
    assert server.names() == ["ListFeatures"] * 2


def test_a_list_stops_at_its_limit(either: Any, server: FakeServer) -> None:
    assert len(list(either.features.list(limit=4))) == 4
    assert server.names() == ["ListFeatures"] * 2
    with pytest.raises(faceteer.InvalidArgumentError, match="limit"):
        list(either.features.list(limit=0))
    with pytest.raises(faceteer.InvalidArgumentError, match="order"):
        list(either.features.list(order="beauty"))


def test_many_features_come_in_one_call_in_their_order(either: Any, server: FakeServer) -> None:
    assert [feature.index for feature in either.features.many(["snow", 412, "night"])] == [5, 412, 3]
    assert server.names() == ["BatchGetFeatures"]


def test_examples_are_pictures_with_activations(either: Any) -> None:
    examples = either.features["night"].examples(2)
    assert [(example.picture, example.activation, example.caption) for example in examples] == [
        ("a", 3.0, "picture a"),
        ("b", 2.0, "picture b"),
    ]
    assert examples[0].thumbnail.size == (16, 16)


def test_an_icon_is_a_picture_with_its_strengths_or_says_that_there_is_none(either: Any) -> None:
    assert either.features["night"].icon().strengths == (0.5, 1.0, 2.0)
    with pytest.raises(faceteer.IconNotMadeError):
        either.features["snow"].icon()


def test_a_person_can_label_a_feature(either: Any, server: FakeServer) -> None:
    labelled = either.features.label(412, "lighthouse", author="me")
    assert (labelled.label, labelled.label_source) == ("lighthouse", "person")
    assert server.calls[-1][1].author == "me"
    assert either.features["lighthouse"].index == 412
