"""SaeService through a real server and stub: what it answers, what it keeps, and what runs a model."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import pytest
import torch
from faceteer.v1 import edits_pb2, sae_pb2, sae_pb2_grpc, tensor_pb2
from faceteer_runtime.bundle import BundleError, seal
from faceteer_runtime.server import RunningServer, start
from faceteer_sae.model import SparseAutoencoder
from faceteer_sae.service import build
from faceteer_sae.settings import SaeSettings
from files_entered import files_entered
from rpc_errors import read_error, read_item
from tiny_bundle import EMBED_DIM, N_FEATURES, K, _write_sae

SET, ADD, SCALE, ABLATE, SWITCH = range(1, 6)
SCALED, RAW = 1, 2
ENCODER = "0123456789abcdef"


def tensor(x: np.ndarray, dtype: str = "<f4") -> tensor_pb2.Tensor:
    kind = {"<f4": tensor_pb2.ELEMENT_TYPE_FLOAT32, "<f2": tensor_pb2.ELEMENT_TYPE_FLOAT16}[dtype]
    return tensor_pb2.Tensor(element_type=kind, shape=np.shape(x), data=np.asarray(x, dtype).tobytes())


def inline(x: np.ndarray | torch.Tensor) -> tensor_pb2.EmbedsInput:
    return tensor_pb2.EmbedsInput(embeds=tensor(np.asarray(x)))


def named(embedding_id: str) -> tensor_pb2.EmbedsInput:
    return tensor_pb2.EmbedsInput(embedding_id=embedding_id)


def values(message: tensor_pb2.Tensor) -> np.ndarray:
    return np.frombuffer(message.data, {1: "<f4", 2: "<f2"}[message.element_type]).astype(np.float32)


def edit(index: int, operation: int, value: float = 0.0, unit: int = RAW) -> edits_pb2.Edit:
    return edits_pb2.Edit(
        feature=edits_pb2.FeatureRef(index=index),
        operation=operation,  # type: ignore[arg-type]
        value=value,
        unit=unit,  # type: ignore[arg-type]
    )


def edit_request(source: tensor_pb2.EmbedsInput, *edits: edits_pb2.Edit, **more: Any) -> sae_pb2.EditEmbedsRequest:
    return sae_pb2.EditEmbedsRequest(input=source, edits=edits, **more)


async def encode(stub: Any, *xs: Any, **more: Any) -> Any:
    inputs = [x if isinstance(x, tensor_pb2.EmbedsInput) else inline(x) for x in xs]
    return await stub.EncodeFeatures(sae_pb2.EncodeFeaturesRequest(inputs=inputs, **more))


@pytest.fixture(scope="session")
def corpus() -> torch.Tensor:
    """Embeddings to which the tiny SAE is fitted, float32 [256, d], of norms like a real encoder's."""
    generator = torch.Generator().manual_seed(5)
    return 8 * torch.randn(256, EMBED_DIM, generator=generator) + 2


@pytest.fixture(scope="session")
def sae_bundle(tmp_path_factory: pytest.TempPathFactory, corpus: torch.Tensor) -> Path:
    directory = tmp_path_factory.mktemp("sae-bundle")
    _write_sae(directory / "sae", corpus)
    seal(directory, {"name": "only-an-sae", "parts": {"sae": {"kind": "sae", "encoder_revision": ENCODER}}})
    return directory


class Serving:
    """A running server and a stub on it."""

    def __init__(self, server: RunningServer, channel: grpc.aio.Channel) -> None:
        self.server = server
        self.cache = server.resources.cache
        self.stub: Any = sae_pb2_grpc.SaeServiceStub(channel)


@pytest.fixture
async def serve(sae_bundle: Path) -> AsyncIterator[Callable[..., Any]]:
    """Starts a server with the settings given; everything is stopped after the test."""
    started: list[tuple[RunningServer, grpc.aio.Channel]] = []

    async def start_one(**fields: Any) -> Serving:
        server = await start(SaeSettings(**({"listen": "127.0.0.1:0", "bundle": sae_bundle} | fields)), build)
        channel = grpc.aio.insecure_channel(server.address)
        started.append((server, channel))
        return Serving(server, channel)

    yield start_one
    for server, channel in started:
        await channel.close()
        await server.stop(0.0)


@pytest.fixture
async def stub(serve: Callable[..., Any]) -> Any:
    return (await serve()).stub


async def test_the_service_says_what_it_serves_and_its_limits(serve: Callable[..., Any]) -> None:
    serving = await serve(sae_max_batch=7, sae_max_edits=300)
    answer = await serving.stub.GetSae(sae_pb2.GetSaeRequest())
    assert answer.bundle == "only-an-sae"
    assert answer.encoder_revision == ENCODER
    assert len(answer.revision) == 16
    assert (answer.architecture, answer.d_in, answer.d_sae, answer.k) == ("topk", EMBED_DIM, N_FEATURES, K)
    assert (answer.has_statistics, answer.max_batch, answer.max_edits) == (True, 7, 300)


async def test_features_come_strongest_first_in_both_units(stub: Any, corpus: torch.Tensor, sae_bundle: Path) -> None:
    sae = SparseAutoencoder.load(sae_bundle / "sae")
    answer = await encode(stub, corpus[3], corpus[4])
    for x, result in zip(corpus[3:5].numpy(), answer.results, strict=True):
        encoding = result.encoding
        (expected,) = sae.encode(x[None])
        found = dict(zip(encoding.features.indices, encoding.features.activations, strict=True))
        assert found == dict(zip(expected.top_indices.tolist(), expected.top_acts.tolist(), strict=True))
        assert encoding.l0 == len(found)
        assert list(encoding.features.scaled) == sorted(encoding.features.scaled, reverse=True)
        assert encoding.norm == pytest.approx(np.linalg.norm(x), rel=1e-6)
        x_hat = sae.decode(expected.top_indices, expected.top_acts)
        assert encoding.cosine == pytest.approx(x @ x_hat / np.linalg.norm(x) / np.linalg.norm(x_hat), rel=1e-5)
        assert not encoding.warnings
        assert encoding.embedding_id.startswith(ENCODER + "-")
        assert not encoding.HasField("error")
    assert not answer.execution.cached
    assert answer.execution.compute_us > 0
    assert answer.execution.model_revision
    assert answer.execution.request_id


async def test_only_the_strongest_are_returned_but_all_are_counted(stub: Any, corpus: torch.Tensor) -> None:
    every = (await encode(stub, corpus[5])).results[0].encoding
    few = (await encode(stub, corpus[5], max_features=3)).results[0].encoding
    assert list(few.features.indices) == list(every.features.indices)[:3]
    assert few.l0 == every.l0 > 3


async def test_features_and_error_decode_to_the_embedding_in_either_type(stub: Any, corpus: torch.Tensor) -> None:
    x = corpus[6].numpy()
    encoding = (await encode(stub, x, include_error=True)).results[0].encoding
    item = sae_pb2.DecodeItem(features=encoding.features, error=encoding.error)
    for element_type, tolerance in ((0, 1e-6), (2, 1e-3)):
        request = sae_pb2.DecodeFeaturesRequest(items=[item], element_type=element_type)
        embedding = (await stub.DecodeFeatures(request)).results[0].embedding
        assert embedding.embeds.element_type == (element_type or 1)
        assert np.allclose(values(embedding.embeds), x, rtol=tolerance, atol=20 * tolerance)
        again = await stub.EditEmbeds(edit_request(named(embedding.embedding_id)))
        assert np.allclose(values(again.embedding.embeds), x, rtol=1e-5, atol=1e-4)


async def test_nothing_decodes_to_the_bias(stub: Any, corpus: torch.Tensor) -> None:
    answer = await stub.DecodeFeatures(sae_pb2.DecodeFeaturesRequest(items=[sae_pb2.DecodeItem()]))
    assert np.allclose(values(answer.results[0].embedding.embeds), corpus.mean(0).numpy(), atol=1e-5)


async def test_what_was_encoded_before_runs_no_model(serve: Callable[..., Any], corpus: torch.Tensor) -> None:
    serving = await serve()
    first = await encode(serving.stub, corpus[7])
    second = await encode(serving.stub, corpus[7], corpus[8])
    third = await encode(serving.stub, named(first.results[0].encoding.embedding_id))
    assert [result.cached for result in first.results] == [False]
    assert [result.cached for result in second.results] == [True, False]
    assert [result.cached for result in third.results] == [True]
    assert third.execution.cached
    assert third.execution.compute_us == 0
    assert third.results[0].encoding == second.results[0].encoding == first.results[0].encoding


async def test_an_edit_of_a_known_embedding_runs_no_model(serve: Callable[..., Any], corpus: torch.Tensor) -> None:
    serving = await serve()
    source = named((await encode(serving.stub, corpus[9])).results[0].encoding.embedding_id)
    answer = await serving.stub.EditEmbeds(edit_request(source, *(edit(i, ADD, 1.0) for i in range(N_FEATURES))))
    assert answer.execution.cached
    assert answer.execution.compute_us == 0
    assert not answer.report.measured
    assert all(not outcome.HasField("achieved") for outcome in answer.report.outcomes)
    assert [outcome.feature_index for outcome in answer.report.outcomes] == list(range(N_FEATURES))


async def test_a_report_says_before_requested_achieved_and_what_drifted(
    stub: Any, corpus: torch.Tensor, sae_bundle: Path
) -> None:
    sae = SparseAutoencoder.load(sae_bundle / "sae")
    x = corpus[10].numpy()
    (f,) = sae.encode(x[None])
    on = int(f.top_indices[0])
    off = next(i for i in range(N_FEATURES) if i not in f.top_indices)
    request = edit_request(inline(x), edit(on, SCALE, 0.5), edit(off, SET, 2.0, SCALED), measure=True, max_drifted=3)
    answer = await stub.EditEmbeds(request)
    x_new = values(answer.embedding.embeds)
    (f_new,) = sae.encode(x_new[None])
    first, second = answer.report.outcomes
    assert (first.feature_index, first.operation, first.before) == (on, SCALE, f.top_acts[0])
    assert first.requested == pytest.approx(f.top_acts[0] / 2)
    assert (second.feature_index, second.operation, second.before) == (off, SET, 0)
    assert second.requested_scaled == pytest.approx(2.0)
    assert [first.achieved, second.achieved] == f_new.at(np.array([on, off])).tolist()
    assert second.achieved_scaled == pytest.approx(second.achieved / second.requested * 2, rel=1e-5)
    assert not first.HasField("rival_of")
    assert answer.report.measured
    assert answer.report.delta_norm == pytest.approx(np.linalg.norm(x_new - x), rel=1e-5)
    assert answer.report.cosine == pytest.approx(x @ x_new / np.linalg.norm(x) / np.linalg.norm(x_new), rel=1e-5)
    drifted = answer.report.drifted
    assert 0 < len(drifted) <= 3
    for drift in drifted:
        assert drift.feature_index not in (on, off)
        assert [drift.before, drift.after] == [float(g.at(np.array([drift.feature_index]))[0]) for g in (f, f_new)]
    moves = [abs(drift.after - drift.before) for drift in drifted]
    assert moves == sorted(moves, reverse=True)
    assert answer.report.drift > 0


async def test_an_outcome_is_the_message_that_the_contract_describes(stub: Any, corpus: torch.Tensor) -> None:
    # Outcomes are written as wire bytes: large indices, negative values, and what a plain writer would make of them.
    answer = await stub.EditEmbeds(edit_request(inline(corpus[11]), edit(63, SET, -1.5), edit(0, ABLATE)))
    for outcome in answer.report.outcomes:
        plain = edits_pb2.EditOutcome(
            feature_index=outcome.feature_index,
            operation=outcome.operation,
            before=outcome.before,
            requested=outcome.requested,
            before_scaled=outcome.before_scaled,
            requested_scaled=outcome.requested_scaled,
        )
        assert edits_pb2.EditOutcome.FromString(outcome.SerializeToString()) == plain
    assert answer.report.outcomes[0].requested == -1.5


async def test_a_switch_turns_rivals_off_and_reports_them_behind_the_named_edits(
    stub: Any, corpus: torch.Tensor, sae_bundle: Path
) -> None:
    from faceteer_sae.statistics import load_statistics

    statistics = load_statistics(sae_bundle / "sae", EMBED_DIM, N_FEATURES)
    assert statistics is not None
    feature = next(i for i in range(N_FEATURES) if len(statistics.rivals(i)))
    answer = await stub.EditEmbeds(edit_request(inline(corpus[12]), edit(feature, SWITCH, 1.0, SCALED)))
    named_, *rivals = answer.report.outcomes
    assert (named_.feature_index, named_.operation) == (feature, SWITCH)
    assert [outcome.feature_index for outcome in rivals] == statistics.rivals(feature).tolist()
    assert {(outcome.operation, outcome.requested, outcome.rival_of) for outcome in rivals} == {(ABLATE, 0.0, feature)}


async def test_edited_embeddings_can_be_used_by_their_id(stub: Any, corpus: torch.Tensor) -> None:
    first = await stub.EditEmbeds(edit_request(inline(corpus[13]), edit(2, ADD, 3.0)))
    back = await stub.EditEmbeds(edit_request(named(first.embedding.embedding_id)))
    assert back.embedding == first.embedding
    half = await stub.EditEmbeds(edit_request(inline(corpus[13]), edit(2, ADD, 3.0), element_type=2))
    assert half.embedding.embedding_id == first.embedding.embedding_id
    assert np.allclose(values(half.embedding.embeds), values(first.embedding.embeds), rtol=1e-3)


async def test_replaying_a_diff_carries_the_share_it_promises(stub: Any, corpus: torch.Tensor) -> None:
    source, target = inline(corpus[14]), inline(corpus[15])
    diff = await stub.DiffFeatures(sae_pb2.DiffFeaturesRequest(source=source, target=target))
    assert diff.coverage >= 0.9
    assert 0 < len(diff.edits) <= diff.differing_features <= 2 * K
    assert {(one.operation, one.unit) for one in diff.edits} == {(ADD, RAW)}
    features = {}
    for name, x in (("source", corpus[14]), ("target", corpus[15])):
        found = (await encode(stub, x)).results[0].encoding.features
        features[name] = sae_pb2.DecodeItem(
            features=tensor_pb2.SparseFeatures(indices=found.indices, activations=found.activations)
        )
    decoded = await stub.DecodeFeatures(sae_pb2.DecodeFeaturesRequest(items=features.values()))
    x_source, x_target = (values(result.embedding.embeds) for result in decoded.results)
    replayed = values(
        (await stub.EditEmbeds(sae_pb2.EditEmbedsRequest(input=source, edits=diff.edits))).embedding.embeds
    )
    D = x_target - x_source
    rest = D - (replayed - corpus[14].numpy())
    assert 1 - rest @ rest / (D @ D) == pytest.approx(diff.coverage, abs=1e-4)
    one = await stub.DiffFeatures(sae_pb2.DiffFeaturesRequest(source=source, target=target, max_edits=1))
    assert len(one.edits) == 1


async def test_an_embedding_of_the_wrong_scale_is_answered_with_a_warning(stub: Any, corpus: torch.Tensor) -> None:
    x = corpus[16].numpy()
    answer = await encode(stub, x / np.linalg.norm(x))
    assert "NORM_OUT_OF_RANGE" in [warning.code for warning in answer.results[0].encoding.warnings]
    report = (await stub.EditEmbeds(edit_request(inline(40 * x), edit(1, SET, 1.0)))).report
    assert "NORM_OUT_OF_RANGE" in [warning.code for warning in report.warnings]


async def test_one_bad_item_does_not_fail_its_neighbours(stub: Any, corpus: torch.Tensor) -> None:
    bad = [np.full(EMBED_DIM, np.nan), np.zeros(EMBED_DIM + 1), np.full(EMBED_DIM, 1e38)]
    answer = await encode(stub, corpus[17], *bad, tensor_pb2.EmbedsInput(), named("nonsense"), corpus[18])
    kinds = [result.WhichOneof("result") for result in answer.results]
    assert kinds == ["encoding", *["error"] * 5, "encoding"]
    failures = [read_item(result.error) for result in answer.results[1:6]]
    assert [failure.fields for failure in failures] == [
        ["inputs[1].embeds.data"],
        ["inputs[2].embeds.shape"],
        ["inputs[3].embeds.data"],
        ["inputs[4]"],
        [],
    ]
    assert [failure.reason for failure in failures] == ["INVALID_FIELD"] * 4 + ["EMBEDDING_EXPIRED"]
    items = [
        sae_pb2.DecodeItem(features=tensor_pb2.SparseFeatures(indices=[1], activations=[2.0])),
        sae_pb2.DecodeItem(features=tensor_pb2.SparseFeatures(indices=[1, 2], activations=[2.0])),
        sae_pb2.DecodeItem(features=tensor_pb2.SparseFeatures(indices=[1, 1], activations=[2.0, 1.0])),
        sae_pb2.DecodeItem(features=tensor_pb2.SparseFeatures(indices=[N_FEATURES], activations=[2.0])),
        sae_pb2.DecodeItem(features=tensor_pb2.SparseFeatures(indices=[1], activations=[np.nan])),
        sae_pb2.DecodeItem(error=tensor(np.zeros(3))),
    ]
    results = (await stub.DecodeFeatures(sae_pb2.DecodeFeaturesRequest(items=items))).results
    assert results[0].WhichOneof("result") == "embedding"
    assert [read_item(result.error).reason for result in results[1:]] == [
        "INVALID_FIELD",
        "INVALID_FIELD",
        "UNKNOWN_FEATURE",
        "INVALID_FIELD",
        "INVALID_FIELD",
    ]


X = inline(np.linspace(-20, 20, EMBED_DIM))
DIFF = sae_pb2.DiffFeaturesRequest


@pytest.mark.parametrize(
    ("method", "request_", "reason", "field"),
    [
        ("EncodeFeatures", sae_pb2.EncodeFeaturesRequest(), "INVALID_FIELD", "inputs"),
        ("EncodeFeatures", sae_pb2.EncodeFeaturesRequest(inputs=[X] * 5), "BATCH_TOO_LARGE", "inputs"),
        ("DecodeFeatures", sae_pb2.DecodeFeaturesRequest(), "INVALID_FIELD", "items"),
        ("DecodeFeatures", sae_pb2.DecodeFeaturesRequest(items=[{}] * 5), "BATCH_TOO_LARGE", "items"),
        ("DecodeFeatures", sae_pb2.DecodeFeaturesRequest(items=[{}], element_type=9), "INVALID_FIELD", "element_type"),
        ("EditEmbeds", edit_request(X, *(edit(i, ABLATE) for i in range(13))), "BATCH_TOO_LARGE", "edits"),
        ("EditEmbeds", edit_request(X, element_type=9), "INVALID_FIELD", "element_type"),
        ("EditEmbeds", edit_request(X, max_drifted=10**6), "INVALID_FIELD", "max_drifted"),
        ("EditEmbeds", sae_pb2.EditEmbedsRequest(), "INVALID_FIELD", "input"),
        ("EditEmbeds", edit_request(inline(np.full(EMBED_DIM, np.inf))), "INVALID_FIELD", "input.embeds.data"),
        ("EditEmbeds", edit_request(X, edits_pb2.Edit(operation=SET)), "INVALID_FIELD", "edits[0].feature"),
        ("EditEmbeds", edit_request(X, edit(1, 0)), "INVALID_FIELD", "edits[0].operation"),
        ("EditEmbeds", edit_request(X, edit(1, SET, np.nan)), "INVALID_FIELD", "edits[0].value"),
        ("EditEmbeds", edit_request(X, edit(1, ABLATE, 1.0)), "INVALID_FIELD", "edits[0].value"),
        ("EditEmbeds", edit_request(X, edit(1, SET, 3e38)), "INVALID_FIELD", "edits[0].value"),
        ("EditEmbeds", edit_request(X, edit(N_FEATURES, SET)), "UNKNOWN_FEATURE", None),
        ("EditEmbeds", edit_request(named("x" * 10_000)), "EMBEDDING_EXPIRED", None),
        ("DiffFeatures", DIFF(target=X), "INVALID_FIELD", "source"),
        ("DiffFeatures", DIFF(source=X), "INVALID_FIELD", "target"),
        ("DiffFeatures", DIFF(source=X, target=X, coverage=1.5), "INVALID_FIELD", "coverage"),
        ("DiffFeatures", DIFF(source=X, target=X, coverage=-1), "INVALID_FIELD", "coverage"),
        ("DiffFeatures", DIFF(source=X, target=X, coverage=np.nan), "INVALID_FIELD", "coverage"),
        ("DiffFeatures", DIFF(source=X, target=X, max_edits=99), "INVALID_FIELD", "max_edits"),
    ],
)
async def test_bad_input_is_refused_by_field(
    serve: Callable[..., Any], method: str, request_: Any, reason: str, field: str | None
) -> None:
    stub = (await serve(sae_max_batch=4, sae_max_edits=12)).stub
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await getattr(stub, method)(request_)
    failure = read_error(caught.value)
    assert failure.reason == reason
    assert failure.code == ("NOT_FOUND" if field is None else "INVALID_ARGUMENT")
    if field is not None:
        assert failure.fields == [field]


async def test_a_label_is_refused_with_the_service_that_resolves_it(stub: Any) -> None:
    night = edits_pb2.Edit(feature=edits_pb2.FeatureRef(label="night"), operation=SET, value=1.0)  # type: ignore[arg-type]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.EditEmbeds(edit_request(X, edit(3, SET, 1.0), night))
    failure = read_error(caught.value)
    assert failure.fields == ["edits[1].feature.label"]
    assert "StudioService" in failure.message


async def test_an_embedding_of_another_encoder_is_not_edited(serve: Callable[..., Any]) -> None:
    from faceteer_runtime.cache_keys import embeds_content_id, embeds_key

    serving = await serve()
    x = np.ones(EMBED_DIM, np.float32)
    foreign = embeds_content_id("feedfeedfeedfeed", x)
    serving.cache.put(embeds_key(foreign), {"embeds": x})
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await serving.stub.EditEmbeds(edit_request(named(foreign)))
    assert read_error(caught.value).reason == "REVISION_MISMATCH"


async def test_without_statistics_raw_units_work_and_scaled_ones_are_refused(
    serve: Callable[..., Any], sae_bundle: Path, tmp_path: Path, corpus: torch.Tensor
) -> None:
    shutil.copytree(sae_bundle, tmp_path / "bundle")
    (tmp_path / "bundle" / "sae" / "feature_statistics.safetensors").unlink()
    seal(tmp_path / "bundle", {"name": "bare", "parts": {"sae": {"kind": "sae", "encoder_revision": ENCODER}}})
    stub = (await serve(bundle=tmp_path / "bundle")).stub
    assert not (await stub.GetSae(sae_pb2.GetSaeRequest())).has_statistics
    encoding = (await encode(stub, corpus[0])).results[0].encoding
    assert list(encoding.features.activations) == sorted(encoding.features.activations, reverse=True)
    assert not encoding.features.scaled
    answer = await stub.EditEmbeds(edit_request(inline(corpus[0]), edit(1, SET, 2.0), edit(2, SCALE, 2.0, SCALED)))
    assert answer.report.outcomes[0].requested == 2.0
    assert answer.report.outcomes[0].requested_scaled == 0.0
    for refused in (edit(1, SET, 2.0, SCALED), edit(1, SET, 2.0, 0), edit(1, SWITCH, 1.0)):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.EditEmbeds(edit_request(inline(corpus[0]), refused))
        assert read_error(caught.value).code == "FAILED_PRECONDITION"
        assert read_error(caught.value).reason == "NOT_IN_BUNDLE"


async def test_many_callers_at_once_get_their_own_answers(stub: Any, corpus: torch.Tensor, sae_bundle: Path) -> None:
    sae = SparseAutoencoder.load(sae_bundle / "sae")
    answers = await asyncio.gather(*(encode(stub, corpus[n % 100]) for n in range(200)))
    for n, answer in enumerate(answers):
        (expected,) = sae.encode(corpus[n % 100][None].numpy())
        found = answer.results[0].encoding.features
        assert sorted(found.indices) == expected.top_indices.tolist()


async def test_a_damaged_sae_stops_the_start_with_one_sentence(sae_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(sae_bundle, tmp_path / "bundle")
    (tmp_path / "bundle" / "sae" / "cfg.json").write_text("{}")
    seal(tmp_path / "bundle", {"name": "bad", "parts": {"sae": {"kind": "sae", "encoder_revision": ENCODER}}})
    with pytest.raises(BundleError, match="architecture None"):
        await start(SaeSettings(listen="127.0.0.1:0", bundle=tmp_path / "bundle"), build)


@pytest.mark.parametrize("call", ["EncodeFeatures", "EditEmbeds"])
async def test_a_call_goes_down_from_the_servicer_to_the_model_through_few_files(
    serve: Callable[..., Any], corpus: torch.Tensor, call: str
) -> None:
    with files_entered(call) as entered:
        stub = (await serve()).stub
        if call == "EncodeFeatures":
            await encode(stub, corpus[0])
        else:
            await stub.EditEmbeds(edit_request(inline(corpus[0]), edit(3, SET, 1.0), measure=True))
    ours = {file.removeprefix("faceteer_sae/") for file in entered if file.startswith("faceteer_sae/")}
    # Screening and rows are the model's own parts; what is said of edits is a file of its own.
    assert len(ours - {"screening.py", "rows.py", "edit_warnings.py"}) <= 6, ours
    assert {"servicer.py", "application.py", "model.py"} <= ours
