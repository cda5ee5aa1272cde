"""import-sae as a user runs it: measured on a corpus, folded where that is exact, and refused with the reason."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faceteer_sae.model import SparseAutoencoder
from faceteer_sae.statistics import load_statistics
from faceteer_sae.weights import SaeWeights
from faceteer_trainer.__main__ import main
from faceteer_trainer.corpus.shards import CorpusCard, Shard, write_embeds
from faceteer_trainer.errors import JobError
from faceteer_trainer.formats.conversions import with_input_shift
from faceteer_trainer.formats.registry import read
from safetensors.torch import save_file

D, N, K = 32, 64, 8


def parts(d_in: int = D) -> dict[str, torch.Tensor]:
    """Encoder and decoder [N, d_in] with rows of many lengths, biases."""
    g = torch.Generator().manual_seed(0)
    W = torch.randn(N, d_in, generator=g)
    return {"E": W, "e": torch.randn(N, generator=g), "D": torch.randn(N, d_in, generator=g),
            "b": torch.randn(d_in, generator=g)}  # fmt: skip


def embeds(count: int = 400, seed: int = 1) -> np.ndarray:
    return (2 * np.random.default_rng(seed).standard_normal((count, D))).astype(np.float32)


def write_saelens(directory: Path, cfg: dict[str, Any], **more: torch.Tensor) -> Path:
    """SAELens' files of :func:`parts`, with this cfg.json."""
    t = parts()
    directory.mkdir(parents=True)
    tensors = {"W_enc": t["E"].T.contiguous(), "b_enc": t["e"], "W_dec": t["D"], "b_dec": t["b"], **more}
    save_file(tensors, directory / "sae_weights.safetensors")
    (directory / "cfg.json").write_text(json.dumps(cfg))
    return directory


def write_published(path: Path, d_in: int = D, **changes: Any) -> Path:
    t = {name: tensor.half() for name, tensor in parts(d_in).items()}
    state = {"enc_bias": t["e"], "encoder.weight": t["E"], "dec_bias": t["b"], "decoder.weight": t["D"].T.contiguous()}
    torch.save(state | changes, path)
    return path


def write_corpus(directory: Path, values: np.ndarray, revision: str) -> Path:
    directory.mkdir()
    write_embeds(directory / "embeds-00000.safetensors", values, dtype="float32", encoder_revision=revision)
    shard = Shard("embeds-00000.safetensors", len(values))
    CorpusCard("pictures", revision, values.shape[1], "float32", (shard,)).write(directory)
    return directory


def served(directory: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Activations and reconstructions by the SAE that services load."""
    sae = SparseAutoencoder.load(directory)
    acts = np.zeros((len(x), sae.d_sae), np.float32)
    output = np.zeros_like(x)
    for row, found in enumerate(sae.encode(x)):
        acts[row, found.top_indices] = found.top_acts
        output[row] = sae.decode(found.top_indices, found.top_acts)
    return acts, output


def imported(format_: str, file: Path, out: Path, *more: str) -> Path:
    main(["import-sae", "--from", format_, "--file", str(file), "--out", str(out), *more])
    return out


def revision_of(bundle: Path) -> str:
    return str(json.loads((bundle / "bundle.json").read_text())["parts"]["encoder"]["revision"])


def test_an_import_is_measured_on_a_corpus_and_names_its_encoder(
    tmp_path: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x, revision = embeds(), revision_of(tiny_bundle)
    corpus = write_corpus(tmp_path / "corpus", x, revision)
    cfg = {"architecture": "topk", "d_in": D, "d_sae": N, "k": K, "metadata": {"sae_lens_version": "6.18.0"}}
    theirs = write_saelens(tmp_path / "theirs", cfg)
    out = imported("saelens", theirs, tmp_path / "sae", "--corpus", str(corpus), "--bundle", str(tiny_bundle))
    acts, output = served(out, x)
    statistics = load_statistics(out, D, N)
    assert statistics is not None
    np.testing.assert_allclose(statistics.firing_share, (acts > 0).mean(0), atol=1e-6)
    p99 = [np.quantile(column[column > 0], 0.99) if column.any() else 0 for column in acts.T]
    np.testing.assert_allclose(statistics.p99, p99, rtol=1e-4)
    metadata = json.loads((out / "cfg.json").read_text())["metadata"]
    assert metadata["encoder_revision"] == revision
    assert metadata["imported_from"] == {"format": "saelens", "file": "theirs"}
    assert metadata["embedding_statistics"]["l0"] == {"p01": K, "p50": K, "p99": K}
    assert metadata["embedding_statistics"]["norm"]["p50"] == pytest.approx(np.median(np.linalg.norm(x, axis=1)), 0.01)
    variance = 1 - ((x - output) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert metadata["figures"]["explained_variance"] == pytest.approx(variance, rel=1e-5)
    # Random weights explain nothing, and the job says so.
    assert "WARNING: that is not what an SAE does" in capsys.readouterr().out
    # What was measured of one SAE does not stay beside another.
    imported("saelens", theirs, out)
    assert load_statistics(out, D, N) is None


def test_an_sae_that_fits_its_embeddings_is_imported_without_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The two halves of each axis: an exact SAE, half of whose features fire.
    eye = torch.eye(D)
    W = torch.cat([eye, -eye])
    state = {"enc_bias": torch.zeros(N), "encoder.weight": W, "dec_bias": torch.zeros(D), "decoder.weight": W.T}
    path = tmp_path / "sae.pth"
    torch.save({name: tensor.half().contiguous() for name, tensor in state.items()}, path)
    corpus = write_corpus(tmp_path / "corpus", embeds(), "r1")
    out = imported("published", path, tmp_path / "sae", "--corpus", str(corpus), "--allow-other-checksum")
    said = capsys.readouterr().out
    assert "WARNING" not in said
    assert "explained_variance 1 " in said
    assert json.loads((out / "cfg.json").read_text())["metadata"]["encoder_revision"] == "r1"


def test_embeddings_of_another_encoder_or_length_are_refused(
    tmp_path: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fits, narrow = write_published(tmp_path / "sae.pth"), write_published(tmp_path / "narrow.pth", 12)
    corpus = write_corpus(tmp_path / "corpus", embeds(), "r1")
    bundle = ["--bundle", str(tiny_bundle)]
    for file, more, words in (
        (fits, [*bundle, "--corpus", str(corpus)], "embeddings of encoder r1, but"),
        (narrow, bundle, "its encoder makes|trained on another encoder"),
        (narrow, ["--corpus", str(corpus)], "embeddings of 32 values, but"),
        (fits, ["--activation-scale", "2"], "goes with --from saelens only"),
        (fits, ["--statistics-rows", "0"], "must be above 0"),
    ):
        with pytest.raises(SystemExit) as stopped:
            imported("published", file, tmp_path / "out", "--allow-other-checksum", *more)
        assert stopped.value.code == 1
        said = capsys.readouterr().err
        assert any(part in said for part in words.split("|")), said
    assert not (tmp_path / "out" / "cfg.json").exists()


@pytest.mark.parametrize("rescaled", [False, True], ids=["plain", "rescaled"])
@pytest.mark.parametrize("architecture", ["standard", "topk", "batchtopk"])
def test_a_scale_of_the_trainings_input_is_folded_exactly(tmp_path: Path, architecture: str, rescaled: bool) -> None:
    if rescaled and architecture == "standard":
        return
    s, x, p = 0.3, embeds(9), {name: tensor.double().numpy() for name, tensor in parts().items()}
    cfg = {"architecture": architecture, "normalize_activations": "expected_average_only_in", "k": K,
           "rescale_acts_by_decoder_norm": rescaled, "metadata": {"sae_lens_version": "6.18.0"}}  # fmt: skip
    more = {"topk_threshold": torch.tensor(4.0, dtype=torch.float64)} if architecture == "batchtopk" else {}
    theirs = write_saelens(tmp_path / "theirs", cfg, **more)
    with pytest.raises(JobError, match=r"give it as --activation-scale, or fold it"):
        read("saelens", theirs)
    # As SAELens runs it: on s x, selected by pre ||d|| where rescaled, and its output divided by s.
    pre = (s * x - p["b"]) @ p["E"].T + p["e"]
    norms = np.linalg.norm(p["D"], axis=1) if rescaled else np.ones(N)
    chosen = pre * norms
    if architecture == "topk":
        least = np.sort(chosen, axis=1)[:, -K][:, None]
    else:
        least = 4.0 + 1e-12 if architecture == "batchtopk" else 0.0
    acts = np.where(chosen >= least, np.maximum(chosen, 0), 0)
    output = (acts / norms @ p["D"] + p["b"]) / s
    out = imported("saelens", theirs, tmp_path / "out", "--activation-scale", str(s))
    found, rebuilt = served(out, x)
    # Rescaled ones have decoder vectors of norm 1 in the end, as SAELens' own fold leaves them: activations are of x.
    np.testing.assert_allclose(found, acts / s if rescaled else acts, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(rebuilt, output, rtol=1e-3, atol=1e-3)
    assert (found > 0).sum() > 20


def test_files_of_saelens_before_version_6_say_the_same_in_other_words(tmp_path: Path) -> None:
    old = {
        "d_in": D,
        "d_sae": N,
        "hook_name": "blocks.0",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 5},
    }
    sae = read("saelens", write_saelens(tmp_path / "topk", old))
    assert (sae.architecture, sae.k, sae.apply_b_dec_to_input) == ("topk", 5, True)
    sae = read("saelens", write_saelens(tmp_path / "relu", {"d_in": D, "activation_fn_str": "relu"}))
    assert sae.architecture == "standard"
    assert read("saelens", write_saelens(tmp_path / "no", {"normalize_activations": False})).d_sae == N
    for changes, words in (
        ({"normalize_activations": True}, "expected_average_only_in"),
        ({"finetuning_scaling_factor": True}, "fold it into W_dec first"),
    ):
        with pytest.raises(JobError, match=words):
            read("saelens", write_saelens(tmp_path / words, changes))


def test_a_matryoshka_checkpoint_of_saelens_is_the_batchtopk_that_it_is_after_training(tmp_path: Path) -> None:
    cfg = {"architecture": "matryoshka_batchtopk", "k": K, "matryoshka_widths": [16, N], "metadata": {}}
    theirs = write_saelens(tmp_path / "theirs", cfg, topk_threshold=torch.tensor(0.5, dtype=torch.float64))
    sae = read("saelens", theirs / "sae_weights.safetensors")
    assert (sae.architecture, sae.k) == ("batchtopk", K)
    x, t = embeds(9), parts()
    found, _ = served(imported("saelens", theirs, tmp_path / "out"), x)
    pre = torch.relu((torch.from_numpy(x) - t["b"]) @ t["E"].T + t["e"])
    np.testing.assert_allclose(found, torch.where(pre > 0.5, pre, 0.0), atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "gated"}, "architecture 'gated' is not one of"),
        ({"normalize_activations": "layer_norm"}, "cannot be folded into the weights"),
        ({"normalize_activations": "constant_norm_rescale"}, "cannot be folded into the weights"),
        ({"d_in": 31}, r"d_in is 31, but sae_weights.safetensors holds 32"),
        ({"d_sae": 128}, r"d_sae is 128, but sae_weights.safetensors holds 64"),
        ({"architecture": "topk", "k": "many"}, "k must be a number, not 'many'"),
        ({"architecture": "topk", "k": 65}, "k is 65, but must be 1 to 64"),
    ],
)
def test_a_cfg_that_contradicts_its_file_or_cannot_be_served_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    theirs = write_saelens(tmp_path / "theirs", {"architecture": "standard", "d_in": D, "d_sae": N, **changes})
    with pytest.raises(JobError, match=words):
        read("saelens", theirs, activation_scale=1.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"enc_bias": "text"}, "'enc_bias' is no tensor but str"),
        ({"enc_bias": torch.zeros(N, dtype=torch.int64)}, r"b_enc is torch\.int64"),
        ({"encoder.weight": torch.zeros(N)}, "must be a matrix"),
        ({"decoder.weight": torch.zeros(2, 2, 2)}, "stands where a matrix must"),
        ({"dec_bias": torch.zeros(D - 1)}, r"b_dec has shape \[31\], not \[32\]"),
        ({"dec_bias": torch.full((D,), torch.inf)}, "b_dec holds NaN or infinite values"),
    ],
)
def test_a_pickle_of_other_things_than_four_fitting_tensors_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(JobError, match=words):
        read("published", write_published(tmp_path / "sae.pth", **changes), any_checksum=True)


class Executes:
    """Unpickling this would write a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.target, "run"))


def as_zip(state: Any, path: Path) -> None:
    torch.save(state, path)


def as_before_torch_1_6(state: Any, path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


def as_plain_pickle(state: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(state))


@pytest.mark.parametrize("save", [as_zip, as_before_torch_1_6, as_plain_pickle])
def test_code_in_a_pickle_of_any_age_is_refused_unread(tmp_path: Path, save: Callable[[Any, Path], None]) -> None:
    proof = tmp_path / "proof"
    state = {"enc_bias": torch.zeros(3), "encoder.weight": Executes(proof)}
    save(state, tmp_path / "sae.pth")
    with pytest.raises(JobError, match=r"not loaded|not a file of torch\.save"):
        read("published", tmp_path / "sae.pth", any_checksum=True)
    assert not proof.exists()


def test_a_file_of_before_torch_1_6_is_read_too(tmp_path: Path) -> None:
    state = torch.load(write_published(tmp_path / "new.pth"), weights_only=True)
    as_before_torch_1_6(state, tmp_path / "old.pth")
    old, new = (read("published", tmp_path / name, any_checksum=True) for name in ("old.pth", "new.pth"))
    assert torch.equal(old.W_enc, new.W_enc)


def test_a_file_cut_short_anywhere_is_one_clear_error(tmp_path: Path) -> None:
    whole = write_published(tmp_path / "sae.pth").read_bytes()
    theirs = write_saelens(tmp_path / "theirs", {"architecture": "standard"})
    tensors = (theirs / "sae_weights.safetensors").read_bytes()
    for share in np.linspace(0, 0.999, 12):
        (tmp_path / "sae.pth").write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(JobError, match=r"sae\.pth: (not a file of torch\.save|holds more than tensors)"):
            read("published", tmp_path / "sae.pth", any_checksum=True)
        (theirs / "sae_weights.safetensors").write_bytes(tensors[: int(share * len(tensors))])
        with pytest.raises(JobError, match="not a readable safetensors file"):
            read("saelens", theirs)


def test_b_dec_moves_into_the_encoders_bias_and_back_without_a_change(tmp_path: Path) -> None:
    t = parts()
    sae = SaeWeights("standard", t["E"], t["e"], t["D"], t["b"], True)
    other = with_input_shift(sae, False)
    assert not other.apply_b_dec_to_input
    x = torch.from_numpy(embeds(5)).double()
    before = (x - t["b"].double()) @ t["E"].double().T + t["e"]
    torch.testing.assert_close(x @ other.W_enc.double().T + other.b_enc, before, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(with_input_shift(other, True).b_enc, t["e"], atol=1e-5, rtol=1e-5)


def test_values_that_float16_cannot_hold_are_refused_and_nothing_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = write_saelens(tmp_path / "theirs", {"architecture": "standard", "apply_b_dec_to_input": False})
    imported("saelens", theirs, tmp_path / "sae")
    big = parts()["E"].T.contiguous()
    big[0, 0] = 1e6
    other = write_saelens(tmp_path / "big", {"architecture": "standard", "apply_b_dec_to_input": False}, W_enc=big)
    half = str(tmp_path / "half")
    for command in (
        ["import-sae", "--from", "saelens", "--file", str(other), "--out", half, "--dtype", "float16"],
        ["export-sae", "--sae", str(imported("saelens", other, tmp_path / "wide")), "--to", "published", "--out",
         str(tmp_path / "half" / "sae.pth")],
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            main(command)
        assert "float16" in capsys.readouterr().err
    assert not [file for file in (tmp_path / "half").rglob("*") if file.is_file() and file.name != ".lock"]
