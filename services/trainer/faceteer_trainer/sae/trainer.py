"""Trains any of the architectures on a corpus of any size; a killed run resumes and reaches identical weights.

A step's batch depends on (seed, step) alone; weights, moments and the count of silent rows are the only state.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from faceteer_runtime.files import whole_file
from faceteer_sae.statistics import save_statistics
from faceteer_sae.weights import write_weights

from faceteer_trainer.budget import Budget
from faceteer_trainer.corpus.shards import CARD, EmbeddingCorpus
from faceteer_trainer.errors import JobError
from faceteer_trainer.files import writing
from faceteer_trainer.sae.autoencoder import Autoencoder, untrained
from faceteer_trainer.sae.initial_directions import neighbour_directions, skewed_directions
from faceteer_trainer.sae.kernels import RowAdam
from faceteer_trainer.sae.losses import Loss, Losses, dense_losses, sparse_losses
from faceteer_trainer.sae.sampling import BlockShuffle
from faceteer_trainer.sae.statistics import measure

# The values of --architecture; matryoshka is a batchtopk trained on nested prefixes.
ARCHITECTURES = ("standard", "topk", "batchtopk", "jumprelu", "matryoshka")
# These fire so few latents from the first step on that sparse kernels apply.
SPARSE = ("topk", "batchtopk", "matryoshka")
STARTS = ("random", "neighbours", "skewed")
CHECKPOINT = "train-sae.ckpt"
# Rows that mean, scale and threshold are estimated from.
SAMPLE = 8192
# Latents a firing from which sparse kernels are quicker: measured, docs/train-sae.md.
SPARSE_FROM = 128
# Rows that initial directions are found from.
_START_ROWS = 65_536
# Dead latents are reset until this share of the budget is used: later ones would not be trained to the end.
_RESET_UNTIL = 0.75
# The share of a batch on which a reset latent fires at first; one that fired on all would upset what is learnt.
_RESET_FIRES = 0.03


@dataclass(frozen=True)
class Settings:
    """All that decides what a run gives. Two runs of equal settings on one corpus give equal weights.

    Attributes:
        architecture: one of ARCHITECTURES.
        d_sae: n, latents.
        loss: what is minimised.
        budget: how long.
        batch: rows a step.
        rate: peak learning rate.
        warmup: steps over which it rises from 0.
        decay: share of the budget over which it falls to 0 at the end.
        clip_norm: the gradient's norm is brought down to this; 0 leaves it.
        dead_after: rows without a firing after which a latent counts as dead.
        bf16: choose latents (sparse kernels) or multiply matrices (dense) in bfloat16.
        kernels: sparse, dense, or auto: sparse where the architecture allows it and few enough latents fire.
        train_decoder: False freezes the decoder at its random start: a baseline, not a way to train.
        train_b_dec: False holds b_dec at the corpus' mean; a trained one takes one value of each attribute for granted.
        start: first decoder directions: random; neighbours: differences of near neighbours among the embeddings;
            skewed: for the first half of the latents directions in which the embeddings are most skewed, where there
            are any, and neighbours for the rest.
        start_k: k at the start, which falls linearly to the loss's k; 0: k is the same throughout.
        anneal: share of the budget over which it falls.
        reset_every: steps between resets of dead latents, which point each at one of the batch's worst reconstructed
            embeddings; after `anneal` and until 0.75 of the budget; 0: never.
        seed: of weights and batches.
    """

    architecture: str
    d_sae: int
    loss: Loss = field(default_factory=Loss)
    budget: Budget = field(default_factory=lambda: Budget(steps=10_000))
    batch: int = 1024
    rate: float = 1e-3
    warmup: int = 200
    decay: float = 0.3
    clip_norm: float = 1.0
    dead_after: int = 50_000
    bf16: bool = False
    kernels: str = "auto"
    train_decoder: bool = True
    train_b_dec: bool = True
    start: str = "random"
    start_k: float = 0.0
    anneal: float = 0.25
    reset_every: int = 0
    seed: int = 0

    @property
    def sparse(self) -> bool:
        """Whether sparse kernels are used."""
        if self.kernels == "auto":
            return self.architecture in SPARSE and self.d_sae >= SPARSE_FROM * self.loss.k
        return self.kernels == "sparse"

    def learning_rate(self, step: int, progress: float) -> float:
        """Linear warm-up, level, then linearly to 0 as the budget ends."""
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        return self.rate * rise * min(1.0, (1 - progress) / max(self.decay, 1e-9))

    def k(self, progress: float) -> float:
        """Firings a row at this share of the budget."""
        if not self.start_k or progress >= self.anneal:
            return self.loss.k
        return self.start_k + (self.loss.k - self.start_k) * progress / self.anneal

    def resets(self, step: int, progress: float) -> bool:
        """Whether dead latents are reset after this step."""
        due = self.reset_every > 0 and step % self.reset_every == 0
        return due and self.anneal < progress < _RESET_UNTIL


def flat(settings: Settings) -> dict[str, Any]:
    """Settings as plain values by name."""
    values = asdict(settings)
    values |= values.pop("loss") | values.pop("budget")
    return json.loads(json.dumps(values))  # type: ignore[no-any-return]


class Trainer:
    """One run: `train` takes it to the end of its budget, from its checkpoint where there is one."""

    def __init__(self, corpus: EmbeddingCorpus, directory: Path, settings: Settings, device: str = "cpu") -> None:
        """Opens the run in `directory`, which must exist and be locked by the caller.

        Raises:
            JobError: the checkpoint there is of other settings or another corpus, or cannot be read; too few rows.
        """
        if len(corpus) < 2:
            raise JobError(f"{corpus.directory}: has {len(corpus)} rows; an SAE needs at least two")
        self.corpus, self.directory, self.settings, self.device = corpus, directory, settings, torch.device(device)
        self.shuffle = BlockShuffle(len(corpus), settings.batch, settings.seed)
        self.corpus_digest = hashlib.sha256((corpus.directory / CARD).read_bytes()).hexdigest()[:16]
        served_as = "batchtopk" if settings.architecture == "matryoshka" else settings.architecture
        self.model = untrained(served_as, corpus.embed_dim, settings.d_sae, round(settings.loss.k), settings.seed)
        self.step, self.elapsed, self.scale = 0, 0.0, 1.0
        self.silent = torch.zeros(settings.d_sae, dtype=torch.int64)
        self.checkpoint = directory / CHECKPOINT
        self.model.to(self.device)
        self.silent = self.silent.to(self.device)
        if not settings.train_decoder:
            self.model.W_dec.requires_grad_(False)
        if not settings.train_b_dec:
            self.model.b_dec.requires_grad_(False)
        self.optimizer: Any = self._optimizer()
        if not self._resumed():
            self._start()

    def sample(self, rows: int = SAMPLE) -> torch.Tensor:
        """Embeddings [<= rows, d] from all over the corpus, in the model's units."""
        count = min(rows, len(self.corpus))
        return self.units(BlockShuffle(len(self.corpus), count, self.settings.seed + 1, block=1).indices(0))

    def units(self, indices: Any) -> torch.Tensor:
        """Rows of the corpus [m, d] in the model's units, on its device."""
        return torch.from_numpy(self.corpus.rows(indices)).to(self.device) / self.scale

    @property
    def progress(self) -> float:
        """The share of the budget used so far."""
        return self.settings.budget.progress(self.step, self.elapsed)

    def train(
        self, checkpoint_minutes: float = 5.0, watch: Callable[[int, Losses, dict[str, float]], None] | None = None,
        stop_after: int | None = None,
    ) -> None:  # fmt: skip
        """Train to the end of the budget; `watch(step, losses, figures)` sees every step.

        Raises:
            JobError: a row is not finite, the loss is not, or a checkpoint cannot be written.
        """
        started, before, saved = time.monotonic(), self.elapsed, time.monotonic()
        while self.progress < 1.0 and self.step != stop_after:
            rate = self.settings.learning_rate(self.step, self.progress)
            losses, norm = self.one_step(rate)
            self.step += 1
            self.elapsed = before + time.monotonic() - started
            if watch:
                watch(self.step, losses, {"rate": rate, "grad_norm": norm, "dead": self.dead_share})
            if time.monotonic() - saved > 60 * checkpoint_minutes:
                self.save()
                saved = time.monotonic()
        if self.model.architecture == "batchtopk":
            self.model.calibrate(self.sample())
        self.save()

    @property
    def dead_share(self) -> float:
        """Share of latents that have not fired for `dead_after` rows."""
        return float((self.silent > self.settings.dead_after).float().mean())

    def save(self) -> None:
        """Write the checkpoint, whole or not at all.

        Raises:
            JobError: there is no room; the checkpoint before is as it was.
        """
        state = {
            "settings": flat(self.settings), "corpus": self.corpus_digest, "step": self.step, "elapsed": self.elapsed,
            "scale": self.scale, "silent": self.silent, "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }  # fmt: skip
        try:
            with whole_file(self.checkpoint, durable=True) as part:
                torch.save(state, part)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError where a write failed
            raise JobError(
                f"{self.checkpoint}: could not be written ({str(error).splitlines()[0]}); make room and run the same "
                "command again: the checkpoint before it is kept"
            ) from None

    def write(self, directory: Path, most_rows: int, dtype: str, metadata: Mapping[str, Any]) -> dict[str, float]:
        """Measures the SAE on up to `most_rows` rows and writes it as a bundle's sae/ holds it (docs/bundles.md).

        Returns:
            The figures: see :class:`faceteer_trainer.sae.statistics.Measured`.

        Raises:
            JobError: it cannot be written.
            BundleError: a weight does not fit into the dtype.
        """
        weights = self.model.weights(self.scale)
        measured = measure(Autoencoder(weights).to(self.device), self.corpus, most_rows)
        facts = {**metadata, "figures": measured.figures, "embedding_statistics": measured.embedding_statistics}
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
            save_statistics(directory, measured.statistics)
            write_weights(directory, replace(weights, metadata=facts), dtype, layout="saelens")
        return measured.figures

    def one_step(self, rate: float) -> tuple[Losses, float]:
        """Take the step of `self.step`, which the caller counts on; returns its losses and the gradient's norm."""
        settings, model = self.settings, self.model
        x = self.units(self.shuffle.indices(self.step))
        dead = self.silent > settings.dead_after
        loss = replace(settings.loss, k=settings.k(self.progress))
        losses = (sparse_losses if settings.sparse else dense_losses)(model, x, dead, loss, settings.bf16)
        if not torch.isfinite(losses.total):
            raise JobError(f"step {self.step}: the loss is {losses.total.item()}; lower --lr, or raise --warmup")
        for parameter in model.parameters():
            parameter.grad = None
        losses.total.backward()
        touched: Any = slice(None)
        with torch.no_grad():
            grad = model.W_dec.grad
            if grad is not None:
                if grad.is_sparse:
                    grad = model.W_dec.grad = grad.coalesce()
                    touched = grad.indices()[0]
                if model.unit_norm:
                    values = grad.values() if grad.is_sparse else grad
                    rows = model.W_dec[touched]
                    values -= (values * rows).sum(-1, keepdim=True) * rows
            norm = self._clip()
            if isinstance(self.optimizer, RowAdam):
                self.optimizer.rate = rate
            else:
                self.optimizer.param_groups[0]["lr"] = rate
            self.optimizer.step()
            if model.unit_norm and grad is not None:
                model.normalise_decoder(touched)
            self.silent += settings.batch
            self.silent[losses.fired] = 0
            if settings.resets(self.step, self.progress):
                self._reset(dead & ~losses.fired, x, losses.residual)
        return losses, norm

    def _reset(self, dead: torch.Tensor, x: torch.Tensor, residual: torch.Tensor) -> None:
        """Points dead latents [n] at the longest residuals [b, d] of x [b, d], and starts their moments afresh."""
        latents = dead.nonzero()[:, 0][: len(residual)]
        longest = residual.norm(dim=-1).topk(len(latents)).indices
        directions = torch.nn.functional.normalize(residual[longest], dim=-1)
        projections = (self.model.centred(x) @ directions.T).sort(dim=0, descending=True).values
        self.model.W_dec[latents] = self.model.W_enc[latents] = directions
        self.model.b_enc[latents] = -projections[round(_RESET_FIRES * (len(x) - 1))]
        self.silent[latents] = 0
        for name in ("W_enc", "W_dec", "b_enc"):
            parameter = getattr(self.model, name)
            if isinstance(self.optimizer, RowAdam):
                self.optimizer.forget(name, latents)
            elif parameter in self.optimizer.state:
                for moment in ("exp_avg", "exp_avg_sq"):
                    self.optimizer.state[parameter][moment][latents] = 0

    def _clip(self) -> float:
        """Bring the gradient's norm down to clip_norm; returns it as it was."""
        values = []
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                if parameter.grad.is_sparse:
                    parameter.grad = parameter.grad.coalesce()
                values.append(parameter.grad.values() if parameter.grad.is_sparse else parameter.grad)
        norm = math.sqrt(sum(float(v.square().sum()) for v in values))
        if 0 < self.settings.clip_norm < norm:
            for v in values:
                v *= self.settings.clip_norm / norm
        return norm

    def _optimizer(self) -> Any:
        if self.settings.sparse:
            return RowAdam({name: p for name, p in self.model.named_parameters() if p.requires_grad})
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return torch.optim.Adam(trained, lr=self.settings.rate, eps=6.25e-10)

    @torch.no_grad()
    def _start(self) -> None:
        x = self.sample()
        mean = x.mean(0)
        if self.settings.architecture != "standard":
            self.scale = float((x - mean).square().sum(-1).mean().sqrt())
            if not self.scale > 0:
                raise JobError(f"{self.corpus.directory}: all embeddings are equal; there is nothing to learn")
        self.model.b_dec.copy_(mean / self.scale)
        if self.settings.start != "random":
            self._point_at(self.sample(_START_ROWS).cpu())

    def _point_at(self, x: torch.Tensor) -> None:
        """First directions from embeddings [m, d] instead of random ones."""
        model, seed = self.model, self.settings.seed
        directions = neighbour_directions(x, model.d_sae, seed=seed)
        model.W_dec.copy_(directions)
        model.W_enc.copy_(directions)
        if self.settings.start == "skewed":
            found = skewed_directions(x, model.d_sae // 2, seed)
            model.W_dec[: len(found.skewness)] = found.decoder.to(self.device)
            model.W_enc[: len(found.skewness)] = found.encoder.to(self.device)

    def _resumed(self) -> bool:
        if not self.checkpoint.exists():
            return False
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True, mmap=True)
            was, now = state["settings"], flat(self.settings)
        except Exception as error:
            raise JobError(f"{self.checkpoint}: cannot be read ({error}); delete it to start over") from None
        changed = [
            f"{name} was {was.get(name)} and is {value}" for name, value in now.items() if was.get(name) != value
        ]
        if changed:
            raise JobError(
                f"{self.directory}: holds a run with other settings ({'; '.join(changed)}); give the same ones, or "
                "another --out"
            )
        if state["corpus"] != self.corpus_digest:
            raise JobError(
                f"{self.directory}: holds a run on another corpus than {self.corpus.directory}; give that one, or "
                "another --out"
            )
        self.step, self.elapsed, self.scale = state["step"], state["elapsed"], state["scale"]
        self.silent.copy_(state["silent"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        return True
