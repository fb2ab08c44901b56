"""Which process of a run this is, and what the system's errors mean."""

import os
import re

from .errors import EarTeachError


def is_first_process() -> bool:
    """Whether this is the process the user started, or the first of those that torchrun or SLURM did. Lightning starts
    the other ranks by running the same command again."""
    ranks = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
    return all(os.environ.get(name, "").strip() in ("", "0") for name in ranks)


def started_processes() -> int | None:
    """How many processes torchrun or SLURM's srun started, this one among them; None if neither did."""
    for mark, count in (("TORCHELASTIC_RUN_ID", "WORLD_SIZE"), ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_TASKS")):
        if mark in os.environ and os.environ.get(count, "").isdigit():
            number = int(os.environ[count])
            # a batch script is itself a step of one task, whatever the job may start
            return number if mark == "TORCHELASTIC_RUN_ID" or number > 1 else None
    return None


def stated(given: str | None, name: str) -> str:
    """What a card says of `name` (consent, license): what was given, else the environment's EARTEACH_NAME."""
    return given or os.environ.get(f"EARTEACH_{name.upper()}") or "not stated"


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
                return EarTeachError(f"{words} ({text[:120]})" if text else words)
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
        r"connection (closed|reset) by peer|NCCL error|gloo/transport|^Dist(Store|Network|Backend)Error",
        "another process of this run ended; what it said tells why. Then go on with earteach resume, or embed --resume",
    ),
    (
        r"^MemoryError|can't allocate memory|not enough memory",
        "memory: too small; lower --batch-size, --image-size or --num-workers",
    ),
)
