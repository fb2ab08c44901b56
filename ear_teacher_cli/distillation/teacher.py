"""The frozen teacher that a student is distilled from: its embeddings and feature maps of images.

B images, S pixels along a side, C channels of a map, s its stride, K numbers in an embedding.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ..data.preprocessing import normalise, pretrained_cfg_of, resized
from ..distill_config import DistillConfig
from ..embedding.embedder import load_embedder
from ..errors import ConfigError, EarTeachError, WeightsError
from ..files import printable
from ..model.export_format import FEATURES
from ..model.map_reader import MapReader, Maps
from ..model.teacher import build_backbone

MEASURED_ON = 256  # images for the statistics of the maps, where the export has none
# Least deviation that a channel is divided by, as a share of the median: one that was constant in the images that were
# measured may vary in others.
_LEAST_SHARE = 0.01


@dataclass(frozen=True)
class Targets:
    """What a student learns to predict: `embeddings` float32 B,K of unit length, and `maps`, stride -> float B,C,G,G."""

    embeddings: torch.Tensor
    maps: Maps


class Teacher:
    """A frozen backbone: `teacher(pixels)` returns its Targets.

    `size`: side of its input in pixels, to which images are scaled. `embedding_dim`: K. `channels`: stride -> C. `statistics`: stride -> mean and
    standard deviation of the channels, float32 C each; those of a folder's features.json, else empty until `measure`.
    Its embeddings are those of `earteach embed`, whitened if the teacher has a whitening.
    """

    def __init__(
        self, weights: str | Path, strides: Sequence[int] = (4, 8, 16), size: int | None = None, untrained: bool = False
    ):
        """Load a run folder, a checkpoint, an export (.safetensors or folder), or `timm:NAME`.

        `strides`: of the maps that are needed, in pixels. `size`: of its input; None: the one it was trained at.
        `untrained`: random weights instead, a control that shows what a student gains without knowledge. Raises
        EarTeachError if the weights are missing or damaged, or have no maps of these strides.
        """
        self.name = printable(weights)
        self._embedder = load_embedder(weights, whiten=not untrained)
        self.preprocessing, self.fingerprint = self._embedder.preprocessing, self._embedder.fingerprint
        self.size, self.embedding_dim = size or self.preprocessing.image_size, self._embedder.row_dim
        architecture = self._embedder.architecture
        if self.size != self.preprocessing.image_size and pretrained_cfg_of(architecture).fixed_input_size:
            raise WeightsError(
                f"{self.name}: {architecture} takes images of {self.preprocessing.image_size} px only, not of {self.size}; "
                "use that size"
            )
        if untrained:
            random = build_backbone(architecture, self.preprocessing.image_size)
            self._embedder.backbone.load_state_dict(random.state_dict())
        self._reader: MapReader | None = None
        self.channels: dict[int, int] = {}
        if strides:
            try:
                self._reader = MapReader(self._embedder.backbone.cpu(), self.size, min(strides), "map_weight", "0")
            except ConfigError as error:
                raise WeightsError(
                    f"{self.name}: a teacher without feature maps; use another, or no map loss"
                ) from error
            shapes = self._reader.shapes
            if missing := sorted(set(strides) - set(shapes)):
                raise WeightsError(
                    f"{self.name}: has feature maps of strides {', '.join(map(str, shapes))}, none of {missing[0]}; "
                    "choose among them"
                )
            self.channels = {stride: shapes[stride][0] for stride in sorted(strides)}
        fitted = self._embedder.whitening
        self._whitening: tuple[torch.Tensor, ...] | None = None
        if fitted is not None:
            assert fitted.matrix is not None  # a run fits more than a mean
            self._whitening = torch.from_numpy(fitted.mean).float(), torch.from_numpy(fitted.matrix).float()
        self.statistics = self._read_statistics(Path(weights)) if self.channels and not untrained else {}

    def _read_statistics(self, folder: Path) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Return the statistics in an exported folder; empty for other weights. Raises WeightsError if damaged."""
        path = folder / FEATURES
        if not path.is_file():
            return {}
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            maps = {stage["stride"]: stage for stage in about["maps"]}
            found = {
                stride: (_vector(maps[stride]["mean"]), _vector(maps[stride]["variance"])) for stride in self.channels
            }
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise WeightsError(f"{printable(path)}: damaged ({error!r}); export the folder again") from error
        for stride, columns in found.items():
            if any(len(column) != self.channels[stride] for column in columns):
                raise WeightsError(f"{printable(path)}: is of another model; export the folder again")
        return {stride: (mean, _deviation(variance)) for stride, (mean, variance) in found.items()}

    def measure(self, batches: Iterable[torch.Tensor]) -> None:
        """Set `statistics` to those of the maps of these images: uint8 B,3,S,S each, some hundred images together.

        Raises EarTeachError if there are none.
        """
        sums: dict[int, torch.Tensor] = {}  # 3,C: numbers of positions, sums, sums of squares
        for pixels in batches:
            for stride, found in self(pixels).maps.items():
                values = found.cpu().double()
                total = torch.stack([torch.ones_like(values), values, values.square()]).sum((1, 3, 4))
                sums[stride] = sums.get(stride, 0) + total
        if not sums:
            raise EarTeachError(f"{self.name}: no image to measure its feature maps on; give at least one")
        for stride, (count, total, squares) in sums.items():
            mean = total / count
            self.statistics[stride] = (mean.float(), _deviation((squares / count - mean.square()).clamp_min(0).float()))

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> Targets:
        """Return the targets of RGB images, uint8 B,3,S,S, or float with values from 0 to 255; scaled to `size`.

        Computed in 32 bit, also within autocast: whitening amplifies rounding.
        """
        backbone: Any = self._embedder.backbone
        if self._embedder.device != pixels.device:
            backbone.to(pixels.device)
        images = normalise(resized(pixels, self.size), self.preprocessing).contiguous(memory_format=torch.channels_last)
        with torch.autocast(images.device.type, enabled=False):
            if self._reader is None:
                return Targets(self._rows(backbone(images)), {})
            embedding, maps = self._reader(backbone, images)
            return Targets(self._rows(embedding), {stride: maps[stride] for stride in self.channels})

    def _rows(self, embedding: torch.Tensor) -> torch.Tensor:
        """Return the rows of `earteach embed` of raw embeddings B,D: float32 B,K."""
        rows = F.normalize(embedding.float(), dim=1)
        if self._whitening is None:
            return rows
        mean, matrix = (part.to(rows.device) for part in self._whitening)
        return F.normalize((rows - mean) @ matrix, dim=1)


def _vector(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def _deviation(variance: torch.Tensor) -> torch.Tensor:
    deviation = variance.sqrt()
    return deviation.clamp_min(max(1e-6, _LEAST_SHARE * float(deviation.median())))


def config_for(teacher: str | Path, **options: Any) -> DistillConfig:
    """Return the configuration of a distillation: `options` of DistillConfig, the rest from the teacher.

    The student's input has the size that the teacher was trained at unless `image_size` is given. Its crops have the
    teacher's margin, its sides and, unless `pad` is given, its padding; the colour of the padding is the student's mean.
    Raises EarTeachError, TypeError for an option that only the teacher decides.
    """
    if decided := sorted({"bbox_buffer", "side_policy", "teacher_fingerprint"} & set(options)):
        raise TypeError(f"config_for() takes no {', '.join(decided)}: the teacher decides it")
    config = DistillConfig(**options, teacher=str(teacher))
    loaded = Teacher(teacher, config.map_strides, config.teacher_size)
    found = loaded.preprocessing
    return replace(
        config,
        teacher_size=loaded.size,
        teacher_fingerprint=loaded.fingerprint,
        image_size=options.get("image_size", found.image_size),
        pad=options.get("pad", found.pad),
        bbox_buffer=found.bbox_buffer,
        side_policy="mirror" if found.mirror else "as-is",
    )
