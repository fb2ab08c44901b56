"""`export-backbone`: the teacher's backbone alone, under timm's names, proven before it is called done."""

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import timm
import torch

from ..core import runs
from ..core.checkpoint import read_checkpoint, read_safetensors, write_safetensors
from ..core.embedder import Embedder, export_header, load_embedder, whitening_beside
from ..core.weights import sha256_of
from ..errors import WeightsError, WordsError
from ..files import printable, refuse_existing, whole_file


@dataclass(frozen=True)
class Export:
    path: Path
    architecture: str
    embedding_dim: int
    tensors: int
    difference: float  # largest |difference| between the checkpoint's and the export's embeddings
    whitening: Path | None  # the file beside it, if the run fitted one


def export_backbone(source: str | Path, out: str | Path, overwrite: bool = False) -> Export:
    """Write `out` (.safetensors), load it strictly into a fresh timm model, compare embeddings, then rename it in place.

    `source`: a checkpoint, or an experiment folder (its best one). Raises WeightsError if the proof fails.
    """
    if Path(out).suffix != ".safetensors":
        raise WordsError(f"{printable(out)}: name a .safetensors file; other formats are not written")
    out = refuse_existing(out, overwrite, inputs=(source,))
    path = runs.checkpoint_of(Path(source), best=True)
    checkpoint = read_checkpoint(path)
    teacher = load_embedder(str(path))
    state = checkpoint.backbone_state
    about = (teacher.architecture, teacher.embedding_dim, teacher.preprocessing, sha256_of(path))
    with ExitStack() as stack:  # left in reverse: the export takes its name first, its whitening last
        mark = None
        if "whitening" in checkpoint.content:
            beside = stack.enter_context(whole_file(refuse_existing(whitening_beside(out), overwrite)))
            write_safetensors(checkpoint.content["whitening"], beside)
            mark = sha256_of(beside)
        temporary = stack.enter_context(whole_file(out))
        header = export_header(*about, mark)
        write_safetensors(state, temporary, metadata=header)
        _sort_header(temporary)
        difference = _prove(temporary, teacher)
    whitening = whitening_beside(out) if mark else None
    return Export(out, teacher.architecture, teacher.embedding_dim, len(state), difference, whitening)


def _sort_header(path: Path) -> None:
    """Put the header's metadata in order: safetensors writes it in a random one, and equal exports shall be equal files.

    A .safetensors file begins with the header's length (8 bytes, little-endian), then the header as JSON,
    padded with spaces.
    """
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        assert len(text) == length
        file.seek(8)
        file.write(text)


def _prove(path: Path, teacher: Embedder) -> float:
    """Load with nothing but timm and compare on a seeded batch: equal weights give equal numbers, so 0 is demanded."""
    size = teacher.preprocessing.image_size
    sized = {"img_size": size} if timm.get_pretrained_cfg(teacher.architecture).fixed_input_size else {}
    fresh = timm.create_model(teacher.architecture, num_classes=0, **sized)
    fresh.load_state_dict(read_safetensors(path)[0], strict=True)
    layout = torch.channels_last  # the teacher's: in another, sums are rounded otherwise
    batch = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0)).to(memory_format=layout)
    with torch.inference_mode():
        difference = float((fresh.eval().to(memory_format=layout)(batch) - teacher.backbone.cpu()(batch)).abs().max())
    if difference != 0:
        raise WeightsError(
            f"{printable(path)}: the export's embeddings differ from the checkpoint's by {difference:g}; nothing was written"
        )
    return difference
