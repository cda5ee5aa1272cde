"""A matrix whose rows are features' vectors: float or int8, on a file's own pages or in memory, read as float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

# Rows brought to float32 at a time: 1,024 of 1,280 values are 5 MB.
BLOCK = 1024


@dataclass(frozen=True)
class Rows:
    """``[n, d]`` vectors; row i is ``values[i]``, times ``scales[i]`` where there are scales.

    Attributes:
        values: float32, float16, bfloat16 or, with scales, int8; [n, d], contiguous, on the CPU.
        scales: float32 [n] or None.
    """

    values: torch.Tensor
    scales: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.values)

    @property
    def dtype(self) -> torch.dtype:
        """The number type of the stored rows."""
        return self.values.dtype

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Rows, float32 [m, d]."""
        if self.values.dtype == torch.float32:
            rows: np.ndarray = self.values.numpy()[indices]
            return rows
        # By torch, which converts float16 six times faster than numpy.
        with torch.inference_mode():
            rows = self.values.index_select(0, torch.as_tensor(np.asarray(indices, dtype=np.int64))).float().numpy()
        if self.scales is not None:
            rows *= self.scales[indices, None]
        return rows

    def blocks(self) -> Iterator[torch.Tensor]:
        """All rows as float32, some thousands at a time."""
        for start in range(0, len(self), BLOCK):
            rows = self.values[start : start + BLOCK].float()
            if self.scales is not None:
                rows *= torch.from_numpy(self.scales[start : start + BLOCK, None])
            yield rows

    def whole(self) -> torch.Tensor:
        """All rows, [n, d]: the values themselves, or float32 where there are scales."""
        if self.scales is None:
            return self.values
        found = torch.empty(self.values.shape)
        for number, block in enumerate(self.blocks()):
            found[number * BLOCK : number * BLOCK + len(block)] = block
        return found


def quantised(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [n, d] of any float type as int8 [n, d] and float32 scales [n]: the nearest of 255 levels, row by row.

    ``|row - scale * int8| <= scale / 2`` everywhere; a row of zeros has scale 0.
    """
    wide = rows.float()
    scales = wide.abs().amax(dim=1) / 127
    levels = torch.round(wide / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None])
    return levels.clamp_(-127, 127).to(torch.int8), scales
