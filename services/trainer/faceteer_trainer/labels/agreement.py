"""When a label's two scores agree. The library service's filter `scores_disagree` goes by the same two numbers.

Knows nothing of how scores are made.
"""

from __future__ import annotations

# AUC from which on a label predicts where its feature fires, and share from which on it says what the feature causes.
PREDICTS, CAUSES = 0.7, 0.7


def agree(detection: float | None, causal: float | None) -> bool | None:
    """Whether both say yes or both say no; None where one of them was not measured."""
    if detection is None or causal is None:
        return None
    return (detection >= PREDICTS) == (causal >= CAUSES)
