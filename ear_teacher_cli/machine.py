"""What this machine offers."""

import os


def usable_cores() -> int:
    """CPU cores this process may use (fewer than the machine's in a container)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
