"""Embeddings that the server has let go: the SDK encodes again by itself, and never in a circle."""

from __future__ import annotations

from typing import Any

import faceteer
import numpy as np
import pytest
from unit.sdk.fake_server import FakeServer, png

BOAT = png(10, 20, 30, 40, 50, 250)
OTHER = png(10, 20, 200)


def test_an_expired_photo_is_opened_again_and_sent_inline(either: Any, server: FakeServer) -> None:
    photo = either.open(BOAT)
    server.expire()
    assert photo.edit().set("night", 1).report().outcomes[0].achieved_scaled == pytest.approx(1.0)
    assert server.names() == ["OpenImage", "EditImage", "OpenImage", "EditImage"]
    reopened, retried = server.calls[2][1], server.calls[3][1]
    assert reopened.input.image == BOAT, "from the kept bytes"
    assert retried.input.WhichOneof("source") == "embeds"


def test_a_server_that_never_finds_an_id_is_asked_once_and_then_sent_values(either: Any, server: FakeServer) -> None:
    server.remembers = False
    photo = either.open(BOAT)
    photo.edit().set("night", 1).render(seed=1)
    photo.edit().set("fog", 1).report()
    assert server.names() == ["OpenImage", "EditImage", "OpenImage", "EditImage", "EditImage"]


def test_both_photos_of_a_transfer_and_a_difference_are_healed(either: Any, server: FakeServer) -> None:
    photo, other = either.open(BOAT), either.open(OTHER)
    server.expire()
    assert len(either.diff(photo, other).features)
    server.expire()
    assert either.transfer(photo, other).edits
    assert either.features.search(photo)
    assert server.names().count("OpenImage") == 4


def test_one_photo_used_twice_is_opened_again_once(either: Any, server: FakeServer) -> None:
    photo = either.open(BOAT)
    server.expire()
    assert either.diff(photo, photo).features == ()
    assert server.names().count("OpenImage") == 2


def test_a_search_by_an_expired_photo_is_healed(either: Any, server: FakeServer) -> None:
    photo = either.open(BOAT)
    server.expire()
    assert [feature.index for feature in either.features.search(photo)] == [0, 1, 2, 3, 4, 5]


def test_an_embedding_opened_without_a_picture_is_healed_from_its_values(either: Any, server: FakeServer) -> None:
    photo = either.open_embeds(np.eye(512)[3])
    server.expire()
    assert photo.edit().ablate(3).report().embeds[3] == pytest.approx(0.0)


def test_a_server_with_other_models_is_not_sent_features_that_mean_something_else(
    either: Any, server: FakeServer
) -> None:
    photo = either.open(BOAT)
    server.expire()
    server.revisions["sae"] = "sae1"
    with pytest.raises(faceteer.RevisionMismatchError, match="open the picture again") as raised:
        either.diff(photo, photo)
    assert (raised.value.part, raised.value.expected, raised.value.actual) == ("sae", "sae0", "sae1")
    with pytest.raises(faceteer.RevisionMismatchError) as raised:
        photo.edit().set(3, 1).report()
    assert (raised.value.part, raised.value.expected, raised.value.actual) == ("sae", "sae0", "sae1")


def test_an_edit_is_refused_by_a_server_whose_features_changed_though_the_embedding_is_still_there(
    either: Any, server: FakeServer
) -> None:
    photo = either.open(BOAT)
    server.revisions["sae"] = "sae1"
    with pytest.raises(faceteer.RevisionMismatchError):
        photo.edit().set(3, 1).render(seed=1)
