"""The world of the postcards: eight independent factors, and scenes drawn at random from them.

`render` draws a scene, `captions` describes it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final

import numpy as np
import numpy.typing as npt

FACTORS: Final[dict[str, tuple[str, ...]]] = {
    "time": ("dawn", "day", "dusk", "night"),
    "ground": ("grass", "sand", "snow", "water"),
    "subject": ("house", "tree", "boat", "cat", "car", "balloon", "flower", "ball"),
    "colour": ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white"),
    "count": ("one", "two", "three"),
    "weather": ("clear", "rain", "snowfall", "fog"),
    "border": ("none", "white", "black"),
    "style": ("plain", "outlined", "pixelated", "striped"),
}
FACTOR_NAMES: Final[tuple[str, ...]] = tuple(FACTORS)
VALUES: Final[tuple[tuple[str, str], ...]] = tuple((name, v) for name, values in FACTORS.items() for v in values)


@dataclass(frozen=True, slots=True)
class Scene:
    """What a postcard shows. Everything not named here (places, clouds, drops) hangs on `seed` alone."""

    time: str
    ground: str
    subject: str
    colour: str
    count: str
    weather: str
    border: str
    style: str
    seed: int

    def __post_init__(self) -> None:
        for name, values in FACTORS.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is {getattr(self, name)!r}, not one of {', '.join(values)}")

    @property
    def codes(self) -> tuple[int, ...]:
        """The index of each factor's value, in the order of `FACTOR_NAMES`."""
        return tuple(FACTORS[name].index(getattr(self, name)) for name in FACTOR_NAMES)

    @classmethod
    def from_codes(cls, codes: npt.ArrayLike, seed: int) -> Scene:
        """The scene whose factors have these indices, `codes` [8]."""
        chosen = np.asarray(codes).tolist()
        values = {name: FACTORS[name][code] for name, code in zip(FACTOR_NAMES, chosen, strict=True)}
        return cls(**values, seed=seed)


def sample_codes(count: int, seed: int) -> npt.NDArray[np.uint8]:
    """`count` scenes' factors [count, 8], each factor uniform and independent of the others."""
    rng = np.random.default_rng(seed)
    columns = [rng.integers(0, len(values), count) for values in FACTORS.values()]
    return np.stack(columns, axis=1).astype(np.uint8)


def sample_scene(seed: int) -> Scene:
    """One scene at random, the same for the same seed."""
    return Scene.from_codes(sample_codes(1, seed)[0], seed)


assert tuple(field.name for field in fields(Scene))[:-1] == FACTOR_NAMES
