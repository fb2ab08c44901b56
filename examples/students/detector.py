"""Train a small ear detector of BlazeFace's architecture, with and without a teacher.

    python detector.py train.csv test.csv --teacher teacher=teacher/ --draw detections.png

train.csv, test.csv: photos with a box for each ear, in any format that earteach reads; all ears of a photo must be in it.
The student is BlazeFace (Bazarevsky et al. 2019) for ears: photos squashed to 128 x 128 pixels on [-1, 1], maps of strides 8
and 16 with 88 and 96 channels, 896 anchors, focal and smooth L1 loss. `folded` returns its weights under the names of
published BlazeFace models. With a teacher, it is first distilled from the teacher's maps of strides 8 and 16 on the training
photos without their boxes (and on --unlabelled crops of ears). Then all students train on the same few labelled photos in
the same order. The control is distilled from random weights: its gain cannot come from what the teacher learned.

The metric is COCO's average precision, IoU 0.50 to 0.95, on the test photos.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from distillation import Block, Task, as_input, compare, crops_of, scaled
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.ops import box_iou, nms, sigmoid_focal_loss

from ear_teacher_cli import load_crop
from ear_teacher_cli.data.crop import image_size
from ear_teacher_cli.data.manifest import Manifest, read_manifest
from ear_teacher_cli.data.preprocessing import Preprocessing
from ear_teacher_cli.errors import ManifestError

SIDE = 128
# Width and height of the anchors of a cell in pixels, by stride: those of ears in photos that are wider than high.
ANCHORS = {
    8: ((6, 15), (9, 21)),
    16: ((12, 28), (16, 38), (24, 52), (36, 72), (52, 96), (76, 120)),
}
VARIANCE = (
    0.1,
    0.2,
)  # of the offsets of centre and size (SSD, Liu et al. 2016): what the regression predicts is divided by
POSITIVE, NEGATIVE = 0.5, 0.35  # IoU with an ear from which an anchor is one, and below which it is none
MOST_EARS = 8  # of a photo


class Detector(nn.Module):
    """Predict, from images B,3,128,128 on [-1, 1], logits B,896 of an ear at each anchor and offsets B,896,4 of its box."""

    channels = {8: 88, 16: 96}

    def __init__(self):
        super().__init__()
        first = [(24, 24, 1), (24, 28, 1), (28, 32, 2), (32, 36, 1), (36, 42, 1), (42, 48, 2)]
        first += [(48, 56, 1), (56, 64, 1), (64, 72, 1), (72, 80, 1), (80, 88, 1)]
        blocks = [Block(narrow, wide, stride, kernel=3) for narrow, wide, stride in first]
        self.backbone1 = nn.Sequential(nn.Conv2d(3, 24, 5, 2), nn.ReLU(), *blocks)
        self.backbone2 = nn.Sequential(Block(88, 96, 2, 3), *(Block(96, 96, 1, 3) for _ in range(4)))
        for stride, width in self.channels.items():
            count = len(ANCHORS[stride])
            setattr(self, f"classifier_{stride}", nn.Conv2d(width, count, 1))
            setattr(self, f"regressor_{stride}", nn.Conv2d(width, 4 * count, 1))
            nn.init.constant_(getattr(self, f"classifier_{stride}").bias, -4)  # few anchors have an ear

    def maps(self, images: torch.Tensor) -> dict[int, torch.Tensor]:
        """Return the maps for distillation: {8: B,88,16,16, 16: B,96,8,8}."""
        fine = self.backbone1(F.pad(images, (1, 2, 1, 2)))
        return {8: fine, 16: self.backbone2(fine)}

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, offsets = [], []
        for stride, stage in self.maps(images).items():
            logits.append(getattr(self, f"classifier_{stride}")(stage).permute(0, 2, 3, 1).flatten(1))
            offsets.append(
                getattr(self, f"regressor_{stride}")(stage).permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 4))
            )
        return torch.cat(logits, 1), torch.cat(offsets, 1)


def folded(student: Detector) -> dict[str, torch.Tensor]:
    """Return the weights for a BlazeFace without batch normalisation, whose output is the same: `backbone1.0.weight`,
    `backbone1.2.convs.0.weight`, ..., `backbone2.4.convs.1.bias`, `classifier_8.weight`, `regressor_16.bias`.

    The names are those of published PyTorch models of BlazeFace; a depthwise convolution gets a bias of 0.
    """
    state = student.state_dict()
    found = {name: tensor for name, tensor in state.items() if ".norm." not in name}
    for name, block in student.named_modules():
        if isinstance(block, Block):
            deep, point, norm = block.convs[0], block.convs[1], block.norm
            weight, bias = fuse_conv_bn_weights(
                point.weight, None, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            found |= {f"{name}.convs.1.weight": weight.detach(), f"{name}.convs.1.bias": bias.detach()}
            found[f"{name}.convs.0.bias"] = torch.zeros(deep.out_channels)
    return found


def _anchors() -> torch.Tensor:
    """Return 896,4: centre x, y, width and height of the anchors in pixels, in the order of the output."""
    found = []
    for stride, sizes in ANCHORS.items():
        centres = (torch.arange(SIDE // stride) + 0.5) * stride
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        for place in torch.stack([x.ravel(), y.ravel()], -1):
            found += [torch.cat([place, torch.tensor(size, dtype=torch.float32)]) for size in sizes]
    return torch.stack(found)


ANCHOR = _anchors()
ANCHOR_BOX = torch.cat([ANCHOR[:, :2] - ANCHOR[:, 2:] / 2, ANCHOR[:, :2] + ANCHOR[:, 2:] / 2], 1)


def decode(offsets: torch.Tensor) -> torch.Tensor:
    """Convert offsets ...,896,4 to boxes x1, y1, x2, y2 in pixels."""
    centre = ANCHOR[:, :2] + offsets[..., :2] * VARIANCE[0] * ANCHOR[:, 2:]
    size = ANCHOR[:, 2:] * (offsets[..., 2:] * VARIANCE[1]).clamp(-4, 4).exp()
    return torch.cat([centre - size / 2, centre + size / 2], -1)


def encode(boxes: torch.Tensor) -> torch.Tensor:
    """Convert a box for each anchor, 896,4, to offsets: the inverse of `decode`."""
    centre, size = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]).clamp_min(1)
    return torch.cat(
        [(centre - ANCHOR[:, :2]) / ANCHOR[:, 2:] / VARIANCE[0], (size / ANCHOR[:, 2:]).log() / VARIANCE[1]], 1
    )


def matched(boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for the ears of a photo, M,4, (kind of each anchor: 1 an ear, 0 none, -1 neither; offsets 896,4 of its ear).

    The best anchor of every ear is an ear whatever the IoU. Boxes without area are padding.
    """
    boxes = boxes[(boxes[:, 2:] - boxes[:, :2]).amin(1) > 0]
    if not len(boxes):
        return torch.zeros(len(ANCHOR)), torch.zeros(len(ANCHOR), 4)
    overlap = box_iou(ANCHOR_BOX, boxes)  # 896,M
    best, ear = overlap.max(1)
    kind = torch.where(best >= POSITIVE, 1.0, torch.where(best < NEGATIVE, 0.0, -1.0))
    nearest = overlap.argmax(0)
    kind[nearest], ear[nearest] = 1.0, torch.arange(len(boxes))
    return kind, encode(boxes[ear])


def photos(manifest: Manifest, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Read whole photos, squashed: (uint8 N,3,size,size; the ears' boxes N,MOST_EARS,4 in pixels of SIDE, then zeros)."""
    preprocessing = Preprocessing(size, 0.0, False, "bicubic", (0.5,) * 3, (0.5,) * 3)
    rows: dict[str, list[int]] = {}
    for row in range(len(manifest)):
        rows.setdefault(manifest.file(row), []).append(row)
    pixels, boxes = torch.empty(len(rows), 3, size, size, dtype=torch.uint8), torch.zeros(len(rows), MOST_EARS, 4)
    for place, (path, ears) in enumerate(rows.items()):
        width, height = image_size(path)
        pixels[place] = torch.from_numpy(load_crop(path, None, preprocessing))
        if len(ears) > MOST_EARS or any(manifest.boxes[ear] is None for ear in ears):
            raise ManifestError(f"{manifest.where(ears[0])}: needs a box for each ear, and at most {MOST_EARS} of them")
        for number, ear in enumerate(ears):
            box = torch.tensor(manifest.boxes[ear], dtype=torch.float32)
            boxes[place, number] = box * SIDE / torch.tensor([width, height, width, height])
    return pixels, boxes


def load(options):
    """Read the lists: photos and boxes to train on and to test on, and unlabelled images: the training photos at the size
    that a teacher sees, and crops."""
    lists = [read_manifest(path, options.root_dir) for path in (options.train, options.test)]
    size = options.teacher_size or SIDE
    (seen, labels), (test, test_labels) = photos(lists[0], size), photos(lists[1], SIDE)
    small = torch.cat([scaled(part, SIDE) for part in seen.split(64)])
    crops = [crops_of(options.unlabelled, SIDE, options.most)] if options.unlabelled else []
    return (small, labels), (test, test_labels), [seen, *crops]


def build(seed: int) -> Detector:
    """Return a student with random weights."""
    torch.manual_seed(seed)
    return Detector().to(memory_format=torch.channels_last)


def loss(student: Detector, pixels: torch.Tensor, boxes: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Return focal loss (of the anchors that are an ear or none) plus smooth L1 loss of the offsets of those that are."""
    images, boxes = augment(as_input(pixels), boxes, random)
    logits, offsets = student(images)
    kind, wanted = (torch.stack(parts) for parts in zip(*map(matched, boxes), strict=True))  # B,896 and B,896,4
    ears, count = kind == 1, (kind == 1).sum().clamp_min(1)
    focal = sigmoid_focal_loss(logits, ears.float(), reduction="none")[kind >= 0].sum() / count
    return focal + F.smooth_l1_loss(offsets[ears], wanted[ears], reduction="sum") / count


def augment(images: torch.Tensor, boxes: torch.Tensor, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Mirror, scale by 0.8 to 1.25, shift by up to 10 %, change brightness and contrast; transform the boxes B,M,4 alike.

    An ear of which less than half is left in the image becomes padding: a box without area.
    """

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(len(images), *shape, generator=random)

    scale, shift = uniform(0.8, 1.25), uniform(-0.2, 0.2, 2)  # the side is 2 long
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    linear = torch.diag_embed(torch.stack([mirror / scale, 1 / scale], -1))
    grid = F.affine_grid(torch.cat([linear, shift[:, :, None]], -1), list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, align_corners=False) * uniform(0.8, 1.2, 1, 1, 1) + uniform(-0.2, 0.2, 1, 1, 1)
    corners = (boxes.unflatten(2, (2, 2)) * 2 / SIDE - 1 - shift[:, None, None]) @ torch.linalg.inv(linear)[:, None]
    corners = ((corners + 1) * SIDE / 2).sort(2).values  # B,M,2,2
    inside = corners.clamp(0, SIDE)
    area, left = ((each[:, :, 1] - each[:, :, 0]).prod(-1) for each in (corners, inside))
    inside = torch.where((left > 0.5 * area)[:, :, None, None], inside, 0.0)
    return images.to(memory_format=torch.channels_last), inside.flatten(2)


@torch.inference_mode()
def predict(student: Detector, pixels: torch.Tensor, most: int = 10) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return for each photo (boxes M,4; scores M), sorted by score."""
    student.eval()
    found = []
    for batch in pixels.split(32):
        logits, offsets = student(as_input(batch))
        for logit, boxes in zip(logits, decode(offsets).clamp(0, SIDE), strict=True):
            kept = nms(boxes, logit, 0.4)[:most]
            found.append((boxes[kept], logit[kept].sigmoid()))
    return found


class Hits(NamedTuple):
    """Predicted boxes of all photos by descending score: `photo` int M; `hit` bool 10,M: whether it is the first on an ear,
    for each IoU. `ears`: number of ears of each photo, N."""

    photo: np.ndarray
    hit: np.ndarray
    ears: np.ndarray


def compared(found: list[tuple[torch.Tensor, torch.Tensor]], test: tuple[torch.Tensor, torch.Tensor]) -> Hits:
    """Match predicted boxes to ears, as COCO does: by descending score, each to the free ear with the largest IoU."""
    thresholds = np.arange(0.5, 1, 0.05)
    photo, scores, hits, ears = [], [], [], []
    for number, ((predicted, score), boxes) in enumerate(zip(found, test[1], strict=True)):
        boxes = boxes[(boxes[:, 2:] - boxes[:, :2]).amin(1) > 0]
        overlap = box_iou(predicted, boxes).numpy()  # M,E
        hit = np.zeros((len(thresholds), len(predicted)), bool)
        for place, threshold in enumerate(thresholds):
            free = np.ones(len(boxes), bool)
            for row in range(len(predicted)):
                candidates = np.where(free, overlap[row], 0.0)
                if len(boxes) and candidates.max() >= threshold:
                    hit[place, row], free[candidates.argmax()] = True, False
        photo.append(np.full(len(predicted), number))
        scores.append(score.numpy())
        hits.append(hit)
        ears.append(len(boxes))
    order = np.argsort(-np.concatenate(scores), kind="stable")
    return Hits(np.concatenate(photo)[order], np.concatenate(hits, 1)[:, order], np.array(ears))


def average_precision(found: Hits, weights: np.ndarray) -> float:
    """Return COCO's AP (101 recall values, IoU 0.50 to 0.95) in %, photo n counted weights[n] times."""
    times = weights[found.photo]
    hits, count, ears = (found.hit * times).cumsum(1), np.maximum(times.cumsum(), 1e-9), (weights * found.ears).sum()
    precision = np.maximum.accumulate((hits / count)[:, ::-1], 1)[:, ::-1]
    precision = np.pad(precision, ((0, 0), (0, 1)))
    wanted = np.linspace(0, 1, 101)
    return 100 * float(
        np.mean([row[np.searchsorted(recall / ears, wanted)] for row, recall in zip(precision, hits, strict=True)])
    )


def draw(test, predicted, scores: dict[str, float], count: int, path: Path, columns: int = 8) -> None:
    """Write an image of evenly spaced test photos at twice their size, a row for each kind of student.

    True boxes are white. Predicted ones are red, with their score, as many as there are ears.
    """
    places, side = np.linspace(0, len(test[0]) - 1, columns).round().astype(int), 2 * SIDE
    page = Image.new("RGB", (130 + columns * (side + 6), 8 + len(predicted) * (side + 6)), (250, 250, 248))
    pen = ImageDraw.Draw(page)
    for line, (name, found) in enumerate(predicted.items()):
        top = 8 + line * (side + 6)
        text = f"{name}\nAP {scores[name]:.1f} %\n{count} labelled"
        pen.text((8, top + 100), text, fill=(24, 28, 36), font=ImageFont.load_default(15))
        for column, place in enumerate(places):
            left = 130 + column * (side + 6)
            photo = Image.fromarray(test[0][place].permute(1, 2, 0).numpy()).resize((side, side))
            page.paste(photo, (left, top))
            truth = [box for box in test[1][place] if box[2] > box[0]]
            boxes, likely = found[place]
            marks = [(box, (255, 255, 255), "") for box in truth]
            best = zip(boxes[: len(truth)], likely[: len(truth)], strict=True)
            marks += [(box, (230, 40, 40), f"{score:.2f}") for box, score in best]
            for box, colour, label in marks:
                x1, y1, x2, y2 = (2 * box).tolist()
                pen.rectangle((left + x1, top + y1, left + x2, top + y2), outline=colour, width=2)
                if label:
                    pen.rectangle((left + x1, top + y1 - 18, left + x1 + 38, top + y1), fill=(255, 255, 255))
                    pen.text((left + x1 + 3, top + y1 - 17), label, fill=(200, 20, 20), font=ImageFont.load_default(15))
    page.save(path)


TASK = Task(
    what="photos",
    unit="AP %",
    inputs={
        "train": "photos with boxes to train on, without which the teacher shows them",
        "test": "photos to test on",
    },
    side=SIDE,
    steps=600,
    rate=5e-3,
    kept=Hits,
    load=load,
    build=build,
    loss=loss,
    predict=predict,
    compared=compared,
    score=average_precision,
    draw=draw,
)

if __name__ == "__main__":
    sys.exit(compare(TASK, __doc__))
