"""The denoising loop, one step of many pictures at a time.

Knows nothing of requests, queues or event loops: pictures come with each call and may be others in the next.

For one picture every operation is that of diffusers' KandinskyV22Pipeline (or KandinskyV22Img2ImgPipeline, or
StableDiffusionXLPipeline), in its order. With n pictures the decoder runs once on up to 2n rows: the negatives of those
with guidance first, then the positives of all.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from faceteer_runtime.errors import InvalidField

from faceteer_generator.decoder import Decoder
from faceteer_generator.inversion import Inversion
from faceteer_generator.previews import reduced
from faceteer_generator.requests import Drawing, ImageStart, NoiseStart
from faceteer_generator.schedulers import Schedulers, ddim_step, estimate_clean, takes_variance

# Pictures whose latents are remembered, for requests with several seeds.
_ENCODED_KEPT = 8


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

    def __init__(
        self, decoder: Decoder, schedulers: Schedulers, drawing: Drawing, encoded: torch.Tensor | None = None
    ) -> None:
        self.drawing = drawing
        self.position = 0
        self.clean: torch.Tensor | None = None
        self.error: BaseException | None = None
        # On the CPU whatever the device, so that a seed means the same picture everywhere.
        self.generator = torch.Generator().manual_seed(drawing.seed)
        self.scheduler: Any = schedulers.fresh(drawing.scheduler, drawing.steps)
        self.timesteps: torch.Tensor = self.scheduler.timesteps[drawing.first_step :]
        self.takes_variance = takes_variance(self.scheduler)
        # An inverted picture is drawn by the very steps that were inverted, which cannot clip.
        table = schedulers.inverse_table if isinstance(drawing.start, NoiseStart) else schedulers.ddim_table
        self.ddim = table(drawing.steps) if drawing.scheduler == "ddim" else None
        self.latents = self._first_latents(decoder, encoded)
        size = {"width": drawing.width, "height": drawing.height}
        self.positive = decoder.condition(drawing.embeds, negative=False, **size)
        self.negative = decoder.condition(drawing.negative, negative=True, **size) if drawing.guided else None

    def _first_latents(self, decoder: Decoder, encoded: torch.Tensor | None) -> torch.Tensor:
        start = self.drawing.start
        if isinstance(start, NoiseStart):
            return torch.tensor(start.noise, dtype=decoder.dtype, device=decoder.device)[None]
        shape = decoder.latents_shape(self.drawing.width, self.drawing.height)
        noise = torch.randn(shape, generator=self.generator, dtype=decoder.dtype).to(decoder.device)
        if encoded is None:
            first: torch.Tensor = noise * self.scheduler.init_noise_sigma
        else:
            first = self.scheduler.add_noise(encoded, noise, self.timesteps[:1])
        return first

    @property
    def coefficients(self) -> torch.Tensor:
        """[4], the row of the DDIM table for the next step."""
        assert self.ddim is not None
        return self.ddim.values[self.drawing.first_step + self.position]

    @property
    def done(self) -> bool:
        """Whether all steps are done."""
        return self.position >= len(self.timesteps)


class Denoiser:
    """Steps pictures and turns their latents into pixels. Not thread-safe: one thread owns it."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._schedulers = Schedulers(decoder.scheduler_config, decoder.device)
        # One request's seeds begin one after the other from one and the same picture.
        self._encoded: OrderedDict[str, torch.Tensor] = OrderedDict()

    @torch.inference_mode()
    def begin(self, drawing: Drawing) -> Picture:
        """A picture before its first step: of pure noise, or what its ``start`` says."""
        start = drawing.start
        encoded = self._encode(start.pixels, start.digest) if isinstance(start, ImageStart) else None
        return Picture(self._decoder, self._schedulers, drawing, encoded)

    @torch.inference_mode()
    def begin_inversion(self, drawing: Drawing) -> Inversion:
        """The way back from ``drawing.start``, an image, to noise; the drawing's seed plays no part."""
        assert isinstance(drawing.start, ImageStart)
        table = self._schedulers.inverse_table(drawing.steps)
        timesteps = self._schedulers.fresh("ddim", drawing.steps).timesteps
        encoded = self._encode(drawing.start.pixels, drawing.start.digest)
        return Inversion(self._decoder, drawing, table.values, timesteps, encoded)

    @torch.inference_mode()
    def encode(self, pixels: np.ndarray) -> torch.Tensor:
        """Pixels uint8 [height, width, 3] to clean latents [1, c, h, w]."""
        image = torch.from_numpy(np.array(pixels, dtype=np.float32) / 255).permute(2, 0, 1)[None]
        return self._decoder.encode(2.0 * image - 1.0)

    def _encode(self, pixels: np.ndarray, digest: str) -> torch.Tensor:
        latents = self._encoded.get(digest)
        if latents is None:
            latents = self._encoded[digest] = self.encode(pixels)
            if len(self._encoded) > _ENCODED_KEPT:
                self._encoded.popitem(last=False)
        return latents

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
            coefficients = torch.stack([pictures[index].coefficients for index in together])
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
        output = self._decoder.predict(
            torch.cat([picture.latents for picture in rows]),
            torch.stack([picture.timesteps[picture.position] for picture in rows]),
            [pictures[index].negative for index in guided] + [picture.positive for picture in pictures],
        )
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
        image = self._decoder.decode(torch.cat(list(latents)))
        # Rounded in float32 on the CPU, as diffusers' numpy_to_pil does.
        pixels = image.cpu().permute(0, 2, 3, 1).float().numpy()
        return list((pixels * 255).round().astype("uint8"))

    @torch.inference_mode()
    def preview(self, estimates: Sequence[torch.Tensor]) -> list[np.ndarray]:
        """Small pixels of estimates of one size, each [1, c, h, w]: uint8 [h', w', 3], at most 128 a side."""
        return self.decode([reduced(clean, self._decoder.scale) for clean in estimates])
