"""The text prior against diffusers' own pipeline, and through the service."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from diffusers import KandinskyV22PriorPipeline, PriorTransformer, UnCLIPScheduler
from faceteer.v1 import generator_pb2, tensor_pb2
from faceteer_generator.prior import Imagining, TextPrior, inspect_prior, load_prior
from faceteer_generator.prompts import Prompt
from faceteer_runtime.bundle import BundleError, seal
from faceteer_runtime.cache_keys import embeds_content_id
from rpc_errors import read_error
from safetensors.torch import load_file, save_file
from tiny_bundle import EMBED_DIM
from transformers import (
    CLIPImageProcessor,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)
from unit.generator.small_prior import write_small_prior

REVISION = "0123456789abcdef"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_prior(tmp_path_factory.mktemp("prior") / "prior")


@pytest.fixture(scope="module")
def models(directory: Path) -> TextPrior:
    return load_prior(directory, device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(scope="module")
def pipeline(directory: Path) -> KandinskyV22PriorPipeline:
    """diffusers' own, loaded the usual way from the same files."""
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    pipe = KandinskyV22PriorPipeline(
        prior=PriorTransformer.from_pretrained(directory / "prior"),
        image_encoder=CLIPVisionModelWithProjection(vision),
        text_encoder=CLIPTextModelWithProjection.from_pretrained(directory / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(directory / "tokenizer"),
        scheduler=UnCLIPScheduler.from_pretrained(directory / "scheduler"),
        image_processor=CLIPImageProcessor(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("steps", [2, 25])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("negative", ["", "a dog"])
def test_an_imagined_embedding_is_the_stock_pipelines(
    models: TextPrior, pipeline: KandinskyV22PriorPipeline, negative: str, guidance: float, steps: int
) -> None:
    imagining = Imagining(models, Prompt("A cat, 2 cats", negative, 2**63 + 5, steps, guidance))
    calls = 0
    while not imagining.done:
        imagining.advance()
        calls += 1
    assert calls == steps + 1
    theirs = pipeline(
        "A cat, 2 cats",
        negative_prompt=negative or None,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(2**63 + 5),
    ).image_embeds
    ours = imagining.embeds()
    assert ours.shape == (EMBED_DIM,)
    assert np.abs(ours).max() < 60  # Clipped to ten before it is scaled.
    np.testing.assert_allclose(ours, theirs[0].numpy(), rtol=2e-5, atol=2e-5)


def test_the_embedding_is_in_the_encoders_own_scale(models: TextPrior) -> None:
    imagining = Imagining(models, Prompt("a cat", "", 1, 3, 4.0))
    while not imagining.done:
        imagining.advance()
    latents = imagining._latents[0].numpy()
    mean, std = (models.prior.state_dict()[name][0].numpy() for name in ("clip_mean", "clip_std"))
    np.testing.assert_allclose(imagining.embeds(), latents * std + mean, rtol=1e-6)


def test_texts_beyond_the_models_length_are_cut(models: TextPrior) -> None:
    embeds = []
    for text in ("cat " * 100, "cat " * 90):
        imagining = Imagining(models, Prompt(text, "", 1, 2, 1.0))
        while not imagining.done:
            imagining.advance()
        embeds.append(imagining.embeds())
    assert np.array_equal(*embeds)


def drop_tensor(path: Path) -> None:
    file = path / "prior" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if name != "clip_std"}, file)


def spoil_text(path: Path) -> None:
    file = path / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    tensors["text_projection.weight"][0, 0] = float("nan")
    save_file(tensors, file)


def other_dimension(path: Path) -> None:
    file = path / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"projection_dim": 16}))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: shutil.rmtree(path / "tokenizer"), "tokenizer: missing"),
        (drop_tensor, "diffusion_pytorch_model.safetensors: tensor 'clip_std' is missing"),
        (spoil_text, "text_encoder: tensor 'text_projection.weight' holds NaN"),
        (other_dimension, r"'text_projection.weight' has shape \[32, 32\]"),
        (lambda path: (path / "prior" / "config.json").write_text("{"), "config.json: cannot be read"),
    ],
)
def test_a_broken_prior_is_refused_in_one_sentence(directory: Path, tmp_path: Path, spoil: Any, words: str) -> None:
    copy = Path(shutil.copytree(directory, tmp_path / "prior"))
    spoil(copy)
    with pytest.raises(BundleError, match=words) as caught:
        load_prior(copy, device=torch.device("cpu"), dtype=torch.float32)
    assert "\n" not in str(caught.value)


def test_a_prior_is_inspected_without_reading_weights(directory: Path) -> None:
    assert set(inspect_prior(directory)) == {"prior", "text_encoder"}


@pytest.fixture(scope="module")
def bundle(directory: Path, generator_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The generator's bundle with a prior in it."""
    whole = Path(shutil.copytree(generator_bundle, tmp_path_factory.mktemp("with-prior") / "bundle"))
    shutil.copytree(directory, whole / "generator" / "prior")
    seal(whole)
    return whole


def request(prompt: str = "a cat", **fields: Any) -> generator_pb2.EmbedPromptRequest:
    return generator_pb2.EmbedPromptRequest(prompt=prompt, seed=3, steps=3, **fields)


async def test_a_prompt_becomes_a_cached_embedding_that_draws(serve: Any, bundle: Path, models: TextPrior) -> None:
    serving = await serve(bundle=bundle)
    about = await serving.stub.GetGenerator(generator_pb2.GetGeneratorRequest())
    assert about.has_prior
    answers = await asyncio.gather(*(serving.stub.EmbedPrompt(request()) for _ in range(3)))
    assert len({answer.embedding.embedding_id for answer in answers}) == 1
    answer = answers[0]
    embeds = np.frombuffer(answer.embedding.embeds.data, dtype="<f4")
    imagining = Imagining(models, Prompt("a cat", "", 3, 3, 4.0))
    while not imagining.done:
        imagining.advance()
    assert np.array_equal(embeds, imagining.embeds())
    assert answer.embedding.embedding_id == embeds_content_id(REVISION, embeds)
    assert answer.execution.model_revision == about.revision
    assert not answer.execution.cached
    assert answer.execution.compute_us > 0
    again = await serving.stub.EmbedPrompt(request())
    assert again.execution.cached
    assert again.embedding == answer.embedding
    for change in ({"negative_prompt": "a dog"}, {"guidance_scale": 1.0}):
        other = await serving.stub.EmbedPrompt(request(**change))
        assert not other.execution.cached
        assert other.embedding.embedding_id != answer.embedding.embedding_id
    generate = generator_pb2.GenerateRequest(
        input=tensor_pb2.EmbedsInput(embedding_id=answer.embedding.embedding_id),
        settings=generator_pb2.GenerationSettings(seeds=[1]),
    )
    events = [event.WhichOneof("event") async for event in serving.stub.Generate(generate)]
    assert events[-2:] == ["image", "finished"]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": "  "}, "prompt"),
        ({"prompt": "x" * 10_001}, "prompt"),
        ({"negative_prompt": "x" * 10_001}, "negative_prompt"),
        ({"steps": 1}, "steps"),
        ({"steps": 1000}, "steps"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
    ],
)
async def test_a_prompt_that_cannot_be_imagined_names_the_field(
    serve: Any, bundle: Path, fields: dict[str, Any], field: str
) -> None:
    serving = await serve(bundle=bundle)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await serving.stub.EmbedPrompt(generator_pb2.EmbedPromptRequest(**({"prompt": "a cat"} | fields)))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert field in str(caught.value.details())


async def test_a_bundle_without_a_prior_says_so(serve: Any) -> None:
    serving = await serve()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await serving.stub.EmbedPrompt(request())
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert read_error(caught.value).reason == "NOT_IN_BUNDLE"
