"""The device that a run trains on, and the precision that suits it."""

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
