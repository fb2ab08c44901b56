"""The learning rate: linear warm-up that starts above zero, then a cosine to the end of the run."""

import math


def rate_at(step: int, warmup_steps: int, total_steps: int) -> float:
    """Share of the peak learning rate in optimiser step `step` (from 0), in (0, 1].

    Warm-up: (step + 1) / warmup_steps. Then 0.5 * (1 + cos(pi * t)) with t from 0 at the first step after the
    warm-up to just under 1 at the last (SGDR, Loshchilov and Hutter 2017, eq. 5, one period, minimum 0).
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    t = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(t, 1.0)))
