"""The sparse kernels against autograd over whole matrices, and the losses against numbers done by hand."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from faceteer_trainer.sae.autoencoder import untrained
from faceteer_trainer.sae.kernels import Pairs, RowAdam, sparse_decode, sparse_encode
from faceteer_trainer.sae.losses import Loss, dense_losses, jump, published_loss, sparse_losses
from faceteer_trainer.sae.sampling import BlockShuffle, permuted
from faceteer_trainer.sae.selection import select_batch_topk, select_topk

B, D, N = 12, 7, 50


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _pairs(generator: torch.Generator) -> Pairs:
    rows, latents = (torch.rand(B, N, generator=generator) < 0.1).nonzero(as_tuple=True)
    return Pairs(rows, latents)


def _parameters(generator: torch.Generator) -> list[torch.Tensor]:
    shapes = ((B, D), (N, D), (N,), (N, D))
    return [torch.randn(*shape, generator=generator).requires_grad_() for shape in shapes]


def test_encode_and_decode_have_the_values_and_gradients_of_whole_matrices(generator: torch.Generator) -> None:
    pairs = _pairs(generator)
    x, W_enc, b_enc, W_dec = _parameters(generator)
    target = torch.randn(B, D, generator=generator)
    acts = sparse_encode(x, W_enc, b_enc, pairs).relu()
    ((sparse_decode(acts, W_dec, pairs, B) - target) ** 2).sum().backward()
    sparse = [p.grad.to_dense() if p.grad.is_sparse else p.grad for p in (x, W_enc, b_enc, W_dec)]
    assert W_enc.grad.is_sparse
    assert W_dec.grad.is_sparse
    assert b_enc.grad.is_sparse
    for p in (x, W_enc, b_enc, W_dec):
        p.grad = None
    mask = torch.zeros(B, N).index_put(tuple(pairs), torch.ones(()))
    dense = (x @ W_enc.T + b_enc).relu() * mask
    ((dense @ W_dec - target) ** 2).sum().backward()
    for ours, theirs in zip(sparse, (x.grad, W_enc.grad, b_enc.grad, W_dec.grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def test_no_firing_at_all_decodes_to_zeros_with_empty_gradients(generator: torch.Generator) -> None:
    none = Pairs(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
    x, W_enc, b_enc, W_dec = _parameters(generator)
    x_hat = sparse_decode(sparse_encode(x, W_enc, b_enc, none), W_dec, none, B)
    (x_hat + x.sum()).sum().backward()
    assert x_hat.shape == (B, D)
    assert not x_hat.any()
    assert W_dec.grad.coalesce().values().shape == (0, D)


@pytest.mark.parametrize("chunk", [37, 1 << 24])
def test_selection_in_chunks_finds_what_topk_of_the_whole_finds(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr("faceteer_trainer.sae.selection._CHUNK", chunk)
    x, W_enc, b_enc, _ = (p.detach() for p in _parameters(generator))
    pre = x @ W_enc.T + b_enc
    of_rows = torch.zeros(B, N).scatter(1, pre.relu().topk(5, 1).indices, 1.0)
    of_batch = torch.zeros(B * N).scatter(0, pre.flatten().topk(5 * B).indices, 1.0).view(B, N)
    pairs, least = select_batch_topk(x, W_enc, b_enc, 5 * B)
    for found, expected in (
        (select_topk(x, W_enc, b_enc, 5), of_rows),
        (pairs, of_batch),
    ):
        rows, latents = expected.nonzero(as_tuple=True)
        assert sorted(zip(*map(torch.Tensor.tolist, found), strict=True)) == list(
            zip(rows.tolist(), latents.tolist(), strict=True)
        )
        assert (found.rows.diff() >= 0).all()
    assert least == pre.flatten().topk(5 * B).values[-1]


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka"])
def test_a_step_by_sparse_kernels_has_the_loss_and_gradients_of_a_dense_one(
    generator: torch.Generator, architecture: str
) -> None:
    prefixes = (0.1, 0.5, 1.0) if architecture == "matryoshka" else (1.0,)
    loss = Loss(k=4, aux_k=3, prefixes=prefixes)
    model = untrained("topk" if architecture == "topk" else "batchtopk", D, N, 4)
    x = torch.randn(B, D, generator=generator)
    dead = torch.zeros(N, dtype=torch.bool)
    dead[40:] = True  # so that AuxK's part is compared too
    found = []
    for losses in (sparse_losses(model, x, dead, loss), dense_losses(model, x, dead, loss)):
        model.zero_grad()
        losses.total.backward()
        grads = {name: p.grad.to_dense() for name, p in model.named_parameters()}
        found.append((losses, grads))
    (ours, our_grads), (theirs, their_grads) = found
    assert ours.auxiliary > 0
    assert ours.l0 == theirs.l0
    torch.testing.assert_close(ours.total, theirs.total)
    assert torch.equal(ours.fired, theirs.fired)
    for name, grad in our_grads.items():
        torch.testing.assert_close(grad, their_grads[name], rtol=1e-4, atol=1e-6)


def _of_rows(rows: list[int], values: torch.Tensor) -> torch.Tensor:
    return torch.sparse_coo_tensor(torch.tensor([rows]), values, (3, 2), is_coalesced=True, check_invariants=True)


def test_row_adam_is_adam_where_every_row_has_a_gradient_and_leaves_untouched_rows_alone() -> None:
    ours = torch.linspace(-1, 1, 6).view(3, 2)
    theirs = torch.nn.Parameter(ours.clone())
    adam = torch.optim.Adam([theirs], lr=0.01, eps=6.25e-10)
    rows = RowAdam({"w": ours})
    rows.rate = 0.01
    for step in range(4):
        theirs.grad = torch.full((3, 2), 0.3 + step)
        ours.grad = torch.sparse_coo_tensor(
            torch.arange(3)[None], theirs.grad.clone(), is_coalesced=True, check_invariants=True
        )
        adam.step()
        rows.step()
    torch.testing.assert_close(ours, theirs.detach())
    before = ours.clone()
    ours.grad = torch.sparse_coo_tensor(
        torch.tensor([[1]]), torch.ones(1, 2), (3, 2), is_coalesced=True, check_invariants=True
    )
    rows.step()
    assert torch.equal(ours[[0, 2]], before[[0, 2]])
    assert not torch.equal(ours[1], before[1])
    assert rows.state["w"]["steps"].tolist() == [4, 5, 4]


def test_the_published_loss_is_what_one_reckons_by_hand() -> None:
    # mse = ((1 - 0)^2 + 0 + 0 + (2 - 1)^2) / 4 = 0.5; penalty = (1 + 3) * 5 + 2 * 13 = 46
    x_hat, x = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    f = torch.tensor([[1.0, 0.0], [3.0, 2.0]])
    W_dec = torch.tensor([[3.0, 4.0], [5.0, 12.0]])
    assert published_loss(x, x_hat, f, W_dec, 4e-5).item() == pytest.approx(0.5 + 46 * 4e-5)


def test_the_standard_architecture_subtracts_no_bias_before_encoding() -> None:
    model = untrained("standard", D, N, 4)
    with torch.no_grad():
        model.b_dec.fill_(3.0)
    x = torch.ones(2, D)
    assert torch.equal(model.centred(x), x)
    assert torch.equal(untrained("topk", D, N, 4).centred(x), x)  # b_dec is zero at the start


def test_jumprelu_has_the_papers_pseudo_derivatives() -> None:
    pre = torch.tensor([[0.50, 0.96, 1.04, 2.0]], requires_grad=True)
    threshold = torch.ones(4, requires_grad=True)
    f, on = jump(pre, threshold, 0.1)
    assert f.tolist() == [[0.0, 0.0, pytest.approx(1.04), 2.0]]
    assert on.tolist() == [[0.0, 0.0, 1.0, 1.0]]
    (3 * f + 5 * on).sum().backward()
    # d f / d pre = H; d f / d theta = -(theta / eps) K, d H / d theta = -(1 / eps) K, K = 1 within eps / 2 = 0.05
    assert pre.grad.tolist() == [[0.0, 0.0, 3.0, 3.0]]
    assert threshold.grad.tolist() == pytest.approx([0.0, -80.0, -80.0, 0.0])


@pytest.mark.parametrize("size", [1, 2, 5, 64, 1000, 4097])
def test_a_computed_permutation_hits_every_place_once_and_differs_by_key(size: int) -> None:
    places = np.arange(size)
    assert sorted(permuted(places, size, (0, 1))) == list(range(size))
    if size > 4:
        assert permuted(places, size, (0, 1)).tolist() != permuted(places, size, (0, 2)).tolist()


def test_an_epoch_shows_every_row_and_the_next_one_another_order() -> None:
    shuffle = BlockShuffle(rows=999, batch=64, seed=3, block=8, window=256)
    epoch = np.concatenate([shuffle.indices(step) for step in range(33)])
    first, second = epoch[:1000], epoch[1000:2000]  # 999 rows in blocks of 8 are 1,000 places
    assert set(first) == set(range(999)) == set(second)
    assert first.tolist() != second.tolist()
    assert np.array_equal(shuffle.indices(7), BlockShuffle(999, 64, 3, 8, 256).indices(7))
    # A batch is no run of neighbours.
    assert np.mean(np.abs(np.diff(shuffle.indices(0))) == 1) < 0.2


def test_a_batch_of_100_million_rows_takes_no_more_memory_than_one_of_a_million() -> None:
    peaks = []
    for rows in (1_000_000, 100_000_000):
        shuffle = BlockShuffle(rows, batch=1024, seed=0)
        tracemalloc.start()
        assert shuffle.indices(12_345).max() < rows
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] < 1_000_000
