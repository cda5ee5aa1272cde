"""dictionary_learning: a trainer's folder with ae.pt, a pickled state dict, and config.json, which names the class.

AutoEncoder                  relu(E (x - bias) + e), D f + bias
AutoEncoderNew               relu(E x + e), D f + decoder.bias
AutoEncoderTopK              the k largest of relu(E (x - b_dec) + e)
BatchTopKSAE, Matryoshka...  relu(E (x - b_dec) + e) where above the threshold
JumpReluAutoEncoder          relu(W x + b) where above the threshold; b_dec is not taken off
"""

from __future__ import annotations

from pathlib import Path

import torch
from faceteer_runtime.files import whole_file, write_json
from faceteer_sae.weights import SaeWeights

from faceteer_trainer.errors import JobError
from faceteer_trainer.formats.conversions import checked, take, turned, whole_number, with_input_shift
from faceteer_trainer.formats.files import read_json, read_pickle

_TENSORS = {
    "AutoEncoder": ("encoder.weight", "encoder.bias", "decoder.weight", "bias"),
    "AutoEncoderNew": ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"),
    "AutoEncoderTopK": ("encoder.weight", "encoder.bias", "decoder.weight", "b_dec", "k", "threshold"),
    "BatchTopKSAE": ("encoder.weight", "encoder.bias", "decoder.weight", "b_dec", "k", "threshold"),
    "MatryoshkaBatchTopKSAE": ("W_enc", "b_enc", "W_dec", "b_dec", "k", "threshold", "group_sizes"),
    "JumpReluAutoEncoder": ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"),
}


def read(path: Path) -> SaeWeights:
    """The dictionary in a trainer's folder, or of the path of its ae.pt."""
    directory = path if path.is_dir() else path.parent
    config = read_json(directory / "config.json").get("trainer")
    if not isinstance(config, dict) or "dict_class" not in config:
        raise JobError(f"{directory / 'config.json'}: names no trainer.dict_class")
    kind = config["dict_class"]
    if kind not in _TENSORS:
        raise JobError(f"{directory / 'config.json'}: dict_class {kind!r} is not one of {', '.join(_TENSORS)}")
    weights = directory / "ae.pt"
    state = read_pickle(weights)
    if "ae" in state and "optimizer" in state:
        raise JobError(f"{weights}: a backup of an unfinished run (step {state.get('step')}); wait until it ends")
    given = take(state, weights, *_TENSORS[kind])
    if kind in ("AutoEncoder", "AutoEncoderNew"):
        W, b, D, shift = given
        return checked(SaeWeights("standard", W, b, turned(D, weights), shift, kind == "AutoEncoder"), weights)
    if kind == "JumpReluAutoEncoder":
        W, b, D, shift, threshold = given
        return checked(SaeWeights("jumprelu", turned(W, weights), b, D, shift, False, threshold=threshold), weights)
    if kind == "MatryoshkaBatchTopKSAE":
        W, b, D, shift, k, threshold, _ = given
        W = turned(W, weights)
    else:
        W, b, D, shift, k, threshold = given
        D = turned(D, weights)
    kept = whole_number(k, weights, "k")
    if kind == "AutoEncoderTopK":
        return checked(SaeWeights("topk", W, b, D, shift, True, kept), weights)
    if threshold.numel() == 1 and float(threshold) < 0:
        raise JobError(
            f"{weights}: its threshold was never set (-1), so it has no activations of its own; train longer"
        )
    return checked(SaeWeights("batchtopk", W, b, D, shift, True, kept, threshold.float()), weights)


def write(sae: SaeWeights, directory: Path) -> Path:
    """A trainer's folder that load_dictionary reads."""
    kind = {
        "standard": "AutoEncoder", "topk": "AutoEncoderTopK", "batchtopk": "BatchTopKSAE",
        "jumprelu": "JumpReluAutoEncoder",
    }[sae.architecture]  # fmt: skip
    sae = with_input_shift(sae, sae.architecture != "jumprelu")
    if sae.architecture == "jumprelu":
        assert sae.threshold is not None
        state = {"W_enc": sae.W_enc.T, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec,
                 "threshold": sae.threshold}  # fmt: skip
    else:
        state = {"encoder.weight": sae.W_enc, "encoder.bias": sae.b_enc, "decoder.weight": sae.W_dec.T}
        state["bias" if sae.architecture == "standard" else "b_dec"] = sae.b_dec
    state = {name: tensor.float().contiguous().clone() for name, tensor in state.items()}
    if sae.architecture in ("topk", "batchtopk"):
        state["k"] = torch.tensor(sae.k, dtype=torch.int32)
        state["threshold"] = torch.tensor(-1.0) if sae.threshold is None else sae.threshold.float()
    trainer = {"dict_class": kind, "activation_dim": sae.d_in, "dict_size": sae.d_sae}
    if sae.k:
        trainer["k"] = sae.k
    directory.mkdir(parents=True, exist_ok=True)
    with whole_file(directory / "ae.pt") as part:
        torch.save(state, part)
    write_json(directory / "config.json", {"trainer": trainer})
    return directory
