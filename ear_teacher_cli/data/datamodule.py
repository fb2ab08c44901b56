"""LightningDataModule: read the training and the validation manifest, and load batches of crops."""

import atexit
import os
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from ..config import TrainConfig
from ..config_fields import AUTO_NUMBER
from ..console import Console
from ..errors import ConfigError, EarTeachError, ManifestError
from ..files import printable
from ..platform import child_exits_unnoticed, usable_cores
from .augment import Augment, Views
from .crop_cache import FOLDER, CropCaches, bytes_of_caches
from .dataset import Batch, Draw, EarDataset, EpochSampler, collate, leave_stopping_to_the_parent
from .manifest import Manifest, has_drive, named_by_folders, print_summary, read_manifest
from .preprocessing import loading_of

_IDENTITY_METRICS = ("val/rank1", "val/eer")  # values of --monitor that need identities


def read_train_manifest(config: TrainConfig) -> Manifest:
    """Read the training list; a folder's subfolders are identities if the classes are. Raises ManifestError."""
    manifest = _read(config.train_metadata, config, "train_metadata")
    return named_by_folders(manifest) if config.pseudo_classes == "identity" else manifest


def read_val_manifest(config: TrainConfig) -> Manifest:
    """Read the validation list; a folder's subfolders are identities if the classes are, or if `monitor` needs them.

    Raises ManifestError.
    """
    manifest = _read(config.val_metadata, config, "val_metadata")
    need_identities = config.pseudo_classes == "identity" or config.monitor in _IDENTITY_METRICS
    return named_by_folders(manifest) if need_identities else manifest


def _read(path: str, config: TrainConfig, name: str) -> Manifest:
    """Read the list of the option `name`. Raises ManifestError; if the default list is missing, it says how to make
    it."""
    if path == getattr(TrainConfig, name) and not os.path.exists(path):
        raise ManifestError(
            f"{path}: no such file or folder; make it with `earteach prepare RAW data/preprocessed`, or name your list "
            f"with --{name.replace('_', '-')}"
        )
    manifest = read_manifest(path, config.root_dir, config.reading)
    return manifest.of_whole_images() if config.reads_whole_images else manifest


_SECONDS_TO_END = 5.0  # for workers, before they are killed
_started: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  # iterators -> process that started them


@atexit.register
def _stop_workers() -> None:
    """End the workers of iterators that a script left in the middle: multiprocessing would send them SIGTERM, which they
    ignore, and wait for ever."""
    for iterator, process in list(_started.items()):
        if process == os.getpid() and _has_workers(iterator):
            _stop(iterator)


def _has_workers(iterator: Any) -> bool:
    """Return whether an iterator has worker processes that were not ended yet."""
    return hasattr(iterator, "_shutdown_workers") and not iterator._shutdown


class _Timed:
    """An iterator of an EarLoader that adds up how long its batches are waited for."""

    def __init__(self, iterator: Any, loader: Any):
        self._iterator, self._loader = iterator, loader

    def __iter__(self) -> "_Timed":
        return self

    def __next__(self) -> Batch:
        start = time.monotonic()
        try:
            return next(self._iterator)
        finally:
            self._loader.waited += time.monotonic() - start

    def __len__(self) -> int:
        return len(self._iterator)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._iterator, name)


class EarLoader(DataLoader):
    """A DataLoader whose worker processes can be ended. `waited`: seconds that was waited for its batches."""

    waited = 0.0

    def __iter__(self) -> Any:
        iterator = super().__iter__()
        self.__dict__.setdefault("_iterators", weakref.WeakSet()).add(iterator)
        _started[iterator] = os.getpid()
        return _Timed(iterator, self)

    def stop_workers(self) -> None:
        """End the workers; kill those that are still running after some seconds (one may hang in a decoder)."""
        for iterator in filter(_has_workers, list(self.__dict__.get("_iterators", ()))):
            _stop(iterator)


def _stop(iterator: Any) -> None:
    """End an iterator's workers as torch's `_shutdown_workers` does, but kill instead of SIGTERM, which they ignore."""
    until = time.monotonic() + _SECONDS_TO_END
    pinning = getattr(iterator, "_pin_memory_thread", None)
    if pinning is not None:  # it reads from the workers' queue, and must end before them
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
            iterator._shutdown_workers()  # cleans up queues, and torch's list of processes


class EarDataModule(pl.LightningDataModule):
    """Training and validation crops.

    Takes a `TrainConfig`, or any of its fields as keywords: `EarDataModule(batch_size=32, num_workers=4)`.
    After `setup`: `train_set`, `clean_set` (the same without augmentation) and `val_set`. Batches: see dataset.collate.
    Validation batches have a `view`, an augmented crop that is the same in every epoch.
    """

    train_set: EarDataset
    clean_set: EarDataset
    val_set: EarDataset

    def __init__(self, config: TrainConfig | None = None, **options):
        super().__init__()
        self.config = config or TrainConfig(**options)
        self.console = Console(quiet=True)  # commands replace it by their own
        self._is_read = False
        self._caches: CropCaches | None = None
        self._loaders: weakref.WeakSet[EarLoader] = weakref.WeakSet()
        # Progress of the run that is resumed; steps are those of its unfinished epoch.
        self._epochs_completed, self._steps_done = 0, 0

    def setup(self, stage: str | None = None) -> None:
        """Read both manifests. Raises EarTeachError if one cannot be read or none of its images is found."""
        if not self._is_read:
            self._read()
        if self.trainer is not None and self._caches is None:  # without a trainer nothing is written
            self._open_caches()

    def teardown(self, stage: str) -> None:
        """Release the caches."""
        if self._caches is not None:
            self._caches = self.train_set.cache = self.clean_set.cache = self.val_set.cache = None

    def on_exception(self, exception: BaseException) -> None:
        """End the worker processes."""
        self.stop_workers()

    def stop_workers(self) -> None:
        """End the worker processes. The garbage collector would not: they ignore SIGTERM, and torch's queues are
        destroyed before their loader."""
        for loader in self._loaders:
            loader.stop_workers()

    def _open_caches(self) -> None:
        config, manifests = self.config, [self.train_set.manifest, self.val_set.manifest]
        kind, limit = self._cache_kind(), config.cache_limit * 1e9
        folder, preprocessing = Path(config.output_dir) / FOLDER, self.train_set.preprocessing
        self._caches = CropCaches(kind, folder, limit, self.trainer.num_devices, manifests, preprocessing)
        self.train_set.cache, self.val_set.cache = self._caches.caches
        self.clean_set.cache = self.train_set.cache
        if kind != "off":
            self.console.info(f"crops: {self._caches.summary}")

    def _cache_kind(self) -> str:
        config = self.config
        return "ram" if config.cache == "auto" and not config.images else config.cache

    def cache_bytes(self) -> dict[str, float]:
        """Return the bytes that cached crops may take in a run: in memory (`ram`) and on disk (`disk`)."""
        config, images = self.config, len(self.train_set) + len(self.val_set)
        return bytes_of_caches(self._cache_kind(), images, config.load_size, config.cache_limit * 1e9, config.devices)

    def _read(self) -> None:
        config = self.config
        preprocessing = loading_of(config)
        train, val = read_train_manifest(config), read_val_manifest(config)
        for manifest in (train, val):
            _refuse_wrong_root(manifest)
            print_summary(manifest, self.console)
        self._check(train, val, mirror=preprocessing.mirror)
        policy = config.augmentation if config.augment else None
        augment = Augment(preprocessing, policy, config.hflip) if config.augment or config.hflip else None
        views = Views(augment, augment if config.views == 2 else None, config.needs_clean_view)
        self.train_set = EarDataset(train, preprocessing, views=views, later=config.augment_on == "gpu")
        self.clean_set = EarDataset(train, preprocessing)
        self.val_set = EarDataset(val, preprocessing, views=Views(view=Augment(preprocessing, config.augmentation)))
        self._is_read = True

    def _check(self, train: Manifest, val: Manifest, mirror: bool) -> None:
        """Raise EarTeachError if the lists are not suited to the configuration."""
        config = self.config
        if not config.allow_overlap:
            _refuse_overlap(train, val)
        for manifest, purpose in ((train, "training"), (val, "validation")):
            if len(manifest) < 2:
                raise EarTeachError(f"{printable(manifest.source)}: has one ear; {purpose} needs at least 2")
        if config.monitor in _IDENTITY_METRICS:
            _require_identities(val, config.monitor)
        if config.side_policy != "as-is":
            for manifest in (train, val) if mirror else (train,):
                _require_sides(manifest, config.side_policy)

    def state_dict(self) -> dict[str, int]:
        """Return the progress of the run, for checkpoints."""
        completed = self.trainer.fit_loop.epoch_progress.current.processed
        return {"epochs_completed": completed, "steps_done": steps_into_epoch(self.trainer)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from the progress in a checkpoint."""
        self._epochs_completed, self._steps_done = state["epochs_completed"], state.get("steps_done", 0)

    def train_dataloader(self) -> DataLoader:
        """Return the loader of augmented training crops, shuffled."""
        return self._loader(self.train_set, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """Return the loader of validation crops with their views, in manifest order."""
        return self._loader(self.val_set, shuffle=False)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Augment a training batch on its device, if the loader's processes did not (--augment-on gpu)."""
        seeds = batch.pop("seeds", None)
        if seeds is not None and self.train_set.views is not None:
            batch |= self.train_set.views.of_batch(batch["pixels"], seeds)
        return batch

    def clean_dataloader(self, rows: range | None = None) -> DataLoader:
        """Return the loader of the training crops (of `rows`, if given) that k-means clusters: without augmentation, in
        manifest order, the same on every rank."""
        return self._loader(self.clean_set, shuffle=False, all_ranks=True, rows=rows)

    def _loader(
        self, dataset: EarDataset, *, shuffle: bool, all_ranks: bool = False, rows: range | None = None
    ) -> DataLoader:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer and not all_ranks else (0, 1)
        if self.config.batch_size == AUTO_NUMBER:
            raise ConfigError("batch_size", "auto is found by `earteach train` only", "give a number")
        workers = min(self.config.num_workers, max(1, usable_cores() // self.config.devices))
        sampler = EpochSampler(len(dataset), self.config.seed, shuffle=shuffle, rank=rank, world=world)
        # Lightning starts the first iterator, whose workers fetch ahead, before it calls set_epoch.
        sampler.set_epoch(self._epochs_completed)
        sampler.skip = self._steps_done * self.config.batch_size if shuffle else 0
        loader = EarLoader(
            dataset,
            batch_size=self.config.batch_size,
            # A last training batch of one image would have no batch statistics; a single batch is kept.
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
    """Return the number of steps done in the current epoch; 0 at its end."""
    return trainer.fit_loop.epoch_loop.batch_progress.current.processed % max(1, int(trainer.num_training_batches))


def _require_identities(manifest: Manifest, monitor: str) -> None:
    """Raise ConfigError unless there are two identities, one of them with several images."""
    named = Counter(ear for i in range(len(manifest)) if (ear := manifest.ear(i)))
    if not 1 < len(named) < named.total():
        raise ConfigError(
            "monitor",
            f"{monitor} needs identities with several images; {printable(manifest.source)} has {len(named)} in "
            f"{named.total()} images",
            "add an identity column (or folders, root/identity/image.jpg), or choose val/retrieval",
        )


def _require_sides(manifest: Manifest, policy: str) -> None:
    """Raise ManifestError if a row has no side."""
    unknown = [i for i in range(len(manifest)) if manifest.side(i) is None]
    if unknown:
        raise ManifestError(
            f"{manifest.where(unknown[0])}: has no side, like {len(unknown) - 1} other rows, but --side-policy "
            f"{policy} needs one; fill in the column (left or right), or leave --side-policy at as-is"
        )


def _refuse_overlap(train: Manifest, val: Manifest) -> None:
    """Raise ManifestError if an image is in both lists: validation would be meaningless."""
    fewer, more = sorted((train, val), key=len)
    images = set(_normalised_paths(fewer)).intersection(_normalised_paths(more))
    if images:
        shared = [i for i, image in enumerate(_normalised_paths(val)) if image in images]
        raise ManifestError(
            f"{val.where(shared[0])}: is also in the training list, as are {len(shared) - 1} more of the {len(val)} rows; "
            "remove them (earteach prepare splits without leaks), or add --allow-overlap"
        )


def _normalised_paths(manifest: Manifest) -> Iterator[str]:
    """Return each path in a form that does not depend on the list's root."""
    root = os.path.abspath(manifest.root or ".")
    return (os.path.normcase(os.path.normpath(os.path.join(root, path))) for path in manifest.paths)


def _refuse_wrong_root(manifest: Manifest) -> None:
    """Raise ManifestError if none of a sample of the images is found: one message instead of one per image."""
    sample = range(0, len(manifest), max(1, len(manifest) // 50))
    root, first = manifest.root or Path("."), manifest.paths[0]
    if not any(os.path.exists(os.path.join(root, manifest.paths[i])) for i in sample):
        advice = "give the folder that they are in with --root-dir"
        if has_drive(first) and not os.path.isabs(first):
            advice = "these are paths of Windows: make them relative to a folder, and give that folder with --root-dir"
        raise ManifestError(
            f"{printable(manifest.source)}: none of its images is under {printable(root)}/ (looked for "
            f"{printable(first)}); {advice}"
        )
