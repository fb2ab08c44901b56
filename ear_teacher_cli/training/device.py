"""The device that a run trains on, and how it computes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..config import TrainConfig


def best_precision(config: TrainConfig) -> str:
    """Return the value of --precision that `auto` means here."""
    if not uses_cuda(config):
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"


def uses_cuda(config: TrainConfig) -> bool:
    """Return whether training uses an NVIDIA GPU here."""
    return config.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


@contextmanager
def arithmetic_of(config: TrainConfig) -> Iterator[None]:
    """Apply --matmul-precision and --deterministic to torch, and restore what was set before."""
    before = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    torch.set_float32_matmul_precision(config.matmul_precision)
    torch.use_deterministic_algorithms(config.deterministic)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.use_deterministic_algorithms(before[1])
