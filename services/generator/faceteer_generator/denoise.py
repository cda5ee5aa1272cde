"""The denoising loop, one step of many pictures at a time.

Knows nothing of requests, queues or event loops: pictures come with each call and may be others in the next.

For one picture every operation is that of diffusers' KandinskyV22Pipeline, in its order. With n pictures the decoder
runs once on up to 2n rows: the negatives of those with guidance first, then the positives of all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from faceteer_runtime.errors import InvalidField

from faceteer_generator.model import Decoder
from faceteer_generator.previews import reduced
from faceteer_generator.requests import Drawing
from faceteer_generator.schedulers import Schedulers, ddim_step, estimate_clean, takes_variance


class PictureFailed(InvalidField):
    """Denoising left the numbers that can be drawn; with weights that draw other pictures, the embeds are to blame."""


class Picture:
    """The state of one picture between two steps.

    Attributes:
        drawing: what is drawn.
        latents: [1, c, h, w], noisy until ``done``.
        position: steps done.
        clean: [1, c, h, w], the estimate of the clean latents after the last step that was asked for one, or None.
        error: why this picture cannot go on, or None.
    """

    def __init__(self, decoder: Decoder, schedulers: Schedulers, drawing: Drawing) -> None:
        self.drawing = drawing
        self.position = 0
        self.clean: torch.Tensor | None = None
        self.error: BaseException | None = None
        # On the CPU whatever the device, so that a seed means the same picture everywhere.
        self.generator = torch.Generator().manual_seed(drawing.seed)
        self.scheduler: Any = schedulers.fresh(drawing.scheduler, drawing.steps)
        self.timesteps: torch.Tensor = self.scheduler.timesteps
        self.takes_variance = takes_variance(self.scheduler)
        self.ddim = schedulers.ddim_table(drawing.steps) if drawing.scheduler == "ddim" else None
        shape = decoder.latents_shape(drawing.width, drawing.height)
        noise = torch.randn(shape, generator=self.generator, dtype=decoder.dtype).to(decoder.device)
        self.latents = noise * self.scheduler.init_noise_sigma
        self.embeds = _row(drawing.embeds, decoder)
        self.negative = decoder.negative_embeds[None] if drawing.negative is None else _row(drawing.negative, decoder)

    @property
    def done(self) -> bool:
        """Whether all steps are done."""
        return self.position >= len(self.timesteps)


class Denoiser:
    """Steps pictures and turns their latents into pixels. Not thread-safe: one thread owns it."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._schedulers = Schedulers(decoder.scheduler_config, decoder.device)

    @torch.inference_mode()
    def begin(self, drawing: Drawing) -> Picture:
        """A picture of pure noise, before its first step."""
        return Picture(self._decoder, self._schedulers, drawing)

    @torch.inference_mode()
    def step(self, pictures: Sequence[Picture], estimates: Sequence[bool] = ()) -> None:
        """One step of each picture; timesteps, schedulers, guidance and sizes may differ.

        One decoder call for each size among them. A picture whose numbers overflow gets its ``error`` and leaves the
        others alone; when a whole call fails, each of its pictures is tried alone.

        Args:
            pictures: none of them done.
            estimates: whether to keep the estimate of the clean latents in ``clean``, aligned; empty for none.
        """
        wanted = {id(picture) for picture, want in zip(pictures, estimates, strict=bool(estimates)) if want}
        groups: dict[torch.Size, list[Picture]] = defaultdict(list)
        for picture in pictures:
            groups[picture.latents.shape].append(picture)
        for group in groups.values():
            try:
                self._advance(group, self._predict(group), wanted)
            except Exception as error:
                self._alone(group, wanted, error)

    def _alone(self, group: list[Picture], wanted: set[int], error: Exception) -> None:
        if len(group) == 1:
            group[0].error = error
            return
        for picture in group:
            try:
                self._advance([picture], self._predict([picture]), wanted)
            except Exception as own:
                picture.error = own

    def _advance(self, pictures: list[Picture], outputs: torch.Tensor, wanted: set[int]) -> None:
        """Schedulers' part of a step. A scheduler that raises fails its own picture only."""
        latents = torch.cat([picture.latents for picture in pictures])
        channels = latents.shape[1]
        stepped: list[torch.Tensor] = [picture.latents for picture in pictures]
        together = [index for index, picture in enumerate(pictures) if picture.ddim is not None]
        if together:
            rows = slice(None) if len(together) == len(pictures) else together
            tables = [pictures[index].ddim for index in together]
            coefficients = torch.stack(
                [table.values[pictures[i].position] for i, table in zip(together, tables, strict=True) if table]
            )
            # In float32 whatever the models' precision: coefficients rounded to half would be seen.
            results = ddim_step(coefficients, self._decoder.prediction_type, outputs[rows, :channels], latents[rows])
            results = results.to(latents.dtype)
            for index, result in zip(together, results.unsqueeze(1).unbind(), strict=True):
                stepped[index] = result
        done_together = set(together)
        for index, picture in enumerate(pictures):
            output = outputs[index : index + 1]
            timestep = picture.timesteps[picture.position]
            if id(picture) in wanted:
                picture.clean = estimate_clean(picture.scheduler, timestep, output[:, :channels], picture.latents)
            if index not in done_together:
                if not picture.takes_variance:
                    output = output[:, :channels]
                try:
                    stepped[index] = picture.scheduler.step(
                        output, timestep, picture.latents, generator=picture.generator, return_dict=False
                    )[0]
                except Exception as error:
                    picture.error = error
        finite = torch.isfinite(torch.cat(stepped)).flatten(1).all(dim=1).tolist()
        for picture, result, drawable in zip(pictures, stepped, finite, strict=True):
            picture.latents = result
            picture.position += 1
            if not drawable and picture.error is None:
                picture.error = PictureFailed(
                    "input",
                    f"the picture of seed {picture.drawing.seed} overflowed at step {picture.position}: embeds of norm"
                    f" {float(np.linalg.norm(picture.drawing.embeds.astype(np.float64))):.3g} are outside what the"
                    " decoder was trained for",
                )

    def _predict(self, pictures: list[Picture]) -> torch.Tensor:
        """The decoder's output for each picture with guidance applied, [n, 2c, h, w]."""
        guided = [index for index, picture in enumerate(pictures) if picture.drawing.guided]
        rows = [pictures[index] for index in guided] + pictures
        output: torch.Tensor = self._decoder.unet(
            sample=torch.cat([picture.latents for picture in rows]),
            timestep=torch.stack([picture.timesteps[picture.position] for picture in rows]),
            encoder_hidden_states=None,
            added_cond_kwargs={
                "image_embeds": torch.cat([pictures[i].negative for i in guided] + [p.embeds for p in pictures])
            },
            return_dict=False,
        )[0]
        if not guided:
            return output
        channels = self._decoder.channels
        uncond, cond = output[: len(guided), :channels], output[len(guided) :]
        chosen = slice(None) if len(guided) == len(pictures) else guided
        scale = torch.tensor(
            [pictures[index].drawing.guidance_scale for index in guided], dtype=torch.float32, device=output.device
        ).view(-1, 1, 1, 1)
        # The variance stays that of the positive row.
        cond[chosen, :channels] = (uncond + scale * (cond[chosen, :channels] - uncond)).to(cond.dtype)
        return cond

    @torch.inference_mode()
    def decode(self, latents: Sequence[torch.Tensor]) -> list[np.ndarray]:
        """Pixels of latents of one size, each [1, c, h, w]: uint8 [height, width, 3] each."""
        image = self._decoder.movq.decode(torch.cat(list(latents)), force_not_quantize=True)["sample"]
        image = (image * 0.5 + 0.5).clamp(0, 1)
        # Rounded in float32 on the CPU, as diffusers' numpy_to_pil does.
        pixels = image.cpu().permute(0, 2, 3, 1).float().numpy()
        return list((pixels * 255).round().astype("uint8"))

    @torch.inference_mode()
    def preview(self, estimates: Sequence[torch.Tensor]) -> list[np.ndarray]:
        """Small pixels of estimates of one size, each [1, c, h, w]: uint8 [h', w', 3], at most 128 a side."""
        return self.decode([reduced(clean, self._decoder.scale) for clean in estimates])


def _row(embeds: np.ndarray, decoder: Decoder) -> torch.Tensor:
    return torch.tensor(embeds, dtype=decoder.dtype, device=decoder.device)[None]
