"""Edits: building them, reports, pictures, events, transfers, differences."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import faceteer
import numpy as np
import pytest
from unit.sdk.fake_server import FakeServer, Fault, png

BOAT = png(10, 20, 30, 40, 50, 250, 0, 0, 80)
OTHER = png(10, 20, 200, 40, 50, 0, 0, 0, 80)


def test_a_builder_never_changes_what_it_was_called_on(client: faceteer.Client) -> None:
    bare = client.open(BOAT).edit()
    night = bare.set("night", 1.0)
    both = night.ablate("snow")
    assert (len(bare.edits), len(night.edits), len(both.edits)) == (0, 1, 2)
    assert both.without("NIGHT").edits == bare.ablate("snow").edits
    assert str(both.add(412, 0.5).scale(7, 2).switch("fog")) == (
        "set night to 1; ablate snow; add 0.5 to #412; scale #7 by 2; switch to fog at 1"
    )


def test_every_operation_travels_as_it_was_said(either: Any, server: FakeServer) -> None:
    edit = either.open(BOAT).edit()
    edit.set("night", 1).add(5, -0.5, unit="raw").scale(1, 2).ablate(2).switch("fog", 0.5).report()
    sent = list(server.calls[-1][1].edits)
    assert [(e.operation, e.value, e.unit) for e in sent] == [
        (1, 1.0, 1),
        (2, -0.5, 2),
        (3, 2.0, 1),
        (4, 0.0, 1),
        (5, 0.5, 1),
    ]
    assert [e.feature.label or e.feature.index for e in sent] == ["night", 5, 1, 2, "fog"]


def test_a_report_says_before_requested_and_achieved(either: Any) -> None:
    report = either.open(BOAT).edit().set("night", 1.0).switch("day", 0.5).report()
    night = report.outcomes[0]
    assert (night.index, night.label, night.operation) == (3, "night", "set")
    assert (night.before_scaled, night.requested_scaled, night.achieved_scaled) == pytest.approx((40 / 510, 1.0, 1.0))
    assert (night.before, night.requested, night.achieved) == pytest.approx((40 / 255, 2.0, 2.0))
    assert report.measured
    assert report.drift == pytest.approx(0.05)
    assert [edit.feature for edit in report.edits] == [3, 4], "labels are resolved"
    assert report.embeds[3] == pytest.approx(2.0)


def test_a_switch_reports_the_rivals_it_turned_off(client: faceteer.Client) -> None:
    report = client.open(BOAT).edit().switch("night", 1.0).report()
    rival = report.outcomes[1]
    assert (rival.name, rival.operation, rival.rival_of, rival.requested) == ("day", "ablate", 3, 0.0)
    assert "rival of #3" in str(report)
    assert [outcome.index for outcome in report.outcomes] == [3, 4, 15]
    assert "#15" not in str(report), "it did not fire before either"
    assert "1 rival was off already." in str(report)
    assert "1 rival was off already." in report._repr_html_()


def test_a_report_prints_as_an_aligned_table(client: faceteer.Client) -> None:
    text = str(client.open(BOAT).edit().set("night", 1.0).ablate("snow").add(412, 0.5).report())
    assert text.splitlines()[2:7] == [
        "feature  label  operation  before  requested  achieved",
        "───────  ─────  ─────────  ──────  ─────────  ────────",
        "#3       night  set          0.08       1.00      1.00",
        "#5       snow   ablate       0.49       0.00      0.00",
        "#412            add          0.00       0.50      0.50",
    ]
    assert "Drift of the features that were not edited: 5.0%" in text


def test_a_report_shows_itself_as_html_with_labels_escaped(client: faceteer.Client) -> None:
    html = client.open(BOAT).edit().set(13, 1.0).report()._repr_html_()
    assert "&lt;b&gt;label&lt;/b&gt;" in html
    assert "<b>label" not in html


def test_a_report_without_measuring_says_so(either: Any, server: FakeServer) -> None:
    edit = either.open(BOAT).edit().set("night", 1.0)
    report = edit.report(measure=False)
    assert (report.measured, report.drift, report.outcomes[0].achieved) == (False, None, None)
    assert "not measured" in str(report)
    assert edit.report().measured, "measuring later asks again"
    assert server.names().count("EditImage") == 2


def test_what_was_measured_is_not_measured_again(either: Any, server: FakeServer) -> None:
    edit = either.open(BOAT).edit().set("night", 1.0)
    assert edit.report().measured
    edit.render(seed=7)
    assert server.calls[-1][1].skip_measuring
    assert edit.report().measured, "what is known is not lost"


def test_what_is_known_is_not_asked_again(either: Any, server: FakeServer) -> None:
    edit = either.open(BOAT).edit().set("night", 1.0)
    edit.render(seed=7)
    edit.report()
    edit.recipe()
    assert server.names() == ["OpenImage", "EditImage"]


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda e: e.set("night", float("nan")), "value: nan is not a finite float32"),
        (lambda e: e.set("night", 1e39), "not a finite float32"),
        (lambda e: e.set("night", "1"), "value: '1' is not a number"),
        (lambda e: e.set("night", True), "not a number"),
        (lambda e: e.set("", 1), "an empty label"),
        (lambda e: e.set(-1, 1), "indices are whole numbers from 0"),
        (lambda e: e.set(1.5, 1), "neither an index nor a label"),
        (lambda e: e.set("night", 1, unit="percent"), "one of scaled, raw"),
        (lambda e: e.using(seed=1, seeds=[2]), "given together with seeds"),
        (lambda e: e.using(seeds=[]), "seeds: is empty"),
        (lambda e: e.using(seed=-1), "not a whole number from 0"),
        (lambda e: e.using(seed=2**64), "not a whole number from 0"),
        (lambda e: e.using(steps=0), "steps"),
        (lambda e: e.using(steps=2.5), "not a whole number"),
        (lambda e: e.using(size=(1, 2, 3)), "neither a number of pixels"),
        (lambda e: e.using(size="64"), "size"),
        (lambda e: e.using(scheduler="euler"), "one of ddpm, ddim"),
        (lambda e: e.using(guidance_scale=float("inf")), "guidance_scale"),
    ],
)
def test_an_edit_that_makes_no_sense_is_refused_where_it_is_written(
    client: faceteer.Client, server: FakeServer, build: Any, says: str
) -> None:
    edit = client.open(BOAT).edit()
    with pytest.raises(faceteer.InvalidArgumentError, match=says):
        build(edit)
    assert server.names() == ["OpenImage"]


def test_a_picture_is_drawn_with_its_seed_and_carries_what_it_takes_to_draw_it_again(either: Any) -> None:
    edit = either.open(BOAT).edit().set("night", 0.25)
    picture = edit.render(seed=7, steps=3, size=(16, 8), guidance_scale=1.5, scheduler="ddpm")
    assert picture.size == (16, 8)
    assert picture.getpixel((0, 0))[0] == 7
    assert picture.info["seed"] == 7
    assert picture.info["revisions"]["encoder"] == "enc0"
    recipe = faceteer.Recipe.from_json(picture.info["recipe"])
    assert recipe == edit.recipe()
    assert recipe.settings == faceteer.Settings((7,), 3, 1.5, (16, 8), "ddpm")


def test_several_seeds_draw_several_pictures_in_their_order(either: Any) -> None:
    pictures = either.open(BOAT).edit().render(seeds=[3, 1, 2])
    assert [picture.info["seed"] for picture in pictures] == [3, 1, 2]
    assert [picture.getpixel((0, 0))[0] for picture in pictures] == [3, 1, 2]


def test_without_a_seed_the_server_picks_and_the_recipe_keeps_it(either: Any, server: FakeServer) -> None:
    edit = either.open(BOAT).edit()
    assert edit.render().info["seed"] == server.picked_seed
    assert edit.recipe().settings.seeds == (server.picked_seed,)


def test_an_edits_own_settings_hold_unless_render_says_otherwise(either: Any, server: FakeServer) -> None:
    edit = either.open(BOAT).edit().using(seeds=[5, 6], steps=2)
    assert edit.render().info["seed"] == 5, "one picture, the first seed"
    assert list(server.calls[-1][1].settings.seeds) == [5], "and no other is drawn"
    assert edit.render(seed=9).info["seed"] == 9
    assert [picture.info["seed"] for picture in edit.render(seeds=edit.settings.seeds)] == [5, 6]
    assert faceteer.Recipe.from_json(edit.render(steps=3).info["recipe"]).settings.steps == 3


def test_progress_and_previews_reach_the_caller(either: Any) -> None:
    seen: list[tuple[int, int | None]] = []
    previews: list[faceteer.Preview] = []
    either.open(BOAT).edit().render(
        seeds=[1, 2],
        steps=4,
        progress=lambda done, total: seen.append((done, total)),
        previews=previews.append,
        preview_every=2,
    )
    assert seen == [(n, 8) for n in range(1, 9)]
    assert [(preview.index, preview.step) for preview in previews] == [(0, 2), (1, 2)]
    assert previews[1].image.getpixel((0, 0))[0] == 2


async def test_callbacks_of_the_asyncio_client_may_be_coroutine_functions(
    async_client: faceteer.AsyncClient,
) -> None:
    seen = []

    async def note(done: int, total: int | None) -> None:
        seen.append(done)

    photo = await async_client.open(BOAT)
    await photo.edit().render(seed=1, steps=3, progress=note)
    assert seen == [1, 2, 3]


def test_an_error_in_a_callback_reaches_the_caller_and_stops_the_drawing(either: Any, server: FakeServer) -> None:
    server.step_seconds = 0.02

    def refuse(preview: faceteer.Preview) -> None:
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        either.open(BOAT).edit().render(seed=1, steps=100, previews=refuse, preview_every=1)
    assert server.cancelled.wait(3)
    assert server.steps_done < 50


def test_events_tell_the_whole_story_in_order(either: Any) -> None:
    events = list(either.open(BOAT).edit().set("night", 1).events(seed=1, steps=2))
    kinds = [type(event).__name__ for event in events]
    assert kinds == ["Edited", "Queued", "Started", "Progress", "Progress", "Drawn", "Finished"]
    assert events[2].settings.seeds == (1,)


def test_leaving_the_loop_over_events_stops_the_drawing(either: Any, server: FakeServer) -> None:
    server.step_seconds = 0.02
    events = either.open(BOAT).edit().events(seed=1, steps=100)
    for event in events:
        if isinstance(event, faceteer.Progress):
            break
    events.close()
    assert server.cancelled.wait(3)


async def test_cancelling_the_task_stops_the_drawing(async_client: faceteer.AsyncClient, server: FakeServer) -> None:
    server.step_seconds = 0.02
    photo = await async_client.open(BOAT)
    drawing = asyncio.Event()
    render = photo.edit().render(seed=1, steps=100, progress=lambda done, total: drawing.set())
    task = asyncio.create_task(render)
    await drawing.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(server.cancelled.wait, 3)


def test_a_deadline_stops_the_drawing(either: Any, server: FakeServer) -> None:
    server.step_seconds = 0.05
    photo = either.open(BOAT)
    with pytest.raises(faceteer.DeadlineExceededError):
        photo.edit().render(seed=1, steps=100, timeout=0.3)
    assert server.cancelled.wait(3)


def test_a_stream_that_breaks_is_taken_up_again_without_drawing_twice_what_is_there(
    either: Any, server: FakeServer
) -> None:
    # edited, queued, started, 2 x progress, image of seed 11: then the connection breaks.
    server.fail("EditImage", Fault("UNAVAILABLE", after=6))
    edit = either.open(BOAT).edit().set("night", 1)
    kinds, drawn = [], []
    for event in edit.events(seeds=[11, 12, 13], steps=2):
        kinds.append(type(event).__name__)
        if isinstance(event, faceteer.Drawn):
            drawn.append((event.index, event.seed))
    assert drawn == [(0, 11), (1, 12), (2, 13)]
    assert kinds.count("Edited") == kinds.count("Started") == kinds.count("Finished") == 1
    again = server.calls[-1][1]
    assert list(again.settings.seeds) == [12, 13]
    assert again.skip_measuring, "the report is there already"
    assert edit.report().measured


def test_a_retry_keeps_the_seed_that_the_server_had_picked(either: Any, server: FakeServer) -> None:
    server.fail("EditImage", Fault("UNAVAILABLE", after=4))
    edit = either.open(BOAT).edit()
    first = server.picked_seed
    events = edit.events(steps=2)
    for event in events:
        if isinstance(event, faceteer.Started):
            server.picked_seed = 99
        if isinstance(event, faceteer.Drawn):
            assert event.seed == first
    assert list(server.calls[-1][1].settings.seeds) == [first]


def test_a_farewell_lost_after_the_last_picture_is_no_failure(either: Any, server: FakeServer) -> None:
    server.fail("EditImage", Fault("UNAVAILABLE", after=6))
    assert either.open(BOAT).edit().render(seed=5, steps=2).info["seed"] == 5
    assert server.names().count("EditImage") == 1


def test_a_defect_of_the_servers_carries_its_request_id(either: Any, server: FakeServer) -> None:
    server.fail("EditImage", Fault("INTERNAL", "INTERNAL", after=3))
    with pytest.raises(faceteer.InternalError) as raised:
        either.open(BOAT).edit().render(seed=1)
    assert raised.value.request_id == "request-1"


def test_a_transfer_is_an_edit_with_its_report(either: Any, server: FakeServer) -> None:
    photo, other = either.open(BOAT), either.open(OTHER)
    edit = either.transfer(photo, other, coverage=0.5)
    assert edit.coverage is not None
    assert edit.coverage >= 0.5
    assert [(e.feature, e.label, e.operation, e.unit) for e in edit.edits] == [(5, "snow", "add", "raw")]
    calls = len(server.calls)
    assert edit.report().outcomes[0].achieved == pytest.approx(0.0)
    assert len(server.calls) == calls, "the report came with the transfer"
    assert edit.render(seed=3).info["seed"] == 3


def test_the_report_says_what_each_finished_picture_shows_beside_what_the_embedding_holds(either: Any) -> None:
    edit = either.open(png(9)).edit().set("night", 1.0).ablate("snow")
    edit.render(seed=7, steps=1)
    assert edit.report().pictures == ()
    edit.render(seed=7, steps=1, measure=True)
    (picture,) = edit.report().pictures
    assert (picture.seed, picture.scaled) == (7, (0.5, 0.0))
    assert edit.report().header[-3:] == ("requested", "achieved", "picture")
    assert edit.report().rows()[0][-3:] == ["1.00", "1.00", "0.50"]
    assert "picture" in str(edit.report())
    edit.render(seeds=[3, 4], steps=1, measure=True)
    assert [picture.seed for picture in edit.report().pictures] == [3, 4]
    assert edit.report().header[-2:] == ("seed 3", "seed 4")
    assert [one["seed"] for one in edit.report().to_dict()["pictures"]] == [3, 4]
    assert "seed 4" in edit._repr_html_()


def test_a_transfer_lists_its_parts_and_takes_some(either: Any) -> None:
    photo, other = either.open(png(9)), either.open(png(0, 0, 0, 90, 0, 60))
    whole = either.transfer(photo, other, coverage=1.0)
    assert {part.taken for part in whole.parts} == {True}
    first = whole.parts[0]
    for named in ([first.index], first.label or [first.index]):
        some = either.transfer(photo, other, coverage=1.0, only=named)
        assert [edit.feature for edit in some.edits] == [first.index]
        rest = either.transfer(photo, other, coverage=1.0, without=named)
        assert first.index not in {edit.feature for edit in rest.edits}
        assert [part.index for part in rest.parts if not part.taken] == [first.index]
    assert photo.edit().parts == ()


def test_a_transfer_can_be_against_a_third_picture(client: faceteer.Client) -> None:
    photo, other, reference = (client.open(png(*b)) for b in ((9, 9), (0, 0, 90), (0, 0, 30)))
    edit = client.transfer(photo, other, reference=reference)
    assert [(e.feature, e.value) for e in edit.edits] == [(2, pytest.approx(60 / 255))]


def test_a_difference_names_its_features_and_can_be_applied(either: Any, server: FakeServer) -> None:
    photo, other = either.open(BOAT, max_features=1), either.open(OTHER, max_features=1)
    difference = either.diff(photo, other, coverage=1.0)
    assert [feature.name for feature in difference.features] == ["snow", "#2"]
    assert difference.features[0].change == pytest.approx(-250 / 255)
    assert difference.differing_features == 2
    assert "2 of 2 differing features carry 100%" in str(difference)
    assert "<table>" in difference._repr_html_()
    report = photo.edit(difference).report()
    np.testing.assert_allclose(report.embeds, other.embeds, atol=1e-6)


@pytest.mark.parametrize("wrong", [{"coverage": 0}, {"coverage": 1.1}, {"max_edits": 0}])
def test_a_share_that_is_none_is_refused(client: faceteer.Client, wrong: dict[str, Any]) -> None:
    photo = client.open(BOAT)
    with pytest.raises(faceteer.InvalidArgumentError, match=next(iter(wrong))):
        client.diff(photo, photo, **wrong)
    with pytest.raises(faceteer.InvalidArgumentError, match=next(iter(wrong))):
        client.transfer(photo, photo, **wrong)


def test_edits_from_a_list_and_nothing_else(client: faceteer.Client) -> None:
    photo = client.open(BOAT)
    edits = [faceteer.FeatureEdit("night", "set", 1.0), faceteer.FeatureEdit(5, "ablate")]
    assert photo.edit(edits).edits == tuple(edits)
    assert photo.edit().extend(edits).edits == tuple(edits)
    with pytest.raises(faceteer.InvalidArgumentError, match="neither a Recipe"):
        photo.edit(["night"])  # type: ignore[list-item]


def test_a_bar_is_drawn_on_a_terminal_and_only_there(
    client: faceteer.Client, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    edit = client.open(BOAT).edit()
    edit.render(seed=1, progress=True)
    assert capfd.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setitem(__import__("sys").modules, "rich.progress", None)
    edit.render(seed=1, progress=True)
    written = capfd.readouterr().err
    assert "drawing 4/4" in written
    assert written.endswith("\r"), "the line is wiped"


def test_one_client_serves_many_threads(client: faceteer.Client) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        photos = list(pool.map(lambda n: client.open(png(n)), range(1, 33)))
    assert [round(float(photo.embeds[0] * 255)) for photo in photos] == list(range(1, 33))


def test_closing_the_client_ends_what_is_under_way(server: FakeServer) -> None:
    server.step_seconds = 0.02
    client = faceteer.connect(server.address)
    events = client.open(BOAT).edit().events(seed=1, steps=200)
    while not isinstance(next(events), faceteer.Progress):
        pass
    client.close()
    with pytest.raises(faceteer.CancelledError), contextlib.closing(events):  # type: ignore[type-var]
        list(events)
    assert server.cancelled.wait(3)


def test_share_and_most_edits_travel_and_leaving_them_out_leaves_them_to_the_server(
    either: Any, server: FakeServer
) -> None:
    photo, other = either.open(png(1, 2, 3)), either.open(png(9, 9, 90))
    assert len(either.diff(photo, other, coverage=1.0, max_edits=2)) == 2
    assert (server.calls[-1][1].coverage, server.calls[-1][1].max_edits) == (1.0, 2)
    assert len(either.transfer(photo, other, coverage=1.0, max_edits=1).edits) == 1
    either.diff(photo, other)
    assert (server.calls[-1][1].coverage, server.calls[-1][1].max_edits) == (pytest.approx(0.9), 0)
    difference = either.diff(photo, other, coverage=1.0, max_edits=1)
    assert (difference.features[0].source, difference.features[0].target) == pytest.approx((3 / 255, 90 / 255))


def test_four_small_pictures_are_kept_of_a_drawing(client: faceteer.Client) -> None:
    edit = client.open(BOAT).edit()
    edit.render(seeds=range(6))
    assert [seed for seed, _ in edit._plan.outcome.pictures] == [0, 1, 2, 3]
    assert edit.set("night", 1)._plan.outcome.pictures == ()


def test_previews_come_every_five_steps_unless_said_otherwise_and_only_when_wanted(
    either: Any, server: FakeServer
) -> None:
    edit = either.open(BOAT).edit()
    edit.render(seed=1, previews=lambda preview: None)
    assert server.calls[-1][1].preview_every == 5
    edit.render(seed=1)
    assert server.calls[-1][1].preview_every == 0
    with pytest.raises(faceteer.InvalidArgumentError, match="preview_every"):
        list(edit.events(preview_every=-1))


def test_an_edit_says_which_models_it_was_made_for(either: Any, server: FakeServer) -> None:
    either.open(BOAT).edit().report()
    sent = server.calls[-1][1].expected_revisions
    assert (sent.encoder, sent.sae, sent.generator) == ("enc0", "sae0", "")
    recipe = faceteer.Recipe((faceteer.FeatureEdit(3, "ablate"),), faceteer.Revisions(generator="gen0"))
    either.open(BOAT).edit(recipe).render(seed=1)
    sent = server.calls[-1][1].expected_revisions
    assert (sent.encoder, sent.sae, sent.generator) == ("enc0", "sae0", "gen0")


def test_a_difference_names_what_the_caller_may_see_and_leaves_gated_features_without_a_name(
    either: Any, server: FakeServer
) -> None:
    photo, other = either.open(BOAT, max_features=1), either.open(png(0, 0, 0, 90, 0, 0), max_features=1)
    server.gated = frozenset({4})
    difference = either.diff(photo, other, coverage=1.0)
    names = {feature.index: feature.name for feature in difference.features}
    assert (names[3], names[4], names[5]) == ("night", "#4", "snow")
    assert server.names().count("BatchGetFeatures") == 1
    with pytest.raises(faceteer.UnknownFeatureError):
        either.features.many([3, 4])


def test_a_second_edit_of_a_feature_takes_the_firsts_place(either: Any) -> None:
    edit = either.open(BOAT).edit().set("night", 1).set("snow", 1).switch("Night", 0.5).set(np.int64(3), 1).ablate(3)
    assert [str(one) for one in edit.edits] == ["switch to Night at 0.5", "set snow to 1", "ablate #3"]
