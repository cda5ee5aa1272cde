"""Features as HTML: one whole, many as cards, their examples and icons. What was not fetched is shown as words."""

from __future__ import annotations

from collections.abc import Sequence

from faceteer._models.features import (
    SOURCES,
    FeatureExample,
    FeatureExamples,
    FeatureFacts,
    FeatureStatistics,
    Histogram,
    RelatedFeature,
)
from faceteer._models.icon import FeatureIcon
from faceteer._models.shown import html_of
from faceteer._views.html import Markup, Pictures, bar, budget_of, chip, dim, div, figure, join, text, view

#: Pictures on a card, on a feature's own view, and features in one view.
CARD_PICTURES = 4
FEATURE_PICTURES = 12
MOST_CARDS = 100


def feature_view(
    facts: FeatureFacts, examples: Sequence[FeatureExample] | None, icon: FeatureIcon | None, *, page: bool = False
) -> str:
    """One feature, whole. ``examples`` None: not fetched."""
    pictures = Pictures(page=page)
    parts = [_head(facts)]
    if facts.terms:
        parts.append(div("ft-chips", [chip(term, kind="ft-solid") for term in facts.terms]))
    parts.append(_figures(facts.statistics))
    if examples:
        parts += [_title("Fires most on"), _grid(examples, pictures)]
    elif examples is None:
        parts.append(dim("Its pictures were not fetched."))
    if icon is not None:
        parts += [_title("What turning it up causes"), _strip(icon, pictures)]
    if facts.statistics.histogram is not None and facts.statistics.histogram.counts:
        parts += [_title("Activations where it fires"), _histogram(facts.statistics.histogram)]
    for title, related in (
        ("Fires together with", facts.coactivating),
        ("Hardly ever fires with", facts.rivals),
        ("Closest directions", facts.nearest),
    ):
        if related:
            parts += [_title(title), _related(related)]
    return view(facts.name, parts, page=page)


def features_view(
    found: Sequence[FeatureFacts],
    examples: dict[int, list[FeatureExample]],
    *,
    total: int,
    title: str = "Features",
    page: bool = False,
) -> str:
    """Many features as cards, with the pictures that were fetched."""
    shown = found[:MOST_CARDS]
    if not found:
        return view(title, [dim("No features.")], page=page)
    # Every card has its share of the bytes, so that the last ones have pictures too.
    share = budget_of(page) // len(shown)
    cards = [_card(facts, examples.get(facts.index), Pictures(budget=share)) for facts in shown]
    count = max(total, len(found))
    of = f" of {count}" if count > len(shown) else ""
    heading = dim(f"{len(shown)}{of} feature{'' if count == 1 else 's'}")
    return view(title, [heading, div("ft-cards", cards)], page=page)


@html_of.register
def _example_view(example: FeatureExample, *, page: bool) -> str:
    return _examples_view(FeatureExamples([example]), page=page)


@html_of.register
def _examples_view(examples: FeatureExamples, *, page: bool) -> str:
    """By quantile where they were drawn from quantiles."""
    if not examples:
        return view("Examples", [dim("No examples.")], page=page)
    pictures = Pictures(page=page)
    groups: dict[tuple[float, float], list[FeatureExample]] = {}
    for example in examples:
        groups.setdefault((example.quantile_from, example.quantile_to), []).append(example)
    parts: list[Markup] = []
    for (low, high), group in groups.items():
        if (low, high) != (0.0, 0.0):
            parts.append(_title(f"From the quantiles {low:.0%} to {high:.0%} of its activation"))
        parts.append(_grid(group, pictures))
    return view("Examples", parts, page=page)


@html_of.register
def _icon_view(icon: FeatureIcon, *, page: bool) -> str:
    return view("Icon", [_strip(icon, Pictures(page=page))], page=page)


def _card(facts: FeatureFacts, examples: Sequence[FeatureExample] | None, pictures: Pictures) -> Markup:
    statistics = facts.statistics
    parts: list[Markup] = []
    if examples:
        images = [pictures.img(e.data, alt=_words(e), side=88) for e in examples[:CARD_PICTURES]]
        parts.append(div("ft-strip", images))
    fires = f"fires on {_share(statistics.firing_share)}" if statistics.alive else "never fires"
    name = Markup(f'<span class="ft-name">{_name(facts)}</span> <span class="ft-dim">#{facts.index} · {fires}</span>')
    body = [name]
    if facts.safety_class:
        body.append(join([Markup(" "), chip(facts.safety_class, kind="ft-warn")]))
    body.append(_scores(statistics, facts.score))
    parts.append(div("ft-body", body))
    return div("ft-card", parts)


def _head(facts: FeatureFacts) -> Markup:
    parts = [
        Markup(f"<h3>{_name(facts)}</h3>"),
        Markup(f'<span class="ft-dim">#{facts.index}</span>'),
        chip(SOURCES[facts.label_source]),
    ]
    if not facts.statistics.alive:
        parts.append(chip("never fires on the library's corpus", kind="ft-warn"))
    if facts.safety_class:
        parts.append(chip(f"safety class {facts.safety_class}", kind="ft-warn"))
    return div("ft-head", parts)


def _name(facts: FeatureFacts) -> Markup:
    return text(facts.label) if facts.label else Markup('<em class="ft-dim">unlabelled</em>')


def _figures(statistics: FeatureStatistics) -> Markup:
    if not statistics.alive:
        return Markup("")
    figures = [
        (_share(statistics.firing_share), "of pictures"),
        (f"{statistics.p50:.3g}", "median activation"),
        (f"{statistics.p99:.3g}", "p99, the unit 1.0"),
        (f"{statistics.max:.3g}", "largest"),
    ]
    for value, what in (
        (statistics.detection_score, "detection, AUC"),
        (statistics.detection_balanced_accuracy, "detection, balanced"),
        (statistics.causal_score, "causal"),
    ):
        if value is not None:
            figures.append((f"{value:.2f}", what))
    return div("ft-facts", [Markup(f"<div><b>{shown}</b><span>{text(what)}</span></div>") for shown, what in figures])


def _scores(statistics: FeatureStatistics, score: float | None) -> Markup:
    rows: list[Markup] = []
    for name, value in (("detection", statistics.detection_score), ("causal", statistics.causal_score)):
        if value is not None:
            kind = "ft-good" if value >= 0.75 else "ft-hue" if value >= 0.6 else "ft-warm"
            rows.append(Markup(f'<span class="ft-dim">{name}</span>{bar(value, kind=kind)}<span>{value:.2f}</span>'))
    if score is not None:
        strength = bar(min(score, 1.0), kind="ft-hue")
        rows.append(Markup(f'<span class="ft-dim">match</span>{strength}<span>{score:.3g}</span>'))
    return div("ft-bars", rows) if rows else Markup("")


def _grid(examples: Sequence[FeatureExample], pictures: Pictures) -> Markup:
    figures = []
    for example in examples:
        words = join([Markup(f"<b>{example.activation:.2f}</b> "), text(example.caption or example.picture)])
        figures.append(figure(pictures.img(example.data, alt=_words(example)), words))
    return div("ft-grid", figures)


def _strip(icon: FeatureIcon, pictures: Pictures) -> Markup:
    captions = ["template", *(f"{strength:g}" for strength in icon.strengths)]
    figures = [figure(pictures.img(tile, alt=words), words) for tile, words in zip(icon.tiles, captions, strict=True)]
    return div("ft-icon", figures)


def _histogram(histogram: Histogram) -> Markup:
    most = max(histogram.counts) or 1
    bars = [
        Markup(f'<i style="height:{100 * count / most:.1f}%" title="{count} up to {edge:.3g}"></i>')
        for edge, count in zip(histogram.edges, histogram.counts, strict=False)
    ]
    axis = f"<span>0</span><span>{sum(histogram.counts):,} pictures</span><span>{histogram.edges[-1]:.3g}</span>"
    return join([div("ft-hist", bars), Markup(f'<div class="ft-axis">{axis}</div>')])


def _related(related: Sequence[RelatedFeature]) -> Markup:
    return div(
        "ft-chips",
        [
            Markup(
                f'<span class="ft-chip">{text(one.label or "unlabelled")} '
                f'<span class="ft-dim">#{one.index} · {one.score:.2g}</span></span>'
            )
            for one in related[:8]
        ],
    )


def _words(example: FeatureExample) -> str:
    return f"{example.caption or example.picture} ({example.activation:.2f})"


def _share(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 or share == 0 else f"{100 * share:.2g}%"


def _title(words: str) -> Markup:
    return Markup(f"<h4>{text(words)}</h4>")
