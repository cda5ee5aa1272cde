"""The feature library: one feature, lists, searches, examples, icons, labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faceteer
import pytest
from PIL import Image
from unit.sdk.fake_server import FakeServer, Fault, png


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


def test_the_library_says_what_it_covers(either: Any) -> None:
    facts = either.features.info()
    assert facts == either.status().library
    assert (facts.corpus, facts.n_pictures, facts.n_features, facts.n_labelled) == ("made up", 40, 512, 6)
    assert facts.searches_meaning
    assert facts.to_dict()["safety_classes"] == []


def test_a_feature_has_both_scores_and_its_other_words(either: Any) -> None:
    night, fog = either.features["night"], either.features["fog"]
    assert night.terms == ("dusk", "evening")
    assert night.statistics.detection_balanced_accuracy == pytest.approx(0.8)
    assert night.statistics.causal_score is None
    assert fog.statistics.causal_score == pytest.approx(0.25)
    assert night.to_dict()["statistics"]["detection_balanced_accuracy"] == pytest.approx(0.8)


def test_every_filter_travels(either: Any, server: FakeServer) -> None:
    either.features.search(
        "n",
        labelled=False,
        max_firing_share=0.5,
        min_detection_score=0.1,
        max_detection_score=0.9,
        min_causal_score=0.25,
        max_causal_score=0.75,
        scores_disagree=True,
        include_safety_classes=["violence", "*"],
    )
    sent = server.calls[-1][1].filter
    assert (sent.labelled, sent.scores_disagree) == (False, True)
    assert sent.HasField("labelled")
    assert not sent.HasField("alive")
    assert [sent.min_detection_score, sent.max_detection_score] == pytest.approx([0.1, 0.9])
    assert [sent.min_causal_score, sent.max_causal_score, sent.max_firing_share] == pytest.approx([0.25, 0.75, 0.5])
    assert list(sent.include_safety_classes) == ["violence", "*"]
    list(either.features.list(scores_disagree=False, order="disagreement", limit=1))
    assert server.calls[-1][1].order == 6
    assert not server.calls[-1][1].filter.scores_disagree
    list(either.features.list(order="causal_score", limit=1, include_safety_classes="nudity"))
    assert server.calls[-1][1].order == 5
    assert list(server.calls[-1][1].filter.include_safety_classes) == ["nudity"]


def test_a_filter_that_is_none_is_refused(either: Any, server: FakeServer) -> None:
    with pytest.raises(TypeError, match="min_score"):
        either.features.search("n", min_score=0.5)
    with pytest.raises(faceteer.InvalidArgumentError, match="min_causal_score"):
        either.features.search("n", min_causal_score="high")
    assert server.calls == []


def test_found_features_are_a_list_that_knows_how_many_there_are(client: faceteer.Client) -> None:
    found = client.features.search("n", limit=1)
    assert isinstance(found, list)
    assert isinstance(found, faceteer.FeatureList)
    assert (len(found), found.total) == (1, 2)
    assert isinstance(found[:1], faceteer.FeatureList)
    assert isinstance(found[0], faceteer.Feature)
    assert client.features.many([3, 5]).total == 2


def test_examples_of_the_quantiles_say_which(either: Any, server: FakeServer) -> None:
    examples = either.features["night"].examples(selection="quantiles")
    assert [(e.picture, e.quantile_from, e.quantile_to) for e in examples] == [("q0", 0.5, 1.0), ("q1", 0.0, 0.5)]
    assert server.calls[-1][1].selection == 2
    either.features["night"].examples()
    assert server.calls[-1][1].selection == 1
    with pytest.raises(faceteer.InvalidArgumentError, match="strongest, quantiles"):
        either.features["night"].examples(selection="weakest")


def test_an_icon_is_cut_into_its_pictures_and_saved(client: faceteer.Client, tmp_path: Path) -> None:
    icon = client.features["night"].icon()
    assert [tile.size for tile in icon.tiles] == [(16, 16)] * 4
    assert icon.save(tmp_path / "i.webp").read_bytes() == icon.data
    with Image.open(icon.save(tmp_path / "i.png")) as saved:
        assert (saved.format, saved.size) == ("PNG", (64, 16))
    with pytest.raises(ValueError, match="no ending"):
        icon.save(tmp_path / "i")


@pytest.mark.parametrize(("width", "height"), [(64, 16), (70, 16), (262, 64), (134, 20)])
def test_an_icons_pictures_are_found_side_by_side_or_a_little_apart(width: int, height: int) -> None:
    image = Image.new("RGB", (width, height), "white")
    step = (width - height) // 3 if width != 134 else 34
    for place in range(4):
        side = height if width != 134 else 32
        image.paste((place * 60, 0, 0), (place * step, 0, place * step + side, height))
    tiles = faceteer.FeatureIcon(image, (0.5, 1.0, 1.5), b"").tiles
    assert len(tiles) == 4
    assert [tile.getpixel((tile.width // 2, 3)) for tile in tiles] == [(0, 0, 0), (60, 0, 0), (120, 0, 0), (180, 0, 0)]


def test_an_access_key_travels_with_every_call_and_is_never_shown(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with faceteer.connect(server.address, access_key="open sesame") as client:
        client.features[3]
        assert server.metadata["x-faceteer-access"] == "open sesame"
        assert "sesame" not in repr(client) + repr(vars(client._connection)) + repr(vars(client._connection.transport))
    monkeypatch.setenv("FACETEER_ACCESS_KEY", "from-the-environment")
    with faceteer.connect(server.address) as client:
        list(client.features.list(limit=1))
        assert server.metadata["x-faceteer-access"] == "from-the-environment"
    with faceteer.connect(server.address, metadata={"X-Faceteer-Access": "by hand"}) as client:
        client.status()
        assert server.metadata["x-faceteer-access"] == "by hand"
    monkeypatch.delenv("FACETEER_ACCESS_KEY")
    with faceteer.connect(server.address) as client:
        client.features[3]
        assert "x-faceteer-access" not in server.metadata


@pytest.mark.parametrize("key", ["", " padded", "schlüssel", "two\nlines"])
def test_a_key_that_cannot_travel_is_refused_without_being_shown(server: FakeServer, key: str) -> None:
    with pytest.raises(faceteer.InvalidArgumentError, match="FACETEER_ACCESS_KEY") as raised:
        faceteer.connect(server.address, access_key=key)
    assert not key or key not in str(raised.value)


def test_a_class_that_the_key_does_not_allow_is_a_typed_refusal(either: Any, server: FakeServer) -> None:
    server.fail("SearchFeatures", Fault("PERMISSION_DENIED", "NOT_PERMITTED", "not with this key"))
    with pytest.raises(faceteer.PermissionDeniedError, match="not with this key"):
        either.features.search("n", include_safety_classes=["violence"])


def test_more_features_than_a_call_holds_come_in_several(client: faceteer.Client, server: FakeServer) -> None:
    found = client.features.many(n % 512 for n in range(2001))
    assert [feature.index for feature in found] == [n % 512 for n in range(2001)]
    assert [len(request.features) for _, request in server.calls] == [1000, 1000, 1]
    assert found.total == 2001


def test_pages_are_asked_for_until_the_limit_and_never_more_than_it(
    either: Any, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("_async", "_sync"):
        monkeypatch.setattr(f"faceteer.{kind}.features._PAGE", 2)
        monkeypatch.setattr(f"faceteer.{kind}.features._EXAMPLES_PAGE", 2)
    assert [feature.index for feature in either.features.list(limit=5)] == [0, 1, 2, 3, 4]
    assert [request.page_size for _, request in server.calls] == [2, 2, 2]
    assert [request.page_token for _, request in server.calls] == ["", "2", "4"]
    found = either.features.search("o", limit=3)
    assert [request.page_size for name, request in server.calls if name == "SearchFeatures"] == [2, 1]
    assert [feature.label for feature in found] == ["snow", "fog", "[bold]odd & <b>label</b>"]
    assert [feature.score for feature in found] == pytest.approx([1, 1 / 2, 1 / 3])
    night = either.features["night"]
    assert [example.picture for example in night.examples(3)] == ["a", "b", "c"]
    assert [r.page_size for name, r in server.calls if name == "ListFeatureExamples"] == [2, 1]
    assert len(night.examples(None)) == 3
    assert len(either.features.search("o", limit=None)) == 3


def test_a_views_pictures_survive_one_feature_that_has_none_and_stop_where_the_server_does(
    client: faceteer.Client, server: FakeServer
) -> None:
    found = client.features.many([3, 4, 5, 7])
    server.fail("ListFeatureExamples", Fault("NOT_FOUND"), Fault("INTERNAL"))
    found.fetch_pictures()
    assert [feature._seen is not None for feature in found] == [False, False, True, True]
    again = client.features.many([3, 4, 5])
    calls = len(server.calls)
    server.fail("ListFeatureExamples", Fault("UNAVAILABLE"))
    again.fetch_pictures()
    assert [feature._seen for feature in again] == [None] * 3
    assert len(server.calls) == calls + 1, "neither tried again, nor the next one asked for"
    assert client.features.many([412])._repr_html_()
    assert server.names()[-1] == "BatchGetFeatures", "a feature that never fires has no pictures"
