"""The parts of a training against numbers done by hand: losses, a step, the model in other units, what is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from faceteer_runtime.bundle import BundleError
from faceteer_sae.weights import SaeWeights, load_config, read_weights, write_weights
from faceteer_trainer.budget import Budget
from faceteer_trainer.corpus.shards import CorpusCard, EmbeddingCorpus, Shard, shard_name, write_embeds
from faceteer_trainer.errors import JobError
from faceteer_trainer.formats import conversions
from faceteer_trainer.formats.conversions import checked, of_raw_input, unit_rows, with_input_shift
from faceteer_trainer.sae import kernels, statistics
from faceteer_trainer.sae.autoencoder import Autoencoder, untrained
from faceteer_trainer.sae.kernels import Pairs, RowAdam, pair_dots
from faceteer_trainer.sae.losses import Loss, dense_losses, jump, sparse_losses
from faceteer_trainer.sae.selection import select_topk
from faceteer_trainer.sae.statistics import measure
from faceteer_trainer.sae.trainer import Settings, Trainer
from safetensors.torch import load_file

D, N = 6, 20
SERVED = ("standard", "topk", "batchtopk", "jumprelu")


def random_weights(architecture: str, d_sae: int = N, seed: int = 0) -> SaeWeights:
    draw = torch.Generator().manual_seed(seed)
    W_enc, W_dec = (torch.randn(d_sae, D, generator=draw) for _ in range(2))
    b_enc, b_dec = torch.randn(d_sae, generator=draw) * 0.3, torch.randn(D, generator=draw)
    thresholds = {"batchtopk": torch.tensor(0.7), "jumprelu": torch.rand(d_sae, generator=draw)}
    k = 4 if "topk" in architecture else 0
    shifted = architecture != "standard"
    return SaeWeights(architecture, W_enc, b_enc, W_dec, b_dec, shifted, k, thresholds.get(architecture))


def rows(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed))


def corpus_of(directory: Path, x: np.ndarray) -> EmbeddingCorpus:
    directory.mkdir()
    write_embeds(directory / shard_name(0), x.astype(np.float32), dtype="float32", encoder_revision="r")
    CorpusCard("own", "r", x.shape[1], "float32", (Shard(shard_name(0), len(x)),)).write(directory)
    return EmbeddingCorpus.open(directory)


# -- losses ----------------------------------------------------------------------------------------


def test_jumprelus_gradient_comes_from_half_a_bandwidth_to_either_side_of_the_threshold() -> None:
    # Bandwidth 0.1 about 1: of these only 0.96 and 1.04 are within 0.05.
    pre = torch.tensor([[0.91, 0.94, 0.96, 1.04, 1.06, 1.09]], requires_grad=True)
    threshold = torch.ones(6, requires_grad=True)
    f, on = jump(pre, threshold, 0.1)
    (on.sum() + 0 * f.sum()).backward()
    assert threshold.grad.tolist() == pytest.approx([0, 0, -10, -10, 0, 0])
    assert pre.grad.tolist() == [[0.0] * 6]  # how many fire has no gradient of its own in pre


def test_the_threshold_itself_scales_what_a_firing_is_worth() -> None:
    pre, threshold = torch.tensor([[2.01], [1.99]]), torch.tensor([2.0], requires_grad=True)
    f, _ = jump(pre, threshold, 0.5)
    (f * torch.tensor([[1.0], [10.0]])).sum().backward()
    # - theta / eps, summed over the rows with their own gradients
    assert threshold.grad.tolist() == pytest.approx([-(2 / 0.5) * 11])


def test_jumprelus_loss_is_the_error_and_the_squared_relative_miss_of_k() -> None:
    model, x = untrained("jumprelu", D, N, 4), rows(8)
    losses = dense_losses(model, x, torch.zeros(N, dtype=torch.bool), Loss(k=4, l0_weight=3.0))
    pre = x @ model.W_enc.T
    f = torch.where(pre > 0.1, pre, 0.0)
    error = (f @ model.W_dec - x).square().sum(1).mean()
    l0 = (f > 0).sum(1).float().mean()
    assert losses.l0 == pytest.approx(float(l0))
    torch.testing.assert_close(losses.total, error + 3 * (l0 / 4 - 1) ** 2)
    torch.testing.assert_close(losses.unexplained, error.detach() / (x - x.mean(0)).square().sum(1).mean())
    torch.testing.assert_close(losses.residual, x - f @ model.W_dec.detach())
    assert not losses.residual.requires_grad


@pytest.mark.parametrize("losses_of", [sparse_losses, dense_losses])
def test_nested_prefixes_weigh_alike_and_each_reconstructs_on_its_own(losses_of: Callable[..., object]) -> None:
    model, x = untrained("batchtopk", D, N, 3), rows(8)
    found = losses_of(model, x, torch.zeros(N, dtype=torch.bool), Loss(k=2.5, prefixes=(0.25, 1.0)))
    pre = (x @ model.W_enc.T).relu()
    least = pre.flatten().topk(20).values[-1]  # 2.5 for each of 8 rows
    f = pre * (pre >= least)
    errors = [(f[:, :end] @ model.W_dec[:end] - x).square().sum(1).mean() for end in (5, N)]
    assert found.l0 == 2.5
    torch.testing.assert_close(found.total, sum(errors) / 2)
    torch.testing.assert_close(found.unexplained * (x - x.mean(0)).square().sum(1).mean(), errors[1].detach())


@pytest.mark.parametrize("losses_of", [sparse_losses, dense_losses])
def test_dead_latents_explain_what_is_left_over_as_a_share_of_it(losses_of: Callable[..., object]) -> None:
    model, x = untrained("topk", D, N, 3), rows(8)
    dead = torch.zeros(N, dtype=torch.bool)
    dead[[2, 9, 11]] = True
    loss = Loss(k=3, aux_k=2, aux_weight=0.5)
    found = losses_of(model, x, dead, loss)
    own = (x @ model.W_enc.T)[:, dead].relu()
    top = own.topk(2, dim=1)
    f = torch.zeros_like(own).scatter(1, top.indices, top.values)
    residual = found.residual
    share = (f @ model.W_dec[dead] - residual).square().sum(1).mean() / residual.square().sum(1).mean()
    torch.testing.assert_close(found.auxiliary, share.detach())
    without = losses_of(model, x, dead, replace(loss, aux_k=0))
    assert float(without.auxiliary) == 0
    torch.testing.assert_close(found.total - without.total, 0.5 * share, rtol=1e-4, atol=1e-5)


# -- kernels beyond one block ----------------------------------------------------------------------


def test_dots_of_more_pairs_than_are_gathered_at_once_are_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_GATHER", 5)
    x, W = rows(9), rows(N, seed=2)
    at, latents = (torch.rand(9, N, generator=torch.Generator().manual_seed(3)) < 0.3).nonzero(as_tuple=True)
    assert len(at) > 20
    torch.testing.assert_close(pair_dots(x, W, Pairs(at, latents)), (x @ W.T)[at, latents])


@pytest.mark.parametrize("chunk", [16, 1 << 24])
def test_the_strongest_of_some_latents_are_named_by_their_own_numbers(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("faceteer_trainer.sae.selection._CHUNK", chunk)
    x, W, some = rows(5), rows(N, seed=2), torch.tensor([3, 4, 8, 15, 16, 19])
    found = select_topk(x, W, torch.full((N,), 0.5), 3, latents=some)
    pre = x @ W[some].T + 0.5
    kept = torch.zeros_like(pre).scatter(1, pre.topk(3, 1).indices, 1.0) * (pre > 0)
    expected = {(row, int(some[column])) for row, column in kept.nonzero().tolist()}
    assert set(zip(found.rows.tolist(), found.latents.tolist(), strict=True)) == expected


def test_a_row_that_rests_goes_on_as_if_it_had_not() -> None:
    # The second row has a gradient in steps 0, 1 and 5 only: as Adam alone with these three gradients.
    ours, theirs = torch.ones(2, 1), torch.nn.Parameter(torch.ones(1))
    sparse, plain = RowAdam({"w": ours}), torch.optim.Adam([theirs], lr=0.1, eps=6.25e-10)
    sparse.rate = 0.1
    for step in range(6):
        both = step in (0, 1, 5)
        where = torch.tensor([[0, 1]] if both else [[0]])
        values = torch.full((where.shape[1], 1), 1.0 + step)
        ours.grad = torch.sparse_coo_tensor(where, values, (2, 1), is_coalesced=True, check_invariants=True)
        sparse.step()
        if both:
            theirs.grad = torch.full((1,), 1.0 + step)
            plain.step()
    torch.testing.assert_close(ours[1], theirs.detach())
    sparse.forget("w", torch.tensor([1]))
    assert [float(sparse.state["w"][name][1]) for name in ("exp_avg", "exp_avg_sq", "steps")] == [0, 0, 0]
    assert sparse.state["w"]["steps"][0] == 6


# -- the model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", SERVED)
def test_weights_for_longer_embeddings_give_the_same_firings_as_many_times_as_strong(architecture: str) -> None:
    model, x = Autoencoder(random_weights(architecture)), rows(30)
    longer = Autoencoder(model.weights(8.0))
    assert longer.W_enc.data_ptr() == model.W_enc.data_ptr()  # no second copy of the matrices
    torch.testing.assert_close(longer.encode(8 * x), 8 * model.encode(x))
    torch.testing.assert_close(longer.decode(8 * model.encode(x)), 8 * model.decode(model.encode(x)))


@pytest.mark.parametrize("architecture", SERVED)
def test_firings_are_the_entries_of_the_whole_matrix_in_its_order(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("faceteer_trainer.sae.autoencoder.FEATURES", 7)
    model, x = Autoencoder(random_weights(architecture)), rows(30)
    whole = model.encode(x)
    pairs, acts = model.fire(x)
    assert torch.equal(torch.stack(pairs), torch.stack(whole.nonzero(as_tuple=True)))
    torch.testing.assert_close(acts, whole[whole > 0])
    if architecture == "topk":
        assert whole.count_nonzero(1).max() == 4


def test_a_threshold_is_set_so_that_k_latents_fire_in_the_mean() -> None:
    model, x = Autoencoder(random_weights("batchtopk")), rows(500)
    model.calibrate(x)
    assert float((model.encode(x) > 0).sum()) == 4 * 500 - 1  # the least of those kept is the threshold itself
    assert model.weights(2.0).threshold == 2 * model.threshold


def test_an_untrained_sae_has_tied_directions_of_norm_one_or_a_tenth_and_no_biases() -> None:
    for architecture, norm in (("topk", 1.0), ("jumprelu", 1.0), ("standard", 0.1)):
        model = untrained(architecture, D, N, 4, seed=5)
        torch.testing.assert_close(model.W_dec.norm(dim=1), torch.full((N,), norm))
        assert torch.equal(model.W_enc, model.W_dec)
        assert model.W_enc.data_ptr() != model.W_dec.data_ptr()
        assert not model.b_enc.any()
        assert not model.b_dec.any()
        assert model.k == (4 if architecture == "topk" else 0)
        assert not torch.equal(model.W_dec, untrained(architecture, D, N, 4, seed=6).W_dec)


# -- one step ----------------------------------------------------------------------------------------


def trainer_on(tmp_path: Path, x: np.ndarray | None = None, **changes: object) -> Trainer:
    x = 7 * rows(300).numpy() + 3 if x is None else x
    (tmp_path / "out").mkdir()
    values = {"loss": Loss(k=4), "budget": Budget(steps=20), "batch": 50} | changes
    settings = Settings(values.pop("architecture", "topk"), N, **values)  # type: ignore[arg-type]
    return Trainer(corpus_of(tmp_path / "corpus", x), tmp_path / "out", settings)


def test_the_learning_rate_rises_stays_and_falls_to_nothing() -> None:
    settings = Settings("topk", N, rate=2.0, warmup=4, decay=0.5)
    assert [settings.learning_rate(step, 0.1) for step in (0, 1, 3, 4)] == [0.5, 1.0, 2.0, 2.0]
    assert [settings.learning_rate(100, share) for share in (0.5, 0.75, 1.0)] == [2.0, 1.0, 0.0]


def test_sparse_kernels_are_taken_from_128_latents_a_firing_on() -> None:
    assert Settings("topk", 1280, Loss(k=10)).sparse
    assert not Settings("topk", 1279, Loss(k=10)).sparse
    assert not Settings("jumprelu", 99_999, Loss(k=10)).sparse
    assert Settings("batchtopk", 20, Loss(k=10), kernels="sparse").sparse
    assert not Settings("batchtopk", 9999, Loss(k=10), kernels="dense").sparse


def test_embeddings_are_trained_on_about_their_mean_at_distance_one(tmp_path: Path) -> None:
    trainer = trainer_on(tmp_path)
    x = trainer.units(np.arange(300))
    torch.testing.assert_close(trainer.model.b_dec.detach(), x.mean(0))
    assert float((x - x.mean(0)).square().sum(1).mean()) == pytest.approx(1.0, rel=1e-4)


def test_a_standard_sae_is_trained_on_embeddings_as_they_are(tmp_path: Path) -> None:
    trainer = trainer_on(tmp_path, architecture="standard")
    assert trainer.scale == 1.0
    torch.testing.assert_close(trainer.model.b_dec.detach(), trainer.units(np.arange(300)).mean(0))


def test_nothing_can_be_learnt_of_equal_embeddings_or_of_one(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="all embeddings are equal"):
        trainer_on(tmp_path, np.ones((9, D)))
    with pytest.raises(JobError, match="has 1 rows; an SAE needs at least two"):
        Trainer(corpus_of(tmp_path / "one", np.ones((1, D))), tmp_path / "out", Settings("topk", N))


@pytest.mark.parametrize("kernels_", ["sparse", "dense"])
def test_a_step_counts_silence_in_rows_and_keeps_decoder_rows_at_norm_one(tmp_path: Path, kernels_: str) -> None:
    trainer = trainer_on(tmp_path, kernels=kernels_, dead_after=99)
    with torch.no_grad():
        trainer.model.b_enc[13] = -99  # never fires
    for silent in (50, 100):
        losses, _ = trainer.one_step(0.05)
        trainer.step += 1
        assert trainer.silent[13] == silent
        assert (trainer.silent[losses.fired] == 0).all()
    assert trainer.dead_share == pytest.approx(float((trainer.silent >= 100).float().mean()))
    assert trainer.dead_share > 0
    torch.testing.assert_close(trainer.model.W_dec.norm(dim=1), torch.ones(N))


@pytest.mark.parametrize("kernels_", ["sparse", "dense"])
def test_the_gradient_is_brought_down_to_the_norm_asked_for_and_no_further(tmp_path: Path, kernels_: str) -> None:
    trainer = trainer_on(tmp_path, kernels=kernels_, clip_norm=1e-3)
    seen: list[float] = []

    def step() -> None:
        parts = [p.grad.coalesce().values() if p.grad.is_sparse else p.grad for p in trainer.model.parameters()]
        seen.append(float(torch.cat([part.flatten() for part in parts]).norm()))

    trainer.optimizer.step = step
    _, norm = trainer.one_step(0.1)
    assert norm > 1e-3
    assert seen[0] == pytest.approx(1e-3, rel=1e-4)
    for limit in (0.0, 1e9):
        trainer.settings = replace(trainer.settings, clip_norm=limit)
        _, norm = trainer.one_step(0.1)
        assert seen[-1] == pytest.approx(norm, rel=1e-5)


def test_the_decoders_gradient_along_its_rows_is_taken_off(tmp_path: Path) -> None:
    trainer = trainer_on(tmp_path, kernels="dense", clip_norm=0.0)
    found: list[torch.Tensor] = []
    trainer.optimizer.step = lambda: found.append((trainer.model.W_dec.grad * trainer.model.W_dec).sum(1).detach())
    trainer.one_step(0.1)
    assert found[0].abs().max() < 1e-6
    assert trainer.model.W_dec.grad.abs().max() > 1e-4


# -- what is measured ----------------------------------------------------------------------------------


def test_measuring_stops_where_too_much_fires_and_says_how_many_rows_it_saw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "_CHUNK", 10)
    model, corpus = Autoencoder(random_weights("topk")), corpus_of(tmp_path / "corpus", rows(100).numpy())
    monkeypatch.setattr(statistics, "_MOST_PAIRS", 100)
    found = measure(model, corpus, 1000)
    assert found.figures["rows"] == 30  # four firings a row: more than 100 after the third block
    monkeypatch.setattr(statistics, "_MOST_PAIRS", 10**9)
    assert measure(model, corpus, 1000).figures["rows"] == 100
    some = measure(model, corpus, 64)
    assert some.figures["rows"] == 64
    assert some.figures["l0"] == pytest.approx(4, abs=0.2)
    assert some.figures["dead_share"] == pytest.approx((some.statistics.firing_share == 0).mean())


def test_rivals_are_looked_for_among_the_commonest_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Four features of which each row has one; the last two are the rarest.
    x = np.eye(4, D, dtype=np.float32)[np.repeat([0, 1, 2, 3], [400, 300, 200, 100])]
    eye = torch.eye(4, D)
    model = Autoencoder(SaeWeights("standard", eye, torch.zeros(4), eye, torch.zeros(D), False))
    corpus = corpus_of(tmp_path / "corpus", x)
    assert [measure(model, corpus, 10**6).statistics.rivals(f).tolist() for f in range(4)] == [
        [1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]
    ]  # fmt: skip
    monkeypatch.setattr(statistics, "_MOST_COMMON", 2)
    assert [measure(model, corpus, 10**6).statistics.rivals(f).tolist() for f in range(4)] == [[1], [0], [], []]


# -- between files -------------------------------------------------------------------------------------


def acts_of(sae: SaeWeights, x: torch.Tensor) -> torch.Tensor:
    return Autoencoder(sae).encode(x)


@pytest.mark.parametrize("architecture", SERVED)
def test_the_same_sae_in_other_terms_gives_the_same(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversions, "_ROWS", 7)
    sae, x = random_weights(architecture), rows(20)
    acts, x_hat = acts_of(sae, x), Autoencoder(sae).decode(acts_of(sae, x))
    shifted = with_input_shift(sae, not sae.apply_b_dec_to_input)
    assert shifted.apply_b_dec_to_input != sae.apply_b_dec_to_input
    torch.testing.assert_close(acts_of(shifted, x), acts, atol=1e-5, rtol=1e-4)
    trained_on_longer = of_raw_input(sae, 5.0)
    torch.testing.assert_close(acts_of(trained_on_longer, x / 5), acts, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(Autoencoder(trained_on_longer).decode(acts), x_hat / 5)
    if architecture != "batchtopk":  # whose threshold is of rescaled activations where a file rescales
        unit = unit_rows(sae)
        torch.testing.assert_close(unit.W_dec.norm(dim=1), torch.ones(N))
        if architecture != "topk":
            torch.testing.assert_close(Autoencoder(unit).decode(acts_of(unit, x)), x_hat, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec", "threshold"])
def test_a_value_that_is_not_finite_is_found_wherever_it_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversions, "_ROWS", 7)
    sae = random_weights("jumprelu")
    spoilt = getattr(sae, name).clone()
    spoilt.view(-1)[-1] = torch.nan
    assert checked(sae, Path("file")) is sae
    with pytest.raises(JobError, match=f"file: {name} holds NaN"):
        checked(replace(sae, **{name: spoilt}), Path("file"))


@pytest.mark.parametrize(("k", "right"), [(0, False), (1, True), (N, True), (N + 1, False)])
def test_k_is_at_least_one_and_at_most_the_features(k: int, right: bool) -> None:
    sae = replace(random_weights("topk"), k=k)
    if right:
        assert checked(sae, Path("file")) is sae
    else:
        with pytest.raises(JobError, match=f"k is {k}, but must be 1 to {N}"):
            checked(sae, Path("file"))


@pytest.mark.parametrize("layout", ["rows", "saelens"])
@pytest.mark.parametrize("architecture", SERVED)
def test_what_is_written_is_read_again(tmp_path: Path, architecture: str, layout: str) -> None:
    sae = replace(random_weights(architecture), metadata={"from": "here"})
    write_weights(tmp_path / "sae", sae, "float32", layout=layout)
    held = load_file(tmp_path / "sae" / "sae_weights.safetensors")
    matrix = held["W_enc_rows"] if layout == "rows" else held["W_enc"].T
    assert torch.equal(matrix, sae.W_enc)
    config = load_config(tmp_path / "sae")
    assert (config.layout, config.k, config.metadata) == (layout, sae.k, {"from": "here"})
    found = read_weights(tmp_path / "sae")
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert torch.equal(getattr(found, name), getattr(sae, name)), name
    assert found.apply_b_dec_to_input == sae.apply_b_dec_to_input
    assert (found.threshold is None) == (sae.threshold is None)
    assert found.threshold is None or torch.equal(found.threshold, sae.threshold)
    assert sorted(path.name for path in (tmp_path / "sae").iterdir()) == ["cfg.json", "sae_weights.safetensors"]


def test_int8_rows_are_read_as_floats_in_more_than_one_block(tmp_path: Path) -> None:
    sae = random_weights("standard", d_sae=2100)
    write_weights(tmp_path, sae, "int8")
    found = read_weights(tmp_path)
    assert found.W_dec.dtype == torch.float32
    largest = sae.W_dec.abs().amax(1, keepdim=True)
    assert ((found.W_dec - sae.W_dec).abs() <= largest / 127 / 2 + 1e-6).all()


def test_a_value_in_a_later_block_is_looked_at_before_anything_is_written(tmp_path: Path) -> None:
    sae = random_weights("standard", d_sae=2100)
    sae.W_dec[2099, D - 1] = 1e6
    with pytest.raises(BundleError, match="W_dec holds values that are not finite in float16"):
        write_weights(tmp_path / "sae", sae, "float16")
    assert not (tmp_path / "sae").exists()


@pytest.mark.parametrize(("d_sae", "there"), [(29, False), (30, True)])
def test_large_dictionaries_get_a_copy_to_screen_by(
    tmp_path: Path, d_sae: int, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("faceteer_sae.weights._SCREEN_FROM", 30)
    write_weights(tmp_path, random_weights("standard", d_sae=d_sae), "float16")
    assert ("W_enc_screen" in load_file(tmp_path / "sae_weights.safetensors")) is there
