"""A whole random bundle in the documented layout: every real class, a few hundred kilobytes, made in seconds.

What it draws is noise. For anything about quality use deploy/bundles/postcards.
"""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from diffusers import DDIMScheduler, KandinskyV22Pipeline, UNet2DConditionModel, VQModel
from PIL import Image, ImageDraw
from safetensors.torch import save_file

EMBED_DIM = 32
N_FEATURES = 64
K = 8
LABELS = ("night", "snow", "two of something", "red", "boat", "fog", "grass", "white border")
# Of the labels; those of "two of something" and "boat" disagree, that of "white border" is not measured.
DETECTION = (0.95, 0.9, 0.8, 0.75, 0.6, 0.5, 0.9)
CAUSAL = (0.9, 0.8, 0.2, 0.9, 0.9, 0.3, 0.75)
WORDS = ("a", "boat", "night", "snow", "two", "red", "fog", "grass", "picture", "of", "at", "in")


def tokenizer_merges(words: tuple[str, ...] = WORDS) -> bytes:
    """A gzip'd merges file for open_clip.SimpleTokenizer in which each of ``words`` is one token."""
    merges: list[str] = []
    for word in words:
        left = word[0]
        for letter in word[1:-1]:
            merges.append(f"{left} {letter}")
            left += letter
        if len(word) > 1:
            merges.append(f"{left} {word[-1]}</w>")
    unique = list(dict.fromkeys(merges))
    return gzip.compress(("#version: 0.2\n" + "\n".join(unique)).encode(), mtime=0)


def picture(seed: int, size: int = 64) -> Image.Image:
    """A random but not featureless RGB picture: sky, ground and a disc."""
    rng = np.random.default_rng(seed)
    colours = [tuple(int(c) for c in rng.integers(0, 256, 3)) for _ in range(3)]
    image = Image.new("RGB", (size, size), colours[0])
    draw = ImageDraw.Draw(image)
    horizon = int(rng.integers(size // 4, 3 * size // 4))
    draw.rectangle((0, horizon, size, size), fill=colours[1])
    x, y, r = (int(v) for v in rng.integers(size // 6, size // 2, 3))
    draw.ellipse((x, y, x + r, y + r), fill=colours[2])
    return image


def picture_bytes(seed: int, size: int = 64, format: str = "PNG", **options: Any) -> bytes:
    """``picture(seed)`` as a file."""
    buffer = io.BytesIO()
    picture(seed, size).save(buffer, format, **options)
    return buffer.getvalue()


def _write_encoder(directory: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes encoder/; returns embeds of 256 pictures, the grey one's first [256, d], and of LABELS [8, d]; float32."""
    directory.mkdir(parents=True)
    merges = directory / "bpe_simple_vocab.txt.gz"
    merges.write_bytes(tokenizer_merges())
    tokenizer = open_clip.SimpleTokenizer(str(merges), context_length=16)
    model_cfg = {
        "embed_dim": EMBED_DIM,
        "vision_cfg": {"image_size": 64, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 16, "vocab_size": tokenizer.vocab_size, "width": 32, "heads": 2, "layers": 2},
    }
    preprocess_cfg = {
        "size": 64,
        "mean": list(open_clip.OPENAI_DATASET_MEAN),
        "std": list(open_clip.OPENAI_DATASET_STD),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    (directory / "open_clip_config.json").write_text(json.dumps(config, indent=2))
    torch.manual_seed(0)
    model = open_clip.CLIP(**model_cfg).eval()
    with torch.no_grad():
        # Random towers map all pictures, and all texts, almost to one point; spread them, as trained ones do.
        model.visual.proj *= 20
        model.token_embedding.weight *= 20
        # What stands in a text shall count, not how long it is.
        model.positional_embedding.zero_()
        model.token_embedding.weight[-2:] = 0
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, directory / "open_clip_model.safetensors")
        mean, std = torch.tensor(preprocess_cfg["mean"]), torch.tensor(preprocess_cfg["std"])
        pixels = torch.stack([torch.tensor(np.array(picture(seed))) for seed in range(255)]).float() / 255
        pixels = ((pixels - mean) / std).permute(0, 3, 1, 2)
        embeds = model.encode_image(torch.cat([torch.zeros(1, 3, 64, 64), pixels]))
        return embeds, model.encode_text(tokenizer(list(LABELS)))


def _write_sae(directory: Path, embeds: torch.Tensor) -> dict[str, np.ndarray]:
    """Writes sae/ (TopK) and returns firing_share, p50, p99, max [d_sae] and top [d_sae, 4] pictures."""
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    W_dec = torch.nn.functional.normalize(torch.randn(N_FEATURES, EMBED_DIM, generator=generator), dim=1)
    W_enc, b_dec, b_enc = W_dec.T.contiguous(), embeds.mean(0), torch.zeros(N_FEATURES)
    save_file({"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}, directory / "sae_weights.safetensors")
    pre_acts = torch.relu((embeds - b_dec) @ W_enc + b_enc)
    top_acts, top_indices = pre_acts.topk(K, dim=1)
    f = torch.zeros_like(pre_acts).scatter(1, top_indices, top_acts)
    fires = f > 0
    positive = np.where(fires.numpy(), f.numpy(), np.nan)
    positive[0, ~fires.any(0).numpy()] = 0.0  # a dead feature has no percentiles; zero stands for that
    p50, p99 = np.nanpercentile(positive, [50, 99], axis=0).astype(np.float32)
    # Rivals of the random dictionary: pairs that never fire together though both are common.
    together = fires.float().T @ fires.float()
    common = fires.float().mean(0) > 0.1
    rivals = [
        [j for j in range(N_FEATURES) if common[i] and common[j] and together[i, j] == 0] for i in range(N_FEATURES)
    ]
    save_file(
        {
            "firing_share": fires.float().mean(0),
            "p99": torch.tensor(p99),
            "rivals_offsets": torch.tensor(np.cumsum([0, *map(len, rivals)]), dtype=torch.int64),
            "rivals_indices": torch.tensor([j for row in rivals for j in row], dtype=torch.int32),
        },
        directory / "feature_statistics.safetensors",
    )
    norms = embeds.norm(dim=1)
    l0 = fires.sum(1).float()
    percentiles = {"p01": 0.01, "p50": 0.5, "p99": 0.99}
    config = {
        "architecture": "topk",
        "d_in": EMBED_DIM,
        "d_sae": N_FEATURES,
        "k": K,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.18.0",
            "sae_lens_training_version": None,
            "embedding_statistics": {
                "norm": {name: float(norms.quantile(q)) for name, q in percentiles.items()},
                "l0": {name: float(l0.quantile(q)) for name, q in percentiles.items()},
            },
        },
    }
    (directory / "cfg.json").write_text(json.dumps(config, indent=2))
    return {
        "firing_share": fires.float().mean(0).numpy(),
        "mean": np.nanmean(positive, axis=0).astype(np.float32),
        "p50": p50,
        "p99": p99,
        "max": f.max(0).values.numpy(),
        "top": f.argsort(0, descending=True)[:4].T.numpy(),
        "f": f.numpy(),
        "together": together.numpy(),
        "W_dec": W_dec.numpy(),
    }


def _write_generator(directory: Path, negative_embeds: torch.Tensor) -> None:
    """Writes generator/ in KandinskyV22Pipeline's layout, with scale factor 4 as in postcards."""
    torch.manual_seed(2)
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=8,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(32, 64),
        layers_per_block=1,
        attention_head_dim=16,
        cross_attention_dim=32,
        encoder_hid_dim=EMBED_DIM,
        encoder_hid_dim_type="image_proj",
        addition_embed_type="image",
        resnet_time_scale_shift="scale_shift",
    )
    movq = VQModel(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 32, 32),
        layers_per_block=1,
        latent_channels=4,
        num_vq_embeddings=32,
        norm_num_groups=32,
        vq_embed_dim=4,
        norm_type="spatial",
    )
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )
    KandinskyV22Pipeline(unet=unet, scheduler=scheduler, movq=movq).save_pretrained(directory)
    save_file({"negative_image_embeds": negative_embeds}, directory / "negative_embeds.safetensors")


def _write_library(
    path: Path, statistics: dict[str, np.ndarray], sae_revision: str, template: np.ndarray, meanings: np.ndarray
) -> None:
    from faceteer_library.writer import ExampleRow, FeatureRow, LibraryWriter
    from faceteer_runtime.icons import TEMPLATE, pack_template

    path.parent.mkdir(parents=True)
    thumbnails = [picture_bytes(seed, 32, "WEBP") for seed in range(255)]
    f, W_dec = statistics["f"], statistics["W_dec"]
    cosines = W_dec @ W_dec.T
    with LibraryWriter(
        path, sae_revision=sae_revision, corpus="random pictures", n_pictures=len(f), embed_dim=EMBED_DIM
    ) as writer:
        writer.meta(TEMPLATE, pack_template(template))
        for label, embeds in zip(LABELS, meanings, strict=True):
            writer.meaning(label, embeds)
        for index in range(N_FEATURES):
            positive = f[:, index][f[:, index] > 0]
            counts, edges = np.histogram(positive, bins=8, range=(0.0, float(statistics["max"][index]) or 1.0))
            writer.feature(
                FeatureRow(
                    index=index,
                    label=LABELS[index] if index < len(LABELS) else "",
                    firing_share=float(statistics["firing_share"][index]),
                    mean=float(statistics["mean"][index]),
                    p50=float(statistics["p50"][index]),
                    p99=float(statistics["p99"][index]),
                    max=float(statistics["max"][index]),
                    histogram_edges=edges[1:].astype(np.float32),
                    histogram_counts=counts.astype(np.int64),
                    detection_score=_at(DETECTION, index),
                    detection_balanced_accuracy=_at(DETECTION, index),
                    causal_score=_at(CAUSAL, index),
                    terms=("darkness", "evening") if index == 0 else (),
                )
            )
            writer.examples(
                index,
                [
                    ExampleRow(f"picture-{n}", float(f[n, index]), thumbnails[n - 1], "")
                    for n in statistics["top"][index]
                    if n > 0 and f[n, index] > 0
                ],
            )
            fires = np.flatnonzero(f[:, index])
            quartiles = np.quantile(f[fires, index], [0, 0.25, 0.5, 0.75, 1]) if len(fires) else []
            drawn = []
            for quarter in (3, 2, 1, 0) if len(fires) else ():
                inside = [n for n in fires if quartiles[quarter] <= f[n, index] <= quartiles[quarter + 1] and n > 0]
                bounds = (quarter / 4, (quarter + 1) / 4)
                drawn += [ExampleRow(f"picture-{n}", float(f[n, index]), thumbnails[n - 1], "", bounds)
                          for n in inside[:1]]  # fmt: skip
            writer.examples(index, drawn, "quantiles")
            nearest = [int(j) for j in np.argsort(-cosines[index])[1:4]]
            writer.relatives(index, "nearest", [(j, float(cosines[index, j])) for j in nearest])


def _at(scores: tuple[float, ...], index: int) -> float | None:
    return scores[index] if index < len(scores) else None


def make_tiny_bundle(directory: Path) -> Path:
    """Writes the bundle into ``directory`` (which must not exist) and returns it."""
    from faceteer_runtime.bundle import seal

    directory = Path(directory)
    with torch.inference_mode(False):
        embeds, meanings = (each.detach() for each in _write_encoder(directory / "encoder"))
        statistics = _write_sae(directory / "sae", embeds)
        _write_generator(directory / "generator", embeds[:1].clone())
    manifest = {
        "name": "tiny",
        "description": "Random weights in the documented layout, for tests.",
        "parts": {
            "encoder": {"kind": "open_clip", "embed_dim": EMBED_DIM},
            "sae": {"kind": "sae"},
            "generator": {
                "kind": "kandinsky-2-2",
                "sizes": [[64, 64], [128, 64]],
                "steps": 4,
                "guidance_scale": 2.0,
                "scheduler": "ddim",
            },
        },
        "licences": {"encoder": "Apache-2.0", "sae": "Apache-2.0", "generator": "Apache-2.0", "library": "Apache-2.0"},
    }
    seal(directory, manifest)
    sealed = json.loads((directory / "bundle.json").read_text())
    _write_library(
        directory / "library" / "library.sqlite",
        statistics,
        sealed["parts"]["sae"]["revision"],
        embeds[0].numpy(),
        meanings.numpy(),
    )
    manifest["parts"]["library"] = {"kind": "sqlite"}
    seal(directory, manifest)
    return directory


def gate_feature(directory: Path, index: int, label: str, safety_class: str) -> None:
    """Labels one feature of a bundle and puts it into a class that operators gate."""
    from faceteer_library.editor import LibraryEditor
    from faceteer_runtime.bundle import seal

    with LibraryEditor(directory / "library" / "library.sqlite") as editor:
        editor.label(index, label)
        editor.safety_class(index, safety_class)
    seal(directory)
