"""Does turning a feature change that, and only that? Every answer is the judge's, beside its controls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from faceteer_postcards.bundle import LoadedBundle
from faceteer_postcards.clip import embed_pictures
from faceteer_postcards.evaluation.editing import Edit, apply_edits, transfer
from faceteer_postcards.evaluation.judge import Judge, judge_pictures
from faceteer_postcards.evaluation.metrics import Share, share_of
from faceteer_postcards.evaluation.painter import Painter
from faceteer_postcards.evaluation.representation import NOWHERE, Embedded, ValueFeature
from faceteer_postcards.render import render
from faceteer_postcards.unet import split_seeds
from faceteer_postcards.world import FACTOR_NAMES, FACTORS, Scene

Codes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Trial:
    """One value's pictures: `codes` judged after the edit, `unedited` judged before it, both [n, 8]."""

    factor: int
    code: int
    codes: Codes
    unedited: Codes

    @property
    def reached(self) -> Share:
        """How many show the value."""
        return share_of(self.codes[:, self.factor] == self.code)

    @property
    def kept(self) -> Share:
        """How many of the other factors are judged as they were before, over pictures and factors."""
        return kept_factors(self.codes, self.unedited, self.factor)


def kept_factors(after: Codes, before: Codes, but: int | list[int]) -> Share:
    """The share of factors other than `but` judged the same."""
    return share_of(np.delete(after == before, but, axis=1))


class Steering:
    """The experiments over one pool of held-out pictures, each with a noise seed of its own."""

    def __init__(
        self, bundle: LoadedBundle, judge: Judge, painter: Painter, pool: Embedded, train: Embedded,
        best: list[ValueFeature], by_label: list[ValueFeature], seed: int = 0,
    ) -> None:  # fmt: skip
        self.bundle, self.judge, self.painter, self.pool, self.best = bundle, judge, painter, pool, best
        self.by_label = by_label
        self.rng = np.random.default_rng(seed)
        self.seeds = split_seeds(seed, len(pool.codes))
        self.before_pictures = painter(pool.embeds, self.seeds)
        self.before = judge_pictures(judge, self.before_pictures)
        other = painter(pool.embeds, split_seeds(seed + 1, len(pool.codes)))
        self.other_noise = judge_pictures(judge, other)
        self.means = self._class_means(train)
        fires = (bundle.sae.encode(train.embeds) > 0).float().mean(0)
        self.common = torch.nonzero(fires > 0.005).flatten().tolist()

    @staticmethod
    def _class_means(train: Embedded) -> dict[tuple[int, int], torch.Tensor]:
        return {
            (index, code): train.embeds[torch.from_numpy(train.codes[:, index] == code)].mean(0)
            for index, values in enumerate(FACTORS.values())
            for code in range(len(values))
        }

    def new_noise_keeps(self) -> dict[str, Any]:
        """What a new noise seed alone keeps: the ceiling for `kept`."""
        by_factor = {
            name: share_of(self.other_noise[:, i] == self.before[:, i]).as_dict() for i, name in enumerate(FACTOR_NAMES)
        }
        return {"all": share_of(self.other_noise == self.before).as_dict(), "by_factor": by_factor}

    def _rows(self, index: int, code: int, count: int, having: bool = False) -> npt.NDArray[np.int64]:
        """Pictures of the pool that lack the value (or have it), judged so as well as drawn so."""
        fits = (self.pool.codes[:, index] == code) == having
        fits &= (self.before[:, index] == code) == having
        return np.flatnonzero(fits)[:count]

    def _paint(self, embeds: torch.Tensor, rows: npt.NDArray[np.int64]) -> Codes:
        return judge_pictures(self.judge, self.painter(embeds, [self.seeds[row] for row in rows]))

    def _edit(self, rows: npt.NDArray[np.int64], edits: list[Edit]) -> torch.Tensor:
        return apply_edits(self.bundle.sae, self.bundle.statistics, self.pool.embeds[rows], edits)

    def run_arm(self, arm: str, count: int, scaled: float = 1.0, by_label: bool = False) -> dict[str, Trial]:
        """One treatment over every value: switch, set, wrong_sign, random, means or ablate.

        ``by_label``: of the feature that the value's word leads to, instead of the one that the truth chose.
        """
        jobs, spans = [], []
        for value in self.by_label if by_label else self.best:
            index, code = FACTOR_NAMES.index(value.factor), FACTORS[value.factor].index(value.value)
            rows = self._rows(index, code, count, having=arm == "ablate")
            jobs.append(self._treat(arm, value, rows, scaled))
            spans.append((value, index, code, rows))
        rows_all = np.concatenate([rows for *_, rows in spans])
        judged = self._paint(torch.cat(jobs), rows_all)
        trials, start = {}, 0
        for value, index, code, rows in spans:
            trials[value.name] = Trial(index, code, judged[start : start + len(rows)], self.before[rows])
            start += len(rows)
        return trials

    def _treat(self, arm: str, value: ValueFeature, rows: npt.NDArray[np.int64], scaled: float) -> torch.Tensor:
        embeds = self.pool.embeds[rows]
        if len(rows) == 0 or value.feature == NOWHERE:
            return embeds
        if arm in ("set", "switch"):
            return self._edit(rows, [Edit(value.feature, scaled, arm == "switch")])
        if arm == "wrong_sign":
            return self._edit(rows, [Edit(value.feature, -scaled)])
        if arm == "ablate":
            return self._edit(rows, [Edit(value.feature, 0.0)])
        if arm == "random":
            moved = self._edit(rows, [Edit(value.feature, scaled, switch=True)]) - embeds
            others = [f for f in self.common if f != value.feature]
            picked = torch.tensor(self.rng.choice(others, len(rows)))
            length: torch.Tensor = moved.norm(dim=-1, keepdim=True)
            return embeds + length * self.bundle.sae.W_dec[picked]
        if arm == "means":
            index, code = FACTOR_NAMES.index(value.factor), FACTORS[value.factor].index(value.value)
            now = torch.stack([self.means[index, int(c)] for c in self.pool.codes[rows, index]])
            return embeds + self.means[index, code] - now
        raise ValueError(f"no such arm: {arm}")

    def stack(self, edits: int, count: int, by_label: bool = False) -> dict[str, Any]:
        """`edits` switches at once on factors drawn at random: the share of targets reached, and of the rest kept.

        The same factors and values by label and by the truth's choice.
        """
        rng = np.random.default_rng((1, edits))
        features = {(v.factor, v.value): v.feature for v in (self.by_label if by_label else self.best)}
        rows, jobs, wanted = np.arange(min(count, len(self.before))), [], []
        for row in rows:
            factors = sorted(rng.permutation(len(FACTOR_NAMES))[:edits].tolist())
            goal = {}
            for index in factors:
                values = FACTORS[FACTOR_NAMES[index]]
                goal[index] = int((self.pool.codes[row, index] + 1 + rng.integers(len(values) - 1)) % len(values))
            names = [(FACTOR_NAMES[i], FACTORS[FACTOR_NAMES[i]][c]) for i, c in goal.items()]
            jobs.append(
                self._edit(
                    np.array([row]), [Edit(features[name], 1.0, True) for name in names if features[name] != NOWHERE]
                )
            )
            wanted.append(goal)
        judged = self._paint(torch.cat(jobs), rows)
        reached = np.array([judged[n, i] == c for n, goal in enumerate(wanted) for i, c in goal.items()])
        every = np.array([all(judged[n, i] == c for i, c in goal.items()) for n, goal in enumerate(wanted)])
        rest = [judged[n, i] == self.before[n, i] for n, goal in enumerate(wanted) for i in range(8) if i not in goal]
        return {"reached": share_of(reached).as_dict(), "all_reached": share_of(every).as_dict(),
                "kept": share_of(np.array(rest, bool)).as_dict()}  # fmt: skip

    def carry_over(self, count: int, factors: int, *, shared: bool) -> dict[str, Any]:
        """B differs from A in `factors` factors; A's way to B, applied to C, which lacks B's values of them.

        A and B are drawn, C is of the pool. C has A's values of these factors where `shared`, else any but B's: then
        its own values must give way, though neither A nor B shows them.
        """
        sources, targets, onto, goals = self._triples(count, factors, shared)
        embeds = transfer(self.bundle.served_sae, self.bundle.statistics, sources, targets, self.pool.embeds[onto])
        judged = self._paint(embeds, onto)
        hits, kept = np.zeros((count, factors), bool), Share(0, 0)
        for number, (row, goal, codes) in enumerate(zip(onto, goals, judged, strict=True)):
            hits[number] = [codes[index] == code for index, code in goal.items()]
            kept += kept_factors(codes[None], self.before[row][None], list(goal))
        all_at_once = np.all(hits, axis=1, keepdims=True)
        return {"reached": share_of(hits).as_dict(), "all_reached": share_of(all_at_once).as_dict(),
                "kept": kept.as_dict()}  # fmt: skip

    def _triples(
        self, count: int, factors: int, shared: bool
    ) -> tuple[torch.Tensor, torch.Tensor, npt.NDArray[np.int64], list[dict[int, int]]]:
        """Embeds of A and of B, rows of the pool for C, and B's values of the factors in which it differs from A."""
        onto, goals, before, after = [], [], [], []
        for number in range(count):
            row = int(self.rng.integers(len(self.pool.codes)))
            mine = self.pool.codes[row]
            a = self.pool.codes[int(self.rng.integers(len(self.pool.codes)))].copy()
            others = [index for index in range(len(FACTOR_NAMES)) if index != number % len(FACTOR_NAMES)]
            changing = [number % len(FACTOR_NAMES), *self.rng.permutation(others)[: factors - 1].tolist()]
            b = a.copy()
            for index in changing:
                if shared:
                    a[index] = mine[index]
                free = [
                    code for code in range(len(FACTORS[FACTOR_NAMES[index]])) if code not in (a[index], mine[index])
                ]
                b[index] = self.rng.choice(free)
            unchanged = [index for index in range(len(FACTOR_NAMES)) if index not in changing]
            b[unchanged] = a[unchanged]
            before.append(render(Scene.from_codes(a, 900_000_000 + number)))
            after.append(render(Scene.from_codes(b, 950_000_000 + number)))
            onto.append(row)
            goals.append({index: int(b[index]) for index in changing})
        sources, targets = (embed_pictures(self.bundle.encoder, np.stack(drawn)) for drawn in (before, after))
        return sources, targets, np.array(onto), goals
