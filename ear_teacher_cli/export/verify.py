"""`verify`: is an export what it says, on this machine?"""

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.preprocessing import normalise
from ..embedding.embedder import embedder_of_export, load_embedder
from ..errors import EarTeachError, ForeignWeightsError, UsageError, WeightsError
from ..files import printable, short_message
from ..model.checkpoint import read_safetensors
from ..model.export_format import (
    CARD,
    CONFIG,
    ENTRIES,
    FEATURES,
    PREPROCESS,
    WEIGHTS,
    About,
    about_of,
    is_export_folder,
    read_whitening,
    sidecars,
)
from ..model.feature_maps import MapStatistics, map_model, open_local_dir
from ..model.file_digest import Seal, read_seal, require_whole
from ..model.golden import TOLERANCE, draw, relative_difference
from ..model.weights import fingerprint
from .onnx import EMBEDDING, OnnxModel


@dataclass(frozen=True)
class Check:
    """`passed`: None where an older export has nothing to check by; `found` then says so."""

    what: str
    found: str
    passed: bool | None


MARKS = {True: "ok", False: "WRONG", None: "-"}  # how a Check's `passed` is printed


def verify(source: str, against: str | None = None) -> list[Check]:
    """Check an export (.safetensors, .onnx, or a folder), and compare it `against` other weights of the same teacher.

    What cannot be read at all raises EarTeachError; what is read and wrong is a Check that did not pass.
    """
    path = Path(source)
    if path.is_file() and path.suffix not in (".onnx", ".safetensors"):
        raise UsageError(
            f"{printable(path)}: is no export by its name; verify takes a .safetensors, a .onnx or a folder"
        )
    if path.suffix == ".onnx":
        if path.is_file() and (seal := read_seal(path)).broken:
            return [_file(seal, ())]  # what is damaged is not given to onnxruntime
        about, checks, run = _onnx(path)
    else:
        file = path / WEIGHTS if is_export_folder(path) else path
        if path.is_dir() and file == path:
            raise WeightsError(f"{printable(path)}: is no export (no {WEIGHTS} and {PREPROCESS} in it); name one")
        about, checks, run = _weights(file)
        if file != path:
            checks += _folder(path, about)
    if against is not None:
        checks.append(_compared(about, run, against))
    return checks


def _weights(path: Path) -> tuple[About, list[Check], Callable[[np.ndarray], np.ndarray]]:
    try:
        state, header = read_safetensors(path)
        about = about_of(header, printable(path))
    except ForeignWeightsError as error:
        raise WeightsError(f"{error}; verify checks what export-backbone wrote") from error
    embedder = embedder_of_export(path, whiten=False, trusted=True)  # strict
    embedder.backbone.cpu()
    kind = "float16" if any(tensor.dtype == torch.float16 for tensor in state.values()) else "float32"
    if embedder.embedding_dim != about.embedding_dim:
        raise WeightsError(
            f"{printable(path)}: says {about.embedding_dim} numbers an image, its weights give {embedder.embedding_dim}; "
            "export it again"
        )
    checks = [Check("weights", f"{len(state)} tensors ({kind}) fit timm's {about.architecture}, all of them", True)]
    checks.append(_file(read_seal(path), header))
    mark = fingerprint(about.architecture, state, about.preprocessing)
    checks.append(_fingerprint(about.fingerprint, mark))

    def run(pixels: np.ndarray) -> np.ndarray:
        return embedder(torch.from_numpy(pixels)).numpy()

    checks.append(_golden(about, run))
    if about.whitening_sha256:
        checks.append(_whitening(path, about))
    return about, checks, run


def _onnx(path: Path) -> tuple[About, list[Check], Callable[[np.ndarray], np.ndarray]]:
    model = OnnxModel(path)
    try:
        about = about_of(model.header, printable(path))
    except ForeignWeightsError as error:
        raise WeightsError(f"{error}; verify checks what export-backbone wrote") from error
    outputs = ", ".join(model.outputs)
    checks = [
        Check("outputs", printable(outputs), model.outputs[:1] == [EMBEDDING]),
        _file(read_seal(path), model.header),
    ]
    checks.append(_golden(about, lambda pixels: model(pixels)[0]))
    if about.golden is not None:
        one = model(about.golden.pixels[:1])[0]
        difference = relative_difference(one, about.golden.embeddings[:1])
        checks.append(Check("batch of 1", f"largest difference {difference:.2g}", difference <= TOLERANCE))
    if about.whitening_sha256:
        checks.append(_whitening(path, about))
    return about, checks, lambda pixels: model(pixels)[0]


def _whitening(path: Path, about: About) -> Check:
    """Whether the whitening beside an export is the one that belongs to it."""
    try:
        shape = read_whitening(path, about.whitening_sha256 or "").matrix.shape
    except WeightsError as error:
        return Check("whitening", str(error).removeprefix(f"{printable(path)}: "), False)
    return Check("whitening", f"of this export, {' x '.join(map(str, shape))}", shape[0] == about.embedding_dim)


def _folder(folder: Path, about: About) -> list[Check]:
    """What lies beside the weights, and whether timm opens it all. Nothing of config.json reaches timm before it is known
    to be what export-backbone writes for these weights: a strange one could build a model of any size."""
    said = {name: _json(folder / name) for name in (CONFIG, PREPROCESS, FEATURES)}
    embedder = embedder_of_export(folder / WEIGHTS, whiten=False, trusted=True)
    backbone = embedder.backbone.cpu()
    own = map_model(backbone, about.architecture, about.preprocessing.image_size)
    info = own.feature_info
    described = list(zip(info.module_name(), info.reduction(), info.channels(), strict=True))
    try:
        measured_on = said[FEATURES]["pictures"]
        maps = [MapStatistics(**stage) for stage in said[FEATURES]["maps"]]
        whole = isinstance(measured_on, int) and measured_on > 0
        whole &= [(m.name, m.stride, m.channels) for m in maps] == described
        whole &= all(len(m.mean) == len(m.variance) == m.channels and min(m.variance) >= 0 for m in maps)
        wanted = sidecars(about, maps, measured_on)
    except (KeyError, TypeError, ValueError, RecursionError):
        whole, measured_on, wanted = False, None, sidecars(about, [], 0)
    strides = "/".join(str(stride) for _, stride, _ in described)
    checks = []
    for name in (CONFIG, PREPROCESS, FEATURES):
        same = said[name] == wanted[name] and (name != FEATURES or whole)
        found = "as these weights want it" if same else "not what was written for these weights"
        if name == FEATURES and same:
            found = f"strides {strides}, statistics over {measured_on} images"
        checks.append(Check(name, found, same))
    card = (folder / CARD).is_file()
    checks.append(Check(CARD, "the model card" if card else "is not there", card))
    if not checks[0].passed:
        return checks
    try:
        timms = open_local_dir(folder)
    except (RuntimeError, ValueError, OSError, TypeError, KeyError, AttributeError) as error:
        return [*checks, Check("timm's local-dir", f"does not open it ({short_message(error)})", False)]
    images = normalise(torch.from_numpy(draw(about.preprocessing.image_size)), about.preprocessing)
    with torch.inference_mode():
        outputs, expected = ([model(images), *stages(images)] for model, stages in (timms, (backbone, own)))
    difference = max(relative_difference(a.numpy(), b.numpy()) for a, b in zip(outputs, expected, strict=True))
    said_by_timm = f"embedding and maps, largest difference {difference:.2g}"
    return [*checks, Check("timm's local-dir", said_by_timm, difference <= TOLERANCE)]


def _json(path: Path) -> Any:
    """Raises WeightsError."""
    if not path.is_file():  # a FIFO would wait for ever
        raise WeightsError(f"{printable(path)}: no such file; export the folder again")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(
            f"{printable(path)}: is no JSON ({short_message(error)}); export the folder again"
        ) from error


def _file(seal: Seal, entries: Collection[str]) -> Check:
    """Whether all bytes are as they were written. `entries`: the names in its metadata."""
    if seal.is_missing(entries, ENTRIES):
        missing = (
            "not checked: an earlier earteach wrote it, without a digest of its bytes; export it again to have one"
        )
        return Check("file", missing, None)
    if seal.said is None:
        return Check("file", "its metadata is damaged: it holds no digest of its bytes", False)
    if seal.broken:
        return Check("file", f"damaged or changed: its sha256 is {seal.found[:16]}, not {seal.said[:16]}", False)
    return Check("file", f"every byte is as it was written, sha256 {seal.said[:16]}", True)


def _fingerprint(said: str | None, found: str) -> Check:
    if said is None:
        return Check("fingerprint", "none: of an older earteach; export it again", False)
    return Check("fingerprint", found if said == found else f"{found}, but it says {printable(said)}", said == found)


def _golden(about: About, run: Callable[[np.ndarray], np.ndarray]) -> Check:
    if about.golden is None:
        return Check("golden batch", "none: of an older earteach; export it again", False)
    difference = about.golden.difference(run(about.golden.pixels))
    count = len(about.golden.pixels)
    return Check(
        "golden batch",
        f"{count} drawn images, largest difference {difference:.2g} (at most {TOLERANCE:g})",
        difference <= TOLERANCE,
    )


def _compared(about: About, run: Callable[[np.ndarray], np.ndarray], against: str) -> Check:
    """With another form of the same teacher, computed here and now."""
    if about.golden is None:
        raise EarTeachError("--against: there is no golden batch to compare on; export it again")
    pixels = about.golden.pixels
    name = f"against {printable(Path(against).name)}"
    if Path(against).suffix == ".onnx":
        require_whole(Path(against))
        model = OnnxModel(Path(against))
        mark = model.header.get("fingerprint")
    else:
        embedder = load_embedder(against, whiten=False)
        mark = embedder.fingerprint
    if mark != about.fingerprint:
        return Check(name, f"another teacher: its fingerprint is {printable(mark)}", False)
    other = model(pixels)[0] if Path(against).suffix == ".onnx" else embedder(torch.from_numpy(pixels)).numpy()
    difference = relative_difference(run(pixels), other)
    return Check(name, f"computed here by both, largest difference {difference:.2g}", difference <= TOLERANCE)
