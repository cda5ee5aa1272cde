"""The SAE of "Interpreting and Steering Features in Images": a plain fp16 state dict of four tensors.

    encoder.weight [d_sae, d_in], enc_bias [d_sae], decoder.weight [d_in, d_sae], dec_bias [d_in]
    f = ReLU(encoder.weight x + enc_bias), x_hat = decoder.weight f + dec_bias

Nothing is taken off the input, and decoder columns are not of unit norm: both are kept as they are.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from faceteer_runtime.files import whole_file
from faceteer_sae.weights import SaeWeights

from faceteer_trainer.errors import JobError
from faceteer_trainer.formats.conversions import checked, take, turned, with_input_shift
from faceteer_trainer.formats.files import read_pickle

SHA256 = "427e99d536d067aee9681f4c26d0e2efaac5524eaab80c78f23ffca56e0bd479"
SOURCE = "gytdau/clip-sae-128, sparse_autoencoder_128.pth"
_NAMES = ("encoder.weight", "enc_bias", "decoder.weight", "dec_bias")


def read(path: Path, *, any_checksum: bool = False) -> SaeWeights:
    """The file, whose digest must be the published one's unless ``any_checksum``."""
    if not path.is_file():
        raise JobError(f"{path}: missing")
    if not any_checksum:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != SHA256:
            raise JobError(
                f"{path}: its SHA-256 is {digest}, not the published file's {SHA256}; fetch it again, or give "
                "--allow-other-checksum for weights of your own in this format"
            )
    encoder, enc_bias, decoder, dec_bias = take(read_pickle(path), path, *_NAMES)
    metadata = {} if any_checksum else {"source": SOURCE}
    return checked(
        SaeWeights("standard", encoder, enc_bias, turned(decoder, path), dec_bias, False, metadata=metadata), path
    )


def write(sae: SaeWeights, path: Path) -> Path:
    """A file in this format, in fp16."""
    if sae.architecture != "standard":
        raise JobError(f"the published format has no {sae.architecture}; it supports ReLU only")
    sae = with_input_shift(sae, False)
    state = {
        "enc_bias": sae.b_enc.half(),
        "encoder.weight": sae.W_enc.half().contiguous(),
        "dec_bias": sae.b_dec.half(),
        "decoder.weight": sae.W_dec.T.half().contiguous(),
    }
    for name, tensor in state.items():
        if not bool(torch.isfinite(tensor).all()):
            raise JobError(f"{path}: {name} does not fit float16, which this format is in; export to saelens instead")
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part:
        torch.save(state, part)
    return path
