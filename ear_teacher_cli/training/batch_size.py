"""`--batch-size auto`: the largest batch whose training step fits into memory, found by trying."""

import sys
from dataclasses import replace

import torch

from ..config import TrainConfig
from ..console import Console
from ..data.dataset import Batch
from ..errors import ConfigError
from ..platform import free_memory, peak_memory
from .device import uses_cuda
from .module import EarTeacherLightningModule
from .step_trial import one_step, trial_batch

FIRST = 4  # images of the smallest batch that is tried
LARGEST = 1024
STEPS_PER_EPOCH = 16  # at least: few large steps learn less than many small ones
STEP = 8  # larger results are multiples of it
SHARE = 0.8  # of the memory that the step may take: other programs, images and the allocator need the rest


def find_batch_size(config: TrainConfig, images: int, console: Console) -> TrainConfig:
    """Return the configuration with the largest batch size that fits and leaves an epoch of `images` training images
    STEPS_PER_EPOCH steps.

    Batches of 4, 8, 16, ... random images go through a training step. Memory grows in proportion to the batch: before
    each trial its need is extrapolated from the two before, and the next batch is not tried if it would not fit, so that
    memory never runs out. Raises ConfigError if not even the first trials fit, or memory cannot be measured here.
    """
    if config.processes > 1:
        found = "auto tries one device, but there are several"
        raise ConfigError("batch_size", found, "find it with --devices 1 --dry-run, then give the number")
    memory = Memory(config)
    config = replace(config, batch_size=FIRST)
    module = EarTeacherLightningModule(config).to(memory.device).train()
    # AdamW's two moments, which the trials do not make
    moments = 8 * sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    most = max(FIRST, min(images // STEPS_PER_EPOCH, LARGEST))
    tried: list[tuple[int, float]] = []  # images, bytes
    size = FIRST
    while size <= most:
        if len(tried) >= 2 and extrapolated(tried, size) > memory.limit:
            break
        try:
            tried.append((size, memory.of_step(module, trial_batch(config, size)) + moments))
        except torch.cuda.OutOfMemoryError:
            break
        if tried[-1][1] > memory.limit:
            break
        size *= 2
    fitting = [each for each in tried if each[1] <= memory.limit]
    if not fitting:
        raise ConfigError(
            "batch_size",
            f"not even {FIRST} images fit into {memory.limit / 1e9:.1f} GB",
            "use a smaller --image-size or --backbone, or --gradient-checkpointing",
        )
    best = between(tried, fitting[-1][0], min(2 * fitting[-1][0], most), memory.limit)
    need = extrapolated(tried, best) if len(tried) >= 2 else tried[0][1]
    where = "GPU memory" if memory.device.type == "cuda" else "memory"
    console.info(
        f"batch size: {best}, {'the largest that fits' if best < most else f'as {STEPS_PER_EPOCH} steps an epoch allow'}; "
        f"a step needs about {need / 1e9:.1f} of {memory.limit / 1e9:.1f} GB of {where}"
    )
    return replace(config, batch_size=best)


class Memory:
    """The memory of the device that trains. `limit`: bytes that the process may take."""

    def __init__(self, config: TrainConfig):
        self.device = torch.device("cuda" if uses_cuda(config) else "cpu")
        if self.device.type == "cuda":
            self.limit = SHARE * torch.cuda.mem_get_info()[1]
        elif peak_memory():
            self.limit = SHARE * (peak_memory() + free_memory())
        else:
            found = f"auto cannot measure memory on {sys.platform}"
            raise ConfigError("batch_size", found, "give a number, for example 32")

    def of_step(self, module: EarTeacherLightningModule, batch: Batch) -> float:
        """Return the peak in bytes while the batch goes forward and back; on a CPU, of the process since its start."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        one_step(module, batch)
        return float(torch.cuda.max_memory_allocated()) if self.device.type == "cuda" else peak_memory()


def extrapolated(tried: list[tuple[int, float]], size: int) -> float:
    """Return the bytes that a batch of `size` needs, on the line through the last two trials (images, bytes)."""
    (few, least), (many, most) = tried[-2:]
    return most + (size - many) * max(0.0, most - least) / (many - few)


def between(tried: list[tuple[int, float]], low: int, high: int, limit: float) -> int:
    """Return the largest multiple of STEP in [low, high] that fits by extrapolation; `low`, which was tried, if none."""
    if len(tried) < 2:
        return low
    sizes = [size for size in range(low - low % STEP, high + 1, STEP) if size >= low]
    return max([low, *(size for size in sizes if extrapolated(tried, size) <= limit)])
