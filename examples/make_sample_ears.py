"""Draw synthetic photos of ears, with boxes, landmarks and identities, as demo data.

    python make_sample_ears.py OUT --people 60 --photos 8 --seed 0

No image is a photograph of a person: all are computed from random numbers, so that they can be published without consent.
They serve to try the programs; results on them say nothing about real ears.

* A person has 35 traits, which shape the splines of an ear's anatomy. These become a height field, which is shaded as
  skin (drawn_ears.py). A person's two ears have slightly different traits.
* Each photo has its own pose, light, exposure, white balance, hair, earring, blur, noise and JPEG quality
  (drawn_heads.py).
* All random numbers are derived from the seed, the person, the side and the photo. Images do therefore not depend on the
  number of processes, or on how many people and photos are drawn.
"""

import argparse
import csv
import itertools
import json
import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import numpy as np
from drawn_ears import build_ear, paste_ear, shade_ear
from drawn_heads import (
    choose_look,
    choose_pose,
    develop,
    draw_ear_shadow,
    draw_earring,
    draw_hair,
    draw_head,
    draw_loose_hair,
)
from PIL import Image


def main(argv=None):
    """Draw a data set and return the exit code."""
    options = parse_options(argv)
    out = Path(options.out)
    if out.exists() and not out.is_dir():
        print(f"{out}: is a file; give a folder", file=sys.stderr)
        return 1
    if out.exists() and any(out.iterdir()):
        if not options.overwrite:
            print(f"{out}: is not empty; give another folder, or --overwrite to replace its images", file=sys.stderr)
            return 1
        for earlier in out.glob("images/p[0-9]*"):
            shutil.rmtree(earlier)
    rows = draw_all(out, options)
    write_tables(out, rows)
    counts = {split: sum(row["split"] == split for row in rows) for split in ("train", "val", "eval")}
    splits = ", ".join(f"{count} {split}" for split, count in counts.items())
    print(f"wrote {len(rows)} drawn ears of {options.people} people ({splits}) to {out}", file=sys.stderr)
    return 0


def parse_options(argv):
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Draw sample photographs of ears (no real people).")
    add = parser.add_argument
    add("out", help="output folder, new or empty unless --overwrite is given")
    add("--people", type=int, default=60, help="number of people (default: %(default)s)")
    add("--photos", type=int, default=8, help="photos per person (default: %(default)s)")
    add("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    add(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="processes; the images do not depend on it (default: one per core)",
    )
    add("--eval-people", type=int, default=12, help="people in eval.csv (default: %(default)s)")
    add("--val-people", type=int, default=6, help="people for validation (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace earlier images in OUT")
    options = parser.parse_args(argv)
    if options.photos < 1 or min(options.eval_people, options.val_people, options.seed) < 0:
        parser.error("--photos must be at least 1, and the other numbers at least 0")
    if options.people <= options.eval_people + options.val_people:
        parser.error("--people must exceed --eval-people plus --val-people; the rest is for training")
    return options


def draw_all(out, options):
    """Draw and save all photos, and return their rows. The last people are for eval, those before them for val."""
    first_eval = options.people - options.eval_people
    first_val = first_eval - options.val_people
    tasks = []
    for person in range(options.people):
        split = "eval" if person >= first_eval else "val" if person >= first_val else "train"
        tasks.append((out, options.seed, person, options.photos, split))
    workers = min(options.workers, len(tasks))
    if workers <= 1:
        people = itertools.starmap(save_person, tasks)
    else:
        with multiprocessing.Pool(workers) as pool:
            people = pool.starmap(save_person, tasks, chunksize=1)
    return [row for rows in people for row in rows]


def save_person(out, seed, person, photos, split):
    """Draw and save the photos of one person, and return their rows."""
    identity = f"p{person:03d}"
    folder = out / "images" / identity
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for photo in range(photos):
        image, box, side, landmarks = draw_photo(seed, person, photo)
        image.save(folder / f"{photo:02d}.jpg", quality=image.info["quality"])
        rows.append(
            {
                "image_path": f"images/{identity}/{photo:02d}.jpg",
                "bbox": [round(v, 2) for v in box],
                "identity": identity,
                "side": side,
                "split": split,
                "landmarks": np.round(landmarks, 2).tolist(),
            }
        )
    return rows


def draw_photo(seed, person, photo):
    """Draw a photo: (PIL image, (x1, y1, x2, y2), "left" or "right", 55 x 2 landmarks in pixels).

    The image depends on the three arguments only. Landmarks are polylines: 20 points along the helix from its crus to
    the lobule, 15 along the antihelix from its superior crus down, 15 along the rim of the concha, 5 down the tragus.
    """
    side = "left" if (person + photo) % 2 == 0 else "right"
    ear = build_ear(seed, person, side)
    rng = np.random.default_rng([seed, person, 1, photo])
    look = choose_look(rng, ear)
    pose = choose_pose(rng, ear)
    scene = draw_head(rng, pose, look)
    scene = draw_hair(scene, rng, pose, look, ear)
    scene = draw_ear_shadow(scene, pose, look, ear)
    scene = paste_ear(scene, shade_ear(rng, ear, look, pose.scale), pose, ear)
    scene = draw_earring(scene, rng, pose, look, ear)
    scene = draw_loose_hair(scene, rng, pose, look)
    image = develop(rng, scene, look)
    points = np.concatenate([pose.to_photo(ear.landmarks, ear), pose.to_photo(ear.outline, ear)])
    if side == "right":  # until here every ear is a left one
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        points[:, 0] = image.width - 1 - points[:, 0]
    image.info["quality"] = look.quality
    box = np.clip([points.min(0), points.max(0)], 0, np.array(image.size) - 1)
    return image, tuple(box.ravel().tolist()), side, points[: len(ear.landmarks)]


def write_tables(out, rows):
    """Write the manifests of training, validation (with identities and sides) and eval.csv, and all rows to ears.jsonl."""
    for split in ("train", "val"):
        chosen = [row for row in rows if row["split"] == split]
        content = {
            "image_paths": np.array([row["image_path"] for row in chosen], dtype=str),
            "bboxes": np.array([row["bbox"] for row in chosen], np.float32).reshape(-1, 4),
        }
        if split == "val":  # training needs no identities; validation uses them for rank-1 and EER
            content |= {
                name: np.array([row[key] for row in chosen])
                for name, key in (("identities", "identity"), ("sides", "side"))
            }
        np.save(out / f"{split}_teacher.npy", content)
    with open(out / "eval.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["image_path", "identity", "side", "x1", "y1", "x2", "y2"])
        for row in rows:
            if row["split"] == "eval":
                table.writerow([row["image_path"], row["identity"], row["side"], *row["bbox"]])
    with open(out / "ears.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
