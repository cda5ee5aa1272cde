"""thin-sae: copies and idle latents go, features carry all of what they stand for, and what cannot be is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from faceteer_sae.weights import SaeWeights, read_weights, write_weights
from faceteer_trainer.__main__ import main
from faceteer_trainer.corpus.shards import CorpusCard, Shard, shard_name, write_embeds
from faceteer_trainer.sae.autoencoder import Autoencoder
from faceteer_trainer.sae.thinning import Thinning, distinctions, superfluous, thin, without

TRUE, D = 8, 12
QUICK = Thinning(steps=60, batch=128, rate=2e-3)


def rows(count: int = 2048, seed: int = 0) -> torch.Tensor:
    """Each row has one of four values of each of two attributes, as the first eight unit vectors times about 3."""
    draw = torch.Generator().manual_seed(seed)
    x = 0.02 * torch.randn(count, D, generator=draw)
    for attribute in range(2):
        value = torch.randint(4, (count,), generator=draw) + 4 * attribute
        x[torch.arange(count), value] += 3 + 0.2 * torch.randn(count, generator=draw)
    return x


def crowded(seed: int = 1) -> SaeWeights:
    """The true directions, of which 0 is there twice more with less of its activation, and one that never fires."""
    directions = torch.cat([torch.eye(D)[:TRUE], torch.eye(D)[[0, 0]], torch.eye(D)[D - 1 :]])
    directions = torch.nn.functional.normalize(
        directions + 1e-3 * torch.randn(11, D, generator=torch.Generator().manual_seed(seed)), dim=-1
    )
    b_enc = torch.tensor([-0.5] * TRUE + [-0.9, -1.2, -5.0])
    return SaeWeights("batchtopk", directions.clone(), b_enc, directions, torch.zeros(D), True, 2, torch.tensor(0.5))


def test_near_copies_and_latents_that_hardly_ever_fire_are_superfluous() -> None:
    model = Autoencoder(crowded())
    assert superfluous(model, rows(), Thinning()) == [8, 9, 10]
    small = without(model, [8, 9, 10])
    torch.testing.assert_close(small.encode(rows()), model.encode(rows())[:, :TRUE])


def test_a_thinned_sae_has_each_feature_once_and_still_explains_the_rows() -> None:
    x = rows()
    weights = crowded()
    before = weights.W_dec.clone()
    thinned = thin(Autoencoder(weights), x, QUICK, lambda line: None)
    assert thinned.d_sae == TRUE
    assert superfluous(thinned, x, Thinning()) == []
    left = (thinned.decode(thinned.encode(x)) - x).square().sum() / (x - x.mean(0)).square().sum()
    assert left < 0.05
    torch.testing.assert_close(weights.W_dec, before)  # the SAE given is left as it is


def test_asked_for_whole_features_a_feature_carries_what_sets_its_rows_apart() -> None:
    x = rows()
    carried = {}
    for whole in (0.0, 1.3):
        thinned = thin(Autoencoder(crowded()), x, replace(QUICK, whole=whole), lambda line: None)
        f = thinned.encode(x)
        mean = f.sum(0) / (f > 0).sum(0)
        carried[whole] = (mean * (thinned.W_dec * distinctions(thinned, x, 0.5)).sum(-1)).min().item()
    assert carried[1.3] > carried[0.0] + 0.05


def test_thin_sae_writes_what_a_bundle_serves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus, sae, out = (tmp_path / name for name in ("corpus", "sae", "out"))
    for directory in (corpus, sae):
        directory.mkdir()
    write_embeds(corpus / shard_name(0), rows().numpy(), dtype="float32", encoder_revision="r")
    CorpusCard("own", "r", D, "float32", (Shard(shard_name(0), 2048),)).write(corpus)
    write_weights(sae, crowded(), "float32")
    words = ["thin-sae", "--sae", str(sae), "--corpus", str(corpus), "--steps", "20"]
    main([*words, "--out", str(out)])
    assert f"{TRUE} latents" in capsys.readouterr().out
    written = read_weights(out)
    assert written.W_dec.shape == (TRUE, D)
    assert written.metadata["thinned_from"] == 11
    np.testing.assert_allclose(written.W_dec.norm(dim=-1).numpy(), 1.0, atol=1e-4)
    for more, message in (
        (["--out", str(sae)], "give another folder"),
        (["--out", str(out), "--k", "40"], "choose a smaller k"),
        (["--out", str(out), "--alike", "2"], "--alike is 2.0; it is a cosine"),
    ):
        with pytest.raises(SystemExit):
            main([*words, *more])
        assert message in capsys.readouterr().err
