"""Lightning's data side: two manifests in, batches of crops out."""

import os
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from ..config import TrainConfig
from ..console import Console
from ..errors import ConfigError, EarTeachError, ManifestError
from ..files import printable
from ..platform import child_exits_unnoticed, usable_cores
from .augment import Augment
from .crop_cache import FOLDER, CropCaches
from .dataset import Draw, EarDataset, EpochSampler, collate, leave_stopping_to_the_parent
from .manifest import Manifest, has_drive, named_by_folders, read_manifest, tell
from .preprocessing import preprocessing_for


def read_train_manifest(config: TrainConfig) -> Manifest:
    """A folder is named by its folders where classes are to be identities. Raises ManifestError."""
    manifest = _read(config.train_metadata, config, "train_metadata")
    return named_by_folders(manifest) if config.pseudo_classes == "identity" else manifest


def read_val_manifest(config: TrainConfig) -> Manifest:
    """A folder is named by its folders where identities are classes, or what `monitor` needs. Raises ManifestError."""
    manifest = _read(config.val_metadata, config, "val_metadata")
    asked = config.pseudo_classes == "identity" or config.monitor in ("val/rank1", "val/eer")
    return named_by_folders(manifest) if asked else manifest


def _read(path: str, config: TrainConfig, name: str) -> Manifest:
    """Raises ManifestError; of a default list that is not there it says how to make one."""
    if path == getattr(TrainConfig, name) and not os.path.exists(path):
        raise ManifestError(
            f"{path}: no such file or folder; make it with `earteach prepare RAW data/preprocessed`, or name your list with "
            f"--{name.replace('_', '-')}"
        )
    return read_manifest(path, config.root_dir, config.reading)


_SECONDS_TO_END = 5.0


class EarLoader(DataLoader):
    """A DataLoader whose processes can be ended."""

    def __iter__(self) -> Any:
        iterator = super().__iter__()
        self.__dict__.setdefault("_iterators", weakref.WeakSet()).add(iterator)
        return iterator

    def stop_workers(self) -> None:
        """Tell them to end, and kill those that have not after some seconds (one may hang in a decoder)."""
        iterators = [
            i for i in self.__dict__.get("_iterators", ()) if hasattr(i, "_shutdown_workers") and not i._shutdown
        ]
        for iterator in iterators:
            _stop(iterator)


def _stop(iterator: Any) -> None:
    """What torch's own `_shutdown_workers` does, in its order, but for the kill: it sends SIGTERM, which the workers ignore."""
    until = time.monotonic() + _SECONDS_TO_END
    pinning = getattr(iterator, "_pin_memory_thread", None)
    if pinning is not None:  # it reads what the workers write, and must end before they do
        iterator._pin_memory_thread_done_event.set()
        iterator._worker_result_queue.put((None, None))
        pinning.join(_SECONDS_TO_END)
    iterator._workers_done_event.set()
    for number, running in enumerate(iterator._workers_status):
        if running:
            iterator._mark_worker_as_unavailable(number, shutdown=True)
    for worker in iterator._workers:
        worker.join(max(0.0, until - time.monotonic()))
    with child_exits_unnoticed():
        for worker in iterator._workers:
            if worker.is_alive():
                worker.kill()
                worker.join()
        if pinning is None or not pinning.is_alive():
            iterator._shutdown_workers()  # what is left to do: queues, and torch's list of processes


class EarDataModule(pl.LightningDataModule):
    """Training and validation crops.

    Takes a `TrainConfig`, or any of its fields as keywords: `EarDataModule(batch_size=32, num_workers=4)`.
    After `setup`: `train_set`, `val_set` (EarDataset). Batches: see dataset.collate. Validation batches carry
    `view`, an augmented copy that is the same every epoch.
    """

    def __init__(self, config: TrainConfig | None = None, **options):
        super().__init__()
        self.config = config or TrainConfig(**options)
        self.train_set: EarDataset | None = None
        self.val_set: EarDataset | None = None
        self.console = Console(quiet=True)  # the verb gives its own
        self._caches: CropCaches | None = None
        self._loaders: weakref.WeakSet[EarLoader] = weakref.WeakSet()
        self._epochs_completed, self._steps_done = (
            0,
            0,
        )  # of the run that is being resumed; steps: of its epoch under way

    def setup(self, stage: str | None = None) -> None:
        """Read both manifests. Raises EarTeachError if one cannot be read or none of its images is there."""
        if self.train_set is None:
            self._read()
        if self.trainer is not None and self._caches is None:  # before, nothing is written
            self._keep_crops()

    def teardown(self, stage: str) -> None:
        if self._caches is not None:
            self._caches = self.train_set.cache = self.clean_set.cache = self.val_set.cache = None

    def on_exception(self, exception: BaseException) -> None:
        """End the processes that load crops. Left to the garbage collector they would stay: they ignore SIGTERM, and
        torch's queues are taken apart before their loader is."""
        for loader in self._loaders:
            loader.stop_workers()

    def _keep_crops(self) -> None:
        config, manifests = self.config, [self.train_set.manifest, self.val_set.manifest]
        kind = "ram" if config.cache == "auto" and not config.images else config.cache
        folder, limit = Path(config.output_dir) / FOLDER, config.cache_limit * 1e9
        preprocessing = self.train_set.preprocessing
        self._caches = CropCaches(kind, folder, limit, self.trainer.num_devices, manifests, preprocessing)
        self.train_set.cache, self.val_set.cache = self._caches.caches
        self.clean_set.cache = self.train_set.cache
        if kind != "off":
            self.console.info(f"crops: {self._caches.words}")

    def _read(self) -> None:
        config = self.config
        preprocessing = preprocessing_for(config)
        train, val = read_train_manifest(config), read_val_manifest(config)
        for manifest in (train, val):
            _refuse_wrong_root(manifest)
            tell(manifest, self.console)
        if not config.allow_overlap:
            _refuse_overlap(train, val)
        if len(train) < 2:
            raise EarTeachError(f"{train.source}: holds one image; training needs at least 2")
        if len(val) < 2:
            raise EarTeachError(f"{val.source}: holds one image; validation needs at least 2")
        if config.monitor in ("val/rank1", "val/eer"):
            _require_identities(val, config.monitor)
        if config.side_policy != "as-is":
            for manifest in (train, val) if preprocessing.mirror else (train,):
                _require_sides(manifest, config.side_policy)
        varied = config.augment or config.hflip
        policy = config.augmentation if config.augment else None
        augment = Augment(preprocessing, policy, config.hflip) if varied else None
        self.train_set = EarDataset(
            train,
            preprocessing,
            augment=augment,
            view=augment if config.views == 2 else None,
            denoise=config.denoise,
        )
        self.clean_set = EarDataset(train, preprocessing)
        self.val_set = EarDataset(val, preprocessing, view=Augment(preprocessing, config.augmentation))

    def state_dict(self) -> dict[str, int]:
        completed = self.trainer.fit_loop.epoch_progress.current.processed
        return {"epochs_completed": completed, "steps_done": steps_into_epoch(self.trainer)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._epochs_completed, self._steps_done = state["epochs_completed"], state.get("steps_done", 0)

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.train_set, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.val_set, shuffle=False)

    def clean_dataloader(self, rows: range | None = None) -> DataLoader:
        """All training images (or those of `rows`) unaugmented in manifest order, on every rank the same: what
        k-means clusters."""
        return self._loader(self.clean_set, shuffle=False, all_ranks=True, rows=rows)

    def _loader(
        self, dataset: EarDataset, *, shuffle: bool, all_ranks: bool = False, rows: range | None = None
    ) -> DataLoader:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer and not all_ranks else (0, 1)
        workers = min(self.config.num_workers, max(1, usable_cores() // self.config.devices))
        sampler = EpochSampler(len(dataset), self.config.seed, shuffle=shuffle, rank=rank, world=world)
        # Lightning starts the first iterator, whose workers fetch ahead, before it tells the sampler the epoch.
        sampler.set_epoch(self._epochs_completed)
        sampler.skip = self._steps_done * self.config.batch_size if shuffle else 0
        loader = EarLoader(
            dataset,
            batch_size=self.config.batch_size,
            # a last training batch may be one image, which has no batch statistics; but one batch there must be
            drop_last=shuffle and len(sampler) > self.config.batch_size,
            collate_fn=collate,
            worker_init_fn=leave_stopping_to_the_parent,
            sampler=[Draw(row, 0) for row in rows] if rows else sampler,
            num_workers=workers,
            persistent_workers=workers > 0 and not all_ranks,
            timeout=self.config.load_timeout if workers else 0,
            pin_memory=torch.cuda.is_available(),
        )
        self._loaders.add(loader)
        return loader


def steps_into_epoch(trainer: pl.Trainer) -> int:
    """Steps done of the epoch under way; 0 at its end, whose checkpoint is of whole epochs."""
    return trainer.fit_loop.epoch_loop.batch_progress.current.processed % max(1, int(trainer.num_training_batches))


def _require_identities(manifest: Manifest, monitor: str) -> None:
    named = [ear for i in range(len(manifest)) if (ear := manifest.ear(i))]
    if not 1 < len(set(named)) < len(named):
        raise ConfigError(
            "monitor",
            f"{monitor} needs identities with several images; {printable(manifest.source)} names {len(set(named))} in "
            f"{len(named)} images",
            "add an identity column (or folders, root/identity/image.jpg), or choose val/retrieval",
        )


def _require_sides(manifest: Manifest, policy: str) -> None:
    unknown = [i for i in range(len(manifest)) if manifest.side(i) is None]
    if unknown:
        raise ManifestError(
            f"{manifest.where(unknown[0])}: has no side, nor have {len(unknown) - 1} other rows, and --side-policy {policy} "
            "needs one; fill in the column (left or right), or leave sides as-is"
        )


def _refuse_overlap(train: Manifest, val: Manifest) -> None:
    """Validation on images that are trained on says nothing."""
    learned = set(_images(train))
    shared = [i for i, image in enumerate(_images(val)) if image in learned]
    if shared:
        raise ManifestError(
            f"{val.where(shared[0])}: is in the training list, too, as are {len(shared) - 1} other of {len(val)} rows; "
            "remove them (earteach prepare splits without leaks), or add --allow-overlap"
        )


def _images(manifest: Manifest) -> Iterator[str]:
    """One form of each path, whatever the list's root is."""
    root = os.path.abspath(manifest.root)
    return (os.path.normcase(os.path.normpath(os.path.join(root, path))) for path in manifest.paths)


def _refuse_wrong_root(manifest: Manifest) -> None:
    """One clear line instead of thousands of missing images."""
    sample = range(0, len(manifest), max(1, len(manifest) // 50))
    if not any(os.path.exists(os.path.join(manifest.root, manifest.paths[i])) for i in sample):
        mend = "say where they are with --root-dir"
        if has_drive(manifest.paths[0]) and not os.path.isabs(manifest.paths[0]):
            mend = "these are paths of Windows: make them relative to a folder, and give that folder with --root-dir"
        raise ManifestError(
            f"{manifest.source}: none of its images is under {manifest.root}/ (looked for {manifest.paths[0]}); {mend}"
        )
