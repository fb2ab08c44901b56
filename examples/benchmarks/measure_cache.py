"""Speed of cached crops from the second epoch on, compared with the first epoch, on one core.

Without augmentation, which takes the same time in both.
"""

from collections.abc import Iterator
from itertools import count
from pathlib import Path

from bench import Line, Work, in_turn
from measure_images import PREPROCESSING
from photos import enlarged, manifest_of

from ear_teacher_cli.data.crop_cache import CropCaches
from ear_teacher_cli.data.dataset import EarDataset


def measure(folder: Path, rounds: int, quick: bool) -> Iterator[Line]:
    """Yield the rows of the table. `quick`: with tiny inputs."""
    images = 3 if quick else 24
    manifest = manifest_of(*enlarged(folder, "12 MP", images))
    for kind, place in (("ram", "in memory"), ("disk", "on disk")):
        numbers = count()
        caches: list[CropCaches] = []

        def first_epoch(kind=kind, numbers=numbers, caches=caches) -> None:
            caches[:] = [CropCaches(kind, folder / f"{kind}{next(numbers)}", 1e9, 1, [manifest], PREPROCESSING)]
            epoch(caches)

        def epoch(caches=caches) -> None:
            dataset = EarDataset(manifest, PREPROCESSING, cache=caches[0].caches[0])
            for index in range(images):
                assert "pixels" in dataset[index]

        seconds = in_turn({"first": first_epoch, "ours": epoch}, rounds)
        work = Work("cache", f"12 MP photos, {place}", images, "crops")
        yield work.compare(seconds, "first", "the first epoch", 20)
