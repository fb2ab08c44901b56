"""The processes that share one `embed`, when torchrun or SLURM started several. (Training's are Lightning's affair.)"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..errors import EarTeachError
from ..files import brief
from ..machine import started_processes

_TO_START = timedelta(minutes=10)
_TO_FINISH = timedelta(days=7)  # ranks wait for the slowest; one that is gone is noticed at once, by its connection


@dataclass(frozen=True)
class Ranks:
    """This process is number `rank` of `world`."""

    rank: int = 0
    world: int = 1
    local: int = 1  # processes on this machine
    group: Any = None  # of torch.distributed

    def block(self, items: int, batch_size: int) -> range:
        """This rank's items: consecutive, in whole batches, so that every batch is the one a single process would make."""
        batches = -(-items // batch_size)
        first, last = (batches * number // self.world * batch_size for number in (self.rank, self.rank + 1))
        return range(first, min(last, items))

    def any(self, mine: bool) -> bool:
        """Whether it is so for one of them."""
        everything = [mine] * self.world
        if self.world > 1:
            dist.all_gather_object(everything, mine, self.group)
        return any(everything)

    def wait(self) -> None:
        """For all the others to get here. Raises RuntimeError if one of them has ended."""
        if self.world > 1:
            dist.barrier(self.group)


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the processes of this launch, each with a GPU of its own where there are GPUs."""
    place = _place()
    if place is None or place.world_size() == 1:
        yield Ranks()
        return
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
    """Lightning's word for how this process was started; None if by hand."""
    if started_processes() is None:
        return None
    from lightning_fabric.plugins import environments  # seconds to import

    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun may itself have been started by SLURM
        return environments.TorchElasticEnvironment()
    try:
        return environments.SLURMEnvironment()
    except RuntimeError as error:
        raise EarTeachError(
            f"SLURM: {brief(error)}; start it as Lightning wants it (srun --ntasks-per-node N)"
        ) from error
