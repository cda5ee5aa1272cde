"""One SAE encode at full size, 163,840 x 1,280: the served one in float16 and int8 screening, and a float32 forward.

    python benchmarks/sae_encode.py

Random unit directions, embeddings of norm about 40 with 32 planted features each; one thread. Prints the median of a
call in milliseconds, how many features were computed again, and whether both screens found the same, to the bit.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from faceteer_sae.model import SparseAutoencoder
from faceteer_sae.weights import SaeConfig

D_SAE, D_IN, K = 163_840, 1280, 32


def median_ms(call: Callable[[], object], repeats: int) -> float:
    """Of some calls after a first one."""
    call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times)


def main() -> None:
    torch.set_num_threads(1)
    rows = torch.nn.functional.normalize(torch.randn(D_SAE, D_IN, generator=torch.Generator().manual_seed(0)), dim=1)
    x = np.random.default_rng(0).standard_normal((64, D_IN)).astype(np.float32)
    x *= 12 / np.linalg.norm(x, axis=1, keepdims=True)
    for number in range(len(x)):
        rng = np.random.default_rng(number)
        x[number] += rng.uniform(3, 10, K).astype(np.float32) @ rows[rng.integers(0, D_SAE, K)].numpy()
    half = rows.half()
    weights = {"W_enc_rows": half, "b_enc": torch.zeros(D_SAE), "W_dec": half, "b_dec": torch.zeros(D_IN)}
    config = SaeConfig("topk", D_IN, D_SAE, K, False, {}, "rows")
    found = {}
    for screening in ("weights", "int8"):
        sae = SparseAutoencoder(config, weights, "cpu", screening)
        for batch in (1, 16, 64):
            took = median_ms(lambda sae=sae, n=batch: sae.encode(x[:n]), 15 if batch == 1 else 3)
            again = len(sae._candidates(x[:1])[1])
            print(f"{screening:8} batch {batch:2}: {took:7.2f} ms, {again} features computed again for the first")
        found[screening] = [(f.top_indices.tolist(), f.top_acts.tolist()) for f in sae.encode(x)]
    print("the same features, the same bits:", found["weights"] == found["int8"])
    one = torch.from_numpy(x[:1])
    took = median_ms(lambda: torch.nn.functional.linear(one, rows).topk(K), 15)
    print(f"a float32 forward and topk: {took:.2f} ms")


if __name__ == "__main__":
    main()
