"""Ears as tensors, and the order they come in.

Everything random is a function of (seed, epoch, image): no state to save, the same for any number of
workers, and exact on resume. An image that cannot be read is never replaced: it comes back as its reason,
leaves its batch, and is counted (`collate`).
"""

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, DistributedSampler, get_worker_info

from ..errors import ImageError
from ..platform import ignore_stop_signals
from .augment import Augment
from .crop import load_crop
from .crop_cache import CropCache
from .manifest import Manifest
from .preprocessing import Preprocessing

Batch = dict[str, Any]


class Draw(NamedTuple):
    """One image in one epoch: its row in the manifest, and the seed of its augmentation."""

    index: int  # type: ignore[assignment]  # a field in the place of tuple.index, which nobody asks
    seed: int


class UnreadableImage(NamedTuple):
    index: int  # type: ignore[assignment]  # as in Draw
    reason: str
    detail: str


class EarDataset(Dataset):
    """Item: {'index': int, 'pixels': uint8 3,H,W [, 'view'][, 'target']}, or a UnreadableImage.

    `pixels` is augmented if `augment` is given; with `view` a second, augmented image comes beside it. With
    `denoise` there is a `target` of the first: moved as it is, but in its own light.
    """

    def __init__(
        self,
        manifest: Manifest,
        preprocessing: Preprocessing,
        *,
        augment: Augment | None = None,
        view: Augment | None = None,
        denoise: bool = False,
        cache: CropCache | None = None,
    ):
        self.cache = cache
        self.manifest, self.preprocessing, self.augment, self.view = manifest, preprocessing, augment, view
        self.denoise = denoise

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
        item = {"index": index, "pixels": pixels}
        if self.augment:
            item["pixels"], target = self.augment.with_target(pixels, seed)
            if self.denoise:
                item["target"] = target
        if self.view:  # the second of two augmented views has a seed of its own; beside a clean image, the image's
            item["view"] = self.view(pixels, derive_seed(seed, 1) if self.augment else seed)
        return item

    def _crop(self, index: int) -> np.ndarray:
        image, box = self.manifest.file(index), self.manifest.boxes[index]
        if self.cache is None:
            return load_crop(image, box, self.preprocessing)
        return self.cache.crop(index, image, lambda: load_crop(image, box, self.preprocessing))


def collate(items: list[dict[str, Any] | UnreadableImage]) -> Batch:
    """{'index': int64 B, 'pixels': uint8 B,3,H,W [, 'view'][, 'target'], 'bad': list of UnreadableImage}; B may be 0.

    In a worker the tensors lie in shared memory. Left to torch, they would be moved there by a thread whose errors
    (no room, mostly) reach nobody: the batch would be lost and the parent wait for it.
    """
    good = [item for item in items if not isinstance(item, UnreadableImage)]
    batch: Batch = {"bad": [item for item in items if isinstance(item, UnreadableImage)]}
    batch["index"] = torch.tensor([item["index"] for item in good], dtype=torch.int64)
    for name in ("pixels", "view", "target"):
        if good and name in good[0]:
            batch[name] = torch.stack([item[name] for item in good])
    if get_worker_info() is not None:
        for value in batch.values():
            if isinstance(value, torch.Tensor):
                value.share_memory_()
    return batch


def leave_stopping_to_the_parent(worker: int) -> None:
    """For a DataLoader's worker_init_fn. A terminal sends Ctrl-C, and a scheduler SIGTERM, to all processes: if a worker
    died of it, its parent could not finish the step and save. Workers end when their parent does, however it ends."""
    ignore_stop_signals()
    sys.excepthook = _say_unless_alone


def _say_unless_alone(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if not isinstance(error, ConnectionError | EOFError):  # the parent is gone, and takes no more batches
        sys.__excepthook__(kind, error, trace)


class EpochSampler(DistributedSampler):
    """Every row once an epoch, in an order that depends on (seed, epoch) alone; rank r takes every world-th.

    Lightning calls `set_epoch`, and leaves a DistributedSampler as it is. With several ranks the order is padded from its start, so that all have as many.
    """

    def __init__(self, length: int, seed: int, *, shuffle: bool, rank: int = 0, world: int = 1):
        super().__init__(range(length), num_replicas=world, rank=rank, shuffle=shuffle, seed=seed)
        self.length, self.world = length, world
        self.skip = 0  # rows of this rank that the next epoch alone leaves out: they were seen before an interruption

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch if self.shuffle else 0  # validation is the same every epoch

    def __len__(self) -> int:
        return -(-self.length // self.world)

    def __iter__(self) -> Iterator[Draw]:
        order = np.arange(self.length)
        if self.shuffle:
            np.random.Generator(np.random.PCG64([self.seed, self.epoch])).shuffle(order)
        order = np.resize(order, len(self) * self.world)
        skip, self.skip = self.skip, 0
        for index in order[self.rank :: self.world][skip:].tolist():
            yield Draw(index, derive_seed(self.seed, self.epoch, index))


def derive_seed(*parts: int) -> int:
    """A 63-bit seed from several numbers, well mixed."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)
