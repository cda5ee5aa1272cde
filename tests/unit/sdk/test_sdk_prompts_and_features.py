"""Prompts to photos, and the SAE's two halves: embeddings to features as numbers and back."""

from __future__ import annotations

from typing import Any

import faceteer
import numpy as np
import pytest
from unit.sdk.fake_server import D, FakeServer, Fault, png


def test_a_prompt_becomes_a_photo_that_can_be_edited_and_drawn(either: Any, server: FakeServer) -> None:
    photo = either.embed_prompt(
        "snow at night", negative_prompt="day", seed=2, steps=9, guidance_scale=1.5, max_features=8
    )
    sent = server.calls[0][1]
    assert (sent.prompt, sent.negative_prompt, sent.seed, sent.steps) == ("snow at night", "day", 2, 9)
    assert sent.guidance_scale == pytest.approx(1.5)
    assert [(f.label, f.activation) for f in photo.features] == [("night", 3.0), ("snow", 3.0)]
    assert (photo.name, photo.prompt, photo.data, photo.image) == ("snow at night", "snow at night", None, None)
    image = photo.edit().ablate("snow").render(seed=7)
    assert image.info["seed"] == 7
    assert photo.edit().ablate("snow").report().outcomes[0].before == pytest.approx(3.0)


def test_what_a_prompt_leaves_out_is_the_servers(either: Any, server: FakeServer) -> None:
    either.embed_prompt("fog")
    sent = server.calls[0][1]
    assert (sent.seed, sent.steps, sent.HasField("guidance_scale")) == (0, 0, False)


def test_an_expired_prompt_is_healed_without_imagining_anew(either: Any, server: FakeServer) -> None:
    photo = either.embed_prompt("night")
    server.expire()
    assert photo.edit().set("night", 1).report().outcomes[0].before == pytest.approx(1.0)
    assert server.names().count("EmbedPrompt") == 1


@pytest.mark.parametrize("prompt", ["", "  \n", None])
def test_an_empty_prompt_is_refused_before_any_call(either: Any, server: FakeServer, prompt: Any) -> None:
    with pytest.raises(faceteer.InvalidArgumentError, match="prompt"):
        either.embed_prompt(prompt)
    assert server.calls == []


def test_a_prompts_seed_is_checked_before_any_call(either: Any, server: FakeServer) -> None:
    with pytest.raises(faceteer.InvalidArgumentError, match="seed"):
        either.embed_prompt("night", seed=-1)
    assert server.calls == []


def test_a_bundle_without_a_prior_says_so(either: Any, server: FakeServer) -> None:
    server.fail("EmbedPrompt", Fault("FAILED_PRECONDITION", "NOT_IN_BUNDLE", "no prior", metadata={"part": "prior"}))
    with pytest.raises(faceteer.NotInBundleError) as raised:
        either.embed_prompt("night")
    assert raised.value.part == "prior"


def test_a_photo_and_its_embedding_have_the_same_features_as_numbers(either: Any) -> None:
    photo = either.open(png(51, 0, 255))
    (by_photo,) = either.encode_features(photo)
    (by_array,) = either.encode_features(photo.embeds)
    assert by_photo.indices.tolist() == by_array.indices.tolist() == [2, 0]
    assert by_photo.activations == pytest.approx([1.0, 0.2])
    assert by_photo.scaled == pytest.approx([0.5, 0.1])
    assert (by_photo.l0, by_photo.error) == (2, None)
    assert by_photo.dense(4) == pytest.approx([0.2, 0, 1.0, 0])


def test_features_and_error_decode_to_the_embedding_again(either: Any) -> None:
    x = np.random.default_rng(0).standard_normal((9, D)).astype(np.float32)
    encodings = either.encode_features(x, include_error=True)
    assert [len(e.indices) for e in encodings] == [int((row > 0).sum()) for row in x]
    np.testing.assert_array_equal(either.decode_features(encodings), x)
    without = either.decode_features(either.encode_features(x))
    np.testing.assert_array_equal(without, np.maximum(x, 0))


def test_batches_keep_to_the_servers_limit(either: Any, server: FakeServer) -> None:
    x = np.ones((9, D), np.float32)
    assert len(either.encode_features(list(x), max_features=1)) == 9
    assert [len(r.inputs) for name, r in server.calls if name == "EncodeFeatures"] == [4, 4, 1]


def test_a_mapping_of_activations_decodes(either: Any) -> None:
    row, other = either.decode_features([{3: 0.5, 7: 2}, {}])
    assert (row[3], row[7], row.sum(), other.any()) == (0.5, 2.0, 2.5, False)
    assert either.decode_features({3: 1.0}).shape == (1, D)
    assert either.decode_features([]).shape == (0, D)
    assert either.encode_features([]) == []


def test_an_items_error_is_raised_with_its_index_or_returned_in_its_place(either: Any) -> None:
    good, bad = np.ones(D, np.float32), np.ones(5, np.float32)
    with pytest.raises(faceteer.InvalidArgumentError, match="item 5: has 5 values") as raised:
        either.encode_features([*[good] * 5, bad])
    assert raised.value.index == 5
    kept = either.encode_features([good, bad, good], on_error="return")
    assert [type(each).__name__ for each in kept] == ["FeatureEncoding", "InvalidArgumentError", "FeatureEncoding"]
    rows = either.decode_features([{D + 1: 1.0}, {1: 1.0}], on_error="return")
    assert isinstance(rows[0], faceteer.InvalidArgumentError)
    assert (rows[0].index, rows[1][1]) == (0, 1.0)
    with pytest.raises(faceteer.InvalidArgumentError, match="item 1"):
        either.decode_features([{1: 1.0}, {D + 1: 1.0}])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (np.ones((2, 2, 2)), "pass \\[d\\] or \\[n, d\\]"),
        ("boat.png", "photos"),
        ([np.array([1.0, np.nan])], "item 0: embeds: NaN"),
        ([np.ones(3), np.ones((2, 3))], "item 1: embeds"),
        (7, "neither a photo"),
    ],
)
def test_what_is_no_embedding_is_refused_before_any_call(
    either: Any, server: FakeServer, given: Any, words: str
) -> None:
    with pytest.raises(faceteer.InvalidArgumentError, match=words):
        either.encode_features(given)
    assert server.calls == []


@pytest.mark.parametrize("given", [7, "night", [{"night": 1.0}], [{1: float("nan")}], [{-1: 1.0}], [3], np.ones(3)])
def test_what_holds_no_features_is_refused_before_any_call(either: Any, server: FakeServer, given: Any) -> None:
    with pytest.raises(faceteer.InvalidArgumentError, match="features"):
        either.decode_features(given)
    assert server.calls == []


def test_an_unknown_way_with_errors_is_refused(either: Any) -> None:
    with pytest.raises(faceteer.InvalidArgumentError, match="raise or return"):
        either.encode_features(np.ones(D), on_error="skip")
    with pytest.raises(faceteer.InvalidArgumentError, match="raise or return"):
        either.decode_features({1: 1.0}, on_error="skip")
    with pytest.raises(faceteer.InvalidArgumentError, match="max_features"):
        either.encode_features(np.ones(D), max_features=-1)


def test_a_call_holds_at_most_256_items_whatever_the_server_allows(
    client: faceteer.Client, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unit.sdk.fake_server.MAX_BATCH", 1000)
    rows = client.decode_features([{index: 1.0} for index in range(300)])
    assert [len(r.items) for name, r in server.calls if name == "DecodeFeatures"] == [256, 44]
    assert rows.argmax(1).tolist() == list(range(300))
    monkeypatch.setattr("unit.sdk.fake_server.MAX_BATCH", 0)
    client.decode_features([{1: 1.0}] * 257)
    assert [len(r.items) for name, r in server.calls if name == "DecodeFeatures"][2:] == [256, 1]


def test_what_a_prompt_is_imagined_with_travels(either: Any, server: FakeServer) -> None:
    photo = either.embed_prompt("night " * 20, negative_prompt="fog", seed=3, steps=5, guidance_scale=1.5)
    sent = next(request for name, request in server.calls if name == "EmbedPrompt")
    assert (sent.negative_prompt, sent.seed, sent.steps, sent.guidance_scale) == ("fog", 3, 5, 1.5)
    assert (len(photo.name), photo.name[-1]) == (60, "…")
    assert either.embed_prompt("n" * 60).name == "n" * 60
    either.embed_prompt("fog")
    plain = server.calls[-2][1]
    assert (plain.steps, plain.HasField("guidance_scale")) == (0, False)


@pytest.mark.parametrize("index", [2**32, -1])
def test_an_index_beyond_32_bits_is_refused(client: faceteer.Client, index: int) -> None:
    with pytest.raises(faceteer.InvalidArgumentError, match="no feature's index"):
        client.decode_features({index: 1.0})
    assert isinstance(client.decode_features([{2**32 - 1: 1.0}], on_error="return")[0], faceteer.InvalidArgumentError)
