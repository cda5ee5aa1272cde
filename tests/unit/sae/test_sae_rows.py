"""Weights in layout rows and in int8, screening in int8: the same features, and memory that processes share."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from faceteer_runtime import memory
from faceteer_runtime.bundle import BundleError
from faceteer_sae.model import SparseAutoencoder
from faceteer_sae.rows import Rows, quantised
from faceteer_sae.screening import FloatScreen, Int8Screen, float_screen, int8_screen
from faceteer_sae.weights import SaeWeights, load_config, load_weights, update_metadata, write_weights
from safetensors.torch import load_file, save_file
from unit.sae.random_sae import ARCHITECTURES, Dense, Pair, embeddings, random_sae


def card(pair: Pair) -> dict[str, object]:
    c = pair.config
    return {
        "architecture": c.architecture,
        "d_in": c.d_in,
        "d_sae": c.d_sae,
        "k": c.k,
        "apply_b_dec_to_input": c.apply_b_dec_to_input,
    }


def stored(directory: Path, pair: Pair) -> Dense:
    """The float64 implementation over what the file really holds."""
    held = {name: tensor.double().numpy() for name, tensor in load_file(directory / "sae_weights.safetensors").items()}
    for name in ("W_enc_rows", "W_dec"):
        if f"{name}_scales" in held:
            held[name] = held[name] * held[f"{name}_scales"][:, None]
    d = pair.dense
    b_pre = held["b_dec"] if pair.config.apply_b_dec_to_input else d.b_pre
    threshold = np.broadcast_to(held.get("threshold", held.get("topk_threshold", np.zeros(()))), d.threshold.shape)
    return Dense(
        d.architecture, d.k, held["W_enc_rows"].T, held["b_enc"], held["W_dec"], held["b_dec"], b_pre, threshold
    )


def test_int8_levels_are_those_done_by_hand() -> None:
    values, scales = quantised(torch.tensor([[127.0, -63.5, 1.0], [0.0, 0.0, 0.0], [0.5, 0.25, -1.0]]))
    assert scales.tolist() == [1.0, 0.0, pytest.approx(1 / 127)]
    assert values.tolist() == [[127, -64, 1], [0, 0, 0], [64, 32, -127]]
    taken = Rows(values, scales.numpy()).take(np.array([2, 0]))
    assert np.allclose(taken, [[64 / 127, 32 / 127, -1.0], [127.0, -64.0, 1.0]])


@pytest.mark.parametrize("screening", ["auto", "int8", "weights"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_features_are_those_of_a_dense_float64_implementation_of_the_stored_weights(
    architecture: str, dtype: str, screening: str, tmp_path: Path
) -> None:
    pair = random_sae(architecture, seed=11, d_in=48, d_sae=700, k=20)
    write_weights(tmp_path, pair.in_memory, dtype)
    sae, dense = SparseAutoencoder.load(tmp_path, screening=screening), stored(tmp_path, pair)
    x = embeddings(12, 7, 48)
    for one, found in zip(x, sae.encode(x), strict=True):
        f = dense.encode(one.astype(np.float64))
        assert found.top_indices.tolist() == np.flatnonzero(f).tolist()
        assert np.allclose(found.top_acts, f[f > 0], rtol=1e-4, atol=1e-4)
        assert np.allclose(sae.decode(found.top_indices, found.top_acts), dense.decode(f), rtol=1e-4, atol=1e-3)
        assert sae.activations(one, found.top_indices, found.kth_pre_act).tolist() == found.top_acts.tolist()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e5])
@pytest.mark.parametrize("make", [float_screen, int8_screen])
def test_no_pre_activation_lies_outside_what_a_screen_promises(make: object, scale: float) -> None:
    generator = torch.Generator().manual_seed(3)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        spread = torch.logspace(-0.5, 0.5, 500)[:, None]
        rows = Rows((torch.randn(500, 64, generator=generator) * spread).to(dtype))
        b_enc = torch.randn(500, generator=generator).numpy()
        x = embeddings(4, 20, 64, scale)
        screen = float_screen(rows, b_enc, torch.device("cpu")) if make is float_screen else int8_screen(rows, b_enc)
        pre, error = screen(x)
        exact = x.astype(np.float64) @ rows.values.double().numpy().T + b_enc
        off = np.abs(pre.double().numpy() - exact)
        assert (off <= error.double().numpy()).all()
        # A bound that lets everything through would be useless.
        assert np.median(error.numpy()) < 0.6 * np.median(np.abs(exact))


def test_the_screen_is_the_one_asked_for(tmp_path: Path) -> None:
    pair = random_sae("standard")
    write_weights(tmp_path / "with", pair.in_memory, "float16", screen=True)
    write_weights(tmp_path / "without", pair.in_memory, "float16", screen=False)

    def kind(directory: str, screening: str) -> type:
        return type(SparseAutoencoder.load(tmp_path / directory, screening=screening)._screen)

    assert kind("with", "auto") is kind("with", "int8") is kind("without", "int8") is Int8Screen
    assert kind("without", "auto") is kind("with", "weights") is FloatScreen


def test_tied_weights_are_written_too(tmp_path: Path) -> None:
    pair = random_sae("standard")
    tied = replace(pair.in_memory, W_enc=pair.weights["W_dec"])
    write_weights(tmp_path, tied, "float32")
    held = load_file(tmp_path / "sae_weights.safetensors")
    assert torch.equal(held["W_enc_rows"], held["W_dec"])


def test_a_value_that_float16_cannot_hold_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    pair = random_sae("standard")
    with pytest.raises(BundleError, match="W_dec holds values that are not finite in float16; take a wider type"):
        write_weights(tmp_path / "sae", replace(pair.in_memory, W_dec=pair.weights["W_dec"] * 1e6), "float16")
    assert not (tmp_path / "sae").exists()


def test_int8_without_its_scales_and_int8_in_the_other_layout_are_refused(tmp_path: Path) -> None:
    pair = random_sae("standard")
    write_weights(tmp_path, pair.in_memory, "int8")
    path = tmp_path / "sae_weights.safetensors"
    held = load_file(path)
    save_file({name: tensor for name, tensor in held.items() if name != "W_dec_scales"}, path)
    with pytest.raises(BundleError, match="'W_dec_scales' is missing"):
        load_weights(tmp_path, load_config(tmp_path))
    save_file({**held, "W_dec_scales": torch.full((96,), torch.nan)}, path)
    with pytest.raises(BundleError, match="'W_dec_scales' holds NaN"):
        load_weights(tmp_path, load_config(tmp_path))
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**config, "layout": "columns"}))
    with pytest.raises(BundleError, match="layout 'columns' is not one of saelens, rows"):
        load_config(tmp_path)


def test_a_gpu_that_is_not_there_is_one_clear_error(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    pair = random_sae("standard")
    write_weights(tmp_path, pair.in_memory, "float16")
    with pytest.raises(BundleError, match="'cuda' was asked for, but this machine has no CUDA GPU"):
        SparseAutoencoder.load(tmp_path, "cuda")


def test_too_little_memory_is_said_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = random_sae("standard")
    write_weights(tmp_path, pair.in_memory, "float32")
    monkeypatch.setattr(memory, "available_memory", lambda: 10_000)
    with pytest.raises(BundleError, match=r"of memory, but this machine has .* use weights in float16 or int8"):
        SparseAutoencoder.load(tmp_path)


RESIDENT = """
import sys, psutil, torch
from pathlib import Path
import numpy as np
from faceteer_sae.model import SparseAutoencoder
torch.set_num_threads(1)
directory = Path(sys.argv[1])
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024
before = psutil.Process().memory_info().rss, anonymous()
sae = SparseAutoencoder.load(directory)
sae.encode(np.ones((1, sae.d_in), np.float32))
print(psutil.Process().memory_info().rss - before[0], anonymous() - before[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' own account of memory")
def test_the_weights_stay_on_the_files_own_pages(tmp_path: Path) -> None:
    d_sae, d_in = 32_768, 512
    rows = torch.randn(d_sae, d_in, generator=torch.Generator().manual_seed(0))
    write_weights(tmp_path, SaeWeights("topk", rows, torch.zeros(d_sae), rows, torch.zeros(d_in), False, 16), "float16")
    size = (tmp_path / "sae_weights.safetensors").stat().st_size
    ran = subprocess.run([sys.executable, "-c", RESIDENT, tmp_path], capture_output=True, text=True, check=True)
    resident, own = map(int, ran.stdout.split())
    # Torch's own first-use memory does not depend on the weights.
    assert resident < 1.1 * size + 40e6
    assert own < 0.1 * size + 30e6


def test_the_int8_bound_holds_where_only_the_rows_were_rounded() -> None:
    # x lies on the int8 grid itself, so all of the error comes from the row; and it points along what the rounding of
    # row 0 left over, which is as wrong as that row's screening can be.
    rows = Rows(torch.randn(8, 64, generator=torch.Generator().manual_seed(5)))
    values, scales = quantised(rows.values)
    left = rows.values - values.float() * scales[:, None]
    x = torch.sign(left[0]).numpy()[None]
    pre, error = int8_screen(rows, np.zeros(8, np.float32))(x)
    off = abs(float(pre[0, 0]) - float(x[0].astype(np.float64) @ rows.values[0].double().numpy()))
    assert off == pytest.approx(float(left[0].abs().sum()), rel=1e-3)
    assert off <= float(error[0, 0])
    # By Cauchy-Schwarz, and not looser.
    assert float(error[0, 0]) == pytest.approx(float(left[0].norm()) * np.linalg.norm(x), rel=1e-3)


def test_the_int8_bound_holds_where_only_the_embedding_was_rounded() -> None:
    # Rows of +-1 are exact in int8; x leaves half a level in each place.
    rows = Rows(torch.ones(2, 64))
    x = np.full((1, 64), 0.5 / 127, np.float32)
    x[0, 0] = 1.0
    pre, error = int8_screen(rows, np.zeros(2, np.float32))(x)
    off = abs(float(pre[0, 0]) - float(x.sum(dtype=np.float64)))
    assert 0 < off <= float(error[0, 0])
    assert float(error[0, 0]) == pytest.approx(np.linalg.norm(x[0, 1:]) * 8.0, rel=1e-2)


def test_a_screen_lets_through_hardly_more_than_fires() -> None:
    pair = random_sae("jumprelu", seed=4, d_in=64, d_sae=2000)
    x = embeddings(5, 8, 64)
    firing = sum(len(found.top_indices) for found in pair.sae.encode(x))
    for make, most in ((float_screen, 1.001), (int8_screen, 1.1)):
        options = (torch.device("cpu"),) if make is float_screen else ()
        pair.sae._screen = make(pair.sae.encoder_rows, pair.sae.b_enc, *options)
        let_through = len(pair.sae._candidates(x - pair.sae.b_pre)[0])
        assert firing <= let_through <= most * firing + 2


@pytest.mark.parametrize("dtype", ["float16", "int8", "float32"])
def test_an_sae_of_several_blocks_is_the_dense_one(dtype: str, tmp_path: Path) -> None:
    # More than two blocks of rows read (1,024) and multiplied (512) together, the last one incomplete.
    pair = random_sae("topk", seed=6, d_in=32, d_sae=2500, k=1500)
    write_weights(tmp_path, pair.in_memory, dtype)
    dense = stored(tmp_path, pair)
    x = embeddings(7, 5, 32)
    for screening in ("weights", "int8"):
        sae = SparseAutoencoder.load(tmp_path, screening=screening)
        for one, found in zip(x, sae.encode(x), strict=True):
            f = dense.encode(one.astype(np.float64))
            assert found.top_indices.tolist() == np.flatnonzero(f).tolist()
            assert len(found.top_indices) > 1024
            assert np.allclose(found.top_acts, f[f > 0], rtol=1e-4, atol=1e-4)
            x_hat = sae.decode(found.top_indices, found.top_acts)
            assert np.allclose(x_hat, dense.decode(f), rtol=1e-4, atol=2e-3)
    everything = np.arange(2500)
    rows = sae.decoder_rows
    assert np.allclose(np.concatenate([block.numpy() for block in rows.blocks()]), rows.take(everything))
    assert np.allclose(rows.take(everything), dense.W_dec, atol=1e-6)
    assert len(rows) == 2500


def test_float16_rows_are_multiplied_as_float32_for_a_batch_and_as_they_are_for_a_few() -> None:
    # As they are, one pass costs least; in blocks of float32, a batch does. What shows is the precision.
    rows = Rows(torch.randn(1300, 64, generator=torch.Generator().manual_seed(8)).half())
    screen = float_screen(rows, np.zeros(1300, np.float32), torch.device("cpu"))
    x = embeddings(9, 4, 64)
    exact = x.astype(np.float64) @ rows.values.double().numpy().T

    def worst(n: int) -> float:
        return float(np.abs(screen(x[:n])[0].numpy() - exact[:n]).max())

    assert worst(4) < 1e-4 < 1e-3 < worst(3)


def test_facts_join_the_metadata_that_is_there(tmp_path: Path) -> None:
    pair = random_sae("topk")
    write_weights(tmp_path, replace(pair.in_memory, metadata={"a": 1, "b": 2}), "float32")
    update_metadata(tmp_path, {"b": 3, "c": 4})
    config = load_config(tmp_path)
    assert config.metadata == {"a": 1, "b": 3, "c": 4}
    assert (config.k, config.d_sae, config.layout) == (pair.config.k, pair.config.d_sae, "rows")
    with pytest.raises(BundleError, match="missing"):
        update_metadata(tmp_path / "nowhere", {})
