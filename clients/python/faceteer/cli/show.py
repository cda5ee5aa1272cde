"""Results for people: tables, bars, a picture of what an edit did."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console, JustifyMethod
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

import faceteer
from faceteer._models.features import JUDGES, SOURCES

_BLOCKS = " ▏▎▍▌▋▊▉█"
_BAR = 16
# Columns of words, which fold in a narrow terminal: not as long as they have this many characters, nor below so few.
_FOLDING = ("label", "runs")
_UNFOLDED = 20
_FOLDED = 8
_UNLIMITED = 10_000


def console(*, stderr: bool = False) -> Console:
    """A console on the current stdout or stderr that leaves labels and numbers as they are."""
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


def photo(to: Console, opened: faceteer.Photo, top: int) -> None:
    """An opened picture and its strongest features."""
    facts = f"{opened.l0} features · {opened.explained_variance:.1%} of the variance explained"
    _title(to, opened.name, f"{facts} · cosine {opened.cosine:.3f}")
    # Before the features, since it says how much they are worth.
    _warnings(to, opened.warnings)
    shown = opened.features.top(top)
    strongest = max((feature.scaled or feature.activation for feature in shown), default=1.0)
    table = _table(("feature", "right"), ("label", "left"), ("activation", "right"), ("scaled", "right"), ("", "left"))
    for feature in shown:
        value = feature.scaled or feature.activation
        table.add_row(
            Text(f"#{feature.index}", "dim"),
            _label(feature.told_apart),
            f"{feature.activation:.3f}",
            f"{feature.scaled:.2f}" if feature.scaled else "–",
            Text(bar(value / max(1.0, strongest)), "cyan"),
        )
    _show(to, table, "", "activation")
    if opened.l0 > len(shown):
        to.print(Text(f"  … and {opened.l0 - len(shown)} weaker ones (--top)", "dim"))


def wrote(to: Console, *paths: object) -> None:
    """Names the files that a command wrote; None is skipped."""
    for path in paths:
        if path is not None:
            to.print(f"  wrote {path}")


def report(to: Console, name: str, result: faceteer.EditReport) -> None:
    """What an edit did."""
    n = len(result.edits)
    unit = "1 is the feature's 99th percentile" if result.scaled else "raw activations"
    moved = f"moved by {result.delta_norm:.3g}, cosine {result.cosine:.3f}"
    _title(to, name, f"{n} edit{'' if n == 1 else 's'} · {moved} · {unit}")
    if result.outcomes:
        table = _table(
            ("feature", "right"),
            ("label", "left"),
            ("operation", "left"),
            ("before", "right"),
            ("requested", "right"),
            ("achieved", "right"),
            *((name, "right") for name in result.header[6:]),
        )
        for row, outcome in zip(result.rows(), result.shown, strict=True):
            index, label, operation, before, requested, achieved, *pictures = row
            table.add_row(
                Text(index, "dim"),
                _label(label),
                Text(operation, "dim" if outcome.rival_of is not None else ""),
                before,
                requested,
                Text(achieved, _achieved_style(outcome)),
                *pictures,
            )
        _show(to, table, "before", "requested", "feature")
    for sentence in (*result.notes, *result.silent_sentence(), result.drift_sentence()):
        to.print(f"  {sentence}")
    if moved_rows := result.drifted_rows():
        table = _table(("feature", "right"), ("label", "left"), ("before", "right"), ("after", "right"))
        for index, label, before, after in moved_rows:
            table.add_row(Text(index, "dim"), _label(label), before, after)
        _show(to, table)
    _warnings(to, result.warnings)


def parts(to: Console, of: Sequence[faceteer.TransferPart]) -> None:
    """What a transfer carries, and what it leaves out."""
    for title, listed in (
        ("carries", [part for part in of if part.taken]),
        ("leaves out", [part for part in of if not part.taken]),
    ):
        if listed:
            names = ", ".join(f"{part.name} ({part.share:.0%})" for part in listed)
            to.print(_indented(Text.assemble((f"{title} ", "dim"), names)))


def difference(to: Console, source: str, target: str, result: faceteer.Difference, top: int) -> None:
    """What leads from one picture to another."""
    _title(to, f"{source} → {target}", result.summary())
    largest = max((abs(feature.change) for feature in result.features), default=1.0)
    table = _table(
        ("feature", "right"), ("label", "left"), (source, "right"), (target, "right"), ("change", "right"), ("", "left")
    )
    for feature in result.features[:top]:
        table.add_row(
            Text(f"#{feature.index}", "dim"),
            _label(feature.label),
            f"{feature.source:.3f}",
            f"{feature.target:.3f}",
            f"{feature.change:+.3f}",
            Text(bar(abs(feature.change) / largest), "green" if feature.change > 0 else "red"),
        )
    _show(to, table, "", source, target)
    if len(result.features) > top:
        to.print(Text(f"  … and {len(result.features) - top} smaller ones (--top)", "dim"))


def features(to: Console, found: Sequence[faceteer.Feature], query: str) -> None:
    """A search's hits."""
    total = getattr(found, "total", len(found))
    of = f" of {total}" if total > len(found) else ""
    _title(to, query, f"{len(found)}{of} feature{'' if max(total, len(found)) == 1 else 's'}")
    if not found:
        suggestions = getattr(found, "suggestions", ())
        near = f" Did you mean {' or '.join(suggestions)}?" if suggestions else " Try another word or fewer filters."
        to.print(Text(f"  Nothing is close.{near}", "dim"))
        return
    by_words = any(feature.match is not None for feature in found)
    table = _table(
        ("feature", "right"),
        ("label", "left"),
        ("fires on", "right"),
        ("p99", "right"),
        ("detection", "right"),
        ("causal", "right"),
    )
    if by_words:
        table.add_column("match", no_wrap=True)
    for feature in found:
        statistics = feature.statistics
        table.add_row(
            Text(f"#{feature.index}", "dim"),
            _label(feature.told_apart),
            f"{statistics.firing_share:.2%}",
            f"{statistics.p99:.3g}",
            _optional(statistics.detection_score),
            _optional(statistics.causal_score),
            *([str(feature.match or "–")] if by_words else []),
        )
    _show(to, table, "p99", "detection", "causal")


def feature(to: Console, shown: faceteer.Feature, examples: Sequence[faceteer.FeatureExample]) -> None:
    """One feature, whole."""
    statistics = shown.statistics
    source = SOURCES[shown.label_source]
    _title(to, shown.label or "unlabelled", f"feature #{shown.index} · {source}")
    if shown.terms:
        to.print(_indented(Text.assemble(("also ", "dim"), ", ".join(shown.terms))))
    if not statistics.alive:
        to.print("  It never fired on the library's corpus.")
        return
    table = Table.grid(padding=(0, 3))
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_row("fires on", f"{statistics.firing_share:.2%} of pictures")
    for name, value in (("p50", statistics.p50), ("mean", statistics.mean), ("p99", statistics.p99)):
        table.add_row(name, f"{value:.3g}")
    table.add_row("max", f"{statistics.max:.3g}")
    accuracy = statistics.detection_balanced_accuracy
    balanced = "" if accuracy is None else f", balanced accuracy {accuracy:.2f}"
    table.add_row("detection", _optional(statistics.detection_score) + balanced)
    table.add_row("causal", _optional(statistics.causal_score) + JUDGES[statistics.causal_judge])
    if shown.safety_class:
        table.add_row("safety class", Text(shown.safety_class, "yellow"))
    to.print(Padding(table, (1, 2), expand=False))
    if statistics.histogram is not None:
        _histogram(to, statistics.histogram)
    for title, related in (
        ("fires together with", shown.coactivating),
        ("hardly ever with", shown.rivals),
        ("closest directions", shown.nearest),
    ):
        if related:
            names = ", ".join(f"{one.label or 'unlabelled'} #{one.index} ({one.score:.2g})" for one in related[:6])
            to.print(_indented(Text.assemble((title + " ", "dim"), names)))
    if examples:
        by_quantile: dict[str, list[str]] = {}
        for one in examples:
            drawn = (one.quantile_from, one.quantile_to) != (0.0, 0.0)
            where = f"from {one.quantile_from:.0%} to {one.quantile_to:.0%} " if drawn else "strongest on "
            by_quantile.setdefault(where, []).append(f"{one.picture} ({one.activation:.2f})")
        for where, listed in by_quantile.items():
            to.print(_indented(Text.assemble((where, "dim"), ", ".join(listed[:6]))))


def labelled(to: Console, now: faceteer.Feature) -> None:
    """A feature whose label was just set or removed."""
    to.print(
        Text.assemble(
            (f"  #{now.index} is ", "dim"), now.label or "unlabelled", (f", {SOURCES[now.label_source]}", "dim")
        )
    )


def library(to: Console, facts: faceteer.LibraryFacts) -> None:
    """What a library covers."""
    of = f" of {facts.corpus}" if facts.corpus else ""
    _title(to, facts.bundle or "library", f"{facts.n_pictures:,} pictures{of}")
    table = Table.grid(padding=(0, 3))
    table.add_column(style="dim")
    table.add_column()
    table.add_row(
        "features", f"{facts.n_features:,}, of which {facts.n_alive:,} fire and {facts.n_labelled:,} are labelled"
    )
    table.add_row("search", "words, and what they mean" if facts.searches_meaning else "words")
    if facts.safety_classes:
        table.add_row("safety classes", Text(", ".join(facts.safety_classes)))
    table.add_row("revision", f"{facts.revision} for SAE {facts.sae_revision}")
    if facts.created:
        table.add_row("made", facts.created)
    to.print(Padding(table, (1, 2), expand=False))


def status(to: Console, server: faceteer.ServerStatus) -> None:
    """What a server runs."""
    _title(to, server.address, server.title())
    table = _table(("service", "left"), ("health", "left"), ("revision", "left"), ("runs", "left"))
    marks = {"serving": ("●", "green"), "not serving": ("●", "red"), "down": ("●", "red")}
    for service, state, revision, runs in server.rows():
        mark, style = marks.get(state, ("○", "yellow"))
        table.add_row(service, Text(f"{mark} {state}", style), Text(revision, "dim"), runs)
    _show(to, table, "revision")
    for reason in server.down.values():
        to.print(_indented(f"⚠ {reason}", "yellow"))
    for sentence in server.consequences():
        to.print(_indented(sentence))


def recipe(to: Console, name: str, shown: faceteer.Recipe) -> None:
    """A recipe in words."""
    _title(to, name, f"recipe {shown.hash[:16]}")
    changed_recipe(to, shown)
    for edit in shown.edits:
        index = f" (#{edit.feature})" if edit.label else ""
        to.print(f"  {edit}{index}")
    given = {key: value for key, value in vars(shown.settings).items() if value not in (None, ())}
    settings = ", ".join(f"{key.replace('_', ' ')} {_written(key, value)}" for key, value in given.items())
    to.print(_indented(f"drawn with {settings or 'the defaults'}"))
    revisions = ", ".join(f"{part} {revision}" for part, revision in vars(shown.revisions).items() if revision)
    to.print(_indented(f"made for {revisions or 'any models'}"))


def changed_recipe(to: Console, shown: faceteer.Recipe) -> None:
    """Says that a recipe was changed after it was saved, if it was."""
    if shown.changed_from:
        words = f"⚠ changed after it was saved: it was recipe {shown.changed_from[:16]}, it is {shown.hash[:16]} now"
        to.print(_indented(words, "yellow"))


def bar(share: float) -> str:
    """A share, 0 to 1, as a bar of block characters."""
    eighths = round(min(1.0, max(0.0, share)) * _BAR * 8)
    whole, rest = divmod(eighths, 8)
    return "█" * whole + (_BLOCKS[rest] if rest else "")


def _histogram(to: Console, histogram: faceteer.Histogram) -> None:
    most = max(histogram.counts, default=0) or 1
    bars = "".join(_COLUMNS[round(count / most * (len(_COLUMNS) - 1))] for count in histogram.counts)
    scale = f"  0 to {histogram.edges[-1]:.3g}, {sum(histogram.counts)} pictures"
    to.print(Text.assemble(("  activations ", "dim"), (bars, "cyan"), (scale, "dim")))


_COLUMNS = "▁▂▃▄▅▆▇█"


def _table(*columns: tuple[str, JustifyMethod]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    for name, justify in columns:
        # Words fold where the terminal is narrow; figures and names of features never do.
        if name in _FOLDING:
            table.add_column(Text(name), justify=justify, overflow="fold", min_width=_FOLDED)
        else:
            table.add_column(Text(name), justify=justify, no_wrap=True)
    return table


def _show(to: Console, table: Table, *first_to_go: str) -> None:
    """Prints a table; where the terminal is too narrow for it, without these columns, the first of them first."""
    for name in first_to_go:
        if _width(to, table) + 2 <= to.width:
            break
        table = _without(table, name)
    to.print(Padding(table, (0, 0, 0, 2), expand=False))


def _without(table: Table, name: str) -> Table:
    kept = [column for column in table.columns if str(column.header) != name]
    smaller = _table(*((str(column.header), column.justify) for column in kept))
    for row in zip(*(column.cells for column in kept), strict=True):
        smaller.add_row(*row)
    return smaller


def _width(to: Console, table: Table) -> int:
    """Columns of the terminal that a table needs; words may fold, but not soon."""
    words = [column for column in table.columns if str(column.header) in _FOLDING]
    folded = sum(
        max(0, max(cell_len(str(cell)) for cell in column.cells) - _UNFOLDED) for column in words if table.rows
    )
    return Measurement.get(to, to.options.update(width=_UNLIMITED), table).maximum - folded


def _title(to: Console, name: str, facts: str) -> None:
    to.print(Text(name, "bold"))
    to.print(_indented(facts))


def _indented(words: str | Text, style: str = "dim") -> Padding:
    text = words if isinstance(words, Text) else Text(words, style)
    return Padding(text, (0, 0, 0, 2), expand=False)


def _label(label: str) -> Text:
    return Text(label) if label else Text("unlabelled", "dim italic")


def _achieved_style(outcome: faceteer.EditOutcome) -> str:
    if outcome.achieved is None:
        return "dim"
    span = max(abs(outcome.requested - outcome.before), 1e-6)
    missed = abs(outcome.achieved - outcome.requested) / span
    return "green" if missed < 0.15 else "yellow" if missed < 0.5 else "red"


def _optional(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _written(name: str, value: object) -> str:
    if isinstance(value, tuple):
        return ("x" if name == "size" else ", ").join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _warnings(to: Console, warnings: Iterable[faceteer.Notice]) -> None:
    for warning in warnings:
        to.print(_indented(f"⚠ {warning}", "yellow"))
