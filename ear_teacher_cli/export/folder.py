"""The format folder: weights, their description for timm (`local-dir:`) and for students, and a model card.

features.json holds the mean and variance of each channel of the feature maps, for distillation.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from .. import run_folder
from ..data.data_card import stated
from ..data.manifest import Manifest, read_manifest
from ..data.preprocessing import normalise, pretrained_cfg_of
from ..embedding.embedder import crops_of
from ..errors import EarTeachError, ManifestError, WeightsError
from ..files import printable, short_message
from ..model.checkpoint import Checkpoint
from ..model.export_format import CARD, CONFIG, FEATURES, PREPROCESS, WEIGHTS, About, whitening_beside
from ..model.feature_maps import MapStatistics, map_model, statistics
from ..model.golden import TOLERANCE, draw, relative_difference
from ..model.teacher import input_size_argument
from . import safetensors
from .checks import Check
from .format import ExportJob, Opened, Written
from .model_card import Stated, model_card

FILES = (WEIGHTS, whitening_beside(Path(WEIGHTS)).name, CONFIG, PREPROCESS, FEATURES, CARD)


def write(folder: Path, job: ExportJob) -> Written:
    """Write all files of an export into an empty folder, open it with timm and compare.

    Raises ManifestError if the images for the statistics cannot be listed, EarTeachError if none can be read,
    WeightsError if outputs differ.
    """
    about, options, checkpoint = job.about, job.options, job.checkpoint
    maps = map_model(job.embedder.backbone, about.architecture, about.preprocessing.image_size)
    measured, images = _measure_maps(maps, job, _list_images(job))
    written = safetensors.write(folder / WEIGHTS, job)
    if job.whitening:
        whitening_beside(folder / WEIGHTS).write_bytes(job.whitening)
    for name, content in sidecars(about, measured, images).items():
        _write_json(folder / name, content)
    answers = Stated(stated(options.consent, "consent"), stated(options.license, "license"), options.ema, options.half)
    card = model_card(about, checkpoint, measured, images, *_metrics_of(checkpoint), answers)
    (folder / CARD).write_text(card, encoding="utf-8")
    _compare_with_timm(folder, maps, job)
    return Written(written.difference, written.proof, maps.feature_info.reduction())


def verify(folder: Path) -> tuple[list[Check], Opened | None]:
    """Check the weights, the files beside them, and that timm opens the folder.

    timm gets config.json only if its content is the one that export-backbone writes for these weights: a hostile one
    could build a model of any size.
    """
    checks, opened = safetensors.verify(folder / WEIGHTS)
    assert opened is not None and opened.backbone is not None
    about, backbone = opened.about, opened.backbone
    maps = map_model(backbone, about.architecture, about.preprocessing.image_size)
    beside = _check_sidecars(folder, about, maps)
    has_card = (folder / CARD).is_file()
    checks += [*beside, Check(CARD, "the model card" if has_card else "does not exist", has_card)]
    if next(check.passed for check in beside if check.what == CONFIG):
        checks.append(_check_local_dir(folder, about, backbone, maps))
    return checks, opened


def open(folder: Path) -> Opened:
    """Open the weights of an exported folder. Raises WeightsError if they do not match their fingerprint."""
    return safetensors.open(folder / WEIGHTS)


def sidecars(about: About, maps: list[MapStatistics], images: int) -> dict[str, dict[str, Any]]:
    """Return the content of config.json (timm's), preprocess.json and features.json. `images`: behind the statistics.

    `num_classes` is 0 at both places of config.json, otherwise timm looks for a classifier. The sha256 in features.json
    is of its other entries: no other value tells whether the statistics are those that were measured.
    """
    published, preprocessing = pretrained_cfg_of(about.architecture), about.preprocessing
    model_args = input_size_argument(about.architecture, preprocessing.image_size)
    config = {
        "architecture": about.architecture,
        "num_classes": 0,
        "num_features": about.embedding_dim,
        **({"model_args": model_args} if model_args else {}),
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [3, preprocessing.image_size, preprocessing.image_size],
            "fixed_input_size": published.fixed_input_size,
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "interpolation": preprocessing.interpolation,
            "crop_pct": 1.0,  # no centre crop by timm: it would cut the helix off
            "crop_mode": "border" if preprocessing.pad else "squash",
            "first_conv": published.first_conv,
            "classifier": published.classifier,
        },
    }
    preprocess = {**preprocessing.as_dict(), "embedding_dim": about.embedding_dim, "fingerprint": about.fingerprint}
    features = {"pictures": images, "fingerprint": about.fingerprint, "maps": [asdict(stage) for stage in maps]}
    features["sha256"] = hashlib.sha256(json.dumps(features, sort_keys=True).encode()).hexdigest()
    # through JSON, so that it compares equal with what is read from the files
    return json.loads(json.dumps({CONFIG: config, PREPROCESS: preprocess, FEATURES: features}))


def _list_images(job: ExportJob) -> Manifest:
    options, config = job.options, job.checkpoint.config
    try:
        if options.val_metadata:
            manifest = read_manifest(options.val_metadata, options.root_dir, options.reading)
        else:
            manifest = read_manifest(config.val_metadata, options.root_dir or config.root_dir, config.reading)
        return manifest.of_whole_images() if config.reads_whole_images else manifest
    except ManifestError as error:
        if options.val_metadata:
            raise
        raise ManifestError(
            f"{error} (a folder holds statistics over the run's validation images; or name others with --val-metadata)"
        ) from error


def _measure_maps(maps: nn.Module, job: ExportJob, manifest: Manifest) -> tuple[list[MapStatistics], int]:
    """Return the statistics of the feature maps over the crops of `manifest`, and how many could be read.

    Raises EarTeachError if none could.
    """
    options, preprocessing = job.options, job.about.preprocessing
    timeout = job.checkpoint.config.load_timeout
    count = 0

    def batches() -> Iterator[torch.Tensor]:
        nonlocal count
        for good, pixels, _ in crops_of(
            manifest, preprocessing, options.batch_size, options.num_workers, timeout, job.console, "maps of"
        ):
            if pixels is not None:
                count += len(good)
                yield normalise(pixels, preprocessing)

    measured = statistics(maps, batches())
    if not measured:
        raise EarTeachError(f"{printable(manifest.source)}: not one image could be read; check --root-dir")
    return measured, count


def _metrics_of(checkpoint: Checkpoint) -> tuple[dict[str, str], dict[str, str]]:
    """Return the rows of metrics.csv for the checkpoint's epoch and for before training; empty where there are none."""
    try:
        rows = run_folder.read_metrics(checkpoint.path.parent.parent / run_folder.METRICS)
    except (OSError, EarTeachError):  # missing or damaged
        rows = []
    by_epoch = {row.get("epoch"): row for row in rows}
    return by_epoch.get(str(checkpoint.epoch), {}), by_epoch.get("0", {})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1)
    text = re.sub(r"\[[\s\d.e+,-]+\]", lambda numbers: " ".join(numbers[0].split()), text)  # on one line
    path.write_text(text + "\n", encoding="utf-8")


def _read_json(path: Path) -> Any:
    """Read a JSON file. Raises WeightsError."""
    if not path.is_file():  # reading a FIFO would block
        raise WeightsError(f"{printable(path)}: no such file; export the folder again")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{printable(path)}: not JSON ({short_message(error)}); export the folder again") from error


def _open_local_dir(folder: Path) -> tuple[nn.Module, nn.Module]:
    """Return (backbone, feature maps) of an exported folder with timm's own loader, as users open it."""
    log = logging.getLogger("timm")
    level = log.level
    log.setLevel(logging.ERROR)  # otherwise it reports the head, which the maps do not have
    try:
        whole = timm.create_model(f"local-dir:{folder}", pretrained=True)
        maps = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True)
    finally:
        log.setLevel(level)
    return whole.eval(), maps.eval()


def _compare_with_timm(folder: Path, maps: nn.Module, job: ExportJob) -> None:
    """Raise WeightsError unless timm opens the folder, and backbone and maps give exactly the outputs of the
    checkpoint."""
    try:
        opened = _open_local_dir(folder)
    except (RuntimeError, ValueError, OSError) as error:
        raise WeightsError(
            f"{printable(job.out)}: timm does not open it ({printable(error)}); nothing was written"
        ) from error
    for loaded, own in zip(opened, (job.embedder.backbone, maps), strict=True):
        difference = safetensors.largest_difference(loaded, own, job.about)
        if difference != 0:
            raise WeightsError(
                f"{printable(job.out)}: outputs of timm's model differ by {difference:g}; nothing was written"
            )


def _check_sidecars(folder: Path, about: About, maps: nn.Module) -> list[Check]:
    """Check config.json, preprocess.json and features.json against what export-backbone writes for these weights."""
    found = {name: _read_json(folder / name) for name in (CONFIG, PREPROCESS, FEATURES)}
    info = maps.feature_info
    described = list(zip(info.module_name(), info.reduction(), info.channels(), strict=True))
    try:
        images = found[FEATURES]["pictures"]
        stages = [MapStatistics(**stage) for stage in found[FEATURES]["maps"]]
        plausible = isinstance(images, int) and images > 0
        plausible &= [(stage.name, stage.stride, stage.channels) for stage in stages] == described
        plausible &= all(
            len(stage.mean) == len(stage.variance) == stage.channels and min(stage.variance) >= 0 for stage in stages
        )
        expected = sidecars(about, stages, images)
    except (KeyError, TypeError, ValueError, RecursionError):
        plausible, images, expected = False, None, sidecars(about, [], 0)
    strides = "/".join(str(stride) for _, stride, _ in described)
    checks = []
    for name in (CONFIG, PREPROCESS, FEATURES):
        same = found[name] == expected[name] and (name != FEATURES or plausible)
        text = "fits these weights" if same else "not what export-backbone writes for these weights"
        if name == FEATURES and same:
            text = f"strides {strides}, statistics over {images} images"
        checks.append(Check(name, text, same))
    return checks


def _check_local_dir(folder: Path, about: About, backbone: nn.Module, maps: nn.Module) -> Check:
    """Check that timm opens the folder, and that its backbone and maps give the outputs of the given ones."""
    try:
        opened = _open_local_dir(folder)
    except (RuntimeError, ValueError, OSError, TypeError, KeyError, AttributeError) as error:
        return Check("timm's local-dir", f"does not open it ({short_message(error)})", False)
    images = normalise(torch.from_numpy(draw(about.preprocessing.image_size)), about.preprocessing)
    with torch.inference_mode():
        outputs, expected = ([model(images), *stages(images)] for model, stages in (opened, (backbone, maps)))
    difference = max(relative_difference(a.numpy(), b.numpy()) for a, b in zip(outputs, expected, strict=True))
    return Check(
        "timm's local-dir", f"embedding and maps, largest difference {difference:.2g}", difference <= TOLERANCE
    )
