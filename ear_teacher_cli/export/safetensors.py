"""The format .safetensors: the backbone's weights under timm's names, with the header in the file's metadata."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..embedding.embedder import embedder_of_export
from ..errors import WeightsError
from ..files import printable
from ..model.checkpoint import read_safetensors, write_safetensors
from ..model.export_format import About, about_of, read_export
from ..model.file_digest import read_digest, require_intact, write_digest
from ..model.teacher import build_backbone
from ..model.weights import fingerprint
from .checks import Check, check_digest, check_fingerprint, check_golden, check_whitening
from .format import ExportJob, Opened, Written

_SEPARATOR = b'":"'  # in the header's JSON, between a name and its text


def write(path: Path, job: ExportJob) -> Written:
    """Write the weights, load them back into timm's model and compare: equal weights give equal outputs, so the
    difference must be 0."""
    write_safetensors(job.state, path, metadata=job.header)
    _sort_metadata(path)
    write_digest(path, _SEPARATOR)
    require_intact(path, _SEPARATOR)
    about, state = read_export(path)
    backbone = build_backbone(about.architecture, about.preprocessing.image_size)
    backbone.load_state_dict(state, strict=True)
    difference = largest_difference(backbone, job.embedder.backbone, about)
    if difference != 0 or fingerprint(about.architecture, state, about.preprocessing) != job.embedder.fingerprint:
        raise WeightsError(
            f"{printable(job.out)}: embeddings of the export differ from the checkpoint's by {difference:g}; "
            "nothing was written"
        )
    return Written(difference, "loaded back into timm strictly", [])


def verify(path: Path) -> tuple[list[Check], Opened | None]:
    """Check tensors, digest, fingerprint, golden batch and whitening."""
    state, header = read_safetensors(path)
    about = about_of(header, printable(path))
    opened = _open(path, about, trusted=True)
    kind = "float16" if any(tensor.dtype == torch.float16 for tensor in state.values()) else "float32"
    checks = [
        Check("weights", f"{len(state)} tensors ({kind}) fit timm's {about.architecture}, all of them", True),
        check_digest(read_digest(path, _SEPARATOR), header),
        check_fingerprint(about.fingerprint, fingerprint(about.architecture, state, about.preprocessing)),
        check_golden(about, opened.run),
        *check_whitening(path, about),
    ]
    return checks, opened


def open(path: Path) -> Opened:
    """Open an export whose weights match its fingerprint. Raises WeightsError."""
    return _open(path, read_export(path)[0], trusted=False)


def _open(path: Path, about: About, trusted: bool) -> Opened:
    embedder = embedder_of_export(path, whiten=False, trusted=trusted)
    embedder.backbone.cpu()
    if embedder.embedding_dim != about.embedding_dim:
        raise WeightsError(
            f"{printable(path)}: its header has embeddings of {about.embedding_dim} values, its weights give "
            f"{embedder.embedding_dim}; export it again"
        )

    def run(pixels: np.ndarray) -> np.ndarray:
        return embedder(torch.from_numpy(pixels)).numpy()

    return Opened(about, embedder.fingerprint, run, embedder.backbone)


def largest_difference(loaded: nn.Module, own: nn.Module, about: About) -> float:
    """Return the largest |difference| between the outputs of two models for a seeded batch; infinity where shapes
    differ or a value is not finite. Both run in the memory layout that `embed` uses: others round sums differently."""
    layout = torch.channels_last
    size = about.preprocessing.image_size
    batch = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0)).to(memory_format=layout)
    with torch.inference_mode():
        found, expected = (model.cpu().eval().to(memory_format=layout)(batch) for model in (loaded, own))
    pairs = list(zip(found, expected, strict=True)) if isinstance(found, list) else [(found, expected)]
    comparable = all(a.shape == b.shape and a.isfinite().all() and b.isfinite().all() for a, b in pairs)
    return max(float((a - b).abs().max()) for a, b in pairs) if comparable else float("inf")


def _sort_metadata(path: Path) -> None:
    """Sort the metadata in the header: safetensors writes it in random order, but equal exports must be equal files.

    A .safetensors file begins with the length of the header (8 bytes, little-endian), then the header as JSON, padded
    with spaces.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        assert len(text) == length
        file.seek(8)
        file.write(text)
