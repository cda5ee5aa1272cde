"""Weights that are not what their configuration promises, memory that does not suffice, devices that are not there."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faceteer_generator.checkpoint import available_bytes, ensure_room, is_finite, read_header, stored_tensors
from faceteer_generator.denoise import Denoiser
from faceteer_generator.kandinsky import KandinskyDecoder
from faceteer_generator.model import load_decoder, offload_between, target_device
from faceteer_runtime.bundle import BundleError
from safetensors.torch import load_file, save_file
from unit.generator.generator_specs import image_spec

UNET = "unet/diffusion_pytorch_model.safetensors"
MOVQ = "movq/diffusion_pytorch_model.safetensors"


@pytest.fixture
def copied(generator_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(generator_bundle / "generator", tmp_path / "generator"))


def changed(file: str, name: str, tensor: torch.Tensor | None) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        tensors = load_file(directory / file)
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
        save_file(tensors, directory / file)

    return spoil


def one_value(file: str, name: str, value: float) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        tensors = load_file(directory / file)
        tensors[name].view(-1)[-1] = value
        save_file(tensors, directory / file)

    return spoil


def cut(file: str) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        data = (directory / file).read_bytes()
        (directory / file).write_bytes(data[: len(data) // 2])

    return spoil


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (changed(UNET, "conv_in.bias", None), f"{UNET}: tensor 'conv_in.bias' is missing"),
        (changed(MOVQ, "encoder.conv_in.weight", None), f"{MOVQ}: tensor 'encoder.conv_in.weight' is missing"),
        (changed(UNET, "stranger", torch.zeros(1)), f"{UNET}: tensor 'stranger' does not belong"),
        (changed(UNET, "conv_in.bias", torch.zeros(3)), f"{UNET}: tensor 'conv_in.bias' has shape \\[3\\]"),
        (one_value(UNET, "conv_out.weight", float("nan")), f"{UNET}: tensor 'conv_out.weight' holds NaN or infinite"),
        (one_value(MOVQ, "decoder.conv_out.bias", float("inf")), f"{MOVQ}: tensor 'decoder.conv_out.bias' holds NaN"),
        (cut(UNET), f"{UNET}: cut off at"),
        (lambda directory: (directory / MOVQ).write_bytes(b"PK"), f"{MOVQ}: not a readable safetensors file"),
        (lambda directory: (directory / UNET).unlink(), f"{UNET}: missing; pull the bundle again"),
    ],
)
def test_a_spoilt_checkpoint_is_refused_by_file_and_tensor(
    copied: Path, spoil: Callable[[Path], Any], words: str
) -> None:
    spoil(copied)
    with pytest.raises(BundleError, match=words) as caught:
        load_decoder(copied)
    assert "\n" not in str(caught.value)


def test_a_sharded_checkpoint_is_one_checkpoint(copied: Path) -> None:
    whole = load_file(copied / UNET)
    names = sorted(whole)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, chosen in shards.items():
        save_file({name: whole[name] for name in chosen}, copied / "unet" / file)
    index = {"weight_map": {name: file for file, chosen in shards.items() for name in chosen}}
    (copied / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (copied / UNET).unlink()
    decoder = load_decoder(copied)
    for name, tensor in decoder.unet.state_dict().items():  # type: ignore[attr-defined]
        assert torch.equal(tensor, whole[name])
    (copied / "unet" / "b.safetensors").unlink()
    with pytest.raises(BundleError, match=r"b\.safetensors: missing"):
        load_decoder(copied)


def test_values_that_half_precision_cannot_hold_are_refused(copied: Path) -> None:
    one_value(UNET, "conv_in.bias", 1e6)(copied)
    assert load_decoder(copied, dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(BundleError, match=r"'conv_in\.bias' holds values beyond float16; choose bfloat16"):
        load_decoder(copied, dtype="float16")


def test_a_sum_that_overflows_is_no_nan() -> None:
    assert is_finite(torch.full((4,), 3e38))
    assert not is_finite(torch.tensor([1.0, float("-inf")]))


def test_too_little_memory_is_said_before_anything_is_loaded(copied: Path) -> None:
    """A codebook of 1 TiB, in a file that takes no room on the disk."""
    entries, side = 1 << 36, 4
    config = json.loads((copied / "movq" / "config.json").read_text())
    (copied / "movq" / "config.json").write_text(json.dumps(config | {"num_vq_embeddings": entries}))
    tensors = load_file(copied / MOVQ)
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        shape = [entries, side] if name == "quantize.embedding.weight" else list(tensor.shape)
        length = 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + length]}
        end += length
    text = json.dumps(header).encode()
    with (copied / MOVQ).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        try:
            file.truncate(8 + len(text) + end)
        except OSError:
            pytest.skip("the file system has no files of this length")
    with pytest.raises(BundleError, match=r"needs 1484\.8 GiB of memory .* this machine has [\d.]+ GiB to spare"):
        load_decoder(copied)


def test_room_is_compared_with_what_is_to_be_had() -> None:
    cpu = torch.device("cpu")
    assert 0 < available_bytes(cpu) < 1 << 50
    ensure_room("weights", 60 << 20, cpu, available=100 << 20)
    with pytest.raises(BundleError, match=r"weights: needs 5\.8 GiB of memory \(4\.0 GiB of weights .* has 4\.5 GiB"):
        ensure_room("weights", 4 << 30, cpu, available=9 << 29)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_one_clear_sentence(copied: Path) -> None:
    with pytest.raises(BundleError, match="this machine has no CUDA GPU; set FACETEER_DEVICE=cpu"):
        load_decoder(copied, device="cuda")
    with pytest.raises(BundleError, match="is no device"):
        target_device("gpu!")


def test_a_kind_that_nobody_knows_is_refused(copied: Path) -> None:
    with pytest.raises(BundleError, match="none of kandinsky-2-2, sdxl-ip-adapter"):
        load_decoder(copied, kind="stable-cascade")


def test_headers_are_read_without_the_weights(copied: Path) -> None:
    shapes = read_header(copied / UNET)
    stored = stored_tensors(copied / "unet")
    assert shapes == {name: entry.shape for name, entry in stored.items()}
    assert shapes["conv_in.bias"] == (32,)


@pytest.mark.parametrize("how", ["model", "sequential"])
def test_offloaded_models_draw_the_same_picture(copied: Path, how: Any) -> None:
    asked = image_spec(1, steps=2)
    pictures = []
    for offload in (False, True):
        decoder = load_decoder(copied)
        assert isinstance(decoder, KandinskyDecoder)
        if offload:
            # Onto the CPU itself: the hooks and their order are what is tested.
            offload_between([decoder.unet, decoder.movq], torch.device("cpu"), how)
        denoiser = Denoiser(decoder)
        one = denoiser.begin(asked)
        while not one.done:
            denoiser.step([one])
        pictures.append(denoiser.decode([one.latents])[0])
    assert (pictures[0] == pictures[1]).all()
    with pytest.raises(BundleError, match="FACETEER_GENERATOR_OFFLOAD is for GPUs"):
        load_decoder(copied, offload=how)


def test_compiled_models_see_few_numbers_of_rows(copied: Path) -> None:
    decoder = load_decoder(copied)
    assert isinstance(decoder, KandinskyDecoder)
    seen = []

    def unet(**inputs: Any) -> Any:
        """Stands for a compiled model: the same arithmetic, and it is told each number of rows."""
        seen.append(len(inputs["sample"]))
        return decoder.unet(**inputs)

    unet.config = decoder.unet.config  # type: ignore[attr-defined]
    import dataclasses

    denoiser = Denoiser(dataclasses.replace(decoder, unet=unet, compiled=True))
    together = [denoiser.begin(image_spec(seed, steps=2)) for seed in range(3)]
    while not together[0].done:
        denoiser.step(together)
    assert set(seen) == {8}
    seen.clear()
    for n in (1, 2, 3, 5, 8, 9):
        denoiser.step([denoiser.begin(image_spec(seed, guidance_scale=1.0)) for seed in range(n)])
    assert seen == [1, 2, 4, 8, 8, 16]
    plain = Denoiser(decoder)
    for one in together:
        alone = plain.begin(one.spec)
        while not alone.done:
            plain.step([alone])
        torch.testing.assert_close(one.latents, alone.latents, rtol=1e-4, atol=1e-4)
