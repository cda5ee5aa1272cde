"""The text prior: a text to an image embedding that fits it (Kandinsky 2.2's, an unCLIP diffusion prior).

Each :meth:`Imagining.advance` is one call of a model.

Every operation is that of diffusers' KandinskyV22PriorPipeline, in its order. Without a negative prompt the pipeline
steers away from the empty text; with one it imagines the negative beside the prompt, which is left out here, but its
share of the noise is drawn all the same, so that a seed means the same embedding.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import PriorTransformer, UnCLIPScheduler
from faceteer_runtime.bundle import BundleError
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from faceteer_generator.checkpoint import (
    STEM,
    StoredTensor,
    check_against,
    ensure_room,
    is_finite,
    stored_tensors,
    weights_bytes,
)
from faceteer_generator.prompts import Prompt

DIRECTORY = "prior"
PARTS = ("prior", "scheduler", "text_encoder", "tokenizer")
# diffusers' classes come without types.
_Prior: Any = PriorTransformer
_Scheduler: Any = UnCLIPScheduler
# Buffers that older files contain and current classes compute.
_IGNORED = ("position_ids",)


@dataclass(frozen=True)
class TextPrior:
    """Models in inference mode, ready to be called on one thread.

    Attributes:
        prior: PriorTransformer.
        text_encoder: CLIPTextModelWithProjection.
        tokenizer: CLIPTokenizer.
        scheduler: UnCLIPScheduler, never stepped itself.
        device: where the models are.
        dtype: of the models.
    """

    prior: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any
    device: torch.device
    dtype: torch.dtype

    @property
    def embed_dim(self) -> int:
        """The length d of the embedding."""
        return int(self.prior.config.embedding_dim)


def inspect_prior(directory: Path) -> dict[str, dict[str, StoredTensor]]:
    """Checks ``generator/prior/`` of a bundle without reading weights: prior/, scheduler/, text_encoder/, tokenizer/.

    Returns:
        The stored tensors of "prior" and "text_encoder".

    Raises:
        BundleError: a file is missing, cut off or broken, a tensor is missing, unknown or misshapen.
    """
    for part in PARTS:
        if not (directory / part).is_dir():
            raise BundleError(f"{directory / part}: missing; pull the bundle again")
    configs: dict[str, Any] = {}
    for name in ("prior", "text_encoder"):
        path = directory / name / "config.json"
        try:
            configs[name] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BundleError(f"{path}: cannot be read ({error}); pull the bundle again") from None
    stored = {
        "prior": stored_tensors(directory / "prior", STEM),
        "text_encoder": {
            name: entry
            for name, entry in stored_tensors(directory / "text_encoder", "model").items()
            if not name.endswith(_IGNORED)
        },
    }
    try:
        with torch.device("meta"):
            skeletons: dict[str, Any] = {
                "prior": _Prior.from_config(configs["prior"]),
                "text_encoder": CLIPTextModelWithProjection(CLIPTextConfig.from_dict(configs["text_encoder"])),
            }
    except Exception as error:
        raise BundleError(f"{directory}: a configuration of the prior gives no model ({_line(error)})") from error
    for name, skeleton in skeletons.items():
        check_against(skeleton, stored[name], directory / name)
    dimensions = configs["text_encoder"].get("projection_dim"), skeletons["prior"].config.embedding_dim
    if dimensions[0] != dimensions[1]:
        raise BundleError(
            f"{directory}: the text encoder gives {dimensions[0]} dimensions, the prior takes {dimensions[1]}"
        )
    return stored


def load_prior(directory: Path, *, device: torch.device, dtype: torch.dtype) -> TextPrior:
    """Loads ``generator/prior/`` of a bundle.

    Raises:
        BundleError: as :func:`inspect_prior`, or weights are not finite, or there is not enough memory.
    """
    stored = inspect_prior(directory)
    ensure_room(f"{directory}", sum(weights_bytes(entries.values(), dtype) for entries in stored.values()), device)
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True}
    try:
        prior = _Prior.from_pretrained(directory / "prior", torch_dtype=dtype, **options)
        text_encoder: Any = CLIPTextModelWithProjection.from_pretrained(
            directory / "text_encoder", dtype=dtype, **options
        )
        tokenizer = CLIPTokenizer.from_pretrained(directory / "tokenizer", local_files_only=True)
        scheduler = _Scheduler.from_pretrained(directory / "scheduler", local_files_only=True)
    except Exception as error:
        raise BundleError(f"{directory}: the prior cannot be loaded ({_line(error)})") from error
    for name, model in (("prior", prior), ("text_encoder", text_encoder)):
        for key, tensor in model.state_dict().items():
            if not is_finite(tensor):
                raise BundleError(f"{directory / name}: tensor {key!r} holds NaN or infinite values")
        model.to(device).eval().requires_grad_(False)
    return TextPrior(prior, text_encoder, tokenizer, scheduler, device, dtype)


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class Imagining:
    """The state of one text's embedding between two calls of a model.

    Args:
        models: are called.
        prompt: what to imagine; without a negative the empty text is steered away from, without guidance nothing.
    """

    def __init__(self, models: TextPrior, prompt: Prompt) -> None:
        self._models, self._guidance = models, prompt.guidance_scale
        self._texts = [prompt.negative, prompt.text] if prompt.guidance_scale > 1 else [prompt.text]
        self._scheduler = copy.copy(models.scheduler)
        self._scheduler.set_timesteps(prompt.steps, device=models.device)
        self._timesteps: torch.Tensor = self._scheduler.timesteps
        self._position = -1
        # The pipeline's batch: the prompt, and the negative beside it where there is one.
        self._rows = 2 if prompt.negative else 1
        self._generator = torch.Generator().manual_seed(prompt.seed)
        shape = (self._rows, models.embed_dim)
        noise = torch.randn(shape, generator=self._generator, dtype=models.dtype).to(models.device)
        self._latents: torch.Tensor = noise * self._scheduler.init_noise_sigma
        self._text: dict[str, torch.Tensor] = {}

    @property
    def calls_left(self) -> int:
        """Calls still to be made."""
        return len(self._timesteps) - self._position

    @property
    def done(self) -> bool:
        """Whether :meth:`embeds` is complete."""
        return self.calls_left <= 0

    @torch.inference_mode()
    def advance(self) -> None:
        """One call: of the text encoder first, then of the prior for each step."""
        if self._position < 0:
            self._read_texts()
        else:
            self._step()
        self._position += 1

    def embeds(self) -> np.ndarray:
        """The embedding in the encoder's own scale (times clip_std, plus clip_mean), float32 [d]."""
        with torch.inference_mode():
            latents = self._models.prior.post_process_latents(self._latents[:1])
        return np.asarray(latents[0].float().cpu().numpy(), dtype=np.float32)

    def _read_texts(self) -> None:
        tokenizer = self._models.tokenizer
        tokens = tokenizer(
            self._texts,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        output = self._models.text_encoder(tokens.input_ids.to(self._models.device))
        self._text = {
            "proj_embedding": output.text_embeds,
            "encoder_hidden_states": output.last_hidden_state,
            "attention_mask": tokens.attention_mask.bool().to(self._models.device),
        }

    def _step(self) -> None:
        timestep = self._timesteps[self._position]
        rows = len(self._texts)
        predicted: torch.Tensor = self._models.prior(
            self._latents[:1].expand(rows, -1), timestep=timestep, **self._text
        ).predicted_image_embedding
        if rows == 2:
            uncond, cond = predicted.chunk(2)
            predicted = uncond + self._guidance * (cond - uncond)
        last = self._position + 1 == len(self._timesteps)
        self._latents = self._scheduler.step(
            predicted.expand(self._rows, -1),
            timestep=timestep,
            sample=self._latents,
            generator=self._generator,
            prev_timestep=None if last else self._timesteps[self._position + 1],
        ).prev_sample
