"""What an edit did: activations before, requested and achieved, and the drift of the other features."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from faceteer._models.edits import EditOperation, FeatureEdit
from faceteer._models.match import FeatureMatch
from faceteer._models.shown import Named, Shown
from faceteer._models.tables import text_table
from faceteer._models.tensors import to_array
from faceteer._models.values import Execution, Notice, Revisions
from faceteer._models.wire import copied, word
from faceteer.v1 import edits_pb2, studio_pb2

if TYPE_CHECKING:
    import numpy.typing as npt


@dataclass(frozen=True)
class EditOutcome(Named):
    """The outcome of one edit. Activations are RAW; ``*_scaled`` are the same in SCALED units (0 without statistics).

    Attributes:
        index: the edited feature.
        label: empty when it has none.
        operation: as requested; "ablate" for a rival that a "switch" turned off.
        before: f_i(x), on the unedited embedding.
        requested: v_i.
        achieved: f_i(x'), by encoding the edited embedding again; None when not measured.
        rival_of: the feature whose "switch" turned this rival off, or None.
        match: how the edit's name led to the feature; None where the edit gave its index.
    """

    index: int
    label: str
    operation: EditOperation
    before: float
    requested: float
    achieved: float | None
    before_scaled: float
    requested_scaled: float
    achieved_scaled: float | None
    rival_of: int | None
    match: FeatureMatch | None = None

    @classmethod
    def from_proto(cls, message: edits_pb2.EditOutcome) -> EditOutcome:
        """From the wire."""
        operation = word(edits_pb2.EditOperation, message.operation)
        match = FeatureMatch.from_proto(message.match)
        return copied(cls, message, index=message.feature_index, operation=operation, match=match)


@dataclass(frozen=True)
class FeatureDrift(Named):
    """How one feature that was not edited moved all the same: f_j(x) and f_j(x'), RAW."""

    index: int
    label: str
    before: float
    after: float


@dataclass(frozen=True)
class MeasuredPicture:
    """What a finished picture shows of the edit, by encoding it again.

    Attributes:
        seed: the picture's.
        activations: one for each of the report's outcomes, RAW.
        scaled: the same in SCALED units (0 without statistics).
    """

    seed: int
    activations: tuple[float, ...]
    scaled: tuple[float, ...]

    @classmethod
    def from_proto(cls, message: studio_pb2.MeasuredPicture) -> MeasuredPicture:
        """From the wire."""
        return cls(
            message.seed,
            tuple(one.activation for one in message.outcomes),
            tuple(one.scaled for one in message.outcomes),
        )


@dataclass(frozen=True)
class EditReport(Shown):
    """What an edit did. ``print`` shows it as a table, a notebook as HTML.

    Attributes:
        outcomes: one for each edit in its order, then one for each rival that a "switch" turned off.
        delta_norm: ||x' - x||, in the embedding's units.
        cosine: cos(x, x').
        measured: whether x' was encoded again; ``drift`` is None and ``drifted`` empty when not.
        drift: ||f_rest(x') - f_rest(x)|| / ||f_rest(x)|| over the features that were not edited.
        drifted: the features that were not edited and moved most, largest move first.
        warnings: an embedding unlike those the SAE was trained on, an edit far outside a feature's range …
        edits: the edits with labels resolved to indices.
        revisions: what ran.
        embedding_id: names x' in later calls while the server's cache keeps it.
        embeds: x', float32 [d], read-only.
        execution: the SAE's part; None when the server did not say.
        pictures: what the finished pictures show, where ``render(measure=True)`` asked for it. "Achieved" is the
            embedding's; the decoder may make less of it.
    """

    outcomes: tuple[EditOutcome, ...]
    delta_norm: float
    cosine: float
    measured: bool
    drift: float | None
    drifted: tuple[FeatureDrift, ...]
    warnings: tuple[Notice, ...]
    edits: tuple[FeatureEdit, ...]
    revisions: Revisions
    embedding_id: str
    embeds: npt.NDArray[np.float32] = field(repr=False, compare=False)
    execution: Execution | None = field(default=None, repr=False, compare=False)
    pictures: tuple[MeasuredPicture, ...] = ()

    @classmethod
    def from_edited(cls, message: studio_pb2.Edited) -> EditReport:
        """From EditImage's first event."""
        execution = Execution.from_proto(message.sae_execution) if message.HasField("sae_execution") else None
        return cls.from_proto(message.report, message.edits, message.revisions, message.embedding, execution)

    @classmethod
    def from_proto(
        cls, report: edits_pb2.EditReport, edits: Any, revisions: Any, embedding: Any, execution: Execution | None
    ) -> EditReport:
        """From the wire: the report and the fields that accompany it."""
        labels = {outcome.feature_index: outcome.label for outcome in report.outcomes}
        return copied(
            cls,
            report,
            outcomes=tuple(map(EditOutcome.from_proto, report.outcomes)),
            drift=report.drift if report.measured else None,
            drifted=tuple(FeatureDrift(d.feature_index, d.label, d.before, d.after) for d in report.drifted),
            warnings=Notice.all_of(report.warnings),
            edits=tuple(FeatureEdit.from_proto(edit, labels.get(edit.feature.index, "")) for edit in edits),
            revisions=Revisions.from_proto(revisions),
            embedding_id=embedding.embedding_id,
            embeds=to_array(embedding.embeds),
            execution=execution,
        )

    @property
    def scaled(self) -> bool:
        """Whether the server has statistics, so that the table can be in SCALED units."""
        return any(o.before_scaled or o.requested_scaled for o in self.outcomes)

    @property
    def shown(self) -> tuple[EditOutcome, ...]:
        """The outcomes to show: all except rivals that were off before and after."""
        return tuple(o for o in self.outcomes if o.rival_of is None or o.before or o.achieved)

    @property
    def notes(self) -> tuple[str, ...]:
        """A sentence for each edit whose name might have meant another feature, or is not the feature's label."""
        return tuple(dict.fromkeys(o.match.note for o in self.outcomes if o.match is not None and o.match.note))

    def __str__(self) -> str:
        lines = [self.title()]
        if self.outcomes:
            lines += ["", text_table(self.header, self.rows(), left=3)]
        lines += self.notes
        lines += self.silent_sentence()
        lines += ["", self.drift_sentence()]
        if moved := self.drifted_rows():
            lines += ["", text_table(_DRIFT_HEADER, moved, left=2)]
        lines += [f"! {warning}" for warning in self.warnings]
        return "\n".join(lines)

    @property
    def header(self) -> tuple[str, ...]:
        """The names of the columns of :meth:`rows`: one for each measured picture at the end."""
        if len(self.pictures) == 1:
            return (*_HEADER, "picture")
        return (*_HEADER, *(f"seed {picture.seed}" for picture in self.pictures))

    def rows(self) -> list[list[str]]:
        """:attr:`shown` as the table's cells: feature, label, operation, before, requested, achieved, pictures."""
        rows = []
        for at, o in enumerate(self.outcomes):
            if o not in self.shown:
                continue
            values: tuple[float | None, ...] = (o.before, o.requested, o.achieved)
            if self.scaled:
                values = (o.before_scaled, o.requested_scaled, o.achieved_scaled)
            values += tuple((p.scaled if self.scaled else p.activations)[at] for p in self.pictures)
            operation = o.operation if o.rival_of is None else f"rival of #{o.rival_of}"
            rows.append([f"#{o.index}", o.label, operation, *("–" if v is None else _figure(v) for v in values)])
        return rows

    def drifted_rows(self, n: int = 5) -> list[list[str]]:
        """The features that moved most without being edited: feature, label, before, after (RAW)."""
        return [[f"#{d.index}", d.label, _figure(d.before), _figure(d.after)] for d in self.drifted[:n]]

    def silent_sentence(self) -> list[str]:
        """One sentence about the rivals that have no row, or none."""
        n = len(self.outcomes) - len(self.shown)
        return [f"{n} rival{' was' if n == 1 else 's were'} off already."] if n else []

    def drift_sentence(self) -> str:
        """The drift of the other features in words."""
        if self.drift is None:
            return "The drift of the other features was not measured."
        moved = "; moved most (raw):" if self.drifted else "."
        return f"Drift of the features that were not edited: {self.drift:.1%}{moved}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "embedding_id": self.embedding_id,
            "outcomes": [
                {**vars(outcome), "match": None if outcome.match is None else dict(vars(outcome.match))}
                for outcome in self.outcomes
            ],
            "delta_norm": self.delta_norm,
            "cosine": self.cosine,
            "measured": self.measured,
            "drift": self.drift,
            "drifted": [dict(vars(drift)) for drift in self.drifted],
            "pictures": [
                {"seed": p.seed, "activations": list(p.activations), "scaled": list(p.scaled)} for p in self.pictures
            ],
            "warnings": [dict(vars(warning)) for warning in self.warnings],
            "revisions": dict(vars(self.revisions)),
        }

    def title(self) -> str:
        """One line: how many edits, in which unit, how far the embedding moved."""
        n = len(self.edits)
        edits = f"{n} edit{'' if n == 1 else 's'}" if n else "No edits"
        unit = "activations scaled: 1 is the feature's 99th percentile" if self.scaled else "activations raw"
        return f"{edits} · {unit} · moved the embedding by {self.delta_norm:.3g}, cosine {self.cosine:.3f}"


_HEADER = ("feature", "label", "operation", "before", "requested", "achieved")
_DRIFT_HEADER = ("feature", "label", "before", "after")


def _figure(value: float) -> str:
    text = f"{value:.2f}" if abs(value) < 1000 else f"{value:.4g}"
    return "0.00" if text == "-0.00" else text
