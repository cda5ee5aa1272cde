"""Which of several features of one name is meant: the one order for searches, edits, lists and rules.

A name means, in this order,

1. the feature that a person gave it to;
2. one that is not *weak*: a weak one fires on under 0.1 % of pictures, causes nothing like its label, or has neither
   been seen to cause what its label says nor a label that predicts where it fires;
3. one that is known to cause what its label says (causal score of at least 0.6), the better in steps of 0.1;
4. the one that fires on more pictures, counted in powers of two: 15.2 % against 14.8 % says nothing;
5. the one whose label predicts better where it fires (detection score).

A causal score below 0.6 does not order features among each other. Libraries scored by icons that did not change hold
0.5, or less where the icon's template had a stronger rival: that says as little as no score.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

RARE = 0.001
"""A feature firing on a smaller share of pictures is no candidate for a name that another one has too."""
CAUSES = 0.6
"""From this causal score on, turning the feature up shows what its label says; 0.5 is chance."""
NOTHING = 0.1
"""Below this causal score, turning it up shows nearly every other label sooner than its own."""
PREDICTS = 0.7
"""A label whose detection score is lower hardly tells where its feature fires; 0.5 is chance."""


def weak(figures: Mapping[str, np.ndarray], by_person: np.ndarray) -> np.ndarray:
    """Bool [n]: features that a name means only where no other feature has it.

    Args:
        figures: firing_share, detection_score and causal_score, float64 [n] each; NaN for a score that is not known.
        by_person: bool [n], whose label a person gave: these are never weak.
    """
    causal, detection = figures["causal_score"], figures["detection_score"]
    unproven = ~(causal >= CAUSES) & (detection < PREDICTS)
    found: np.ndarray = ((figures["firing_share"] < RARE) | (causal < NOTHING) | unproven) & ~by_person
    return found


def order(indices: np.ndarray, figures: Mapping[str, np.ndarray], by_person: np.ndarray) -> np.ndarray:
    """Places, int64 [n], the feature that a shared name means first."""
    causal = np.nan_to_num(figures["causal_score"], nan=0.0)
    causing = np.where(causal >= CAUSES, np.round(causal, 1), 0.0)
    share, detection = figures["firing_share"], np.nan_to_num(figures["detection_score"], nan=0.0)
    often = np.round(np.log2(np.maximum(share, 2.0**-30)))
    # The last key is the first to be compared.
    return np.lexsort((indices, -share, -detection, -often, -causing, weak(figures, by_person), ~by_person))
