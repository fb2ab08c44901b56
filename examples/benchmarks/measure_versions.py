"""Time of whole commands, compared with another version of earteach: the one in the folder EARTEACH_BEFORE.

    git worktree add ../before COMMIT
    EARTEACH_BEFORE=../before python examples/benchmarks/bench.py versions

Both run in the same environment, on the same files, in turn, with the variables that each sets itself. Options that both versions understand give the same work.
Without EARTEACH_BEFORE there are no rows.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import timm
import torch
from bench import Line, Work, in_turn
from photos import crops, drawn, enlarged
from safetensors.torch import save_file

from ear_teacher_cli.config import Reading
from ear_teacher_cli.data.manifest import Box, read_manifest

SIDE = 96
SET_BY_BENCH = ("GOMP_SPINCOUNT", "PYTHONPATH")


def measure(folder: Path, rounds: int, quick: bool) -> Iterator[Line]:
    """Yield the rows of the table. `quick`: with tiny inputs."""
    before = os.environ.get("EARTEACH_BEFORE")
    if not before:
        return
    here = Path(__file__).resolve().parents[2]
    shown = _output_of(Path(before), "-c", "import ear_teacher_cli as e; print(e.__version__, e.__file__)").split()
    version, place = shown[0], Path(shown[1])
    assert place.is_relative_to(Path(before).resolve()), f"EARTEACH_BEFORE: {before} is not a checkout of earteach"
    for what, count, unit, arguments in _commands(folder, quick):
        functions = {"ours": _run(here, arguments), "before": _run(Path(before), arguments)}
        seconds = in_turn(functions, rounds)
        yield Work("versions", what, count, unit).compare(seconds, "before", f"earteach {version}")


def _commands(folder: Path, quick: bool) -> Iterator[tuple[str, int, str, list[str]]]:
    """Yield (what it does, number of items, what these are, the command's arguments)."""
    ears = drawn(folder, people=3 if quick else 24)
    backbone, epochs = ("test_convnext", 1) if quick else ("convnext_atto", 3)
    yield "earteach --help", 1, "runs", ["--help"]
    lists = [f"--{name}-metadata={_named_boxes(folder / 'ears' / f'{name}_teacher.npy')}" for name in ("train", "val")]
    recipe = ["--preset=seed", "--pseudo-classes=batch", "--precision=32-true", "--no-pretrained", "--num-workers=1"]
    options = [f"--backbone={backbone}", f"--image-size={SIDE}", "--batch-size=16", f"--max-epochs={epochs}"]
    runs = [f"--output-dir={folder / 'runs'}", "--overwrite", "--quiet"]
    what = f"train, {backbone}, {SIDE} px, {len(ears)} images, {epochs} epochs"
    yield what, epochs * len(ears), "images", ["train", *lists, *recipe, *options, *runs]
    for model, count, photos in (("convnext_nano", 320, "crops"), ("convnext_nano", 96, "crops"), ("", 48, "12 MP")):
        model = "test_convnext" if quick or not model else model
        count = count // 12 if quick else count
        place = folder / f"{model}-{count}"
        paths = (crops(place, count) if photos == "crops" else enlarged(place, photos, count))[0]
        weights = folder / f"{model}.safetensors"
        torch.manual_seed(0)
        save_file(timm.create_model(model, num_classes=0).state_dict(), weights)
        options = [f"--weights={weights}", f"--backbone={model}", "--image-size=224", "--overwrite", "--quiet"]
        images = "200 px crops" if photos == "crops" else "12 MP photos"
        command = ["embed", str(Path(paths[0]).parent), str(folder / "rows.npy"), *options]
        yield f"embed, {model}, {count} {images}", count, "images", command
    paths, boxes = enlarged(folder, "2 MP", 32 if quick else 384)
    manifest = _list_of([Path(path).name for path in paths], boxes, Path(paths[0]).parent / "list.csv")
    yield f"validate-data, {len(paths)} 2 MP photos", len(paths), "photos", ["validate-data", str(manifest)]


def _named_boxes(source: Path) -> Path:
    """Write a list as CSV, whose columns name the order of the boxes; return its path."""
    ears = read_manifest(source, reading=Reading(box_format="xyxy"))  # few boxes do not tell
    return _list_of(ears.paths, ears.boxes, source.with_suffix(".csv"))


def _list_of(paths: Iterable[str], boxes: Iterable[Box | None], path: Path) -> Path:
    with open(path, "w", encoding="utf-8") as file:
        file.write("image_path,x1,y1,x2,y2\n")
        file.writelines(f"{name},{','.join(map(str, box))}\n" for name, box in zip(paths, boxes, strict=True))
    return path


def _run(checkout: Path, arguments: list[str]) -> Callable[[], None]:
    """Return a function that runs the command of the version in `checkout`."""
    return lambda: _output_of(checkout, "-m", "ear_teacher_cli", *arguments) and None


def _output_of(checkout: Path, *arguments: str) -> str:
    """Return what a Python with this version of earteach prints."""
    environment = {name: value for name, value in os.environ.items() if name not in SET_BY_BENCH}
    command = [sys.executable, *arguments]  # Python looks for packages in the working directory first
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=checkout).stdout
