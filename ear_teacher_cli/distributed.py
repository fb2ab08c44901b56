"""The processes of one run: the rank of this one, how many a launcher started, and how `embed` divides the images.

During training Lightning handles the communication; `embed` uses `distributed_context`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from .errors import EarTeachError
from .files import short_message


def is_first_process() -> bool:
    """Return whether this is the process that the user started, or the first of those that torchrun or SLURM started.
    Lightning starts the other ranks by running the same command again."""
    ranks = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
    return all(os.environ.get(name, "").strip() in ("", "0") for name in ranks)


def started_processes() -> int | None:
    """Return how many processes torchrun or SLURM's srun started, this one included; None if neither did."""
    for mark, count in (("TORCHELASTIC_RUN_ID", "WORLD_SIZE"), ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_TASKS")):
        if mark in os.environ and os.environ.get(count, "").isdigit():
            number = int(os.environ[count])
            # a batch script itself is a step of one task, however many the job starts
            return number if mark == "TORCHELASTIC_RUN_ID" or number > 1 else None
    return None


def rows_of_other_ranks(rows: Any, most: int) -> Any:
    """Return the rows of the other ranks' tensors, with their gradients, in a training step; None without other ranks.

    `rows` N,D, N at most `most` on every rank (images that cannot be read are left out of a batch). Returns
    (world - 1) * most,D: what is missing is zeros, so that no rank has to wait for the numbers of rows.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    import torch

    class Gathered(torch.autograd.Function):
        """The rows of all ranks, world,N,D; the gradient of a rank's own is the sum of what all ranks compute for them."""

        @staticmethod
        def forward(ctx: Any, mine: Any) -> Any:
            found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
            dist.all_gather(found, mine.contiguous())
            return torch.stack(found)

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            gradient = gradient.contiguous()
            dist.all_reduce(gradient)
            return gradient[dist.get_rank()]

    everything = Gathered.apply(torch.nn.functional.pad(rows, (0, 0, 0, most - len(rows))))
    return torch.cat([part for rank, part in enumerate(everything) if rank != dist.get_rank()])


_TO_START = timedelta(minutes=10)
_TO_FINISH = timedelta(days=7)  # ranks wait for the slowest one; the lost connection of an ended one raises at once


@dataclass(frozen=True)
class Ranks:
    """The place of this process among `world` processes: its `rank`, from 0."""

    rank: int = 0
    world: int = 1
    local: int = 1  # processes on this machine
    group: Any = None  # of torch.distributed

    def block(self, items: int, batch_size: int) -> range:
        """Return this rank's share of the items: consecutive whole batches, the same that a single process would make."""
        batches = -(-items // batch_size)
        first, last = (batches * number // self.world * batch_size for number in (self.rank, self.rank + 1))
        return range(first, min(last, items))

    def of_first(self, value: Any) -> Any:
        """Return the `value` that rank 0 has, on all ranks. Raises RuntimeError if one of them has ended."""
        values = [value]
        if self.world > 1:
            import torch.distributed as dist

            dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def wait(self) -> None:
        """Wait for all other ranks to call this. Raises RuntimeError if one of them has ended."""
        if self.world > 1:
            import torch.distributed as dist

            dist.barrier(self.group)


@contextmanager
def distributed_context() -> Iterator[Ranks]:
    """Connect the processes of this launch (gloo), each with its own GPU where there are GPUs."""
    place = _place()
    if place is None or place.world_size() == 1:
        yield Ranks()
        return
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(place.local_rank() % torch.cuda.device_count())
    os.environ.update(MASTER_ADDR=place.main_address, MASTER_PORT=str(place.main_port))
    rank, world = place.global_rank(), place.world_size()
    dist.init_process_group("gloo", timeout=_TO_START, rank=rank, world_size=world)
    try:
        local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or 1)
        yield Ranks(rank, world, local, dist.new_group(backend="gloo", timeout=_TO_FINISH))
    finally:
        dist.destroy_process_group()


def _place() -> Any:
    """Return Lightning's description of the launch (rank, world size, addresses); None without a launcher."""
    if started_processes() is None:
        return None
    from lightning_fabric.plugins import environments  # seconds to import

    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun may itself have been started by SLURM
        return environments.TorchElasticEnvironment()
    try:
        return environments.SLURMEnvironment()
    except RuntimeError as error:
        raise EarTeachError(
            f"SLURM: {short_message(error)}; start it as Lightning requires (srun --ntasks-per-node N)"
        ) from error
