"""Gives the postcards bundle its library, by the commands that anyone uses for pictures of their own.

The pictures' factors are used for one thing only: to write the captions that are shown beside them. Names are found
from the pictures alone.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from faceteer_postcards.captions import describe
from faceteer_postcards.corpus import Corpus


def pack_pictures(corpus: Corpus, count: int, path: Path) -> None:
    """The first ``count`` pictures as a tar of PNG files, each with a caption that names five to eight factors."""
    part = path.with_suffix(".part")
    with tarfile.open(part, "w") as tar:
        for number in range(count):
            picture, caption = (
                io.BytesIO(),
                describe(corpus.codes[number], np.random.default_rng((corpus.seed, number)), 5),
            )
            Image.fromarray(corpus.pictures[number]).save(picture, "PNG", compress_level=1)
            for suffix, data in ((".png", picture.getvalue()), (".txt", caption.text.encode())):
                entry = tarfile.TarInfo(f"postcard-{number:05}{suffix}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    part.replace(path)


def write_library(out: Path, corpus: Corpus, count: int, work: Path) -> None:
    """embed, build-library, label-library and draw-icons on a bundle that has every other part."""
    from faceteer_trainer.__main__ import main

    work.mkdir(parents=True, exist_ok=True)
    pictures, embeds = work / "pictures.tar", work / f"embeds-{count}"
    if not pictures.exists():
        pack_pictures(corpus, count, pictures)
    bundle = ["--bundle", str(out)]
    main(["embed", "--images", str(pictures), *bundle, "--out", str(embeds), "--name", "postcards"])
    # The SAE's own statistics are those of its training, over more pictures than these.
    main(["build-library", "--corpus", str(embeds), *bundle, "--keep-statistics"])
    main(["label-library", "--corpus", str(embeds), *bundle, "--vocabulary", "postcards"])
    main(["draw-icons", *bundle])
