"""Bundles pulled in their published layout, from a directory and from a hub: whole or not at all, and served."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import pytest
import torch
from all_in_one import start_all_in_one
from faceteer.v1 import generator_pb2, library_pb2, library_pb2_grpc, sae_pb2, sae_pb2_grpc, studio_pb2, studio_pb2_grpc
from faceteer.v1.edits_pb2 import EDIT_OPERATION_SET, EDIT_UNIT_RAW, Edit, FeatureRef
from faceteer.v1.tensor_pb2 import EmbedsInput
from faceteer_library.store import Store
from faceteer_runtime.bundle import Bundle, BundleError, verify
from faceteer_sae.model import SparseAutoencoder
from faceteer_trainer.__main__ import main
from faceteer_trainer.bundles import pull as pulling
from faceteer_trainer.bundles.completion import with_sae
from faceteer_trainer.bundles.manifest import known, read_recipe
from faceteer_trainer.errors import JobError
from fake_hub import FakeHub
from published_layout import write_image_encoder
from tiny_bundle import EMBED_DIM, picture_bytes
from unit.generator.small_kandinsky import write_small_kandinsky
from unit.generator.small_prior import write_small_prior
from unit.sae.random_sae import random_sae, write_sae

PRIOR, DECODER, SAE = (
    "kandinsky-community/kandinsky-2-2-prior",
    "kandinsky-community/kandinsky-2-2-decoder",
    "g/clip-sae",
)
D_SAE = 96


def write_published_sae(path: Path) -> dict[str, torch.Tensor]:
    """Four tensors in fp16, pickled, as the work that this continues published them."""
    generator = torch.Generator().manual_seed(9)
    state = {
        "enc_bias": torch.randn(D_SAE, generator=generator).half(),
        "encoder.weight": torch.randn(D_SAE, EMBED_DIM, generator=generator).half(),
        "dec_bias": torch.randn(EMBED_DIM, generator=generator).half(),
        "decoder.weight": torch.randn(EMBED_DIM, D_SAE, generator=generator).half(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return state


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small random checkpoints in the exact layout of the three repositories."""
    root = tmp_path_factory.mktemp("mirror")
    write_image_encoder(root / PRIOR, embed_dim=EMBED_DIM, dtype=torch.float16)
    write_small_prior(root / PRIOR)
    write_small_kandinsky(root / DECODER)
    # Not published: our own.
    (root / DECODER / "negative_embeds.safetensors").unlink()
    write_published_sae(root / SAE / "sparse_autoencoder_128.pth")
    return root


@pytest.fixture
def manifest(mirror: Path, tmp_path: Path) -> Path:
    """The known bundle's own recipe, for these checkpoints: another SAE repository, smaller pictures."""
    recipe = json.loads((Path(pulling.__file__).parent / "known" / "kandinsky-2-2.json").read_text())
    recipe["parts"]["encoder"]["embed_dim"] = EMBED_DIM
    recipe["parts"]["generator"] |= {"sizes": [[64, 64]], "steps": 2}
    # The small text encoder has a small vocabulary, which only its own tokenizer fits.
    recipe["files"] = [file for file in recipe["files"] if not file["path"].startswith("encoder/text_encoder")]
    for file in recipe["files"]:
        if file["part"] == "sae":
            file["source"]["repo"] = SAE
            file["sha256"] = hashlib.sha256((mirror / SAE / "sparse_autoencoder_128.pth").read_bytes()).hexdigest()
    path = tmp_path / "bundle.json"
    path.write_text(json.dumps(recipe))
    return path


def pull(manifest: Path, out: Path, *more: str) -> None:
    main(["bundles", "pull", str(manifest), "--out", str(out), *more])


def test_a_pulled_bundle_is_whole_and_says_what_it_is_made_of(
    mirror: Path, manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "kandinsky"
    pull(manifest, out, "--from", str(mirror))
    shown = capsys.readouterr()
    assert "licence of the sae: not stated by its author" in shown.err
    assert "is whole; serve it with FACETEER_BUNDLE=" in shown.out
    verify(out)
    assert not (out / ".pull.json").exists()
    assert not (out / "sources").exists()
    sealed = json.loads((out / "bundle.json").read_text())
    weights = next(
        file for file in sealed["files"] if file["path"] == "generator/unet/diffusion_pytorch_model.safetensors"
    )
    theirs = mirror / DECODER / "unet" / "diffusion_pytorch_model.safetensors"
    assert weights["sha256"] == hashlib.sha256(theirs.read_bytes()).hexdigest()
    assert weights["source"]["repo"] == DECODER
    main(["bundles", "verify", str(out)])
    main(["bundles", "info", str(out), "--json"])
    info = json.loads(capsys.readouterr().out.partition("\n")[2])
    assert info["parts"]["sae"]["parameters"] >= 2 * D_SAE * EMBED_DIM
    assert info["parts"]["generator"]["kind"] == "kandinsky-2-2"
    main(["bundles", "list", str(tmp_path)])
    assert "kandinsky-2-2" in capsys.readouterr().out


def test_the_imported_sae_does_what_its_four_tensors_say(mirror: Path, manifest: Path, tmp_path: Path) -> None:
    pull(manifest, tmp_path / "k", "--from", str(mirror))
    state = {
        name: tensor.double().numpy()
        for name, tensor in torch.load(mirror / SAE / "sparse_autoencoder_128.pth", weights_only=True).items()
    }
    sae = SparseAutoencoder.load(tmp_path / "k" / "sae")
    x = (3 * np.random.default_rng(0).standard_normal((6, EMBED_DIM))).astype(np.float32)
    for one, found in zip(x, sae.encode(x), strict=True):
        # f = ReLU(W_enc x + b_enc), x_hat = W_dec f + b_dec: nothing is taken off the input.
        f = np.maximum(state["encoder.weight"] @ one + state["enc_bias"], 0)
        assert found.top_indices.tolist() == np.flatnonzero(f).tolist()
        assert np.allclose(found.top_acts, f[f > 0], rtol=1e-5, atol=1e-5)
        x_hat = state["decoder.weight"] @ f + state["dec_bias"]
        assert np.allclose(sae.decode(found.top_indices, found.top_acts), x_hat, rtol=1e-4, atol=1e-4)


async def test_it_serves_the_same_calls_as_postcards(mirror: Path, manifest: Path, tmp_path: Path) -> None:
    out = tmp_path / "kandinsky"
    pull(manifest, out, "--from", str(mirror))
    process, address = start_all_in_one(out, tmp_path / "server")
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(process.wait)
        stack.callback(process.terminate)
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
        studio = studio_pb2_grpc.StudioServiceStub(channel)
        about = await studio.GetStudio(studio_pb2.GetStudioRequest())
        assert about.bundle == "kandinsky-2-2"
        assert (about.sae.d_sae, about.sae.architecture, about.generator.has_prior) == (D_SAE, "standard", True)
        opened = await studio.OpenImage(studio_pb2.OpenImageRequest(input={"image": picture_bytes(1)}))
        assert opened.l0 > 0
        edit = Edit(feature=FeatureRef(index=5), operation=EDIT_OPERATION_SET, value=4.0, unit=EDIT_UNIT_RAW)
        request = studio_pb2.EditImageRequest(
            input={"embedding_id": opened.embedding.embedding_id},
            edits=[edit],
            settings=generator_pb2.GenerationSettings(seeds=[1]),
        )
        kinds = [event.WhichOneof("event") async for event in studio.EditImage(request)]
        assert (kinds[0], kinds[-2], kinds[-1]) == ("edited", "image", "finished")
        library = library_pb2_grpc.LibraryServiceStub(channel)
        feature = await library.GetFeature(library_pb2.GetFeatureRequest(feature=FeatureRef(index=5)))
        assert (feature.feature.label, feature.feature.alive) == ("", False)
        sae = sae_pb2_grpc.SaeServiceStub(channel)
        encoded = await sae.EncodeFeatures(
            sae_pb2.EncodeFeaturesRequest(inputs=[EmbedsInput(embeds=opened.embedding.embeds)])
        )
        assert encoded.results[0].encoding.l0 == opened.l0


def test_a_second_pull_fetches_only_what_is_not_right(
    mirror: Path, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "k"
    pull(manifest, out, "--from", str(mirror))
    before = (out / "bundle.json").read_bytes()
    weights = out / "generator" / "movq" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(SystemExit):
        main(["bundles", "verify", str(out)])
    assert "its SHA-256 is not the one in bundle.json" in capsys.readouterr().err
    # By its own bundle.json, which holds every digest now.
    fetched: list[str] = []
    real = pulling._check

    def noted(path: Path, wanted: Any) -> str:
        fetched.append(wanted.path)
        return real(path, wanted)

    monkeypatch.setattr(pulling, "_check", noted)
    pull(out / "bundle.json", out, "--from", str(mirror))
    assert fetched[0].startswith("generator/movq") or "generator/movq/diffusion_pytorch_model.safetensors" in fetched
    assert "generator/unet/diffusion_pytorch_model.safetensors" not in fetched
    verify(out)
    assert json.loads(before)["parts"] == json.loads((out / "bundle.json").read_text())["parts"]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda m: (m / SAE / "sparse_autoencoder_128.pth").write_bytes(b"x"),
            r"its SHA-256 is \w+, not \w+; it was dam",
        ),
        (lambda m: (m / DECODER / "unet" / "config.json").unlink(), "missing, and so is"),
    ],
    ids=["another-file", "missing"],
)
def test_what_is_not_what_it_should_be_is_not_taken(
    mirror: Path, manifest: Path, tmp_path: Path, spoil: Callable[[Path], Any], words: str
) -> None:
    own = tmp_path / "mirror"
    shutil.copytree(mirror, own)
    spoil(own)
    with pytest.raises(JobError, match=words):
        _pull(manifest, tmp_path / "k", own)
    assert not (tmp_path / "k" / "bundle.json").exists()


def _pull(manifest: Path, out: Path, directory: Path) -> None:
    from faceteer_trainer.bundles.completion import complete
    from faceteer_trainer.bundles.sources import Directory

    pulling.pull(read_recipe(str(manifest)), out, Directory(directory), complete)


class Executes:
    """Unpickling this would write a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.target, "run"))


def test_a_pickle_with_code_in_it_is_refused_unread(mirror: Path, manifest: Path, tmp_path: Path) -> None:
    own, proof = tmp_path / "mirror", tmp_path / "proof"
    shutil.copytree(mirror, own)
    sae = own / SAE / "sparse_autoencoder_128.pth"
    torch.save({"enc_bias": Executes(proof)}, sae)
    recipe = json.loads(manifest.read_text())
    for file in recipe["files"]:
        if file["part"] == "sae":
            file["sha256"] = hashlib.sha256(sae.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(recipe))
    with pytest.raises(JobError, match="holds more than tensors; it was not loaded"):
        _pull(manifest, tmp_path / "k", own)
    assert not proof.exists()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(sae, weights_only=True)


def test_without_room_nothing_is_fetched(
    mirror: Path, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulling, "free_bytes", lambda _: 1_000_000)
    with pytest.raises(JobError, match=r"1\.5 GB are needed on this disk, 1\.0 MB are free"):
        _pull(manifest, tmp_path / "k", mirror)
    assert not (tmp_path / "k").exists()


def test_a_bundle_takes_an_sae_of_its_owners(tiny_bundle: Path, tmp_path: Path) -> None:
    pair = random_sae("jumprelu", d_in=EMBED_DIM, d_sae=50)
    sae = write_sae(tmp_path / "sae", pair)
    main(["bundles", "with-sae", str(tiny_bundle), "--sae", str(sae), "--out", str(tmp_path / "mine")])
    verify(tmp_path / "mine")
    bundle, before = Bundle.open(tmp_path / "mine"), Bundle.open(tiny_bundle)
    assert bundle.part("encoder").revision == before.part("encoder").revision
    assert bundle.part("sae").facts["encoder_revision"] == before.part("encoder").revision
    assert SparseAutoencoder.load(bundle.part("sae").path).d_sae == 50
    store = Store(bundle.part("library").path / "library.sqlite", tmp_path / "people.sqlite")
    assert (store.size, store.get(49).label) == (50, "")
    verify(tiny_bundle)
    other = write_sae(tmp_path / "other", random_sae("standard", d_in=7, d_sae=9))
    for arguments, words in (
        ((tiny_bundle, sae, tmp_path / "mine"), "is there already"),
        ((tiny_bundle, other, tmp_path / "new"), "with 7 values, but"),
        ((tiny_bundle, tmp_path, tmp_path / "new"), r"cfg\.json: missing"),
    ):
        with pytest.raises((JobError, BundleError), match=words):
            with_sae(*arguments)
    assert not (tmp_path / "new").exists()


def test_a_recipe_that_is_none_is_refused(tmp_path: Path) -> None:
    assert known() == ["kandinsky-2-2"]
    with pytest.raises(JobError, match="neither a known bundle"):
        read_recipe("stable-diffusion")
    path = tmp_path / "bundle.json"
    path.write_text(
        '{"name": "x", "parts": {}, "files": [{"path": "../x", "part": "a", "source": {"repo": "a/b", "file": "c"}}]}'
    )
    with pytest.raises(JobError, match="must lie inside the bundle"):
        read_recipe(str(path))
    path.write_text('{"name": "x", "parts": {}, "files": []}')
    with pytest.raises(JobError, match="names no source"):
        read_recipe(str(path))


# -- a hub, as a small real server -------------------------------------------------------------------


@pytest.fixture
def hub(mirror: Path) -> Iterator[FakeHub]:
    fake = FakeHub(mirror)
    thread = threading.Thread(target=fake.server.serve_forever, daemon=True)
    thread.start()
    yield fake
    fake.server.shutdown()
    fake.server.server_close()
    thread.join()


def test_from_a_hub_a_download_that_is_cut_short_goes_on_where_it_stopped(
    hub: FakeHub, manifest: Path, tmp_path: Path
) -> None:
    hub.cut = "diffusion_pytorch_model.safetensors"
    out = tmp_path / "k"
    command = [sys.executable, "-m", "faceteer_trainer", "bundles", "pull", manifest, "--out", out, "--mirror", hub.url]
    # The client's settings are read when it is imported, so it runs in a process of its own.
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "5"}
    for _ in range(3):
        ran = subprocess.run(command, env=environment, capture_output=True, text=True)
        if ran.returncode == 0:
            break
        assert "run the same command again to go on" in ran.stderr
    verify(out)
    # It was cut short; what arrived in the end is whole.
    assert hub.cut is None
    sealed = json.loads((out / "bundle.json").read_text())
    assert {file["source"]["revision"] for file in sealed["files"] if file.get("source")} == {"c" * 40}
    assert Bundle.open(out).part("generator").facts["size_multiple"] == 64


def test_without_a_network_the_way_out_is_named(manifest: Path, tmp_path: Path) -> None:
    from faceteer_trainer.bundles.sources import Hub

    with pytest.raises(JobError, match=r"cannot be reached .* give --from a directory that holds the published files"):
        Hub("http://127.0.0.1:9").look(read_recipe(str(manifest)).files[0])
