"""Make the whole bundle from nothing, step by step; each step resumes, and is skipped when its result is there.

A working directory holds corpora, caches, checkpoints and logs; the bundle is written from it at the end.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from diffusers import VQModel
from faceteer_trainer.budget import Budget
from faceteer_trainer.corpus.shards import CorpusCard, EmbeddingCorpus, Shard, shard_name, write_embeds
from faceteer_trainer.errors import JobError
from faceteer_trainer.sae.losses import Loss
from faceteer_trainer.sae.trainer import Settings, Trainer
from safetensors.torch import load_file, save_file

from faceteer_postcards.bundle import negative_embeds, seal_bundle, write_generator
from faceteer_postcards.clip import ClipSettings, embed_pictures, load_encoder, train_clip
from faceteer_postcards.corpus import Corpus, draw_corpus, write_examples
from faceteer_postcards.library import rebuild_library
from faceteer_postcards.movq import MovqSettings, encode_all, sharpen_decoder, train_movq
from faceteer_postcards.unet import DecoderData, UnetSettings, load_averaged, train_unet

# Any run of `train-sae` may have these options; docs/log-postcards.md says what each is worth here.
SAE = Settings(
    "matryoshka", 128, Loss(k=10, aux_k=16, prefixes=(0.5, 1.0)), batch=512, warmup=100, decay=1.0, dead_after=10_000,
    train_b_dec=False, start="skewed", start_k=12, reset_every=100,
)  # fmt: skip


@dataclass(frozen=True)
class Preset:
    """What each step may spend. Minutes are of one core, of `workers` cores for the decoder."""

    corpus: int = 60_000
    held_out: int = 8_000
    library: int = 24_000
    judge_steps: int = 600
    budgets: Mapping[str, Budget] = field(
        default_factory=lambda: {
            "clip": Budget(minutes=16.5),
            "movq": Budget(minutes=17),
            "sharpen": Budget(minutes=14),
            "unet": Budget(minutes=66),
            "sae": Budget(steps=3000),
        }
    )
    clip_settings: ClipSettings = field(default_factory=ClipSettings)
    movq_settings: MovqSettings = field(default_factory=MovqSettings)
    unet_settings: UnetSettings = field(default_factory=UnetSettings)
    sae_settings: Settings = SAE


PRESETS = {
    "full": Preset(),
    # For tests: every step in a few seconds; the result is unusable otherwise.
    "trial": Preset(
        corpus=256, held_out=64, library=256, judge_steps=2,
        budgets={"clip": Budget(steps=4), "movq": Budget(steps=3), "sharpen": Budget(steps=2), "unet": Budget(steps=3),
                 "sae": Budget(steps=60)},
        clip_settings=ClipSettings(embed_dim=32, vision_width=16, vision_layers=(1, 1, 1, 1), text_width=32,
                                   batch=16, full_captions=8, short_captions=8),
        movq_settings=MovqSettings(channels=(32, 32, 32), latent_channels=4, batch=2),
        unet_settings=UnetSettings(channels=(32, 32), cross_attention_dim=32, batch=4),
        sae_settings=Settings("matryoshka", 64, Loss(k=6, prefixes=(0.5, 1.0)), batch=64, start="skewed"),
    ),
}  # fmt: skip


class Workshop:
    """The steps of a build over one working directory."""

    def __init__(
        self, work: Path, preset: Preset, seed: int = 0, device: str = "cpu", workers: int | None = None
    ) -> None:
        self.work, self.preset, self.seed, self.device = work, preset, seed, device
        # a GPU trains alone; pictures are drawn on the CPU either way
        self.workers = workers or min(os.cpu_count() or 1, 2)
        self.trainers = 1 if device != "cpu" else self.workers

    @property
    def corpus(self) -> Corpus:
        """What everything is trained on."""
        return draw_corpus(self.work / "corpus", self.preset.corpus, self.seed + 1, self.workers)

    @property
    def held_out(self) -> Corpus:
        """Pictures for the trainers' own checks."""
        return draw_corpus(self.work / "held-out", self.preset.held_out, self.seed + 2, self.workers)

    def clip(self) -> Path:
        """Train the encoder, then embed the corpus."""
        encoder = self.work / "clip" / "encoder"
        if not (encoder / "open_clip_model.safetensors").exists():
            budget, settings = self.preset.budgets["clip"], self.preset.clip_settings
            train_clip(self.corpus, self.held_out, self.work / "clip", budget, settings, self.seed, self.device)
        if not (self.work / "embeds.safetensors").exists():
            model, _ = load_encoder(encoder)
            model.to(self.device)
            save_file(
                {"train": embed_pictures(model, self.corpus.pictures), "negative": negative_embeds(model)},
                self.work / "embeds.safetensors",
            )
        return encoder

    def movq(self) -> Path:
        """Train the picture autoencoder, then encode the corpus."""
        final = self.work / "movq" / "final"
        if not final.exists():
            pictures, held_out = self.corpus.pictures, self.held_out.pictures
            budget, settings = self.preset.budgets["movq"], self.preset.movq_settings
            model = train_movq(pictures, held_out, self.work / "movq", budget, settings, self.seed, self.device)
            model.save_pretrained(final)
        if not (self.work / "latents.safetensors").exists():
            model = VQModel.from_pretrained(final).to(self.device)
            save_file({"latents": encode_all(model, self.corpus.pictures)}, self.work / "latents.safetensors")
        return final

    def _decoder_data(self) -> DecoderData:
        embeds = load_file(self.work / "embeds.safetensors")
        latents = load_file(self.work / "latents.safetensors")["latents"]
        return DecoderData(latents, embeds["train"], embeds["negative"])

    def unet(self) -> Path:
        """Train the decoder; needs `clip` and `movq`."""
        budget, settings = self.preset.budgets["unet"], self.preset.unet_settings
        data, out = self._decoder_data(), self.work / "unet"
        train_unet(data, out, budget, settings, self.seed, self.device, self.trainers)
        return self.work / "unet"

    def sharpen(self) -> Path:
        """Train the autoencoder's decoding half on; needs `movq`."""
        sharp = self.work / "movq" / "sharp"
        if not sharp.exists():
            model = VQModel.from_pretrained(self.work / "movq" / "final")
            latents = load_file(self.work / "latents.safetensors")["latents"]
            sharpen_decoder(model, self.corpus.pictures, latents, self.held_out.pictures, self.work / "movq",
                            self.preset.budgets["sharpen"], self.seed, self.device).save_pretrained(sharp)  # fmt: skip
        return sharp

    def sae(self) -> Path:
        """Train the sparse autoencoder and measure its features on the corpus; needs `clip`."""
        out = self.work / "sae"
        out.mkdir(exist_ok=True)
        corpus = self._embeddings(out / "embeds")
        trainer = Trainer(
            corpus, out, replace(self.preset.sae_settings, budget=self.preset.budgets["sae"], seed=self.seed)
        )
        trainer.train()
        trainer.write(out / "part", len(corpus), "float16", {
            "trained_as": trainer.settings.architecture, "trained_on": f"{len(corpus)} postcards", "seed": self.seed,
        })  # fmt: skip
        return out / "part"

    def _embeddings(self, directory: Path) -> EmbeddingCorpus:
        """The corpus' embeddings as `train-sae` reads them."""
        embeds, encoder = load_file(self.work / "embeds.safetensors")["train"].numpy(), "postcards"
        directory.mkdir(exist_ok=True)
        write_embeds(directory / shard_name(0), embeds, dtype="float32", encoder_revision=encoder)
        shards = (Shard(shard_name(0), len(embeds)),)
        CorpusCard("postcards", encoder, embeds.shape[1], "float32", shards).write(directory)
        return EmbeddingCorpus.open(directory)

    def assemble(self, out: Path) -> Path:
        """Write the bundle from what there is, with the newest decoder checkpoint, finished or not."""
        data = self._decoder_data()
        for part, source in (("encoder", self.work / "clip" / "encoder"), ("sae", self.work / "sae" / "part")):
            shutil.rmtree(out / part, ignore_errors=True)
            shutil.copytree(source, out / part)
        sharp = self.work / "movq" / "sharp"
        movq = VQModel.from_pretrained(sharp if sharp.exists() else self.work / "movq" / "final")
        unet = load_averaged(self.work / "unet", data, self.preset.unet_settings)
        write_generator(unet, movq, data.negative, out / "generator")
        write_examples(out / "examples")
        return self.library(out)

    def library(self, out: Path) -> Path:
        """Write the library into a bundle that has every other part, and seal it."""
        embeds = load_file(self.work / "embeds.safetensors")["train"]
        shutil.rmtree(out / "library", ignore_errors=True)
        seal_bundle(out, embeds.shape[1])
        rebuild_library(out, self.work / "library", self.preset.library, self.workers, self.preset.judge_steps)
        return out

    def build(self, out: Path) -> Path:
        """Everything, in order."""
        for step in (self.clip, self.movq, self.unet, self.sharpen, self.sae):
            print(f"== {step.__name__}", flush=True)
            step()
        return self.assemble(out)


_WHOLE = ("build", "assemble", "library")  # these write a bundle
STEPS = ("clip", "movq", "unet", "sharpen", "sae")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The job's options."""
    parser.add_argument("--step", choices=(*STEPS, "assemble", "library"), default="build", help="only this one")
    parser.add_argument("--out", type=Path, help="where the bundle goes (the whole, assemble, library)")
    parser.add_argument("--work", type=Path, default=Path("runs/postcards"), help="corpora, checkpoints and logs")
    parser.add_argument("--preset", choices=("full", "trial"), default="full")
    parser.add_argument("--minutes", type=float, help="a step's budget, instead of the preset's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--workers", type=int, help="processes; by default the cores there are, two at most")


def run(arguments: argparse.Namespace) -> None:
    """Run the step, and print where its result is."""
    torch.set_num_threads(1)  # the jobs use processes; two threads on a busy machine are slower than one
    preset = PRESETS[arguments.preset]
    if arguments.minutes is not None:
        if arguments.step not in STEPS:
            raise JobError(f"--minutes is one step's budget; {arguments.step} has none of its own")
        budgets = {**preset.budgets, arguments.step: Budget(minutes=arguments.minutes)}
        preset = replace(preset, budgets=budgets)
    if arguments.step in _WHOLE and arguments.out is None:
        raise JobError(f"{arguments.step} needs --out")
    workshop = Workshop(arguments.work, preset, arguments.seed, arguments.device, arguments.workers)
    if arguments.step in _WHOLE:
        print(getattr(workshop, arguments.step)(arguments.out))
    else:
        print(getattr(workshop, arguments.step)())
