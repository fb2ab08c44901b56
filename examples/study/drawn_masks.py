"""Write the masks and the list of boxes that mask_probe.py needs, for photos that make_sample_ears.py has drawn.

    python drawn_masks.py drawn --seed 0

A mask holds the pixels that the ear covers, also where hair or an earring lies over it. The seed is that of
make_sample_ears.py: shape and pose of each ear are computed again from it, without drawing the photo.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

from drawn_ears import build_ear
from drawn_fields import STEP, X0, X1, Y0, Y1, lookup
from drawn_heads import choose_look, choose_pose


def draw_mask(seed: int, person: int, photo: int, side: str) -> Image.Image:
    """Return the mask of a photo, 1 bit, with the random numbers of `draw_photo`."""
    ear = build_ear(seed, person, side)
    rng = np.random.default_rng([seed, person, 1, photo])
    choose_look(rng, ear)
    pose = choose_pose(rng, ear)
    x, y = pose.to_ear(pose.columns, pose.rows, ear)
    on_grid = (x > X0) & (x < X1 - STEP) & (y > Y0) & (y < Y1 - STEP)
    mask = Image.fromarray((lookup(ear.alpha, x, y)[..., 0] > 0.5) & on_grid)
    return mask.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if side == "right" else mask


def main(argv: list[str] | None = None) -> int:
    """Write `masks/` and `boxes.csv` into a folder of drawn ears, and return the exit code."""
    parser = argparse.ArgumentParser(description="Write masks of drawn ears.")
    parser.add_argument("folder", type=Path, help="folder that make_sample_ears.py has written")
    parser.add_argument("--seed", type=int, default=0, help="its --seed (default: %(default)s)")
    options = parser.parse_args(argv)
    rows = [json.loads(line) for line in (options.folder / "ears.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows:
        path = Path(row["image_path"])  # images/p003/01.jpg
        mask = draw_mask(options.seed, int(path.parent.name[1:]), int(path.stem), row["side"])
        if np.abs(np.subtract(mask.getbbox() or (0, 0, 0, 0), row["bbox"])).max() > 20:
            print(f"{path}: was drawn with another --seed", file=sys.stderr)
            return 1
        file = options.folder / "masks" / path.parent.name / f"{path.stem}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        mask.save(file)
    with open(options.folder / "boxes.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["image_path", "x1", "y1", "x2", "y2", "identity"])
        table.writerows([row["image_path"], *row["bbox"], row["identity"]] for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
