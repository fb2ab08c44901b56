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
from .step_trial import bytes_besides_a_step, one_step, trial_batch

FIRST = 4  # images of the smallest batch that is tried
LARGEST = 1024
STEPS_PER_EPOCH = 16  # at least: few large steps learn less than many small ones
STEP = 8  # larger results are multiples of it
SHARE = 0.8  # of the free memory that the step may take: other programs and the allocator need the rest
# What torch's errors say when a GPU has no memory left.
NO_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def find_batch_size(config: TrainConfig, images: int, classes: int, kept: float, console: Console) -> TrainConfig:
    """Return the configuration with the largest batch size that fits and leaves an epoch of `images` training images
    STEPS_PER_EPOCH batches. `classes`: number of pseudo-classes; `kept`: bytes of crops that will be cached in memory.

    Batches of 4, 8, 16, ... random images go through a training step. Memory grows in proportion to the batch: from the
    third on, the need of each is extrapolated from the two before, and it is not tried if it would not fit.
    Raises ConfigError if not even the first trial fits, or memory cannot be measured here.
    """
    if config.processes > 1:
        found = "auto tries one device, but there are several"
        raise ConfigError("batch_size", found, "find it with --devices 1 --dry-run, then give the number")
    memory = Memory(config, kept)
    config = replace(config, batch_size=FIRST)
    module = EarTeacherLightningModule(config).to(memory.device).train()
    more = bytes_besides_a_step(module)
    allowed = min(images // STEPS_PER_EPOCH, LARGEST)
    most = max(FIRST, allowed)
    tried: list[tuple[int, float]] = []  # images, bytes
    size, failed = FIRST, most + 1
    while size <= most and not (len(tried) >= 2 and extrapolated(tried, size) > memory.limit):
        try:
            tried.append((size, memory.of_step(module, trial_batch(config, size), classes) + more))
        except RuntimeError as error:
            if not any(text in str(error) for text in NO_MEMORY):
                raise
            failed = size
            break
        size *= 2
    memory.free()
    fitting = [each for each in tried if each[1] <= memory.limit]
    if not fitting:
        raise ConfigError(
            "batch_size",
            f"not even {FIRST} images fit into {memory.limit / 1e9:.1f} GB",
            "use a smaller --image-size or --backbone, or --gradient-checkpointing",
        )
    largest = fitting[-1][0]
    best = between(tried, largest, min(2 * largest, most, failed - 1), memory.limit)
    need = extrapolated(tried, best) if len(tried) >= 2 else tried[0][1]
    if allowed < FIRST:
        why = "the smallest that is tried"
    elif best + STEP > most:
        why = "the largest there is" if most == LARGEST else f"which leaves {STEPS_PER_EPOCH} batches an epoch"
    else:
        why = "the largest that fits"
    where = "GPU memory" if memory.device.type == "cuda" else "memory"
    console.info(
        f"batch size: {best}, {why}; a step needs about {need / 1e9:.1f} of {memory.limit / 1e9:.1f} GB of {where}"
    )
    return replace(config, batch_size=best)


class Memory:
    """The memory of the device that trains. `limit`: bytes that the process may take in all."""

    def __init__(self, config: TrainConfig, kept: float):
        self.device = torch.device("cuda" if uses_cuda(config) else "cpu")
        if self.device.type == "cuda":
            self.limit = SHARE * (torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved())
        elif torch.backends.mps.is_available() and config.accelerator in ("auto", "gpu", "mps"):
            raise ConfigError(
                "batch_size", "auto cannot measure the memory of this GPU", "give a number, for example 32"
            )
        elif peak_memory():
            self.limit = peak_memory() + SHARE * (free_memory() - kept)
        else:
            found = f"auto cannot measure memory on {sys.platform}"
            raise ConfigError("batch_size", found, "give a number, for example 32")

    def of_step(self, module: EarTeacherLightningModule, batch: Batch, classes: int) -> float:
        """Return the peak in bytes while the batch goes forward and back; on a CPU, of the process since its start."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        one_step(module, batch, classes)
        return float(torch.cuda.max_memory_allocated()) if self.device.type == "cuda" else peak_memory()

    def free(self) -> None:
        """Return the memory of the trials to the GPU."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def extrapolated(tried: list[tuple[int, float]], size: int) -> float:
    """Return the bytes that a batch of `size` needs, on the line through the last two trials (images, bytes); in
    proportion to its size if memory has not grown (an earlier peak of the process hides how it grows)."""
    (few, least), (many, most) = tried[-2:]
    if most <= least:
        return most * size / many
    return most + (size - many) * (most - least) / (many - few)


def between(tried: list[tuple[int, float]], low: int, high: int, limit: float) -> int:
    """Return the largest multiple of STEP in [low, high] that fits by extrapolation; `low`, which was tried, if none."""
    if len(tried) < 2:
        return low
    return max(
        [low, *(size for size in range(STEP, high + 1, STEP) if size > low and extrapolated(tried, size) <= limit)]
    )
