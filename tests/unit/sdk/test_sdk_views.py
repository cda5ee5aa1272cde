"""What a notebook shows and a page holds: escaped, bounded, without requests, and whole when the server is gone."""

from __future__ import annotations

import base64
import html.parser
import io
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faceteer
import numpy as np
import pytest
from faceteer._views import html as views
from PIL import Image
from unit.sdk.fake_server import D, FakeServer, png

ODD = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> & fog"
_VOID = {"img", "meta"}


class Page(html.parser.HTMLParser):
    """A view taken apart as a browser would; complains where tags do not match."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.words = ""
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in _VOID:
            self._open.append(tag)
        for name, value in attributes:
            assert not name.startswith("on"), f"{name}={value}"
            assert name != "href"
            if name == "src":
                self.sources.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self._open or self._open[-1] != "style":
            self.words += data + " "


def read(page: str) -> Page:
    """A checked view: no script, no request, no handler."""
    parsed = Page(page)
    assert not {"script", "iframe", "object", "embed", "link", "svg", "form"} & set(parsed.tags)
    assert all(re.match(r"data:image/(webp|png|jpeg|gif);base64,", source) for source in parsed.sources)
    assert "http:" not in page
    assert "https:" not in page
    return parsed


def noise(side: int) -> bytes:
    """A PNG that does not compress."""
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_feature_shows_its_name_scores_pictures_and_relatives(client: faceteer.Client) -> None:
    page = read(client.features["night"]._repr_html_())
    for words in ("night", "#3", "labelled automatically", "dusk", "0.90", "0.80", "40 pictures", "day", "snow"):
        assert words in page.words, words
    assert len(page.sources) == 3
    assert "3.00  picture a" in page.words


def test_a_features_pictures_are_fetched_once(client: faceteer.Client, server: FakeServer) -> None:
    night = client.features["night"]
    assert night._repr_html_() == night._repr_html_()
    assert server.names() == ["GetFeature", "ListFeatureExamples"]


def test_pictures_that_were_fetched_already_are_shown_without_a_call(
    client: faceteer.Client, server: FakeServer
) -> None:
    night = client.features["night"]
    night.examples(2)
    night.icon()
    calls = len(server.calls)
    page = read(night._repr_html_())
    assert len(server.calls) == calls
    assert len(page.sources) == 2 + 4
    assert "template" in page.words


def test_a_list_shows_cards_with_pictures_and_how_many_there_are(client: faceteer.Client) -> None:
    page = read(client.features.search("n", limit=1)._repr_html_())
    assert "1 of 2 features" in page.words
    assert "night" in page.words
    assert len(page.sources) == 3
    assert "No features" in read(client.features.search("zebra")._repr_html_()).words


async def test_in_asyncio_a_view_shows_what_was_fetched_and_calls_nothing(
    async_client: faceteer.AsyncClient, server: FakeServer, tmp_path: Path
) -> None:
    found = await async_client.features.search("n")
    night = found[0]
    calls = len(server.calls)
    assert read(found._repr_html_()).sources == []
    assert "not fetched" in read(night._repr_html_()).words
    assert len(server.calls) == calls
    await night.examples(2)
    assert len(read(night._repr_html_()).sources) == 2
    await found.fetch_pictures()
    assert len(read(found._repr_html_()).sources) == 2 + 3
    page = read((await found.save_html(tmp_path / "found.html")).read_text())
    assert len(page.sources) == 5
    snow = await async_client.features["snow"]
    assert len(read((await snow.save_html(tmp_path / "snow.html")).read_text()).sources) == 3


def test_a_view_without_a_server_is_words_and_takes_no_time(server: FakeServer, client: faceteer.Client) -> None:
    found, night = client.features.search("n"), client.features["night"]
    server.__exit__()
    started = time.monotonic()
    assert "night" in read(found._repr_html_()).words
    assert "not fetched" in read(night._repr_html_()).words
    assert time.monotonic() - started < 4
    client.close()
    assert "night" in read(found._repr_html_()).words


def test_a_slow_server_holds_a_notebook_up_for_seconds_not_for_minutes(
    server: FakeServer, client: faceteer.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = client.features.many(range(10))
    monkeypatch.setattr("faceteer._sync.features.NOTEBOOK_SECONDS", 0.4)
    server.answer_seconds = 0.15
    started = time.monotonic()
    page = read(found._repr_html_())
    assert time.monotonic() - started < 1.5
    assert 3 <= len(page.sources) <= 9
    assert "10 features" in page.words


def test_other_peoples_words_are_never_markup(client: faceteer.Client, server: FakeServer) -> None:
    server._labels |= {3: ODD, 2: ODD}
    server.hostile = True
    odd = client.features[3]
    photo = client.open(png(0, 0, 99, 99))
    photo._opened.name = ODD
    other = client.open(png(1, 1))
    edit = photo.edit().set(3, 1.0)
    report = edit.report()
    views = [
        odd._repr_html_(),
        client.features.many([2, 3])._repr_html_(),
        odd.examples()._repr_html_(),
        odd.examples()[0]._repr_html_(),
        photo._repr_html_(),
        photo.features._repr_html_(),
        report._repr_html_(),
        edit._repr_html_(),
        client.diff(photo, other)._repr_html_(),
        client.embed_prompt(ODD)._repr_html_(),
        other.edit().set(ODD, 1.0)._repr_html_(),
    ]
    for view in views:
        assert "alert(1)" in read(view).words


def test_a_list_of_fifty_features_with_large_pictures_stays_small(
    client: faceteer.Client, server: FakeServer, tmp_path: Path
) -> None:
    server.thumbnail = noise(256)
    assert len(server.thumbnail) > 190_000
    found = client.features.many(list(range(16)) * 4)[:50]
    view = found._repr_html_()
    assert len(view) < 3_000_000
    assert len(read(view).sources) >= 50, "every card has a picture"
    assert len(found.save_html(tmp_path / "all.html").read_bytes()) < 25_000_000


def test_small_pictures_are_shown_as_they_came_and_large_ones_shrunk() -> None:
    small, large = png(9), noise(600)
    pictures = views.Pictures()
    assert base64.b64encode(small).decode() in pictures.img(small, alt="small")
    shrunk = pictures.img(large, alt="large")
    data = base64.b64decode(re.search(r"base64,([^\"]+)", shrunk).group(1))  # type: ignore[union-attr]
    assert Image.open(io.BytesIO(data)).size == (288, 288)
    assert "<img" not in pictures.img(b"no picture at all", alt="words")
    tight = views.Pictures(budget=10)
    assert "<img" not in tight.img(small, alt="words")
    assert tight.left_out == 1


def test_a_photo_shows_its_picture_and_its_features_with_bars(client: faceteer.Client, tmp_path: Path) -> None:
    photo = client.open(png(10, 20, 30, 40, 50, 250))
    page = read(photo._repr_html_())
    assert len(page.sources) == 1
    assert "6 features" in page.words
    assert "snow" in page.words
    assert "opened from an embedding" in read(client.open_embeds(np.ones(D))._repr_html_()).words
    saved = photo.save_html(tmp_path / "photo.html").read_text()
    assert saved.startswith("<!doctype html>")
    assert "Content-Security-Policy" in saved
    assert len(read(saved).sources) == 1


def test_an_edit_shows_before_after_and_its_report(either: Any, tmp_path: Path) -> None:
    edit = either.open(png(9, 9, 9, 9, 200)).edit().switch("night", 1.0)
    assert len(read(edit._repr_html_()).sources) == 1
    edit.render(seeds=[4, 5])
    page = read(edit._repr_html_())
    assert len(page.sources) == 3
    for words in ("before", "seed 4", "seed 5", "rival of #3", "Drift of the features", "switch to night at 1"):
        assert words in page.words, words
    edit.render(seed=6)
    assert "seed 4" not in read(edit._repr_html_()).words
    assert read(edit.save_html(tmp_path / "edit.html").read_text()).words.count("night") >= 2
    assert "night" in read(edit.report().save_html(tmp_path / "report.html").read_text()).words


def test_many_drawings_leave_only_a_few_small_pictures_behind(client: faceteer.Client) -> None:
    edit = client.open(png(9)).edit()
    edit.render(seeds=[1, 2, 3, 4], size=512)
    edit.render(seeds=[5, 6], size=512)
    kept = edit._plan.outcome.pictures
    assert [seed for seed, _ in kept] == [5, 6]
    assert max(side for _, picture in kept for side in picture.size) <= 384


def test_quantiles_are_titled(client: faceteer.Client, tmp_path: Path) -> None:
    examples = client.features["night"].examples(selection="quantiles")
    assert isinstance(examples, list)
    assert "50% to 100% of its activation" in read(examples._repr_html_()).words
    assert len(read(examples.save_html(tmp_path / "e.html").read_text()).sources) == 2
    icon = client.features["night"].icon()
    assert read(icon._repr_html_()).words.split()[:2] == ["template", "0.5"]
    assert len(read(icon.save_html(tmp_path / "i.html").read_text()).sources) == 4


def test_a_page_appears_whole_or_not_at_all(client: faceteer.Client, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing"):
        client.features["night"].save_html(tmp_path / "missing" / "n.html")
    assert list(tmp_path.iterdir()) == []


def test_an_edit_that_was_not_drawn_shows_its_report_beside_the_picture_and_what_is_wrong_with_it(
    client: faceteer.Client,
) -> None:
    photo = client.open(png(9, 9, 9, 9, 200))
    page = read(photo.edit().switch("night")._repr_html_())
    for words in ("before", "achieved", "rival of #3", "Nothing drawn yet"):
        assert words in page.words, words
    assert "nearest" in read(photo.edit().switch("nigth")._repr_html_()).words


def test_a_status_is_short_as_text_and_a_table_in_a_notebook(client: faceteer.Client, server: FakeServer) -> None:
    status = client.status()
    assert repr(status) == f"<ServerStatus of {server.address}: fake, all services serving>"
    page = read(status._repr_html_())
    assert "table" in page.tags
    for words in ("encoder", "generator", "features labelled", "bundle fake"):
        assert words in page.words, words


def test_the_strongest_features_and_slices_have_a_view_too(client: faceteer.Client) -> None:
    features = client.open(png(10, 20, 30, 40, 50, 250)).features
    page = read(features.top(2)._repr_html_())
    assert "snow" in page.words
    assert "and 4 weaker ones" in page.words
    assert len(features[:3]) == 3
    assert "snow" in read(features[:3]._repr_html_()).words


class Notebook:
    """What IPython's module is to us in a kernel: `display` keeps what each output of the cell last showed."""

    def __init__(self, kernel: object = True) -> None:
        self._shell = SimpleNamespace(kernel=kernel)
        self.display = SimpleNamespace(display=self._display)
        self.outputs: list[list[Any]] = []

    def get_ipython(self) -> Any:
        return self._shell

    def _display(self, shown: Any, *, display_id: bool) -> Any:
        assert display_id
        self.outputs.append([shown])
        return SimpleNamespace(update=self.outputs[-1].append)


def test_a_notebook_shows_progress_in_one_output_which_ends_complete(
    either: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    notebook = Notebook()
    monkeypatch.setitem(sys.modules, "IPython", notebook)
    edit = either.open(png(9)).edit().switch("night")
    edit.render(seed=7, steps=3, progress=True)
    (output,) = notebook.outputs
    assert output[-1]._repr_html_() == '<progress value="3" max="3"></progress> drawing 3/3'
    assert repr(output[-1]) == "drawing 3/3"
    assert len(output) <= 6
    edit.render(seed=7, steps=3)
    assert len(notebook.outputs) == 1
    monkeypatch.setitem(sys.modules, "IPython", Notebook(kernel=None))
    edit.render(seed=7, steps=3, progress=True)
    assert capsys.readouterr() == ("", ""), "IPython in a pipe: neither a notebook nor a terminal"
