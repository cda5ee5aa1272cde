"""Models that are larger than the GPU: what is not needed waits in host memory.

Knows nothing of what the models compute; accelerate's hooks move them as they are called.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch


def offload_between(models: Sequence[Any], device: torch.device, how: Literal["model", "sequential"]) -> None:
    """Arranges that models in host memory run on ``device``.

    Args:
        models: on the CPU; called in any order, one at a time.
        device: where they run.
        how: "model": one whole model at a time is there; "sequential": one layer at a time, for the smallest GPUs, at
            the price of moving all weights in every call.
    """
    from accelerate import cpu_offload, cpu_offload_with_hook  # type: ignore[import-untyped]

    if how == "sequential":
        for model in models:
            cpu_offload(model, execution_device=device)
        return
    handles = [cpu_offload_with_hook(model, device)[1] for model in models]
    # Each sends the one before it home, the first the last: denoising and decoding take turns without end.
    for handle, previous in zip(handles, handles[-1:] + handles[:-1], strict=True):
        handle.hook.prev_module_hook = previous
