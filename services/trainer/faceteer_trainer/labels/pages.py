"""A library's report as Markdown, and as a page with pictures."""

from __future__ import annotations

import base64
import html
import math
from pathlib import Path

from faceteer_library.editor import Described, LibraryEditor

from faceteer_trainer.files import writing
from faceteer_trainer.labels.report import LibraryReport, Quartiles, report_on
from faceteer_trainer.labels.run import edit_library
from faceteer_trainer.labels.scores import CAUSES, PREDICTS

_STYLE = """
:root{color-scheme:light dark}body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.3rem .8rem;border-bottom:1px solid #8884;text-align:left}
td.n{text-align:right;font-variant-numeric:tabular-nums}img{image-rendering:auto;border-radius:3px;margin-right:2px}
h2{margin-top:2.5rem}.icon{height:64px}.thumb{height:48px}small{opacity:.7}
"""


def write_report(bundle_directory: Path, out: Path) -> str:
    """Writes both files, and returns the Markdown."""
    editor = edit_library(bundle_directory)
    try:
        report = report_on(editor)
        text, page = as_markdown(report), as_page(report, editor)
    finally:
        editor.discard()
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
        out.with_suffix(".html").write_text(page, encoding="utf-8")
    return text


def as_markdown(report: LibraryReport) -> str:
    """The figures, and the features to look at by number and name."""
    lines = [f"# Library of {report.facts.get('corpus', '?')}", "", *_sentences(report), ""]
    lines += ["| | measured | 25 % | median | 75 % |", "|---|---|---|---|---|"]
    lines += [f"| {name} | {cells} |" for name, cells in _rows(report, " | ")]
    for title, features in _lists(report):
        lines += [
            "",
            f"## {title}",
            "",
            "| feature | label | fires on | predicts (AUC) | causes |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {f.index} | {_plain(f.label)} | {f.firing_share:.1%} | {_number(f.detection_score)} | "
            f"{_number(f.causal_score)} |"
            for f in features
        ]
    return "\n".join(lines) + "\n"


def as_page(report: LibraryReport, editor: LibraryEditor) -> str:
    """The same as a page of its own, with examples and icons."""
    rows = "".join(
        f"<tr><th>{name}</th><td class=n>{cells}</td></tr>" for name, cells in _rows(report, "</td><td class=n>")
    )
    parts = [
        f"<!doctype html><meta charset=utf-8><title>Library</title><style>{_STYLE}</style>",
        f"<h1>Library of {html.escape(report.facts.get('corpus', '?'))}</h1>",
        "".join(f"<p>{html.escape(sentence)}</p>" for sentence in _sentences(report)),
        f"<table><tr><th></th><th>measured</th><th>25 %</th><th>median</th><th>75 %</th></tr>{rows}</table>",
    ]
    for title, features in _lists(report):
        parts.append(f"<h2>{html.escape(title)}</h2><table>")
        parts += [_feature(feature, editor) for feature in features]
        parts.append("</table>")
    return "\n".join(parts) + "\n"


def _feature(feature: Described, editor: LibraryEditor) -> str:
    icon = editor.icon_of(feature.index)
    shown = _image(icon[0], "icon") if icon else ""
    thumbs = "".join(_image(example.thumbnail, "thumb") for example in editor.examples(feature.index)[:6])
    scores = f"predicts {_number(feature.detection_score)}, causes {_number(feature.causal_score)}"
    label = f"<b>{html.escape(feature.label)}</b> <small>{feature.index}</small><br><small>{scores}</small>"
    return f"<tr><td>{label}</td><td>{shown}</td><td>{thumbs}</td></tr>"


def _image(webp: bytes, kind: str) -> str:
    if not webp:
        return ""
    return f'<img class={kind} alt="" src="data:image/webp;base64,{base64.b64encode(webp).decode()}">'


def _sentences(report: LibraryReport) -> list[str]:
    pictures, living = int(report.facts.get("n_pictures", "0")), report.alive / max(report.features, 1)
    sentences = [
        f"{report.features:,} features over {pictures:,} pictures: {report.alive:,} ({living:.1%}) fire, "
        f"{report.labelled:,} have a label, {report.iconic:,} an icon."
    ]
    if report.sae:
        sentences.append(
            f"The SAE explains {report.sae['explained_variance']:.1%} of the variance with {report.sae['l0']:.1f} "
            f"features a picture (cosine {report.sae['cosine']:.4f}, on {report.sae['pictures']:,.0f} pictures)."
        )
    plain, weighted = report.predict
    if not math.isnan(plain):
        sentences.append(
            f"{plain:.1%} of the measured labels predict where their feature fires (AUC of {PREDICTS} or more on "
            f"pictures they were not made from; 0.5 is chance); weighted by how often features fire, {weighted:.1%}."
        )
    plain, weighted = report.cause
    if not math.isnan(plain):
        sentences.append(
            f"{plain:.1%} (weighted, {weighted:.1%}) say what their feature causes: turned up, it moves the picture "
            f"towards its label more than towards {CAUSES:.0%} of all other labels (of labels drawn at random, at most "
            f"{1 - CAUSES:.0%} would). "
            f"In {report.both:.1%} the two agree."
        )
    sentences += _weaknesses(report)
    sentences += [f"Not made yet: {part}." for part in report.missing]
    return sentences


def _weaknesses(report: LibraryReport) -> list[str]:
    """What a reader should not expect of this library."""
    found = []
    unnamed, unmeasured = report.alive - report.labelled, report.labelled - report.detection.measured
    if report.labelled and unnamed > 0:
        found.append(
            f"{unnamed:,} live features have no label, because nothing in the vocabulary told where they fire; those "
            f"with one make up {report.named_firings:.1%} of all firings."
        )
    if report.texts < report.labelled:
        text, count = report.commonest
        found.append(f"There are {report.texts:,} different labels; the commonest, “{text}”, names {count:,} features.")
    if unmeasured > 0:
        found.append(f"{unmeasured:,} labels could not be measured: their features fire on too few pictures.")
    if report.still:
        found.append(f"{report.still:,} icons show no change up to the greatest strength; they score 0.5.")
    return found


def _rows(report: LibraryReport, between: str) -> list[tuple[str, str]]:
    named: list[tuple[str, Quartiles]] = [
        ("predicts: AUC", report.detection),
        ("predicts: balanced accuracy", report.accuracy),
        ("causes", report.causal),
    ]
    return [
        (name, between.join([f"{q.measured:,}", *(_number(value) for value in (q.low, q.median, q.high))]))
        for name, q in named
    ]


def _lists(report: LibraryReport) -> list[tuple[str, list[Described]]]:
    lists = [
        ("Labels that predict best", report.best),
        ("Labels that predict worst", report.worst),
        ("Labels whose two scores disagree most", report.disagreeing),
    ]
    return [(title, features) for title, features in lists if features]


def _number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.3f}"


def _plain(label: str) -> str:
    """A label in a Markdown table."""
    return label.replace("\\", "\\\\").replace("|", "\\|")
