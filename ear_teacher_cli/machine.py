"""What this machine offers, and what its complaints mean."""

import os
import re
from contextlib import suppress
from pathlib import Path

from .errors import EarTeachError


def usable_cores() -> int:
    """CPU cores this process may use (fewer than the machine's in a container)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory() -> float:
    """Bytes of memory that can be had without swapping; in a container, of its share."""
    free = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) / 2  # where the system does not say
    with suppress(OSError, IndexError, ValueError):
        free = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024.0
    for most, used in _CONTAINER:
        with suppress(OSError, ValueError):  # "max" is no number, and no limit
            free = min(free, int(Path(most).read_text()) - int(Path(used).read_text()))
    return max(0.0, free)


# Limit and use of a container's memory, of cgroups version 2 and 1.
_CONTAINER = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def is_first_process() -> bool:
    """Whether this is the process the user started, or the first of those that torchrun or SLURM did. Lightning starts
    the other ranks by running the same command again."""
    ranks = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
    return all(int(os.environ.get(name, 0)) == 0 for name in ranks)


def complaint(error: BaseException | None) -> EarTeachError | None:
    """An error of torch about the machine in our words, with the option that helps; None if it is another. An error that
    was raised while cleaning up after one is taken for that one."""
    while error is not None:
        text = str(error).strip()
        if "Traceback (most recent call last)" in text:  # a loader's: its last line is what was raised
            text = text.splitlines()[-1]
        text = " ".join(text.split())
        for pattern, words in _COMPLAINTS:
            if re.search(pattern, f"{type(error).__name__}: {text}", re.IGNORECASE):
                return EarTeachError(f"{words} ({text[:120]})")
        error = error.__context__
    return None


# What torch says (class and text) and what it means. The first that fits counts: shared memory before memory.
_COMPLAINTS = (
    (
        r"InvalidCxxCompiler|C\+\+ compiler|CxxCompileError|TritonMissing",
        "--compile: needs a working compiler (g++, and Triton on a GPU); install it, or leave the option out",
    ),
    (
        r"shared memory|bus error|\bshm\b|/torch_\d",
        "shared memory (/dev/shm): too small for the processes that load pictures; use --num-workers 0, or give the "
        "container more (docker run --shm-size 8g)",
    ),
    (
        r"No space left on device|File too large|Disk quota",
        "the disk, or the shared memory (/dev/shm) of the processes that load pictures, is full; make room, or use "
        "--num-workers 0",
    ),
    (
        r"DataLoader timed out",
        "loading pictures: no batch came in time; look after the disk, raise --load-timeout, or find the picture that "
        "hangs with earteach validate-data",
    ),
    (
        r"DataLoader worker .*(killed|exited)",
        "loading pictures: a process that does it was killed, mostly for want of memory; lower --num-workers or "
        "--batch-size",
    ),
    (
        r"^OutOfMemoryError|CUDA out of memory|CUBLAS_STATUS_ALLOC_FAILED",
        "GPU memory: too small; lower --batch-size or --image-size, or use --precision 16-mixed",
    ),
    (
        r"Too many open files|received \d+ items of ancdata",
        "open files: too many for this shell's limit; raise it (ulimit -n 65536), or lower --num-workers",
    ),
    (
        r"connection (closed|reset) by peer|NCCL error|gloo/transport",
        "another process of this run ended; what it said tells why. Then go on with earteach resume, or embed --resume",
    ),
    (
        r"^MemoryError|can't allocate memory|not enough memory",
        "memory: too small; lower --batch-size, --image-size or --num-workers",
    ),
)
