"""How good each part of a library is, in figures and in features to look at: Markdown, and a page with pictures."""

from __future__ import annotations

import base64
import html
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from faceteer_library.editor import Described, LibraryEditor
from faceteer_library.schema import CAUSAL_JUDGES

from faceteer_trainer.files import writing
from faceteer_trainer.labels.quality import SAE_FIGURES
from faceteer_trainer.labels.run import edit_library
from faceteer_trainer.labels.scores import CAUSES, PREDICTS, agree
from faceteer_trainer.library.writing import FOREIGN

_SHOWN = 12
_HEAD = ("measured", "25 %", "median", "75 %")
_STYLE = """
:root{color-scheme:light dark}body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.3rem .8rem;border-bottom:1px solid #8884;text-align:left}
td.n{text-align:right;font-variant-numeric:tabular-nums}img{image-rendering:auto;border-radius:3px;margin-right:2px}
h2{margin-top:2.5rem}.icon{height:64px}.thumb{height:48px}small{opacity:.7}
"""


class LibraryReport(NamedTuple):
    """What there is to say.

    Attributes:
        title: names the corpus.
        sentences: the figures in words, what is weak, and what has not been made yet.
        scores: of each kind of score, its name and the cells of its row under `_HEAD`.
        lists: features to look at, under their titles.
    """

    title: str
    sentences: list[str]
    scores: list[tuple[str, list[str]]]
    lists: list[tuple[str, list[Described]]]


def write_report(bundle_directory: Path, out: Path) -> str:
    """Writes the Markdown to ``out`` and the page beside it; returns the Markdown."""
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


def report_on(editor: LibraryEditor) -> LibraryReport:
    """Reads the whole library; nothing is changed."""
    features = list(editor.features())
    labelled = [feature for feature in features if feature.label]
    icons = editor.icon_keys()
    sentences = [
        *_foreign(editor.facts),
        *_counts(editor.facts, features, labelled, len(icons)),
        *_score_sentences(labelled),
        *_weaknesses(features, labelled, len(icons)),
    ]
    if not labelled:
        sentences.append("Not made yet: labels (label-library).")
    if not icons:
        sentences.append("Not made yet: icons and causal scores (draw-icons).")
    scores = [
        ("predicts: AUC", _cells([f.detection_score for f in labelled])),
        ("predicts: balanced accuracy", _cells([f.detection_balanced_accuracy for f in labelled])),
        ("causes", _cells([f.causal_score for f in labelled])),
    ]
    best = sorted((f for f in labelled if f.detection_score is not None), key=lambda f: -(f.detection_score or 0))
    apart = [f for f in labelled if agree(f.detection_score, f.causal_score) is False]
    apart.sort(key=lambda f: -abs((f.detection_score or 0) - (f.causal_score or 0)))
    lists = [
        ("Labels that predict best", best[:_SHOWN]),
        ("Labels that predict worst", best[::-1][:_SHOWN]),
        ("Labels whose two scores disagree most", apart[:_SHOWN]),
    ]
    title = f"Library of {editor.facts.get('corpus', '?')}"
    return LibraryReport(title, sentences, scores, [(name, shown) for name, shown in lists if shown])


def as_markdown(report: LibraryReport) -> str:
    """The figures, and the features to look at by number and name."""
    lines = [f"# {report.title}", "", *report.sentences, "", *_table(("", *_HEAD))]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in report.scores]
    for title, features in report.lists:
        lines += ["", f"## {title}", "", *_table(("feature", "label", "fires on", "predicts (AUC)", "causes"))]
        for f in features:
            label = f.label.replace("\\", "\\\\").replace("|", "\\|")
            scores = f"{_number(f.detection_score)} | {_number(f.causal_score)}"
            lines.append(f"| {f.index} | {label} | {f.firing_share:.1%} | {scores} |")
    return "\n".join(lines) + "\n"


def as_page(report: LibraryReport, editor: LibraryEditor) -> str:
    """The same as a page of its own, with examples and icons."""
    head = "".join(f"<th>{name}</th>" for name in ("", *_HEAD))
    rows = "".join(
        f"<tr><th>{name}</th>{''.join(f'<td class=n>{cell}</td>' for cell in cells)}</tr>"
        for name, cells in report.scores
    )
    parts = [
        f"<!doctype html><meta charset=utf-8><title>Library</title><style>{_STYLE}</style>",
        f"<h1>{html.escape(report.title)}</h1>",
        "".join(f"<p>{html.escape(sentence)}</p>" for sentence in report.sentences),
        f"<table><tr>{head}</tr>{rows}</table>",
    ]
    for title, features in report.lists:
        parts.append(f"<h2>{html.escape(title)}</h2><table>")
        for feature in features:
            icon = editor.icon_of(feature.index)
            thumbnails = [example.thumbnail for example in editor.examples(feature.index)[:6]]
            scores = f"predicts {_number(feature.detection_score)}, causes {_number(feature.causal_score)}"
            label = f"<b>{html.escape(feature.label)}</b> <small>{feature.index}</small><br><small>{scores}</small>"
            shown = f"{_images([icon[0]] if icon else [], 'icon')}</td><td>{_images(thumbnails, 'thumb')}"
            parts.append(f"<tr><td>{label}</td><td>{shown}</td></tr>")
        parts.append("</table>")
    return "\n".join(parts) + "\n"


def _foreign(facts: dict[str, str]) -> list[str]:
    if FOREIGN not in facts:
        return []
    return [
        f"{float(facts[FOREIGN]):.0%} of these pictures are unlike those that the bundle's encoder and SAE know. "
        "Labels say what the encoder takes them for, and scores that it agrees with itself: neither says what they "
        "show."
    ]


def _counts(facts: dict[str, str], features: list[Described], labelled: list[Described], icons: int) -> list[str]:
    pictures, alive = int(facts.get("n_pictures", "0")), sum(f.firing_share > 0 for f in features)
    sentences = [
        f"{len(features):,} features over {pictures:,} pictures: {alive:,} ({alive / max(len(features), 1):.1%}) fire, "
        f"{len(labelled):,} have a label, {icons:,} an icon."
    ]
    if sae := json.loads(facts.get(SAE_FIGURES, "{}")):
        sentences.append(
            f"The SAE explains {sae['explained_variance']:.1%} of the variance with {sae['l0']:.1f} features a picture "
            f"(cosine {sae['cosine']:.4f}, on {sae['pictures']:,.0f} pictures)."
        )
    return sentences


def _score_sentences(labelled: list[Described]) -> list[str]:
    sentences = []
    plain, weighted = _shares([(f.detection_score, f.firing_share) for f in labelled], PREDICTS)
    if not math.isnan(plain):
        sentences.append(
            f"{plain:.1%} of the measured labels predict where their feature fires (AUC of {PREDICTS} or more on "
            f"pictures they were not made from; 0.5 is chance); weighted by how often features fire, {weighted:.1%}."
        )
    plain, weighted = _shares([(f.causal_score, f.firing_share) for f in labelled], CAUSES)
    if not math.isnan(plain):
        verdicts = [agree(f.detection_score, f.causal_score) for f in labelled]
        measured = [verdict for verdict in verdicts if verdict is not None]
        both = float(np.mean(measured)) if measured else float("nan")
        sentences.append(
            f"{plain:.1%} (weighted, {weighted:.1%}) of those measured say what their feature causes: switched on, it "
            f"moves the picture towards its label more than towards {CAUSES:.0%} of all other labels (of labels drawn "
            f"at random, at most {1 - CAUSES:.0%} would). In {both:.1%} the two agree."
        )
        by_tower = sum(f.causal_judge == CAUSAL_JUDGES[0] for f in labelled)
        by_others = sum(f.causal_score is not None for f in labelled) - by_tower
        if by_others:
            sentences.append(
                f"What features cause was judged for {by_others:,} labels by a classifier that had no part in them"
                + (f", for {by_tower:,} by the text tower that gave them." if by_tower else ".")
            )
        else:
            sentences.append(
                "What features cause was judged by the text tower that gave the labels too: what it mistakes for a "
                "label it mistakes again."
            )
    return sentences


def _weaknesses(features: list[Described], labelled: list[Described], icons: int) -> list[str]:
    """What a reader should not expect of this library."""
    found = []
    unnamed = sum(f.firing_share > 0 for f in features) - len(labelled)
    if labelled and unnamed > 0:
        named_firings = sum(f.firing_share for f in labelled) / sum(f.firing_share for f in features)
        found.append(
            f"{unnamed:,} live features have no label, because nothing in the vocabulary told where they fire; those "
            f"with one make up {named_firings:.1%} of all firings."
        )
    texts = Counter(f.label for f in labelled)
    if len(texts) < len(labelled):
        ((text, count),) = texts.most_common(1)
        found.append(f"There are {len(texts):,} different labels; the commonest, “{text}”, names {count:,} features.")
    if unmeasured := sum(f.detection_score is None for f in labelled):
        found.append(f"Whether {unmeasured:,} labels predict is not measured: their features fire on too few pictures.")
    if icons and (unmeasured := sum(f.causal_score is None for f in labelled)):
        found.append(
            f"What the features of {unmeasured:,} labels cause is not measured: their icons show no change up to the "
            "greatest strength, or are not drawn."
        )
    return found


def _shares(scored: list[tuple[float | None, float]], line: float) -> tuple[float, float]:
    """Of (score, weight): the share that reaches the line, plain and weighted; NaN where nothing was measured."""
    known = [(score >= line, weight) for score, weight in scored if score is not None]
    if not known:
        return float("nan"), float("nan")
    hits, weights = np.array(known, float).T
    return float(hits.mean()), float(hits @ weights / max(weights.sum(), 1e-12))


def _cells(scores: list[float | None]) -> list[str]:
    known = [score for score in scores if score is not None]
    quartiles = np.quantile(known, (0.25, 0.5, 0.75)).tolist() if known else [None] * 3
    return [f"{len(known):,}", *map(_number, quartiles)]


def _table(head: Sequence[str]) -> list[str]:
    return ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]


def _images(files: list[bytes], kind: str) -> str:
    urls = ("data:image/webp;base64," + base64.b64encode(webp).decode() for webp in files if webp)
    return "".join(f'<img class={kind} alt="" src="{url}">' for url in urls)


def _number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.3f}"
