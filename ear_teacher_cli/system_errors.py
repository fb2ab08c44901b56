"""Messages for errors of torch and of the system, with the option that helps."""

import re

from .errors import EarTeachError


def explain_system_error(error: BaseException | None) -> EarTeachError | None:
    """Return a message for an error of torch about the machine; None if the error is of another kind.

    Errors that were raised while handling another one are searched down to the first (`__context__`).
    """
    while error is not None:
        text = str(error).strip()
        if "Traceback (most recent call last)" in text:  # of a DataLoader worker: its last line is the error
            text = text.splitlines()[-1]
        text = " ".join(text.split())
        for pattern, words in _EXPLANATIONS:
            if re.search(pattern, f"{type(error).__name__}: {text}", re.IGNORECASE):
                return EarTeachError(f"{words} ({text[:120]})" if text else words)
        error = error.__context__
    return None


# (pattern of "class: text", message). The first match counts: shared memory before memory.
_EXPLANATIONS = (
    (
        r"InvalidCxxCompiler|C\+\+ compiler|CxxCompileError|TritonMissing",
        "--compile: needs a working compiler (g++, and Triton on a GPU); install it, or leave the option out",
    ),
    (
        r"shared memory|bus error|\bshm\b|/torch_\d",
        "shared memory (/dev/shm): too small for the processes that load images; use --num-workers 0, or give the "
        "container more (docker run --shm-size 8g)",
    ),
    (
        r"No space left on device|File too large|Disk quota",
        "the disk, or the shared memory (/dev/shm) of the processes that load images, is full; make room, or use "
        "--num-workers 0",
    ),
    (
        r"DataLoader timed out",
        "loading images: no batch came in time; check the disk, raise --load-timeout, or find the image that hangs with "
        "earteach validate-data",
    ),
    (
        r"DataLoader worker .*(killed|exited)",
        "loading images: a worker process was killed, mostly because memory ran out; lower --num-workers or "
        "--batch-size",
    ),
    (
        r"^OutOfMemoryError|CUDA out of memory|CUBLAS_STATUS_ALLOC_FAILED",
        "GPU memory: too small; lower --batch-size or --image-size, add --gradient-checkpointing, or use --precision "
        "16-mixed",
    ),
    (
        r"does not have a deterministic implementation|CUBLAS_WORKSPACE_CONFIG",
        "--deterministic: the GPU has no deterministic algorithm for an operation of this model; leave the option out",
    ),
    (
        r"Too many open files|received \d+ items of ancdata",
        "open files: more than this shell's limit; raise it (ulimit -n 65536), or lower --num-workers",
    ),
    (
        r"connection (closed|reset) by peer|NCCL error|gloo/transport|^Dist(Store|Network|Backend)Error",
        "another process of this run ended; its last line names the cause. Then continue with earteach resume, or "
        "embed --resume",
    ),
    (
        r"^MemoryError|can't allocate memory|not enough memory",
        "memory: too small; lower --batch-size, --image-size or --num-workers",
    ),
)
