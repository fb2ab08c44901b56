"""Crops from the second epoch on, against the first, on one core, without augmentation (which is the same for both)."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from bench import Line, in_turn, rate, speed_up
from measure_pictures import PREPROCESSING
from photos import drawn, enlarged

from ear_teacher_cli.data.crop_cache import CropCaches
from ear_teacher_cli.data.dataset import EarDataset


def measure(folder: Path, rounds: int, quick: bool) -> Iterator[Line]:
    count = 3 if quick else 24
    paths, boxes = enlarged(folder, "12 MP", count)
    names = [Path(path).name for path in paths]
    manifest = replace(
        drawn(folder),
        root=Path(paths[0]).parent,
        paths=names,
        boxes=boxes,
        rows=range(count),
        identities=None,
        sides=None,
    )
    for kind, words in (("ram", "in memory"), ("disk", "on disk")):
        number = iter(range(1_000_000))
        held: list = []

        def first(kind=kind, number=number, held=held) -> None:
            held[:] = [CropCaches(kind, folder / f"{kind}{next(number)}", 1e9, 1, [manifest], PREPROCESSING)]
            epoch(held[0])

        def epoch(caches: CropCaches) -> None:
            dataset = EarDataset(manifest, PREPROCESSING, cache=caches.caches[0])
            for index in range(count):
                assert "pixels" in dataset[index]

        def later(held=held) -> None:
            epoch(held[0])

        seconds = in_turn({"first": first, "later": later}, rounds)
        yield Line("cache", f"12 MP photos, {words}", "the first epoch", speed_up(seconds, "later", "first"), 20,
                   rate(seconds["later"], count, "crops"), rate(seconds["first"], count, "crops"))  # fmt: skip
