"""SAELens 6: cfg.json and sae_weights.safetensors.

    W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_in], b_dec [d_in]; jumprelu: threshold [d_sae];
    a batchtopk or matryoshka_batchtopk training checkpoint: topk_threshold []

A topk or batchtopk with rescale_acts_by_decoder_norm selects by ``pre ||d_i||`` and decodes with unit vectors, which is
the same as moving the norms into the encoder.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from faceteer_runtime.files import whole_file, write_json
from faceteer_sae.weights import SaeWeights
from safetensors.torch import save_file

from faceteer_trainer.errors import JobError
from faceteer_trainer.formats.conversions import checked, of_raw_input, take, turned, unit_rows, whole_number
from faceteer_trainer.formats.files import read_json, read_safetensors

# The version of the format written; readers treat files without one as older than 6.
VERSION = "6.18.0"
_FOUR = ("W_enc", "b_enc", "W_dec", "b_dec")
_MORE: dict[str, tuple[str, ...]] = {
    "standard": (),
    "topk": (),
    "jumprelu": ("threshold",),
    "batchtopk": ("topk_threshold",),
}


def read(path: Path, *, activation_scale: float | None = None) -> SaeWeights:
    """The SAE in a folder, or of the path of its sae_weights.safetensors.

    Args:
        activation_scale: what the training multiplied its input with, if cfg.json says that it did
            (``normalize_activations: expected_average_only_in``): no file holds that number.
    """
    directory = path if path.is_dir() or not path.exists() else path.parent
    where, weights = directory / "cfg.json", directory / "sae_weights.safetensors"
    cfg = _modern(read_json(where), where)
    architecture = cfg["architecture"]
    normalised = cfg.get("normalize_activations") or "none"
    if normalised == "expected_average_only_in" and activation_scale is None:
        raise JobError(
            f"{where}: normalize_activations is {normalised!r}, and no file holds the factor; give it as "
            "--activation-scale, or fold it into the weights first (fold_activation_norm_scaling_factor in SAELens)"
        )
    if normalised not in ("none", "expected_average_only_in"):
        raise JobError(
            f"{where}: normalize_activations is {normalised!r}, which scales each embedding differently and cannot be "
            "folded into the weights; train with none or expected_average_only_in"
        )
    if (reshaped := cfg.get("reshape_activations", "none")) != "none":
        raise JobError(f"{where}: reshape_activations is {reshaped!r}; an embedding has one dimension")
    W_enc, b_enc, W_dec, b_dec, *more = take(read_safetensors(weights), weights, *_FOUR, *_MORE[architecture])
    metadata = cfg.get("metadata")
    sae = checked(
        SaeWeights(
            architecture,
            turned(W_enc, weights),
            b_enc,
            W_dec,
            b_dec,
            bool(cfg.get("apply_b_dec_to_input", True)),
            whole_number(cfg.get("k", 100), where, "k") if "topk" in architecture else 0,
            more[0] if more else None,
            metadata if isinstance(metadata, dict) else {},
        ),
        weights,
    )
    for name, value in (("d_in", sae.d_in), ("d_sae", sae.d_sae)):
        if cfg.get(name, value) != value:
            raise JobError(f"{where}: {name} is {cfg[name]!r}, but {weights.name} holds {value}")
    rescaled = bool(cfg.get("rescale_acts_by_decoder_norm", False))
    if normalised != "none":
        assert activation_scale is not None
        sae = of_raw_input(sae, activation_scale)
        if rescaled and sae.architecture == "batchtopk" and sae.threshold is not None:
            # Its threshold is of pre ||d_i||, and the d_i have just become shorter.
            sae = replace(sae, threshold=sae.threshold / activation_scale)
    return unit_rows(sae) if rescaled else sae


def _modern(cfg: dict[str, Any], where: Path) -> dict[str, Any]:
    """cfg.json with the keys of version 6; earlier ones said what is missing there in other words."""
    cfg = dict(cfg)
    if cfg.get("finetuning_scaling_factor"):
        raise JobError(f"{where}: finetuning_scaling_factor is not served; fold it into W_dec first")
    function = cfg.get("activation_fn_str", cfg.get("activation_fn", "relu"))
    if "architecture" not in cfg or (cfg["architecture"] == "standard" and function == "topk"):
        cfg["architecture"] = "topk" if function == "topk" else "standard"
    if isinstance(arguments := cfg.get("activation_fn_kwargs"), dict) and "k" in arguments:
        cfg.setdefault("k", arguments["k"])
    if isinstance(cfg.get("normalize_activations"), bool):
        cfg["normalize_activations"] = "expected_average_only_in" if cfg["normalize_activations"] else "none"
    if cfg["architecture"] == "matryoshka_batchtopk":  # nested in training, the same afterwards
        cfg["architecture"] = "batchtopk"
    if cfg["architecture"] not in _MORE:
        raise JobError(f"{where}: architecture {cfg['architecture']!r} is not one of {', '.join(_MORE)}")
    return cfg


def write(sae: SaeWeights, directory: Path) -> Path:
    """What SAELens reads: batchtopk as the jumprelu that it is once it is trained."""
    architecture, threshold = sae.architecture, sae.threshold
    if architecture == "batchtopk":
        assert threshold is not None
        architecture, threshold = "jumprelu", threshold.float().clamp_min(0).expand(sae.d_sae)
    cfg: dict[str, Any] = {
        "architecture": architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {**sae.metadata, "sae_lens_version": VERSION, "sae_lens_training_version": None},
    }
    if architecture == "topk":
        cfg |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    tensors = {
        "W_enc": sae.W_enc.T.float().contiguous(),
        "b_enc": sae.b_enc.float(),
        "W_dec": sae.W_dec.float().contiguous(),
        "b_dec": sae.b_dec.float(),
    }
    if threshold is not None:
        tensors["threshold"] = threshold.float().contiguous()
    directory.mkdir(parents=True, exist_ok=True)
    for name, tensor in tensors.items():
        tensors[name] = tensor.clone()  # tied weights share memory, which a safetensors file cannot say
    with whole_file(directory / "sae_weights.safetensors") as part:
        save_file(tensors, part)
    write_json(directory / "cfg.json", cfg)
    return directory
