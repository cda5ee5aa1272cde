"""Values by themselves, without a server: messages in, values out, and what becomes of an edit's stream."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import faceteer
import numpy as np
import pytest
from faceteer._models.edit_stream import EditStream
from faceteer._models.events import Drawn, Edited, Finished, Preview, Progress, Queued, Started
from faceteer._models.fired import FiredFeature, FiredFeatures
from faceteer._models.photo import OpenedPhoto
from faceteer._models.plan import EditPlan
from faceteer._models.report import EditReport
from faceteer._models.tables import text_table, width
from faceteer._models.tensors import to_array, to_tensor
from faceteer._models.wire import copied, number, word
from faceteer.v1 import edits_pb2, generator_pb2, studio_pb2, tensor_pb2
from PIL import Image


def test_what_the_sdk_hands_out_cannot_be_changed() -> None:
    for name in faceteer.__all__:
        kind = getattr(faceteer, name)
        if dataclasses.is_dataclass(kind):
            assert kind.__dataclass_params__.frozen, name  # type: ignore[attr-defined]


# -- messages to values --------------------------------------------------------------------------------------


def test_enums_and_words_are_each_others_inverse() -> None:
    assert word(edits_pb2.EditOperation, edits_pb2.EDIT_OPERATION_SET) == "set"
    for value in edits_pb2.EditOperation.values():
        assert number(edits_pb2.EditOperation, word(edits_pb2.EditOperation, value)) == value
    with pytest.raises(ValueError, match="EDIT_OPERATION_PAINT"):
        number(edits_pb2.EditOperation, "paint")


def test_a_field_of_the_same_name_is_copied_and_an_absent_one_is_none_not_zero() -> None:
    message = edits_pb2.EditOutcome(feature_index=3, label="night", before=1.0, rival_of=0)
    outcome = copied(faceteer.EditOutcome, message, index=message.feature_index, operation="ablate")
    assert (outcome.index, outcome.label, outcome.before, outcome.requested) == (3, "night", 1.0, 0.0)
    assert (outcome.achieved, outcome.rival_of) == (None, 0)


def test_tensors_come_in_both_widths_read_only_and_broken_ones_are_the_servers_fault() -> None:
    half = np.array([1.5, -2.0], "<f2")
    tensor = tensor_pb2.Tensor(element_type=tensor_pb2.ELEMENT_TYPE_FLOAT16, shape=[2], data=half.tobytes())
    array = to_array(tensor)
    assert (array.dtype, array.tolist(), array.flags.writeable) == (np.float32, [1.5, -2.0], False)
    tensor.data += b"\0"
    with pytest.raises(faceteer.InternalError, match="5 bytes"):
        to_array(tensor)
    assert to_array(to_tensor(np.array([1, 2], np.int64))).tolist() == [1.0, 2.0]
    for wrong in (np.array([]), np.ones((1, 2)), np.array(["a"]), np.array([np.inf])):
        with pytest.raises(faceteer.InvalidArgumentError) as raised:
            to_tensor(wrong)
        assert raised.value.field == "embeds"


# -- a picture's features ------------------------------------------------------------------------------------


def test_features_are_found_by_index_and_by_label_in_any_case() -> None:
    features = FiredFeatures([FiredFeature(3, "Night", 2.0, 1.0, 0.1), FiredFeature(7, "", 1.0, 0.0, 0.2)], l0=3)
    assert features.find("nIGHT") == features.find(3) == features[0]
    assert (features.find("fog"), features.find(8), features.activation(7), features.activation(8)) == (
        None,
        None,
        1.0,
        0,
    )
    assert (features.complete, FiredFeatures(features, l0=2).complete) == (False, True)
    assert (features.top(1), list(features.top(-1)), features.top(9)) == (features[:1], [], features)
    assert str(features[0]) == "Night 1.00"
    assert str(features[1]) == "#7 1.00", "without statistics, the activation"
    assert repr(features) == "<3 features: Night 1.00, #7 1.00>"


def test_twenty_features_are_printed_and_the_rest_counted() -> None:
    features = FiredFeatures([FiredFeature(n, "", 1.0, 1.0, 0.1) for n in range(21)], l0=21)
    lines = str(features).splitlines()
    assert len(lines) == 2 + 20 + 1
    assert lines[-1] == "… and 1 more"
    assert "more" not in str(FiredFeatures(features[:20], l0=20))
    assert repr(FiredFeatures(features[:4], l0=4)).count("…") == 0
    assert repr(FiredFeatures(features[:5], l0=5)).count("…") == 1


def test_columns_line_up_also_where_characters_are_wide_or_combine() -> None:
    assert (width("ab"), width("雪夜"), width("e\u0301")) == (2, 4, 1)
    table = text_table(("label", "n"), [("雪", "1"), ("snow", "10")], left=1)
    assert table.splitlines() == ["label   n", "─────  ──", "雪      1", "snow   10"]


# -- reports -------------------------------------------------------------------------------------------------


def outcome(**given: Any) -> edits_pb2.EditOutcome:
    return edits_pb2.EditOutcome(feature_index=3, operation=edits_pb2.EDIT_OPERATION_SET, **given)


def report(*outcomes: edits_pb2.EditOutcome, **given: Any) -> EditReport:
    message = studio_pb2.Edited(report=edits_pb2.EditReport(outcomes=outcomes, **given))
    message.embedding.embeds.CopyFrom(to_tensor(np.ones(2)))
    return EditReport.from_edited(message)


def test_a_report_is_in_raw_units_without_statistics_and_scaled_with() -> None:
    raw = report(outcome(before=1.0, requested=1234.5))
    assert (raw.scaled, raw.rows()[0][3:]) == (False, ["1.00", "1234", "–"])
    assert "activations raw" in raw.title()
    scaled = report(outcome(before=1.0, requested_scaled=0.5, achieved_scaled=-0.001))
    assert (scaled.scaled, scaled.rows()[0][3:]) == (True, ["0.00", "0.50", "0.00"])
    assert "99th percentile" in scaled.title()


def test_rivals_that_were_off_and_stayed_off_are_counted_and_those_that_came_on_are_shown() -> None:
    off, on = outcome(rival_of=9), outcome(rival_of=9, achieved=0.5)
    both = report(off, off, on)
    assert [one.achieved for one in both.shown] == [0.5]
    assert both.silent_sentence() == ["2 rivals were off already."]
    assert report(off).silent_sentence() == ["1 rival was off already."]
    assert report(on).silent_sentence() == []
    assert both.rows()[0][2] == "rival of #9"


def test_five_drifted_features_are_shown_and_no_drift_is_not_unknown_drift() -> None:
    drifted = [edits_pb2.FeatureDrift(feature_index=n, before=n, after=n + 1) for n in range(7)]
    measured = report(measured=True, drift=0.0, drifted=drifted)
    assert [row[0] for row in measured.drifted_rows()] == ["#0", "#1", "#2", "#3", "#4"]
    assert measured.drifted_rows(1) == [["#0", "", "0.00", "1.00"]]
    assert measured.drift_sentence().startswith("Drift of the features that were not edited: 0.0%; moved most")
    assert report(measured=True).drift_sentence().endswith("0.0%.")
    assert report(drift=0.5).drift is None, "what was not measured is not reported"


# -- an edit's stream ----------------------------------------------------------------------------------------


def photo(**given: Any) -> OpenedPhoto:
    return OpenedPhoto.from_proto(opened(**given), name="boat.png", data=b"file")


def opened(**given: Any) -> studio_pb2.OpenImageResponse:
    message = studio_pb2.OpenImageResponse(**given)
    message.embedding.embedding_id = "id"
    message.embedding.embeds.CopyFrom(to_tensor(np.ones(2)))
    return message


def message(**event: Any) -> studio_pb2.EditImageResponse:
    return studio_pb2.EditImageResponse(**event)


def edited(*, measured: bool = True) -> studio_pb2.EditImageResponse:
    answer = message(edited=studio_pb2.Edited(report=edits_pb2.EditReport(measured=measured)))
    answer.edited.embedding.embeds.CopyFrom(to_tensor(np.ones(2)))
    return answer


def started(*seeds: int) -> studio_pb2.EditImageResponse:
    settings = generator_pb2.GenerationSettings(steps=2, width=8, height=8)
    return message(started=generator_pb2.Started(seeds=seeds, settings=settings))


def image(index: int, seed: int) -> studio_pb2.EditImageResponse:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return message(image=generator_pb2.Image(index=index, seed=seed, data=buffer.getvalue()))


def stream(*seeds: int, plan: EditPlan | None = None, **given: Any) -> EditStream:
    return EditStream(plan or EditPlan(photo()), faceteer.Settings(seeds), **{"measure": True, **given})


def test_a_second_try_asks_for_what_is_missing_and_its_indices_are_those_of_the_whole() -> None:
    edit = stream(11, 12, 13)
    assert list(edit.request().settings.seeds) == [11, 12, 13]
    events = [edit.take(one) for one in (edited(), started(11, 12, 13), image(1, 12))]
    assert [type(event) for event in events] == [Edited, Started, Drawn]
    again = edit.request()
    assert (list(again.settings.seeds), again.skip_measuring) == ([11, 13], True)
    assert edit.take(edited()) is edit.take(started(11, 13)) is None, "told already"
    assert edit.take(message(progress=generator_pb2.Progress(index=1, step=1, steps=2))) == Progress(2, 1, 2)
    preview = generator_pb2.Preview(index=0, step=1, data=image(0, 1).image.data)
    told = edit.take(message(preview=preview))
    assert isinstance(told, Preview)
    assert (told.index, told.step) == (0, 1)
    assert not edit.complete
    drawn = [edit.take(image(0, 11)), edit.take(image(1, 13))]
    assert [(one.index, one.seed) for one in drawn if isinstance(one, Drawn)] == [(0, 11), (2, 13)]
    assert edit.complete, "though the farewell has not come"


def test_a_stream_is_complete_with_its_farewell_its_last_picture_or_its_report_alone() -> None:
    edit = stream(1)
    assert not edit.complete
    edit.take(edited())
    assert not edit.complete
    assert edit.take(message(queued=generator_pb2.Queued(position=4))) == Queued(4)
    edit.take(started())
    assert not edit.complete, "no seed, no picture, and no end either"
    assert isinstance(edit.take(message(finished=generator_pb2.Finished())), Finished)
    assert edit.complete
    only = stream(report_only=True)
    assert only.request().report_only
    only.take(edited())
    assert only.complete


def test_a_server_that_draws_before_it_reports_is_at_fault() -> None:
    with pytest.raises(faceteer.InternalError, match="sent queued before edited"):
        stream(1).take(message(queued=generator_pb2.Queued()))


def test_a_measured_report_is_never_replaced_by_one_that_is_not() -> None:
    plan = EditPlan(photo())
    stream(1, plan=plan).take(edited(measured=True))
    stream(1, plan=plan, measure=False).take(edited(measured=False))
    assert plan.outcome.report is not None
    assert plan.outcome.report.measured
    other = EditPlan(photo())
    stream(1, plan=other).take(edited(measured=False))
    stream(1, plan=other).take(edited(measured=True))
    assert other.outcome.report is not None
    assert other.outcome.report.measured


def test_measuring_is_skipped_only_where_it_was_not_asked_for() -> None:
    assert stream(1, measure=False).request().skip_measuring
    assert not stream(1, measure=True).request().skip_measuring
    assert stream(1, preview_every=3).request().preview_every == 3
    with pytest.raises(faceteer.InvalidArgumentError, match="preview_every: -1"):
        stream(1, preview_every=-1)


def test_a_photo_is_named_by_its_id_until_it_was_opened_again() -> None:
    one = photo(l0=2)
    assert one.image_input().embedding_id == one.embeds_input().embedding_id == "id"
    answer = opened()
    answer.embedding.embedding_id = "new"
    answer.embedding.embeds.CopyFrom(to_tensor(np.array([5.0, 6.0])))
    one.reopened(answer)
    assert one.embedding_id == "new"
    assert one.inline
    for source in (one.image_input(), one.embeds_input()):
        assert to_array(source.embeds).tolist() == [5.0, 6.0]
    assert one.source.image == b"file"


@pytest.mark.parametrize("part", ["encoder", "sae"])
def test_a_photo_is_not_opened_again_by_other_models(part: str) -> None:
    before, after = opened(), opened()
    setattr(before.revisions, part, "a")
    setattr(after.revisions, part, "b")
    one = OpenedPhoto.from_proto(before, name="boat.png")
    with pytest.raises(faceteer.RevisionMismatchError, match=f"{part} revision a, but the server runs b") as raised:
        one.reopened(after)
    assert (raised.value.part, raised.value.expected, raised.value.actual) == (part, "a", "b")
    assert not one.inline
    setattr(after.revisions, part, "")
    one.reopened(after)
    assert one.inline, "a server that does not say is believed"


@pytest.mark.parametrize(
    ("name", "lowest", "highest"), [("steps", 1, 2**32 - 1), ("seed", 0, 2**64 - 1), ("size", 1, 2**32 - 1)]
)
def test_numbers_are_taken_up_to_their_bounds(name: str, lowest: int, highest: int) -> None:
    for value in (lowest, highest):
        faceteer.Settings.of(**{name: value})  # type: ignore[arg-type]
    for value in (lowest - 1, highest + 1):
        with pytest.raises(faceteer.InvalidArgumentError, match=name):
            faceteer.Settings.of(**{name: value})  # type: ignore[arg-type]


def test_a_strength_of_one_is_taken_and_settings_laid_over_others_win_where_they_are_given() -> None:
    whole = faceteer.Settings(keep_layout="image_to_image", strength=1)
    assert whole.strength == 1.0
    base = faceteer.Settings((1,), steps=3, guidance_scale=2.0)
    laid = base.overlaid(faceteer.Settings(guidance_scale=0.0))
    assert (laid.seeds, laid.steps, laid.guidance_scale) == ((1,), 3, 0.0), "a zero is given, nothing is not"
    assert whole.overlaid(faceteer.Settings(keep_layout="inversion")).strength is None
    assert whole.overlaid(faceteer.Settings(steps=2)).strength == 1.0


def test_a_servers_zeros_are_its_defaults_and_a_scheduler_from_the_future_is_none() -> None:
    settings = faceteer.Settings.from_proto(generator_pb2.GenerationSettings(width=8, guidance_scale=0.1))
    assert settings == faceteer.Settings(guidance_scale=0.1), "a width alone is no size; 0.1 stays 0.1"
    known = generator_pb2.GenerationSettings(scheduler=generator_pb2.SCHEDULER_LCM, height=4, width=8, steps=1)
    assert faceteer.Settings.from_proto(known) == faceteer.Settings(steps=1, size=(8, 4), scheduler="lcm")
    assert faceteer.Settings(size=(8, 4), scheduler="lcm", steps=1).to_proto() == known
