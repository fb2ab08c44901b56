"""Train a small ear detector for photos of 128 px, with and without a teacher.

    python detector.py EARS TEACHER --draw detections.png

EARS: output folder of make_sample_ears.py. TEACHER: a folder of `earteach export-backbone`. The student has blocks similar
to BlazeFace, predicts boxes at strides 8 and 16 without anchors (FCOS, Tian et al. 2019), and has under a million
parameters. With the teacher, it is first distilled from the teacher's maps of strides 8 and 16 on all training photos
without their boxes. Then all students train on the same few labelled photos in the same order. The control is distilled
from a randomly initialised copy of the teacher: its gain cannot come from what the teacher learned.

The metric is COCO's average precision, IoU 0.50 to 0.95, on photos of people on whom neither student nor teacher was trained.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from distillation import Block, Task, Trunk, as_input, compare, square
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torchvision.ops import box_iou, generalized_box_iou_loss, nms, sigmoid_focal_loss

SIDE, STRIDES, WIDTHS = 128, (8, 16), (32, 64, 128, 160)
LARGE = 48  # boxes with a longer side above this, in pixels, belong to stride 16


class Detector(nn.Module):
    """Predict, from images B,3,128,128, logits B,K of an ear at each of K cells and boxes B,K,4.

    Boxes are x1, y1, x2, y2 in pixels.
    """

    def __init__(self):
        super().__init__()
        self.trunk = Trunk(WIDTHS, (2, 3, 4, 3))
        self.sides = nn.ModuleList(nn.Conv2d(width, 96, 1) for width in WIDTHS[1:])
        self.heads = nn.ModuleList(nn.Sequential(Block(96, 96), nn.Conv2d(96, 5, 1)) for _ in STRIDES)
        for head in self.heads:
            nn.init.constant_(head[-1].bias[0], -4)  # few cells have an ear
        cells = [_cells(SIDE // stride, stride) for stride in STRIDES]
        self.register_buffer("cells", torch.cat(cells))  # K,3: x and y of the centre, stride

    def maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return the maps of STRIDES, for distillation."""
        return self.trunk(images)[1:3]

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        fine, middle, coarse = (side(stage) for side, stage in zip(self.sides, self.trunk(images)[1:], strict=True))
        middle = middle + F.interpolate(coarse, scale_factor=2)
        fine = fine + F.interpolate(middle, scale_factor=2)
        outputs = [head(stage).flatten(2) for head, stage in zip(self.heads, (fine, middle), strict=True)]
        output = torch.cat(outputs, 2).transpose(1, 2)  # B,K,5
        distances = (
            output[..., 1:].clamp(-4, 4).exp() * 2 * self.cells[:, 2:]
        )  # to the left, top, right and bottom side
        centre = self.cells[:, :2]
        return output[..., 0], torch.cat([centre - distances[..., :2], centre + distances[..., 2:]], -1)


def _cells(count: int, stride: int) -> torch.Tensor:
    """Return count * count,3: x and y of the cells' centres in pixels, and the stride."""
    centres = (torch.arange(count) + 0.5) * stride
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    return torch.stack([x.ravel(), y.ravel(), torch.full((count * count,), float(stride))], -1)


def photos(rows: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """Read whole photos, padded to squares: (uint8 N,3,128,128; the ear's box N,4 in pixels)."""
    pixels, boxes = [], []
    for row in rows:
        with Image.open(row["file"]) as file:
            image = file.convert("RGB")
        whole, scale, offset = square(image, (0, 0, *image.size), SIDE)
        pixels.append(torch.from_numpy(whole.transpose(2, 0, 1).copy()))
        boxes.append(torch.tensor((np.array(row["bbox"]).reshape(2, 2) * scale + offset).ravel(), dtype=torch.float32))
    return torch.stack(pixels), torch.stack(boxes)


def build(seed: int) -> Detector:
    """Return a student with random weights."""
    torch.manual_seed(seed)
    return Detector().to(memory_format=torch.channels_last)


def loss(student: Detector, pixels: torch.Tensor, boxes: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Return focal loss plus generalised IoU loss of augmented photos."""
    images, boxes = augment(as_input(pixels), boxes, random)
    logits, predicted = student(images)
    positive = positives(student.cells, boxes)  # B,K
    focal = sigmoid_focal_loss(logits, positive.float(), reduction="sum") / positive.sum()
    targets = boxes[:, None].expand_as(predicted)
    return focal + generalized_box_iou_loss(predicted[positive], targets[positive], reduction="mean")


def positives(cells: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Return the cells that should predict the box, bool B,K: those of its stride within one cell of its centre."""
    centre, size = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]).amax(1)
    stride = torch.where(size > LARGE, STRIDES[1], STRIDES[0])
    distance = (cells[None, :, :2] - centre[:, None]).abs().amax(-1)
    return (cells[None, :, 2] == stride[:, None]) & (distance <= stride[:, None])


def augment(images: torch.Tensor, boxes: torch.Tensor, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Mirror, scale by 0.8 to 1.25, shift by up to 10 %, change brightness and contrast; transform the boxes alike."""

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(len(images), *shape, generator=random)

    scale, shift = uniform(0.8, 1.25), uniform(-0.2, 0.2, 2)  # the side is 2 long
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    linear = torch.diag_embed(torch.stack([mirror / scale, 1 / scale], -1))
    grid = F.affine_grid(torch.cat([linear, shift[:, :, None]], -1), list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, align_corners=False) * uniform(0.8, 1.2, 1, 1, 1) + uniform(-0.2, 0.2, 1, 1, 1)
    corners = (boxes.unflatten(1, (2, 2)) * 2 / SIDE - 1 - shift[:, None]) @ torch.linalg.inv(linear)
    corners = ((corners + 1) * SIDE / 2).sort(1).values.clamp(0, SIDE)
    return images.to(memory_format=torch.channels_last), corners.flatten(1)


@torch.inference_mode()
def predict(student: Detector, pixels: torch.Tensor, most: int = 10) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return for each photo (boxes M,4; scores M), sorted by score."""
    student.eval()
    found = []
    for batch in pixels.split(32):
        for logits, boxes in zip(*student(as_input(batch)), strict=True):
            kept = nms(boxes, logits, 0.5)[:most]
            found.append((boxes[kept].clamp(0, SIDE), logits[kept].sigmoid()))
    return found


def average_precision(found, boxes: torch.Tensor) -> float:
    """Return COCO's AP (101 recall values, IoU 0.50 to 0.95) of photos with one ear each."""
    scores = torch.cat([scores for _, scores in found])
    order = scores.argsort(descending=True)
    result = []
    for threshold in np.arange(0.5, 1, 0.05):
        hits = []
        for (predicted, _), box in zip(found, boxes, strict=True):
            hit = box_iou(predicted, box[None])[:, 0] >= threshold
            hit[1:] &= hit.cumsum(0)[:-1] == 0  # a second box on the same ear is a false positive
            hits.append(hit)
        true_positives = torch.cat(hits)[order].double().cumsum(0)
        precision = (true_positives / torch.arange(1, len(true_positives) + 1)).flip(0).cummax(0).values.flip(0)
        recall = true_positives / len(boxes)
        place = torch.searchsorted(recall, torch.linspace(0, 1, 101, dtype=torch.float64))
        result.append(float(torch.cat([precision, precision.new_zeros(1)])[place].mean()))
    return float(np.mean(result))


def draw(test, predicted, count: int, path: Path, columns: int = 8) -> None:
    """Write an image of evenly spaced test photos at twice their size, a row for each kind of student.

    The true box is white, the predicted box with the highest score red, with its score.
    """
    places, side = np.linspace(0, len(test[0]) - 1, columns).round().astype(int), 2 * SIDE
    page = Image.new("RGB", (130 + columns * (side + 6), 8 + len(predicted) * (side + 6)), (250, 250, 248))
    pen = ImageDraw.Draw(page)
    for line, (name, found) in enumerate(predicted.items()):
        top = 8 + line * (side + 6)
        text = f"{name}\nAP {100 * average_precision(found, test[1]):.1f} %\n{count} labelled"
        pen.text((8, top + 100), text, fill=(24, 28, 36), font=ImageFont.load_default(15))
        for column, place in enumerate(places):
            left = 130 + column * (side + 6)
            photo = Image.fromarray(test[0][place].permute(1, 2, 0).numpy()).resize((side, side))
            page.paste(photo, (left, top))
            boxes, scores = found[place]
            for box, colour in ((test[1][place], (255, 255, 255)), (boxes[0], (230, 40, 40))):
                x1, y1, x2, y2 = (2 * box).tolist()
                pen.rectangle((left + x1, top + y1, left + x2, top + y2), outline=colour, width=2)
            pen.rectangle((left + 2, top + 2, left + 42, top + 20), fill=(255, 255, 255))
            pen.text((left + 6, top + 3), f"{scores[0]:.2f}", fill=(200, 20, 20), font=ImageFont.load_default(15))
    page.save(path)


TASK = Task(
    what="photos",
    unit="AP %",
    strides=STRIDES,
    steps=400,
    load=photos,
    build=build,
    loss=loss,
    predict=predict,
    score=lambda predicted, test: 100 * average_precision(predicted, test[1]),
    draw=draw,
)

if __name__ == "__main__":
    sys.exit(compare(TASK, __doc__))
