"""How fast SAEs train, by sparse and by dense kernels, and how much of a known dictionary they find.

    python benchmarks/sae_training.py widths                     # a step's time by width and L0, sparse against dense
    python benchmarks/sae_training.py full --corpus DIR          # a few steps at 163,840 latents, with peak memory
    python benchmarks/sae_training.py recovery                   # five architectures against frozen and random decoders

Each prints a Markdown table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from faceteer_postcards.synthetic import SparseMixtures, recovered
from faceteer_trainer.budget import Budget
from faceteer_trainer.corpus.shards import EmbeddingCorpus
from faceteer_trainer.sae.autoencoder import Autoencoder
from faceteer_trainer.sae.losses import Loss
from faceteer_trainer.sae.statistics import measure
from faceteer_trainer.sae.trainer import Settings, Trainer


def _corpus(
    directory: Path, n_true: int, d: int, rows: int, mean_active: float
) -> tuple[EmbeddingCorpus, SparseMixtures]:
    mixtures = SparseMixtures(n_true, d, mean_active=mean_active)
    mixtures.write(directory, rows)
    return EmbeddingCorpus.open(directory), mixtures


def _step(corpus: EmbeddingCorpus, settings: Settings, steps: int) -> dict[str, float]:
    """Median seconds of a step (the first left out), and this process' peak memory in GB."""
    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(corpus, Path(out), settings)
        times, unexplained = [], 1.0
        for _ in range(steps):
            started = time.perf_counter()
            losses, _ = trainer.one_step(settings.rate)
            trainer.step += 1
            times.append(time.perf_counter() - started)
            unexplained = float(losses.unexplained)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    rest = sorted(times[1:])
    return {"seconds": rest[len(rest) // 2], "first": times[0], "peak_gb": peak, "unexplained": unexplained}


def one(arguments: argparse.Namespace) -> None:
    """One measurement, in this process, as JSON: peak memory is a process' own."""
    corpus = EmbeddingCorpus.open(arguments.corpus)
    settings = Settings(
        "topk", arguments.width, Loss(k=arguments.k), Budget(steps=1000), batch=arguments.batch, rate=1e-4,
        kernels=arguments.kernels, bf16=arguments.bf16,
    )  # fmt: skip
    print(json.dumps(_step(corpus, settings, arguments.steps)))


def _apart(corpus: Path, width: int, k: int, kernels: str, batch: int, steps: int, bf16: bool) -> dict[str, float]:
    command = [sys.executable, __file__, "one", "--corpus", str(corpus), "--width", str(width), "--k", str(k)]
    command += ["--kernels", kernels, "--batch", str(batch), "--steps", str(steps), *(["--bf16"] if bf16 else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def widths(arguments: argparse.Namespace) -> None:
    """A step's time by width and L0."""
    with tempfile.TemporaryDirectory() as directory:
        _corpus(Path(directory), 4096, arguments.d, 8192, 32)
        print(f"d = {arguments.d}, batch {arguments.batch}, topk, {torch.get_num_threads()} thread(s)\n")
        print("| width | L0 | dense s/step | sparse s/step | dense / sparse |\n|---|---|---|---|---|")
        for width in arguments.widths:
            for k in arguments.ks:
                found = [
                    _apart(Path(directory), width, k, kernels, arguments.batch, 5, False)["seconds"]
                    for kernels in ("dense", "sparse")
                ]
                ratio = found[0] / found[1]
                print(f"| {width:,} | {k} | {found[0]:.3f} | {found[1]:.3f} | {ratio:.2f} |", flush=True)


def full(arguments: argparse.Namespace) -> None:
    """The published size."""
    print("| kernels | s/step | first step | peak GB |\n|---|---|---|---|")
    for kernels, bf16 in (("sparse", True), ("sparse", False), ("dense", False)):
        if kernels in arguments.kernels:
            found = _apart(arguments.corpus, 163_840, 32, kernels, arguments.batch, arguments.steps, bf16)
            name = f"{kernels}, bf16 selection" if bf16 else kernels
            print(f"| {name} | {found['seconds']:.2f} | {found['first']:.2f} | {found['peak_gb']:.1f} |", flush=True)


def recovery(arguments: argparse.Namespace) -> None:
    """Mean max cosine of the true directions, per architecture and for two baselines."""
    loss = Loss(k=round(arguments.active), l1=arguments.l1)
    base = Settings(
        "topk", arguments.width, loss, Budget(steps=arguments.steps), batch=arguments.batch, rate=arguments.lr,
        dead_after=arguments.dead_after,
    )  # fmt: skip
    runs = {
        name: dataclasses.replace(base, architecture=name)
        for name in ("standard", "topk", "batchtopk", "jumprelu", "matryoshka")
    }
    runs["topk, dense kernels"] = dataclasses.replace(base, kernels="dense")
    runs["topk, no AuxK"] = dataclasses.replace(base, loss=dataclasses.replace(loss, aux_k=0))
    runs["topk, frozen decoder"] = dataclasses.replace(base, train_decoder=False)
    if arguments.only:
        runs = {name: run for name, run in runs.items() if name in arguments.only}
    with tempfile.TemporaryDirectory() as directory:
        corpus, mixtures = _corpus(Path(directory), arguments.n_true, arguments.d, arguments.rows, arguments.active)
        truth = torch.from_numpy(mixtures.dictionary)
        chance = recovered(torch.randn(arguments.width, arguments.d, generator=torch.Generator().manual_seed(1)), truth)
        print("| decoder | mean max cosine | true directions at > 0.9 | explained variance | L0 | dead | s |")
        print("|---|---|---|---|---|---|---|")
        print(f"| random directions | {chance.mean:.3f} | {chance.share:.3f} | | | | |", flush=True)
        for name, settings in runs.items():
            with tempfile.TemporaryDirectory() as out:
                trainer = Trainer(corpus, Path(out), settings)
                started = time.perf_counter()
                trainer.train()
                seconds = time.perf_counter() - started
                figures = measure(Autoencoder(trainer.model.weights(trainer.scale)), corpus, 50_000).figures
            found = recovered(trainer.model.W_dec.detach(), truth)
            print(
                f"| {name} | {found.mean:.3f} | {found.share:.3f} | {figures['explained_variance']:.3f} | "
                f"{figures['l0']:.1f} | {100 * figures['dead_share']:.1f} % | {seconds:.0f} |",
                flush=True,
            )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(dest="job", required=True)
    for name, job in (("one", one), ("widths", widths), ("full", full), ("recovery", recovery)):
        options = jobs.add_parser(name)
        options.set_defaults(run=job)
        options.add_argument("--batch", type=int, default={"recovery": 512}.get(name, 256))
        if name in ("one", "full"):
            options.add_argument("--corpus", type=Path, required=True)
            options.add_argument("--steps", type=int, default=5)
        if name == "one":
            options.add_argument("--width", type=int, required=True)
            options.add_argument("--k", type=int, default=32)
            options.add_argument("--kernels", default="sparse")
            options.add_argument("--bf16", action="store_true")
        if name == "full":
            options.add_argument("--kernels", nargs="+", default=["sparse", "dense"])
        if name == "widths":
            options.add_argument("--d", type=int, default=512)
            options.add_argument("--widths", type=int, nargs="+", default=[1024, 4096, 16384, 65536, 163840])
            options.add_argument("--ks", type=int, nargs="+", default=[8, 32, 64])
        if name == "recovery":
            for flag, default in (("d", 128), ("n-true", 1024), ("rows", 200_000), ("width", 2048), ("steps", 3000)):
                options.add_argument(f"--{flag}", type=int, default=default)
            options.add_argument("--active", type=float, default=16.0)
            options.add_argument("--lr", type=float, default=2e-3)
            options.add_argument("--l1", type=float, default=4e-5)
            options.add_argument("--dead-after", type=int, default=50_000)
            options.add_argument("--only", nargs="+")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    arguments.run(arguments)


if __name__ == "__main__":
    main()
