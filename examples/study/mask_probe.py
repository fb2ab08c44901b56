"""Measure how well frozen feature maps separate ear from not ear in whole photographs.

    python mask_probe.py teacher.safetensors photos/boxes.csv --draw masks.png

`boxes.csv` has the columns image_path, x1, y1, x2, y2, and one row for each visible ear. The mask of `images/NAME.jpg` is
`masks/NAME.png`: the pixels of all ears of the photo, of the same size as the photo.

Each box gives a window of 192 x 192 photo pixels around its centre, not resized, and filled with the mean colour beyond
the border. The feature maps of strides 8 and 16 are resampled to one grid of stride 8 and standardised per channel. A
linear layer, the only trained one, is fitted to the share of ear pixels in each cell (logistic regression; it is convex,
so the result does not depend on a seed). Its output, interpolated bilinearly to pixels, is ear where it is above 0, that
is, at a probability above 0.5. The metric is the intersection over union (IoU) with the mask: its mean over test windows,
and that of the pixels of all windows together (pooled).

A fifth of the windows are for testing. Windows of one photo, of near duplicates of it, and (with a column `identity`) of
one person are on the same side. `--choose` divides the training part once more and does not read the test part: choose
options with it.

N windows, S pixels along a side of a window, G cells along a side of the grid, C channels.
"""

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torch.nn.functional as F
from landmark_probe import to_grid
from PIL import Image

from ear_teacher_cli.config import Reading
from ear_teacher_cli.console import Console
from ear_teacher_cli.data.crop import read_image
from ear_teacher_cli.data.duplicates import drop_repeated_rows, examine, link_groups, merge_copies, near_duplicates
from ear_teacher_cli.data.manifest import Manifest
from ear_teacher_cli.data.mixed_sources import read_mixed
from ear_teacher_cli.data.preprocessing import normalise, pretrained_cfg_of
from ear_teacher_cli.data.split import Group, choose_validation
from ear_teacher_cli.embedding.embedder import Embedder, load_embedder
from ear_teacher_cli.errors import EarTeachError, ManifestError, UsageError
from ear_teacher_cli.model.feature_maps import map_model

SIDE, BATCH = 192, 8  # of a window in px; windows per forward pass
GRID_STRIDE = 8
GRID = SIDE // GRID_STRIDE
STRIDES = {"8+16": (8, 16), "8": (8,), "16": (16,)}  # the first is the result, the others show what each stride adds
TEST_SHARE = 0.2
L2, STEPS = 1e-4, 100  # factor of the sum of squared weights; most iterations of L-BFGS


@dataclass(frozen=True)
class Windows:
    """`pixels` uint8 N,3,S,S; `masks` bool N,S,S, true on ears; `photos`: path of the photo of each window."""

    pixels: torch.Tensor
    masks: torch.Tensor
    photos: list[str]


@dataclass(frozen=True)
class Score:
    """`iou`: of each test window, float64 N. `pooled`: of the pixels of all test windows together."""

    iou: np.ndarray
    pooled: float
    predicted: torch.Tensor  # bool N,S,S

    @property
    def mean(self) -> float:
        return float(self.iou.mean())


@dataclass(frozen=True)
class Probe:
    """The result of a probe. `scores`: by the strides of the feature maps, see STRIDES."""

    scores: dict[str, Score]
    test: Windows


def probe(weights: str | Path | Embedder, boxes: str | Path, seed: int = 0, choose: bool = False) -> Probe:
    """Train and test the probe on weights that `load_embedder` reads.

    `seed`: of the split; the same for all weights that are compared. `choose`: test on a part of the training windows.
    """
    embedder = weights if isinstance(weights, Embedder) else load_embedder(str(weights))
    check_input_size(embedder)
    train, test = (cut_windows(part, embedder.preprocessing.fill) for part in split(boxes, seed, choose))
    maps = map_model(embedder.backbone, embedder.architecture, embedder.preprocessing.image_size)
    (train_cells, strides), (test_cells, _) = (window_cells(maps, part.pixels, embedder) for part in (train, test))
    std, mean = torch.std_mean(train_cells, dim=0)  # C
    for cells in (train_cells, test_cells):
        cells.sub_(mean).div_(std.clamp_min(1e-6))
    target = F.avg_pool2d(train.masks.float().unsqueeze(1), GRID_STRIDE).flatten()  # share of ear pixels, N*G*G
    scores = {}
    for name, chosen in STRIDES.items():
        columns = _columns(strides, chosen)
        weight, bias = fit(train_cells[:, columns], target)
        scores[name] = score(test_cells[:, columns] @ weight + bias, test.masks)
    return Probe(scores, test)


def check_input_size(embedder: Embedder) -> None:
    """Raise UsageError if the backbone takes images of another size only."""
    size = embedder.preprocessing.image_size
    if pretrained_cfg_of(embedder.architecture).fixed_input_size and size != SIDE:
        raise UsageError(
            f"{embedder.architecture}: takes images of {size} px only, and the probe's windows are {SIDE} px; "
            "probe a backbone that takes any size"
        )


def split(boxes: str | Path, seed: int, choose: bool) -> tuple[Manifest, Manifest]:
    """Return the ears of a list as (training, test). Copies, repeated rows and unusable images are left out.

    Raises ManifestError if the list cannot be split.
    """
    found = read_mixed(str(boxes), None, Reading())
    if None in found.ears.boxes:
        raise ManifestError(f"{boxes}: not every row has a box; give x1, y1, x2, y2 of every ear")
    examined = examine(found, 0, Console(quiet=True))
    drop_repeated_rows(found, examined)
    merged = merge_copies(found, examined)
    links = link_groups(found, examined, merged, near_duplicates(found, examined))
    by_group: dict[Hashable, list[int]] = defaultdict(list)
    for index in examined.kept:
        by_group[links.find(found.ears.paths[index])].append(index)
    train, test = _divide(list(by_group.values()), found.ears.paths, seed)
    if choose:
        train, test = _divide(train, found.ears.paths, seed + 1)
    if not train or not test:
        raise ManifestError(
            f"{boxes}: has {len(by_group)} photos that are not copies of each other; the probe needs more, to test on "
            "other photos than it was trained on"
        )
    train_ears, test_ears = (found.ears.subset(sorted(sum(groups, []))) for groups in (train, test))
    return train_ears, test_ears


def _divide(groups: list[list[int]], paths: list[str], seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """Return groups of ears as (training, test)."""
    sized = [Group(paths[group[0]], Counter({"": len(group)})) for group in groups]
    chosen = choose_validation(sized, TEST_SHARE, seed)
    return (
        [group for place, group in enumerate(groups) if place not in chosen],
        [group for place, group in enumerate(groups) if place in chosen],
    )


def cut_windows(ears: Manifest, fill: tuple[int, int, int]) -> Windows:
    """Cut the window of each ear out of photo and mask. Raises ImageError or ManifestError."""
    pixels, masks, photos = [], [], []
    for index, (path, box) in enumerate(zip(ears.paths, ears.boxes, strict=True)):
        if not photos or photos[-1] != path:
            image = read_image(ears.file(index)).image
            mask = _read_mask(ears, index, image.size)
        corner = round((box[0] + box[2] - SIDE) / 2), round((box[1] + box[3] - SIDE) / 2)
        pixels.append(torch.from_numpy(np.array(_window(image, corner, fill))).permute(2, 0, 1))  # S,S,3 -> 3,S,S
        masks.append(torch.from_numpy(np.array(_window(mask, corner, 0)) > 127))
        if not masks[-1].any():
            raise ManifestError(f"{ears.where(index)}: its mask has no ear around the box; correct the box or the mask")
        photos.append(path)
    return Windows(torch.stack(pixels), torch.stack(masks), photos)


def _read_mask(ears: Manifest, index: int, size: tuple[int, int]) -> Image.Image:
    """Return the mask of a photo, in grey. Raises ManifestError if there is none of the photo's size."""
    path = mask_path(ears.paths[index])
    file = (ears.root or Path()) / path
    if not file.exists():
        raise ManifestError(f"{ears.where(index)}: has no mask {path} in {ears.root}")
    mask = read_image(str(file)).image.convert("L")
    if mask.size != size:
        raise ManifestError(f"{path}: is {mask.width} x {mask.height}, and its photo is {size[0]} x {size[1]}")
    return mask


def mask_path(path: str) -> str:
    """Return the path of a photo's mask: `masks/a/1.png` of `images/a/1.jpg`."""
    parts = list(PurePosixPath(path).with_suffix(".png").parts)
    if "images" in parts:
        parts[parts.index("images")] = "masks"
        return str(PurePosixPath(*parts))
    return str(PurePosixPath("masks", *parts))


def _window(image: Image.Image, corner: tuple[int, int], fill: tuple[int, int, int] | int) -> Image.Image:
    canvas = Image.new(image.mode, (SIDE, SIDE), fill)
    canvas.paste(image, (-corner[0], -corner[1]))
    return canvas


@torch.no_grad()
def window_cells(maps: torch.nn.Module, pixels: torch.Tensor, embedder: Embedder) -> tuple[torch.Tensor, list[int]]:
    """Return (float32 N*G*G,C on the CPU, the stride of each of the C channels) of uint8 N,3,S,S."""
    device = next(embedder.backbone.parameters()).device
    maps.to(device)
    wanted = {stride for strides in STRIDES.values() for stride in strides}
    chosen = [(i, stride) for i, stride in enumerate(maps.feature_info.reduction()) if stride in wanted]
    if {stride for _, stride in chosen} != wanted:
        raise UsageError(f"{embedder.architecture}: has no feature maps of strides 8 and 16; probe another backbone")
    channels = maps.feature_info.channels()
    strides = [stride for i, stride in chosen for _ in range(channels[i])]
    cells = torch.empty(len(pixels) * GRID**2, len(strides))
    for batch, rows in zip(pixels.split(BATCH), cells.split(BATCH * GRID**2), strict=True):
        stages = maps(normalise(batch.to(device), embedder.preprocessing).contiguous(memory_format=torch.channels_last))
        joined = torch.cat([to_grid(stages[i].float(), GRID) for i, _ in chosen], dim=1)  # B,C,G,G
        rows.copy_(joined.permute(0, 2, 3, 1).flatten(0, 2))
    return cells, strides


def _columns(strides: list[int], chosen: tuple[int, ...]) -> slice:
    """Return the channels of some neighbouring strides."""
    places = [place for place, stride in enumerate(strides) if stride in chosen]
    return slice(places[0], places[-1] + 1)


def fit(cells: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit a logistic regression of shares [R] on standardised rows R,C; return its weights [C] and bias [1]."""
    weight = torch.zeros(cells.shape[1], requires_grad=True)
    bias = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(cells @ weight + bias, target) + L2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def score(logits: torch.Tensor, masks: torch.Tensor) -> Score:
    """Compare logits N*G*G with masks N,S,S."""
    maps = logits.view(len(masks), 1, GRID, GRID)
    predicted = F.interpolate(maps, size=(SIDE, SIDE), mode="bilinear", align_corners=False)[:, 0] > 0
    common = (predicted & masks).sum((1, 2)).double()
    union = (predicted | masks).sum((1, 2)).double()
    return Score((common / union).numpy(), float(common.sum() / union.sum()), predicted)


def draw(result: Probe, path: str | Path, count: int = 8) -> None:
    """Write an image of `count` test windows, each with its true mask (green) and then the predicted one (red)."""
    predicted = next(iter(result.scores.values())).predicted
    count = min(count, len(predicted))
    tiles = []
    for i in np.linspace(0, len(predicted) - 1, count).round().astype(int).tolist():
        window = result.test.pixels[i].permute(1, 2, 0).float()  # S,S,3
        pair = [
            torch.where(mask[i].unsqueeze(-1), window / 2 + torch.tensor(colour) / 2, window)
            for mask, colour in ((result.test.masks, (40.0, 220.0, 60.0)), (predicted, (240.0, 40.0, 40.0)))
        ]
        tiles.append(F.pad(torch.cat(pair, dim=1), (0, 0, 2, 2, 2, 2), value=255).byte().numpy())
    columns = min(2, count)
    rows = [np.concatenate(tiles[i : i + columns], axis=1) for i in range(0, count - count % columns, columns)]
    Image.fromarray(np.concatenate(rows)).save(path)


def main(argv: list[str] | None = None) -> int:
    """Run the probe and return the exit code."""
    parser = argparse.ArgumentParser(description="Mask probe on frozen feature maps of a backbone.")
    parser.add_argument("weights", help="an export, a checkpoint, a run folder, or a plain state dict with --backbone")
    parser.add_argument("boxes", help="list of ears on whole photos, with masks/ beside images/")
    parser.add_argument("--backbone", help="timm model of a plain state dict")
    parser.add_argument("--image-size", type=int, help="input side in pixels for a plain state dict (of the teacher)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split (default: %(default)s)")
    parser.add_argument("--choose", action="store_true", help="test on a part of the training photos instead")
    parser.add_argument("--draw", metavar="FILE.png", help="draw true and predicted masks of a few test windows")
    options = parser.parse_args(argv)
    try:
        embedder = load_embedder(options.weights, options.backbone, options.image_size)
        result = probe(embedder, options.boxes, options.seed, options.choose)
    except EarTeachError as error:
        print(f"mask_probe: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{len(result.test.photos)} test windows of {len(set(result.test.photos))} photos")
    for name, found in result.scores.items():
        print(f"strides {name:<4}: mean IoU {100 * found.mean:.1f} %, pooled {100 * found.pooled:.1f} %")
    if options.draw:
        draw(result, options.draw)
    return 0


if __name__ == "__main__":
    sys.exit(main())
