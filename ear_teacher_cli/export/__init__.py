"""Exports of a teacher's backbone: one module for each format, and the table of them.

A new format is a module with `write`, `verify` and `open` (see format.py), and a line here. The key is the suffix of
its files, or "folder".
"""

from . import folder, onnx, safetensors
from .format import Format

FORMATS: dict[str, Format] = {
    ".safetensors": Format(
        "weights under timm's names", safetensors.write, safetensors.verify, safetensors.open, ("half",)
    ),
    ".onnx": Format(
        "model for onnxruntime", onnx.write, onnx.verify, onnx.open, ("features",), require=onnx.require_onnx
    ),
    "folder": Format(
        "for timm's local-dir and for students, with a model card",
        folder.write,
        folder.verify,
        folder.open,
        ("half", "val_metadata", "consent", "license"),
        files=folder.FILES,
    ),
}
