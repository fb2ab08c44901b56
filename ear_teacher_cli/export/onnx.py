"""The backbone as ONNX: uint8 pixels in, embedding and, if wanted, feature maps out. An optional extra.

Normalisation is part of the model. What a .safetensors export says in its header is in the model's metadata.
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
from ..model.file_digest import seal

INPUT, EMBEDDING = "pixels", "embedding"
_MISSING = "pip install 'ear-teacher-cli[onnx]'"
_LARGEST = 2**31 - 2**20  # bytes: protobuf's limit, and some room for the graph


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


def require_onnx() -> None:
    """Raise EarTeachError unless what writes, runs and checks ONNX is installed."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        _package(name)


def write_onnx(
    backbone: nn.Module, preprocessing: Preprocessing, strides: list[int], header: dict[str, str], path: Path
) -> None:
    """Write the model with a dynamic batch. `strides`: of the maps it shall give, none or all that timm gives.
    `header`: of `exports.header_of`.

    Raises EarTeachError if the packages are not there, WeightsError if torch cannot export the model.
    """
    require_onnx()
    onnx = _package("onnx")
    if strides and not hasattr(backbone, "forward_intermediates"):
        raise WeightsError("--features: timm gives this backbone's maps apart from its embedding; export a folder")
    size = sum(tensor.numel() * 4 for tensor in backbone.state_dict().values())
    if size > _LARGEST:
        raise WeightsError(
            f"{printable(path.name)}: {size / 1e9:.1f} GB are more than an ONNX file holds; use a folder"
        )
    module = _FromPixels(backbone.cpu().eval(), preprocessing, bool(strides))
    example = torch.zeros(2, 3, preprocessing.image_size, preprocessing.image_size, dtype=torch.uint8)
    names = [EMBEDDING, *map_names(strides)]
    try:
        with _quiet(), torch.inference_mode(False), torch.no_grad():
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                verbose=False,
                input_names=[INPUT],
                output_names=names,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
    except (RuntimeError, torch.onnx.errors.OnnxExporterError) as error:
        raise WeightsError(
            f"ONNX: torch cannot export this model ({short_message(error)}); use a .safetensors"
        ) from error
    model = program.model_proto
    _forget_where_it_was_made(model)
    for name, value in sorted(header.items()):
        entry = model.metadata_props.add()
        entry.key, entry.value = name, value
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise WeightsError(f"ONNX: torch's model is not valid ({short_message(error)}); use a .safetensors") from error
    path.write_bytes(model.SerializeToString(deterministic=True))
    seal(path)


def map_names(strides: list[int]) -> list[str]:
    """map_4, map_8, ...; of two with one stride the second is map_8b, and so on."""
    names: list[str] = []
    for stride in strides:
        name = f"map_{stride}"
        names.append(name + "bcdefgh"[sum(n.rstrip("bcdefgh") == name for n in names) - 1] if name in names else name)
    return names


class OnnxModel:
    """An ONNX file in onnxruntime, on the CPU. Raises EarTeachError, WeightsError."""

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
        except _errors() as error:
            raise WeightsError(
                f"{printable(path)}: no ONNX model, or damaged ({short_message(error)}); export it again"
            ) from error
        self.where = printable(path)

    def __call__(self, pixels: np.ndarray) -> list[np.ndarray]:
        """uint8 B,3,S,S -> one array for each of `outputs`."""
        try:
            return self.session.run(None, {INPUT: pixels})
        except _errors() as error:
            raise WeightsError(f"{self.where}: does not run ({short_message(error)}); export it again") from error


def _errors() -> tuple[type[Exception], ...]:
    """What onnxruntime raises: classes of its own, which share no base but Exception, and some of Python's."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = [value for value in vars(state).values() if isinstance(value, type) and issubclass(value, Exception)]
    return (*own, RuntimeError, ValueError, TypeError, OSError)


def _package(name: str) -> ModuleType:
    try:
        return __import__(name)
    except ImportError as error:
        raise EarTeachError(f"ONNX: {name} is not installed; {_MISSING}") from error


def _forget_where_it_was_made(model: Any) -> None:
    """Take out what the exporter writes of this machine's folders: traces of source lines."""
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
            if not isinstance(value, str):  # a function's inputs are names
                value.doc_string = ""
                del value.metadata_props[:]


@contextlib.contextmanager
def _quiet():
    """The exporter talks to stdout, to loggers and in warnings."""
    before = logging.root.manager.disable
    logging.disable(before if library_messages.are_shown() else logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter(library_messages.warning_action())
            yield
    finally:
        logging.disable(before)
