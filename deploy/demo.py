"""The whole idea in half a minute: opens a picture, prints its features, edits it twice, shows before and after.

Starts a server of its own on a free port, and stops it. Everything else goes through the SDK.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import faceteer
from local_server import ROOT, opened_bundle, temporary_server
from PIL import Image, ImageDraw

# (words to look for among the labels, what to say about it)
EDITS = (("night", "turned to night"), ("snow", "covered in snow"))
SCALE = 4
STEPS, SEED = 25, 7


def side_by_side(pictures: list[tuple[str, Image.Image]]) -> Image.Image:
    """Pictures in a row, enlarged without smoothing, each with its caption below."""
    size = SCALE * max(picture.width for _, picture in pictures)
    sheet = Image.new("RGB", (len(pictures) * (size + 12) + 12, size + 44), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (caption, picture) in enumerate(pictures):
        left = 12 + place * (size + 12)
        sheet.paste(picture.convert("RGB").resize((size, size), Image.Resampling.NEAREST), (left, 12))
        draw.text((left, size + 20), caption, fill="black")
    return sheet


def run(address: str, example: Path, out: Path) -> None:
    """Opens ``example`` at the server, prints its features, and writes the edits' pictures into ``out``."""
    with faceteer.connect(address) as client:
        photo = client.open(example)
        print(f"\n{example.name} is made of {len(photo.features)} features; the strongest:\n")
        for feature in photo.features.top(8):
            bar = "#" * round(12 * min(feature.scaled, 1.5))
            print(f"  {feature.index:>5}  {feature.label or '(no label)':<28} {feature.scaled:5.2f}  {bar}")

        unedited = photo.edit().render(seed=SEED, steps=STEPS)
        pictures = [("the picture", Image.open(example)), ("decoded, unedited", unedited)]
        for words, caption in EDITS:
            hits = client.features.search(words)
            if not hits:
                print(f"\nThis bundle has no feature labelled {words!r}; skipped.")
                continue
            label = hits[0].label
            # `switch` turns the feature on and its rivals (day, dusk ...) off.
            edit = photo.edit().switch(label, 1.0)
            print(f"\nswitch({label!r}, 1.0):\n{edit.report()}")
            started = time.perf_counter()
            picture = edit.render(seed=SEED, steps=STEPS)
            print(f"drawn in {time.perf_counter() - started:.2f} s")
            path = out / f"{example.stem}-{words}.png"
            picture.save(path)
            edit.recipe().save(path.with_suffix(".json"))
            pictures.append((caption, picture))
        sheet = out / "before-and-after.png"
        side_by_side(pictures).save(sheet)
    print(f"\nBefore and after, side by side:  {sheet}")
    print(f"Each picture and the recipe to replay it:  {out}/")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=Path("deploy/bundles/postcards"))
    parser.add_argument("--image", type=Path, help="a picture of your own instead of the bundle's first example")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "demo")
    arguments = parser.parse_args()
    opened_bundle(arguments.bundle)
    examples = sorted((arguments.bundle / "examples").glob("*.png"))
    day = [path for path in examples if "day" in path.stem]
    example = arguments.image or next(iter(day or examples), None)
    if example is None:
        sys.exit(f"{arguments.bundle} has no example pictures; give one with --image")
    arguments.out.mkdir(parents=True, exist_ok=True)
    print(f"Starting a server on {arguments.bundle} ...")
    with temporary_server(arguments.bundle.resolve()) as address:
        try:
            run(address, example, arguments.out)
        except faceteer.FaceteerError as error:
            sys.exit(f"the demo failed: {error}")
    print(
        "\nNext:\n"
        "  make up                                        leave a server running at 127.0.0.1:50050\n"
        f"  .venv/bin/faceteer open {example}\n"
        "  .venv/bin/faceteer features search snow\n"
        "  README.md                                      the SDK in fifteen lines, and other languages"
    )


if __name__ == "__main__":
    main()
