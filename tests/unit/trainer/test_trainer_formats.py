"""SAEs in others' file formats: read as their own packages read them, and written so that they read them again."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faceteer_sae.model import SparseAutoencoder
from faceteer_sae.weights import SaeWeights, write_weights
from faceteer_trainer.__main__ import main
from faceteer_trainer.errors import JobError
from faceteer_trainer.formats import dictionary_learning, published, saelens, sparsify
from faceteer_trainer.formats.registry import read
from safetensors.torch import save_file
from unit.sae.random_sae import Pair, random_sae, write_sae

ROOT = Path(__file__).parents[3]
ORIGINALS = ROOT / ".venv" / "originals"
D, N, K = 12, 40, 6
ARCHITECTURES = ("standard", "topk", "batchtopk", "jumprelu")


def parts(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors by what they are, decoder rows not of norm 1."""
    g = torch.Generator().manual_seed(seed)
    return {
        "E": torch.randn(N, D, generator=g), "e": torch.randn(N, generator=g), "D": torch.randn(N, D, generator=g),
        "b": torch.randn(D, generator=g), "t": torch.rand(N, generator=g) + 0.2,
    }  # fmt: skip


def embeds(count: int = 7) -> np.ndarray:
    return (2 * np.random.default_rng(1).standard_normal((count, D))).astype(np.float32)


def ours(sae: SaeWeights, directory: Path) -> tuple[np.ndarray, np.ndarray]:
    """Activations [n, N] and reconstructions [n, D] as they are served."""
    write_weights(directory, sae, "float32")
    served = SparseAutoencoder.load(directory)
    acts, output = np.zeros((7, N)), np.zeros((7, D))
    for row, found in enumerate(served.encode(embeds())):
        acts[row, found.top_indices] = found.top_acts
        output[row] = served.decode(found.top_indices, found.top_acts)
    return acts, output


def top(pre: np.ndarray, k: int) -> np.ndarray:
    kept = np.zeros_like(pre)
    for row, values in enumerate(pre):
        best = np.argsort(-values)[:k]
        kept[row, best] = np.maximum(values[best], 0)
    return kept


# -- each format, built by hand, against its forward pass written out ---------------------------------


def write_saelens(directory: Path, architecture: str, **changes: Any) -> tuple[np.ndarray, np.ndarray]:
    p = {name: tensor.numpy().astype(np.float64) for name, tensor in parts().items()}
    tensors = {"W_enc": parts()["E"].T, "b_enc": parts()["e"], "W_dec": parts()["D"], "b_dec": parts()["b"]}
    cfg = {"architecture": architecture, "d_in": D, "d_sae": N, "dtype": "float32", "device": "cpu",
           "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
           "metadata": {"sae_lens_version": "6.18.0"}, **changes}  # fmt: skip
    x = embeds() - p["b"] if cfg["apply_b_dec_to_input"] else embeds()
    pre, W_dec = x @ p["E"].T + p["e"], p["D"]
    if "topk" in architecture:
        cfg["k"] = K
    if cfg.get("rescale_acts_by_decoder_norm"):
        norms = np.linalg.norm(W_dec, axis=1)
        pre, W_dec = pre * norms, W_dec / norms[:, None]
    if architecture == "jumprelu":
        tensors["threshold"] = parts()["t"]
        acts = np.maximum(pre, 0) * (pre > p["t"])
    elif architecture == "batchtopk":
        tensors["topk_threshold"] = torch.tensor(0.9, dtype=torch.float64)
        acts = np.maximum(pre, 0) * (pre > 0.9)
    else:
        acts = top(pre, K) if architecture == "topk" else np.maximum(pre, 0)
    directory.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "sae_weights.safetensors")
    (directory / "cfg.json").write_text(json.dumps(cfg))
    return acts, acts @ W_dec + p["b"]


@pytest.mark.parametrize("rescale", [False, True], ids=["", "rescaled"])
@pytest.mark.parametrize("shift", [True, False], ids=["b_dec", "no-b_dec"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saelens_files_do_what_saelens_says(architecture: str, shift: bool, rescale: bool, tmp_path: Path) -> None:
    if rescale and "topk" not in architecture:
        return
    more = {"rescale_acts_by_decoder_norm": True} if rescale else {}
    acts, output = write_saelens(tmp_path / "sae", architecture, apply_b_dec_to_input=shift, **more)
    found, rebuilt = ours(read("saelens", tmp_path / "sae"), tmp_path / "ours")
    assert np.allclose(found, acts, atol=1e-5)
    assert np.allclose(rebuilt, output, atol=1e-4)
    assert (acts > 0).sum() > 10


def write_dictionary(directory: Path, kind: str) -> tuple[np.ndarray, np.ndarray]:
    t = parts()
    p = {name: tensor.numpy().astype(np.float64) for name, tensor in t.items()}
    linear = {"encoder.weight": t["E"], "encoder.bias": t["e"], "decoder.weight": t["D"].T}
    plain = {"W_enc": t["E"].T, "b_enc": t["e"], "W_dec": t["D"], "b_dec": t["b"]}
    k, threshold = torch.tensor(K, dtype=torch.int32), torch.tensor(0.9)
    shifted = np.maximum((embeds() - p["b"]) @ p["E"].T + p["e"], 0)
    unshifted = np.maximum(embeds() @ p["E"].T + p["e"], 0)
    state, acts = {
        "AutoEncoder": ({**linear, "bias": t["b"]}, shifted),
        "AutoEncoderNew": ({**linear, "decoder.bias": t["b"]}, unshifted),
        "AutoEncoderTopK": ({**linear, "b_dec": t["b"], "k": k, "threshold": torch.tensor(-1.0)}, top(shifted, K)),
        "BatchTopKSAE": ({**linear, "b_dec": t["b"], "k": k, "threshold": threshold}, shifted * (shifted > 0.9)),
        "MatryoshkaBatchTopKSAE": (
            {**plain, "k": k, "threshold": threshold, "group_sizes": torch.tensor([10, 30])},
            shifted * (shifted > 0.9),
        ),
        "JumpReluAutoEncoder": ({**plain, "threshold": t["t"]}, unshifted * (unshifted > p["t"])),
    }[kind]  # fmt: skip
    directory.mkdir(parents=True)
    torch.save({name: tensor.contiguous() for name, tensor in state.items()}, directory / "ae.pt")
    trainer = {"dict_class": kind, "activation_dim": D, "dict_size": N, "k": K}
    (directory / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    return acts, acts @ p["D"] + p["b"]


DICTIONARIES = ("AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE",
                "JumpReluAutoEncoder")  # fmt: skip


@pytest.mark.parametrize("kind", DICTIONARIES)
def test_dictionary_learnings_files_do_what_it_says(kind: str, tmp_path: Path) -> None:
    acts, output = write_dictionary(tmp_path / "trainer_0", kind)
    for path in (tmp_path / "trainer_0", tmp_path / "trainer_0" / "ae.pt"):
        found, rebuilt = ours(read("dictionary-learning", path), tmp_path / "ours")
        assert np.allclose(found, acts, atol=1e-5)
        assert np.allclose(rebuilt, output, atol=1e-4)


def write_sparsify(directory: Path, **changes: Any) -> tuple[np.ndarray, np.ndarray]:
    t = parts()
    p = {name: tensor.numpy().astype(np.float64) for name, tensor in t.items()}
    directory.mkdir(parents=True)
    save_file(
        {"encoder.weight": t["E"], "encoder.bias": t["e"], "W_dec": t["D"], "b_dec": t["b"]},
        directory / "sae.safetensors",
    )
    cfg = {"activation": "topk", "expansion_factor": 3, "normalize_decoder": True, "num_latents": N, "k": K,
           "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D, **changes}  # fmt: skip
    (directory / "cfg.json").write_text(json.dumps(cfg))
    acts = top(np.maximum((embeds() - p["b"]) @ p["E"].T + p["e"], 0), K)
    return acts, acts @ p["D"] + p["b"]


def test_sparsifys_files_do_what_it_says(tmp_path: Path) -> None:
    acts, output = write_sparsify(tmp_path / "layer")
    found, rebuilt = ours(read("sparsify", tmp_path / "layer"), tmp_path / "ours")
    assert np.allclose(found, acts, atol=1e-5)
    assert np.allclose(rebuilt, output, atol=1e-4)


def write_published(path: Path) -> tuple[np.ndarray, np.ndarray]:
    t = {name: tensor.half() for name, tensor in parts().items()}
    state = {"enc_bias": t["e"], "encoder.weight": t["E"], "dec_bias": t["b"], "decoder.weight": t["D"].T.contiguous()}
    torch.save(state, path)
    p = {name: tensor.double().numpy() for name, tensor in t.items()}
    acts = np.maximum(embeds() @ p["E"].T + p["e"], 0)
    return acts, acts @ p["D"] + p["b"]


def test_the_published_file_does_what_its_four_tensors_say(tmp_path: Path) -> None:
    acts, output = write_published(tmp_path / "sparse_autoencoder_128.pth")
    sae = read("published", tmp_path / "sparse_autoencoder_128.pth", any_checksum=True)
    assert not sae.apply_b_dec_to_input
    found, rebuilt = ours(sae, tmp_path / "ours")
    assert np.allclose(found, acts, atol=1e-5)
    assert np.allclose(rebuilt, output, atol=1e-4)
    with pytest.raises(JobError, match=r"its SHA-256 is \w+, not the published file's 427e99d5"):
        read("published", tmp_path / "sparse_autoencoder_128.pth")


# -- the original packages ------------------------------------------------------------------------


WRITERS: dict[str, Callable[..., Any]] = {
    "saelens": write_saelens, "dictionary-learning": write_dictionary, "sparsify": write_sparsify,
}  # fmt: skip
CASES: list[tuple[str, str | None]] = [("saelens", a) for a in ("standard", "topk", "jumprelu")]
CASES += [("dictionary-learning", kind) for kind in DICTIONARIES]
CASES += [("sparsify", None)]


EXPORTS = [("saelens", a) for a in ARCHITECTURES] + [("dictionary-learning", a) for a in ARCHITECTURES]
EXPORTS += [("sparsify", "topk")]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """Files of every kind, theirs and ours, and what the packages make of them: one process for all."""
    assert ORIGINALS.is_dir(), "run `make setup`: it installs the original packages into .venv/originals"
    home = tmp_path_factory.mktemp("originals")
    jobs = []
    for format_, kind in CASES:
        WRITERS[format_](home / f"read-{format_}-{kind}", *([kind] if kind else []))
        jobs.append([f"read-{format_}-{kind}", format_, str(home / f"read-{format_}-{kind}")])
    for format_, architecture in EXPORTS:
        directory = write_sae(home / f"mine-{architecture}", exported(architecture))
        target = home / f"written-{format_}-{architecture}"
        main(["export-sae", "--sae", str(directory), "--to", format_, "--out", str(target)])
        jobs.append([target.name, format_, str(target)])
    (home / "jobs.json").write_text(json.dumps(jobs))
    np.save(home / "x.npy", embeds())
    command = [sys.executable, ROOT / "tests" / "originals.py", ORIGINALS, home / "jobs.json", home / "x.npy",
               home / "out.npz"]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    with np.load(home / "out.npz") as found:
        return home, dict(found)


def exported(architecture: str) -> Pair:
    return random_sae(architecture, seed=3, d_in=D, d_sae=N, k=K, apply_b_dec_to_input=architecture != "standard")


@pytest.mark.parametrize(("format_", "kind"), CASES)
def test_a_file_read_here_does_what_its_own_package_does(
    format_: str, kind: str | None, originals: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    home, theirs = originals
    name = f"read-{format_}-{kind}"
    found, rebuilt = ours(read(format_, home / name), tmp_path / "ours")
    assert np.allclose(found, theirs[f"{name}/acts"], atol=1e-5)
    assert np.allclose(rebuilt, theirs[f"{name}/output"], atol=1e-4)


@pytest.mark.parametrize(("format_", "architecture"), EXPORTS)
def test_a_file_written_here_does_in_their_package_what_it_does_here(
    format_: str, architecture: str, originals: tuple[Path, dict[str, np.ndarray]]
) -> None:
    _, theirs = originals
    name, dense = f"written-{format_}-{architecture}", exported(architecture).dense
    expected = np.stack([dense.encode(x.astype(np.float64)) for x in embeds()])
    assert np.allclose(theirs[f"{name}/acts"], expected, atol=1e-5)
    assert np.allclose(theirs[f"{name}/output"], np.stack([dense.decode(f) for f in expected]), atol=1e-4)


def test_every_format_comes_back_as_it_went(tmp_path: Path) -> None:
    t = parts()
    for architecture in ARCHITECTURES:
        threshold = {"jumprelu": t["t"], "batchtopk": torch.tensor(0.7)}.get(architecture)
        sae = SaeWeights(
            architecture, t["E"], t["e"], t["D"], t["b"], True, K if "topk" in architecture else 0, threshold
        )
        expected = ours(sae, tmp_path / "a")
        for module in (saelens, dictionary_learning, *([sparsify] if architecture == "topk" else [])):
            back = module.read(module.write(sae, tmp_path / module.__name__ / architecture))
            for one, other in zip(ours(back, tmp_path / "b"), expected, strict=True):
                assert np.allclose(one, other, atol=1e-5)
    for module in (published, sparsify):
        with pytest.raises(JobError, match="has no jumprelu"):
            module.write(SaeWeights("jumprelu", t["E"], t["e"], t["D"], t["b"], True, 0, t["t"]), tmp_path / "no")


def test_the_command_line_imports_and_says_what_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_published(tmp_path / "sae.pth")
    command = ["import-sae", "--from", "published", "--file", str(tmp_path / "sae.pth"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        main(command)
    assert "--allow-other-checksum" in capsys.readouterr().err
    main([*command, "--allow-other-checksum", "--dtype", "int8"])
    assert "standard, 40 features of 12 values, int8" in capsys.readouterr().out
    assert SparseAutoencoder.load(tmp_path / "out").d_sae == N
    postcards = ROOT / "deploy" / "bundles" / "postcards"
    with pytest.raises(SystemExit):
        main([*command, "--allow-other-checksum", "--bundle", str(postcards)])
    assert "embeddings of 12 values, but" in capsys.readouterr().err


# -- files that are not what they should be ---------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "gated"}, "architecture 'gated' is not one of"),
        ({"normalize_activations": "expected_average_only_in"}, "fold it into the weights first"),
        ({"reshape_activations": "hook_z"}, "an embedding has one dimension"),
    ],
)
def test_what_saelens_can_say_and_we_cannot_serve_is_refused(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    write_saelens(tmp_path / "sae", "standard")
    cfg = tmp_path / "sae" / "cfg.json"
    cfg.write_text(json.dumps(json.loads(cfg.read_text()) | changes))
    with pytest.raises(JobError, match=words):
        read("saelens", tmp_path / "sae")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"activation": "groupmax"}, "activation 'groupmax' is not served"),
        ({"skip_connection": True}, "with skip_connection is no autoencoder"),
        ({"transcode": True}, "with transcode is no autoencoder"),
    ],
)
def test_what_sparsify_can_say_and_we_cannot_serve_is_refused(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    write_sparsify(tmp_path / "sae", **changes)
    with pytest.raises(JobError, match=words):
        read("sparsify", tmp_path / "sae")


def spoilt(directory: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    write_dictionary(directory, "BatchTopKSAE")
    state = torch.load(directory / "ae.pt", weights_only=True)
    change(state)
    torch.save(state, directory / "ae.pt")
    return directory


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("b_dec"), "'b_dec' is missing"),
        (lambda s: s.update(more=torch.zeros(1)), "'more' does not belong there"),
        (lambda s: s.update({"decoder.weight": torch.zeros(3, 4)}), r"W_dec has shape \[4, 3\], not \[40, 12\]"),
        (lambda s: s["encoder.bias"].fill_(torch.nan), "b_enc holds NaN or infinite values"),
        (lambda s: s["threshold"].fill_(-1.0), "its threshold was never set"),
        (lambda s: s["k"].fill_(99), "k is 99, but must be 1 to 40"),
        (lambda s: s.update(ae={}, optimizer={}, step=3), r"a backup of an unfinished run \(step 3\)"),
    ],
    ids=["missing", "extra", "misshapen", "nan", "no-threshold", "k", "backup"],
)
def test_faulty_tensors_are_named(change: Callable[[dict[str, Any]], Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=words):
        read("dictionary-learning", spoilt(tmp_path / "t", change))


class Executes:
    """Unpickling this would write a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.target, "run"))


@pytest.mark.parametrize("format_", ["published", "dictionary-learning"])
def test_a_pickle_with_code_in_it_is_never_run(format_: str, tmp_path: Path) -> None:
    write_dictionary(tmp_path / "t", "AutoEncoder")
    proof = tmp_path / "proof"
    torch.save({"bias": Executes(proof)}, tmp_path / "t" / "ae.pt")
    with pytest.raises(JobError, match="holds more than tensors; it was not loaded"):
        read(format_, tmp_path / "t" / "ae.pt", any_checksum=True)
    assert not proof.exists()
    (tmp_path / "t" / "ae.pt").write_bytes(b"hello")
    with pytest.raises(JobError, match=r"not loaded|not a file of torch\.save"):
        read(format_, tmp_path / "t" / "ae.pt", any_checksum=True)


def test_the_published_checksum_is_checked_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "sparse_autoencoder_128.pth"
    write_published(path)
    monkeypatch.setattr(published, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    assert published.read(path).metadata == {"source": published.SOURCE}
