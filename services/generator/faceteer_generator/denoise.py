"""The denoising loop, one step of many images at a time; which ones may change from one step to the next.

For one image every operation is that of diffusers' KandinskyV22Pipeline (or KandinskyV22Img2ImgPipeline, or
StableDiffusionXLPipeline), in its order. With n images the decoder runs once on up to 2n rows: the negatives of those
with guidance first, then the positives of all.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from faceteer_runtime.errors import InvalidField
from torch.nn.functional import interpolate

from faceteer_generator.decoder import Decoder
from faceteer_generator.inversion import Inversion
from faceteer_generator.requests import ImageSpec, ImageStart, NoiseStart
from faceteer_generator.schedulers import Schedulers, ddim_step, estimate_clean, takes_variance

# Most pixels a side of a preview.
PREVIEW_SIDE = 128
# Images whose latents are remembered, for requests with several seeds.
_ENCODED_KEPT = 8


class ImageFailed(InvalidField):
    """Denoising left the numbers that can be drawn; with weights that draw other images, the embeds are to blame."""


class Denoising:
    """The state of one image between two steps.

    Attributes:
        spec: what is drawn.
        latents: [1, c, h, w], noisy until ``done``.
        position: steps done.
        clean: [1, c, h, w], the estimate of the clean latents after the last step that was asked for one, or None.
        error: why this image cannot go on, or None.
    """

    def __init__(
        self, decoder: Decoder, schedulers: Schedulers, spec: ImageSpec, encoded: torch.Tensor | None = None
    ) -> None:
        self.spec = spec
        self.position = 0
        self.clean: torch.Tensor | None = None
        self.error: BaseException | None = None
        # On the CPU whatever the device, so that a seed means the same image everywhere.
        self.generator = torch.Generator().manual_seed(spec.seed)
        self.scheduler: Any = schedulers.fresh(spec.scheduler, spec.steps)
        self.timesteps: torch.Tensor = self.scheduler.timesteps[spec.first_step :]
        self.takes_variance = takes_variance(self.scheduler)
        # An inverted image is drawn by the very steps that were inverted, which cannot clip.
        table = schedulers.inverse_table if isinstance(spec.start, NoiseStart) else schedulers.ddim_table
        self.ddim = table(spec.steps) if spec.scheduler == "ddim" else None
        self.latents = self._first_latents(decoder, encoded)
        size = {"width": spec.width, "height": spec.height}
        self.positive = decoder.condition(spec.embeds, negative=False, **size)
        self.negative = decoder.condition(spec.negative, negative=True, **size) if spec.guided else None

    def _first_latents(self, decoder: Decoder, encoded: torch.Tensor | None) -> torch.Tensor:
        start = self.spec.start
        if isinstance(start, NoiseStart):
            return torch.tensor(start.noise, dtype=decoder.dtype, device=decoder.device)[None]
        shape = decoder.latents_shape(self.spec.width, self.spec.height)
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
        return self.ddim.values[self.spec.first_step + self.position]

    @property
    def calls_left(self) -> int:
        """Steps still to be done."""
        return len(self.timesteps) - self.position

    @property
    def done(self) -> bool:
        """Whether all steps are done."""
        return self.calls_left <= 0


class Denoiser:
    """Steps images and turns their latents into pixels. Not thread-safe: one thread owns it."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._schedulers = Schedulers(decoder.scheduler_config, decoder.device)
        # One request's seeds begin one after the other from one and the same image.
        self._encoded: OrderedDict[str, torch.Tensor] = OrderedDict()

    @torch.inference_mode()
    def begin(self, spec: ImageSpec) -> Denoising:
        """An image before its first step: of pure noise, or what its ``start`` says."""
        start = spec.start
        encoded = self._encode(start.pixels, start.digest) if isinstance(start, ImageStart) else None
        return Denoising(self._decoder, self._schedulers, spec, encoded)

    @torch.inference_mode()
    def begin_inversion(self, spec: ImageSpec) -> Inversion:
        """The way back from ``spec.start``, an image, to noise; the spec's seed is ignored."""
        assert isinstance(spec.start, ImageStart)
        table = self._schedulers.inverse_table(spec.steps)
        timesteps = self._schedulers.fresh("ddim", spec.steps).timesteps
        encoded = self._encode(spec.start.pixels, spec.start.digest)
        return Inversion(self._decoder, spec, table.values, timesteps, encoded)

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
    def step(self, images: Sequence[Denoising], estimates: Sequence[bool] = ()) -> None:
        """One step of each image; timesteps, schedulers, guidance and sizes may differ.

        One decoder call for each size among them. An image whose numbers overflow gets its ``error`` and leaves the
        others alone; when a whole call fails, each of its images is tried alone.

        Args:
            images: none of them done.
            estimates: whether to keep the estimate of the clean latents in ``clean``, aligned; empty for none.
        """
        wanted = {id(image) for image, want in zip(images, estimates, strict=bool(estimates)) if want}
        groups: dict[torch.Size, list[Denoising]] = defaultdict(list)
        for image in images:
            groups[image.latents.shape].append(image)
        for group in groups.values():
            try:
                self._advance(group, self._predict(group), wanted)
            except Exception as error:
                self._alone(group, wanted, error)

    def _alone(self, group: list[Denoising], wanted: set[int], error: Exception) -> None:
        if len(group) == 1:
            group[0].error = error
            return
        for image in group:
            try:
                self._advance([image], self._predict([image]), wanted)
            except Exception as own:
                image.error = own

    def _advance(self, images: list[Denoising], outputs: torch.Tensor, wanted: set[int]) -> None:
        """Schedulers' part of a step. A scheduler that raises fails its own image only."""
        latents = torch.cat([image.latents for image in images])
        channels = latents.shape[1]
        stepped: list[torch.Tensor] = [image.latents for image in images]
        together = [index for index, image in enumerate(images) if image.ddim is not None]
        if together:
            rows = slice(None) if len(together) == len(images) else together
            coefficients = torch.stack([images[index].coefficients for index in together])
            # In float32 whatever the models' precision: coefficients rounded to half would be seen.
            results = ddim_step(coefficients, self._decoder.prediction_type, outputs[rows, :channels], latents[rows])
            results = results.to(latents.dtype)
            for index, result in zip(together, results.unsqueeze(1).unbind(), strict=True):
                stepped[index] = result
        done_together = set(together)
        for index, image in enumerate(images):
            output = outputs[index : index + 1]
            timestep = image.timesteps[image.position]
            if id(image) in wanted:
                image.clean = estimate_clean(image.scheduler, timestep, output[:, :channels], image.latents)
            if index not in done_together:
                if not image.takes_variance:
                    output = output[:, :channels]
                try:
                    stepped[index] = image.scheduler.step(
                        output, timestep, image.latents, generator=image.generator, return_dict=False
                    )[0]
                except Exception as error:
                    image.error = error
        finite = torch.isfinite(torch.cat(stepped)).flatten(1).all(dim=1).tolist()
        for image, result, drawable in zip(images, stepped, finite, strict=True):
            image.latents = result
            image.position += 1
            if not drawable and image.error is None:
                image.error = ImageFailed(
                    "input",
                    f"the picture of seed {image.spec.seed} overflowed at step {image.position}: embeds of norm"
                    f" {float(np.linalg.norm(image.spec.embeds.astype(np.float64))):.3g} are outside what the"
                    " decoder was trained for",
                )

    def _predict(self, images: list[Denoising]) -> torch.Tensor:
        """The decoder's output for each image with guidance applied, [n, 2c, h, w]."""
        guided = [index for index, image in enumerate(images) if image.spec.guided]
        rows = [images[index] for index in guided] + images
        output = self._decoder.predict(
            torch.cat([image.latents for image in rows]),
            torch.stack([image.timesteps[image.position] for image in rows]),
            [images[index].negative for index in guided] + [image.positive for image in images],
        )
        if not guided:
            return output
        channels = self._decoder.channels
        uncond, cond = output[: len(guided), :channels], output[len(guided) :]
        chosen = slice(None) if len(guided) == len(images) else guided
        scale = torch.tensor(
            [images[index].spec.guidance_scale for index in guided], dtype=torch.float32, device=output.device
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


def reduced(latents: torch.Tensor, scale: int, side: int = PREVIEW_SIDE) -> torch.Tensor:
    """Latents [n, c, h, w] averaged down until their image has at most ``side`` pixels in both directions.

    Decoding costs go with the area, and are more than a denoising step's at 512 pixels. A linear map from latents to
    colours would be cheaper still, but has to be fitted to every bundle.

    Args:
        latents: an estimate of clean latents.
        scale: pixels to a latent, each way; the result's sides are multiples of it.
        side: pixels.
    """
    height, width = latents.shape[-2:]
    shrink = max(height, width) * scale / side
    if shrink <= 1:
        return latents
    size = [max(scale, int(length / shrink) // scale * scale) for length in (height, width)]
    return interpolate(latents.float(), size=size, mode="area").to(latents.dtype)
