"""Dataset of ears as tensors, its sampler, and the collation of batches.

All randomness is a function of (seed, epoch, image): no state is saved, the number of workers does not matter, and
resuming is exact. An image that cannot be read is never replaced: the dataset returns the reason, and `collate` leaves
it out of the batch.
"""

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, DistributedSampler, get_worker_info

from ..errors import ImageError
from ..platform import ignore_stop_signals
from .augment import Views, derive_seed
from .crop import load_crop
from .crop_cache import CropCache
from .manifest import Manifest
from .preprocessing import Preprocessing

Batch = dict[str, Any]
_BLOCK = 1 << 16  # rows whose numbers are Python's at a time: they take 40 bytes each


class Draw(NamedTuple):
    """One image in one epoch: its row in the manifest, and the seed of its augmentation."""

    index: int  # type: ignore[assignment]  # replaces the method tuple.index, which is not used
    seed: int


class UnreadableImage(NamedTuple):
    """An image that cannot be read, or a box that cannot be cut: its row, and `reason` and `detail` of the
    ImageError."""

    index: int  # type: ignore[assignment]  # as in Draw
    reason: str
    detail: str


class EarDataset(Dataset):
    """Ears of a manifest. Item: {'index': int, 'pixels': uint8 3,H,W, ...}, or an UnreadableImage.

    With `views`, pixels are augmented, and the item has the other views (augment.Views). `later`: the item has the crop
    and the 'seed' instead, and the views are made when the batch is on its device (EarDataModule).
    """

    def __init__(
        self,
        manifest: Manifest,
        preprocessing: Preprocessing,
        *,
        views: Views | None = None,
        later: bool = False,
        cache: CropCache | None = None,
    ):
        self.manifest, self.preprocessing, self.views, self.later = manifest, preprocessing, views, later
        self.cache = cache

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, draw: Draw | int) -> dict[str, Any] | UnreadableImage:
        index, seed = draw if isinstance(draw, Draw) else Draw(draw, derive_seed(0, 0, draw))
        try:
            crop = self._crop(index)
        except ImageError as error:
            return UnreadableImage(index, error.reason, error.detail)
        pixels = torch.from_numpy(crop)
        if self.preprocessing.mirror and self.manifest.side(index) == "right":
            pixels = pixels.flip(-1)
        if self.later:
            return {"index": index, "pixels": pixels, "seed": seed}
        return {"index": index, **(self.views(pixels, seed) if self.views else {"pixels": pixels})}

    def _crop(self, index: int) -> np.ndarray:
        image, box = self.manifest.file(index), self.manifest.boxes[index]
        if self.cache is None:
            return load_crop(image, box, self.preprocessing)
        return self.cache.crop(index, image, lambda: load_crop(image, box, self.preprocessing))


def collate(items: list[dict[str, Any] | UnreadableImage]) -> Batch:
    """Return {'index': int64 B, 'pixels': uint8 B,3,H,W [, 'view'][, 'clean'][, 'seeds': list of int], 'bad': list of
    UnreadableImage}.

    B may be 0; then there are no pixels. In a worker the tensors are moved to shared memory here: torch would do it in
    a thread whose errors (usually no room) are lost, and the parent would wait for the batch.
    """
    readable = [item for item in items if not isinstance(item, UnreadableImage)]
    batch: Batch = {"bad": [item for item in items if isinstance(item, UnreadableImage)]}
    batch["index"] = torch.tensor([item["index"] for item in readable], dtype=torch.int64)
    for name in ("pixels", "view", "clean"):
        if readable and name in readable[0]:
            batch[name] = torch.stack([item[name] for item in readable])
    if readable and "seed" in readable[0]:
        batch["seeds"] = [item["seed"] for item in readable]
    if get_worker_info() is not None:
        for value in batch.values():
            if isinstance(value, torch.Tensor):
                value.share_memory_()
    return batch


def leave_stopping_to_the_parent(worker: int) -> None:
    """Ignore stop signals in a worker (worker_init_fn of a DataLoader).

    A terminal sends Ctrl-C, and a scheduler SIGTERM, to all processes: if workers ended, the parent could not finish
    its step and save. Workers end when their parent does.
    """
    ignore_stop_signals()
    sys.excepthook = _print_unless_parent_ended


def _print_unless_parent_ended(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if not isinstance(error, ConnectionError | EOFError):  # which sending a batch raises if the parent has ended
        sys.__excepthook__(kind, error, trace)


class EpochSampler(DistributedSampler):
    """Visit every row once per epoch, in an order that depends on (seed, epoch) only; rank r takes each `world`-th.

    With several ranks the order is padded with its beginning, so that all have the same number of rows. It is a
    DistributedSampler because Lightning then calls `set_epoch` and does not replace it.
    """

    def __init__(self, length: int, seed: int, *, shuffle: bool, rank: int = 0, world: int = 1):
        super().__init__(range(length), num_replicas=world, rank=rank, shuffle=shuffle, seed=seed)
        self.length, self.world = length, world
        self.skip = 0  # rows of this rank to leave out in the next epoch: they were used before an interruption

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, counted from 0; ignored without shuffling, so that validation is the same in every epoch."""
        self.epoch = epoch if self.shuffle else 0

    def __len__(self) -> int:
        return -(-self.length // self.world)

    def __iter__(self) -> Iterator[Draw]:
        order = np.arange(self.length)
        if self.shuffle:
            np.random.Generator(np.random.PCG64([self.seed, self.epoch])).shuffle(order)
        order = np.resize(order, len(self) * self.world)
        skip, self.skip = self.skip, 0
        order = order[self.rank :: self.world][skip:]
        for start in range(0, len(order), _BLOCK):
            for index in order[start : start + _BLOCK].tolist():
                yield Draw(index, derive_seed(self.seed, self.epoch, index))
