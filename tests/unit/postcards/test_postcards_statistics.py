"""The bundle's SAE after jobs that anyone may run on it."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
from faceteer_encoder.model import load_encoder
from faceteer_postcards.bundle import load_bundle
from faceteer_postcards.render import render
from faceteer_postcards.world import sample_scene
from faceteer_runtime.bundle import Bundle
from faceteer_trainer.__main__ import main
from faceteer_trainer.corpus.shards import CorpusCard, Shard, shard_name, write_embeds
from PIL import Image

SHIPPED = Path(__file__).parents[3] / "deploy" / "bundles" / "postcards"


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_bundle_that_got_a_new_library_is_loaded_for_evaluation(tmp_path: Path) -> None:
    bundle, corpus = tmp_path / "bundle", tmp_path / "corpus"
    shutil.copytree(SHIPPED, bundle)
    encoder, preprocessor = load_encoder(bundle / "encoder")
    revision = Bundle.open(bundle).part("encoder").revision
    x = encoder.encode_images([preprocessor.pixels(png(render(sample_scene(n)))) for n in range(300)])
    x = np.asarray(x, np.float32)
    corpus.mkdir()
    write_embeds(corpus / shard_name(0), x, dtype="float32", encoder_revision=revision)
    CorpusCard("own", revision, x.shape[1], "float32", (Shard(shard_name(0), 300),)).write(corpus)
    main(["build-library", "--corpus", str(corpus), "--bundle", str(bundle)])
    loaded = load_bundle(bundle)
    assert loaded.statistics.embedding_mean is not None
    np.testing.assert_allclose(loaded.statistics.embedding_mean, x.mean(0), rtol=1e-4, atol=1e-4)
    assert (loaded.statistics.p99[: loaded.sae.d_sae] > 0).any()
