"""The format .onnx: uint8 pixels in, embedding and, if wanted, feature maps out. Needs the packages of the extra
`onnx`.

Normalisation is part of the model. The header of an export is in the model's metadata.
"""

import contextlib
import io
import logging
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from .. import library_messages
from ..data.preprocessing import Preprocessing, normalise
from ..errors import EarTeachError, WeightsError
from ..files import printable, short_message
from ..model.export_format import about_of
from ..model.feature_maps import map_model
from ..model.file_digest import read_digest, require_intact, write_digest
from ..model.golden import TOLERANCE, relative_difference
from .checks import Check, check_digest, check_golden, check_whitening
from .format import ExportJob, Opened, Written

INPUT, EMBEDDING = "pixels", "embedding"
_INSTALL = "pip install 'ear-teacher-cli[onnx]'"
_MAX_BYTES = 2**31 - 2**20  # of weights: protobuf's limit, less some room for the graph
_SEPARATOR = b"\x12\x40"  # in protobuf, between a name and its text: field 2, 64 bytes long


def write(path: Path, job: ExportJob) -> Written:
    """Write the model, with the feature maps if `features` is set, and compare its outputs in onnxruntime with torch's.

    Raises EarTeachError if a package is missing, WeightsError if torch cannot export the model or outputs differ.
    """
    require_onnx()
    about, maps, strides = job.about, None, []
    if job.options.features:
        maps = map_model(job.embedder.backbone, about.architecture, about.preprocessing.image_size)
        strides = maps.feature_info.reduction()
    content = _serialise(job, strides)
    path.write_bytes(content)
    write_digest(path, _SEPARATOR)
    difference = _compare_with_torch(path, job, maps, strides)
    return Written(difference, "compared with torch in onnxruntime", strides)


def verify(path: Path) -> tuple[list[Check], Opened | None]:
    """Check digest, outputs, golden batch and whitening. A damaged file is not given to onnxruntime."""
    digest = read_digest(path, _SEPARATOR)
    if digest.broken:
        return [check_digest(digest, ())], None
    model, opened = _open(path)
    about = opened.about
    checks = [
        Check("outputs", printable(", ".join(model.outputs)), model.outputs[:1] == [EMBEDDING]),
        check_digest(digest, model.header),
        check_golden(about, opened.run),
    ]
    if about.golden is not None:
        single = opened.run(about.golden.pixels[:1])
        difference = relative_difference(single, about.golden.embeddings[:1])
        checks.append(Check("batch of 1", f"largest difference {difference:.2g}", difference <= TOLERANCE))
    return [*checks, *check_whitening(path, about)], opened


def open(path: Path) -> Opened:
    """Open an intact model in onnxruntime. Raises EarTeachError if it is not installed, WeightsError."""
    require_intact(path, _SEPARATOR)
    return _open(path)[1]


def require_onnx() -> None:
    """Raise EarTeachError unless the packages that write, run and check ONNX are installed."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        _package(name)


def map_names(strides: list[int]) -> list[str]:
    """Return map_4, map_8, ... for the strides; the second map of one stride is map_8b, the third map_8c."""
    names: list[str] = []
    for stride in strides:
        name = f"map_{stride}"
        names.append(name + "bcdefgh"[sum(n.rstrip("bcdefgh") == name for n in names) - 1] if name in names else name)
    return names


class OnnxModel:
    """An ONNX file in onnxruntime, on the CPU. `header`: its metadata. `outputs`: their names.

    Raises EarTeachError if onnxruntime is not installed, WeightsError if the file cannot be opened.
    """

    def __init__(self, path: Path):
        runtime = _package("onnxruntime")
        if not path.is_file():
            raise WeightsError(f"{printable(path)}: no such file; check the path")
        options = runtime.SessionOptions()
        options.log_severity_level = 4
        try:
            self.session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            self.header: dict[str, str] = self.session.get_modelmeta().custom_metadata_map
            self.outputs = [output.name for output in self.session.get_outputs()]
        except _runtime_errors() as error:
            raise WeightsError(
                f"{printable(path)}: damaged, or not an ONNX model ({short_message(error)}); export it again"
            ) from error
        self.where = printable(path)

    def __call__(self, pixels: np.ndarray) -> list[np.ndarray]:
        """Run the model on uint8 B,3,S,S and return an array for each of `outputs`. Raises WeightsError."""
        try:
            return self.session.run(None, {INPUT: pixels})
        except _runtime_errors() as error:
            raise WeightsError(f"{self.where}: does not run ({short_message(error)}); export it again") from error


def _open(path: Path) -> tuple[OnnxModel, Opened]:
    model = OnnxModel(path)
    about = about_of(model.header, printable(path))
    return model, Opened(about, about.fingerprint, lambda pixels: model(pixels)[0])


class _FromPixels(nn.Module):
    """uint8 B,3,S,S -> float32 B,D and, with `maps`, each B,C,S/stride,S/stride."""

    def __init__(self, backbone: nn.Module, preprocessing: Preprocessing, maps: bool):
        super().__init__()
        self.backbone, self.preprocessing, self.maps = backbone, preprocessing, maps

    def forward(self, pixels: torch.Tensor):
        images = normalise(pixels, self.preprocessing)
        if not self.maps:
            return self.backbone(images)
        last, stages = self.backbone.forward_intermediates(images)
        return self.backbone.forward_head(last), *stages


def _serialise(job: ExportJob, strides: list[int]) -> bytes:
    """Return the ONNX model with a dynamic batch size. `strides`: of the feature maps to return, none or all of timm's.

    Raises WeightsError if torch cannot export the model.
    """
    onnx = _package("onnx")
    backbone, preprocessing = job.embedder.backbone.cpu().eval(), job.about.preprocessing
    if strides and not hasattr(backbone, "forward_intermediates"):
        raise WeightsError("--features: timm gives this backbone's maps apart from its embedding; export a folder")
    size = sum(tensor.numel() * 4 for tensor in backbone.state_dict().values())
    if size > _MAX_BYTES:
        raise WeightsError(f"{printable(job.out)}: {size / 1e9:.1f} GB are more than an ONNX file holds; use a folder")
    module = _FromPixels(backbone, preprocessing, bool(strides))
    example = torch.zeros(2, 3, preprocessing.image_size, preprocessing.image_size, dtype=torch.uint8)
    try:
        with _silenced(), torch.inference_mode(False), torch.no_grad():
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                verbose=False,
                input_names=[INPUT],
                output_names=[EMBEDDING, *map_names(strides)],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
    except (RuntimeError, torch.onnx.errors.OnnxExporterError) as error:
        raise WeightsError(
            f"ONNX: torch cannot export this model ({short_message(error)}); use a .safetensors"
        ) from error
    model = program.model_proto
    _remove_source_traces(model)
    for name, value in sorted(job.header.items()):
        entry = model.metadata_props.add()
        entry.key, entry.value = name, value
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise WeightsError(f"ONNX: torch's model is not valid ({short_message(error)}); use a .safetensors") from error
    return model.SerializeToString(deterministic=True)


def _compare_with_torch(path: Path, job: ExportJob, maps: nn.Module | None, strides: list[int]) -> float:
    """Return the largest relative difference over all outputs for the golden batch, at two batch sizes.

    Raises WeightsError if it is above TOLERANCE.
    """
    require_intact(path, _SEPARATOR)
    model, golden = OnnxModel(path), job.about.golden
    assert golden is not None
    expected = [golden.embeddings]
    if maps is not None:
        with torch.inference_mode():
            images = normalise(torch.from_numpy(golden.pixels), job.about.preprocessing)
            expected += [stage.numpy() for stage in maps(images)]
    differences = [
        relative_difference(found, wanted[:batch])
        for batch in (len(golden.pixels), 1)
        for found, wanted in zip(model(golden.pixels[:batch]), expected, strict=True)
    ]
    difference = float(np.max(differences))
    if not difference <= TOLERANCE or model.outputs[1:] != map_names(strides):
        raise WeightsError(
            f"{printable(job.out)}: outputs in onnxruntime differ from torch's by {difference:g}; nothing was written"
        )
    return difference


def _runtime_errors() -> tuple[type[Exception], ...]:
    """Return what onnxruntime raises: classes of its own, whose only common base is Exception, and some of Python's."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = [value for value in vars(state).values() if isinstance(value, type) and issubclass(value, Exception)]
    return (*own, RuntimeError, ValueError, TypeError, OSError)


def _package(name: str) -> ModuleType:
    try:
        return __import__(name)
    except ImportError as error:
        raise EarTeachError(f"ONNX: {name} is not installed; {_INSTALL}") from error


def _remove_source_traces(model: Any) -> None:
    """Remove the traces of source lines that the exporter writes: they hold folders of this machine."""
    model.doc_string = ""
    del model.metadata_props[:]
    graphs = [model.graph, *model.functions]
    for graph in graphs:
        graph.doc_string = ""
        del graph.metadata_props[:]
        for node in graph.node:
            node.doc_string = ""
            del node.metadata_props[:]
            graphs += [attribute.g for attribute in node.attribute if attribute.HasField("g")]
        for value in [*graph.value_info, *getattr(graph, "initializer", ()), *graph.input, *graph.output]:
            if not isinstance(value, str):  # the inputs of a function are names
                value.doc_string = ""
                del value.metadata_props[:]


@contextlib.contextmanager
def _silenced():
    """Suppress what the exporter prints, logs and warns of."""
    before = logging.root.manager.disable
    logging.disable(before if library_messages.are_shown() else logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter(library_messages.warning_action())
            yield
    finally:
        logging.disable(before)
