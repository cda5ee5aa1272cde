"""Opened pictures, edits, reports and differences as HTML: what was fetched, and no call."""

from __future__ import annotations

from collections.abc import Sequence

from faceteer._models.difference import Difference
from faceteer._models.fired import FiredFeature, FiredFeatures
from faceteer._models.photo import OpenedPhoto
from faceteer._models.plan import EditPlan
from faceteer._models.report import EditReport
from faceteer._models.shown import html_of
from faceteer._models.values import Notice
from faceteer._views.html import Markup, Pictures, bar, chip, dim, div, figure, join, table, text, view

_MOST_FEATURES = 20
_MOST_PROMPT = 300


@html_of.register
def _fired_view(features: FiredFeatures, *, page: bool) -> str:
    return view("Features", [fired_table(features)], page=page)


def photo_view(opened: OpenedPhoto, *, page: bool = False) -> str:
    """An opened picture beside its strongest features."""
    facts = (
        f"{opened.features.l0} features · {opened.explained_variance:.1%} of the variance explained · "
        f"cosine {opened.cosine:.3f}"
    )
    head = Markup(f'<div class="ft-head"><h3>{text(opened.name)}</h3><span class="ft-dim">{facts}</span></div>')
    rows = div("ft-grow", [fired_table(opened.features, 50 if page else 12)])
    # Before the features, since it says how much they are worth.
    parts = [head, *_warnings(opened.warnings), div("ft-split", [_photo(opened, Pictures(page=page)), rows])]
    return view(opened.name, parts, page=page)


@html_of.register
def _report_view(report: EditReport, *, page: bool) -> str:
    return view("Report", _report(report), page=page)


def edit_view(plan: EditPlan, trouble: Sequence[str] = (), *, page: bool = False) -> str:
    """An edit: the photo, its edits, what was drawn of it last, and its report where there is one.

    The report stands beside the photo as long as nothing was drawn. ``trouble``: why there is no report.
    """
    pictures = Pictures(page=page)
    edits = [chip(str(edit), kind="ft-solid") for edit in plan.edits] or [chip("no edits")]
    head = Markup(f'<div class="ft-head"><h3>{text(plan.photo.name)}</h3>{join(edits)}</div>')
    row = [_photo(plan.photo, pictures, caption="before")]
    for seed, picture in plan.outcome.pictures:
        image = pictures.img(picture, alt=f"seed {seed}", side=256)
        row.append(figure(image, f"seed {seed}", kind="ft-photo"))
    # A report repeats the photo's own warnings.
    report = _warnings(plan.photo.warnings) if plan.outcome.report is None else _report(plan.outcome.report)
    report += [Markup(f'<p class="ft-warning">{text(words)}</p>') for words in trouble]
    if not plan.outcome.pictures:
        row.append(div("ft-grow", [*report, dim("Nothing drawn yet: .render(seed=7) draws it.")]))
        report = []
    return view(plan.photo.name, [head, div("ft-split", row), *report], page=page)


@html_of.register
def _difference_view(difference: Difference, *, page: bool) -> str:
    largest = max((abs(feature.change) for feature in difference.features), default=0.0) or 1.0
    rows = [
        [*row, bar(abs(feature.change) / largest, kind="ft-good" if feature.change > 0 else "ft-bad")]
        for row, feature in zip(difference.rows(), difference.features, strict=True)
    ]
    header = ("feature", "label", "source", "target", "change", "")
    return view("Difference", [dim(difference.summary()), table(header, rows, left=2)], page=page)


def fired_table(features: FiredFeatures, most: int = _MOST_FEATURES) -> Markup:
    """Features as rows with bars; 1.0 SCALED is a whole bar unless one is stronger."""
    shown = features.top(most)
    strongest = max([1.0, *(feature.scaled for feature in shown)])
    if not any(feature.scaled for feature in shown):
        strongest = max((feature.activation for feature in shown), default=1.0)
    rows = [_row(feature, strongest) for feature in shown]
    rest = Markup("")
    if features.l0 > len(shown):
        rest = dim(f"… and {features.l0 - len(shown)} weaker ones")
    return join([table(("", "label", "", "scaled", "activation", "of pictures"), rows, left=3), rest])


def _row(feature: FiredFeature, strongest: float) -> list[str]:
    value = feature.scaled or feature.activation
    label = text(feature.label) if feature.label else Markup('<em class="ft-dim">unlabelled</em>')
    return [
        Markup(f'<span class="ft-dim">#{feature.index}</span>'),
        label,
        bar(value / strongest, kind="ft-warm" if feature.scaled > 1 else ""),
        f"{feature.scaled:.2f}" if feature.scaled else "–",
        f"{feature.activation:.3f}",
        f"{feature.firing_share:.1%}",
    ]


def _report(report: EditReport) -> list[Markup]:
    header = (*report.header, "reached")
    rows = []
    for row, outcome in zip(report.rows(), report.shown, strict=True):
        reached = Markup("")
        if outcome.achieved is not None:
            span = max(abs(outcome.requested - outcome.before), 1e-6)
            missed = abs(outcome.achieved - outcome.requested) / span
            kind = "ft-good" if missed < 0.15 else "ft-warm" if missed < 0.5 else "ft-bad"
            reached = bar(max(0.0, 1.0 - missed), kind=kind)
        rows.append([*row, reached])
    parts = [dim(report.title())]
    if rows:
        parts.append(table(header, rows, left=3))
    sentences = (*report.notes, *report.silent_sentence(), report.drift_sentence())
    parts += [Markup(f"<p>{text(words)}</p>") for words in sentences]
    if moved := report.drifted_rows():
        parts.append(table(("feature", "label", "before", "after"), moved, left=2))
    return [*parts, *_warnings(report.warnings)]


def _photo(opened: OpenedPhoto, pictures: Pictures, caption: str = "") -> Markup:
    if opened.prompt:
        words = opened.prompt if len(opened.prompt) <= _MOST_PROMPT else opened.prompt[:_MOST_PROMPT] + "…"
        image = Markup(f'<span class="ft-img ft-none">“{text(words)}”</span>')
        caption = caption and f"{caption}: the prompt"
    elif opened.data is None:
        image = Markup('<span class="ft-img ft-none">opened from an embedding</span>')
    else:
        image = pictures.img(opened.data, alt=opened.name, side=256)
    return figure(image, caption, kind="ft-photo")


def _warnings(warnings: Sequence[Notice]) -> list[Markup]:
    return [Markup(f'<p class="ft-warning">{text(str(warning))}</p>') for warning in warnings]
