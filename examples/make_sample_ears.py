"""Draw made-up photographs of ears, with boxes, landmarks and identities, as demo data.

Nothing here is a photograph of a person: every picture is computed from random numbers, so the
set can be shipped and shown without anybody's consent.  It is meant for trying the programs, not
for judging how well they do on real ears.

    python make_sample_ears.py OUT --people 60 --photos 8 --seed 0

How a picture comes about:

* A person is some thirty-five numbers (`TRAITS`), which bend the splines of the helix, antihelix with
  its two crura, concha, tragus, antitragus and lobule.  The second ear of a person is the mirror
  image with slightly different numbers.
* The splines become a height field (`build_ear`), which is lit like skin (`shade_ear`): wrapped
  diffuse light, cast shadows, ambient occlusion, a weak gloss, and red in the hollows.
* Each photo draws its own pose, light, exposure, white balance, hair, earring, blur, noise and JPEG
  quality.  Tone varies more between photos than between people, so telling people apart takes shape.

Ear coordinates: x runs from the face to the back of the head, y from the top of the ear (0) to
the bottom of the lobule (about 1), both in ear heights.  They describe a left ear, whose face is at
the left of the picture; right ears are mirrored at the end.
"""

import argparse
import csv
import functools
import json
import math
import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

STEP = 1 / 200  # grid spacing of the height field, in ear heights
X0, X1, Y0, Y1 = -0.16, 0.86, -0.14, 1.20
GRID = np.meshgrid(np.arange(X0, X1, STEP, np.float32), np.arange(Y0, Y1, STEP, np.float32))

# name: (mean, spread between people).  The two ears of a person differ by a tenth of the spread.
TRAITS = {
    "width": (1.0, 0.095), "tilt": (0.12, 0.08), "stand_off": (0.20, 0.07),
    "rim_front": (0, 0.016), "rim_top": (0, 0.020), "rim_top_back": (0, 0.026),
    "rim_back": (0, 0.026), "rim_low": (0, 0.022), "darwin": (0, 0.006),
    "helix_width": (0.082, 0.016), "helix_taper": (0.75, 0.16), "helix_curl": (0.115, 0.022),
    "helix_run": (0.80, 0.085), "crus_length": (0, 0.026), "crus_height": (0, 0.016),
    "anti_x": (0, 0.025), "anti_bend": (0, 0.020), "anti_height": (0.104, 0.020),
    "anti_width": (0.048, 0.008), "fork_y": (0, 0.032), "superior_x": (0, 0.026),
    "superior_height": (0.95, 0.15), "inferior_y": (0, 0.022), "inferior_height": (0.9, 0.15),
    "concha_depth": (0.17, 0.028), "concha_front": (0, 0.012), "tragus_size": (0.075, 0.018),
    "tragus_y": (0, 0.020), "tragus_point": (0, 0.013), "antitragus_size": (0.075, 0.022),
    "notch_width": (0, 0.013), "lobe_length": (0, 0.045), "lobe_width": (0, 0.024),
    "lobe_hang": (0.5, 0.40), "melanin": (0.40, 0.12),
}


def main(argv=None):
    options = parse_options(argv)
    out = Path(options.out)
    if out.exists() and not out.is_dir():
        print(f"{out} is a file; give a folder", file=sys.stderr)
        return 1
    if out.exists() and any(out.iterdir()):
        if not options.overwrite:
            print(f"{out} is not empty; give --overwrite to replace what is there", file=sys.stderr)
            return 1
        for earlier in out.glob("images/p[0-9]*"):
            shutil.rmtree(earlier)
    rows = draw_all(out, options)
    write_tables(out, rows)
    counts = {split: sum(row["split"] == split for row in rows) for split in ("train", "val", "eval")}
    said = ", ".join(f"{count} {split}" for split, count in counts.items())
    print(f"wrote {len(rows)} drawn ears of {options.people} people ({said}) to {out}", file=sys.stderr)
    return 0


def parse_options(argv):
    parser = argparse.ArgumentParser(description="Draw sample photographs of ears (no real people).")
    add = parser.add_argument
    add("out", help="folder to write; must be new or empty unless --overwrite is given")
    add("--people", type=int, default=60, help="number of people (default: %(default)s)")
    add("--photos", type=int, default=8, help="photos of each person (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of everything drawn (default: %(default)s)")
    add("--workers", type=int, default=os.cpu_count(),
        help="processes; the result does not depend on it (default: one per core)")
    add("--eval-people", type=int, default=12, help="people kept for eval.csv (default: %(default)s)")
    add("--val-people", type=int, default=6, help="people kept for validation (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace an earlier set in OUT")
    options = parser.parse_args(argv)
    if options.photos < 1 or min(options.eval_people, options.val_people, options.seed) < 0:
        parser.error("--photos must be at least 1, and the other numbers not negative")
    if options.people <= options.eval_people + options.val_people:
        parser.error("--people must exceed --eval-people plus --val-people, or nobody is left to train on")
    return options


def draw_all(out, options):
    """Draw and save every photo; the last people go to eval, those before them to val."""
    first_eval = options.people - options.eval_people
    first_val = first_eval - options.val_people
    tasks = []
    for person in range(options.people):
        split = "eval" if person >= first_eval else "val" if person >= first_val else "train"
        tasks.append((str(out), options.seed, person, options.photos, split))
    workers = max(1, min(options.workers or 1, len(tasks)))
    if workers == 1:
        return [row for task in tasks for row in save_person(task)]
    with multiprocessing.Pool(workers) as pool:
        return [row for rows in pool.imap(save_person, tasks) for row in rows]


def save_person(task):
    out, seed, person, photos, split = task
    identity = f"p{person:03d}"
    folder = Path(out, "images", identity)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for photo in range(photos):
        image, box, side, landmarks = draw_photo(seed, person, photo)
        image.save(folder / f"{photo:02d}.jpg", quality=image.info["quality"])
        rows.append({"image_path": f"images/{identity}/{photo:02d}.jpg",
                     "bbox": [round(float(v), 2) for v in box], "identity": identity, "side": side,
                     "split": split, "landmarks": np.round(landmarks, 2).tolist()})
    return rows


def write_tables(out, rows):
    for split in ("train", "val"):
        chosen = [row for row in rows if row["split"] == split]
        np.save(out / f"{split}_teacher.npy", {
            "image_paths": np.array([row["image_path"] for row in chosen], dtype=str),
            "bboxes": np.array([row["bbox"] for row in chosen], np.float32).reshape(-1, 4)})
    with open(out / "eval.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["image_path", "identity", "side", "x1", "y1", "x2", "y2"])
        for row in rows:
            if row["split"] == "eval":
                table.writerow([row["image_path"], row["identity"], row["side"], *row["bbox"]])
    with open(out / "ears.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def draw_photo(seed, person, photo):
    """One photo: (PIL image, (x1, y1, x2, y2), "left" or "right", 55 x 2 landmarks in pixels).

    The same three numbers always give the same picture.  Landmarks are line strips: 20 along the
    helix from its crus to the lobule, 15 along the antihelix from its superior crus down, 15 along the
    rim of the concha, 5 down the tragus.
    """
    side = "left" if (person + photo) % 2 == 0 else "right"
    ear = build_ear(seed, person, side)
    rng = np.random.default_rng(np.random.SeedSequence([seed, person, 1, photo]))
    look = choose_look(rng, ear)
    pose = choose_pose(rng, ear)
    scene = draw_head(rng, pose, look)
    scene = draw_behind_ear(scene, rng, pose, look, ear)
    patch = shade_ear(rng, ear, look, pose)
    scene = paste_ear(scene, patch, pose, ear)
    scene = draw_in_front(scene, rng, pose, look, ear)
    image = develop(rng, scene, look)
    landmarks = pose.to_photo(ear.landmarks, ear)
    outline = np.concatenate([pose.to_photo(ear.outline, ear), landmarks])
    if side == "right":
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        landmarks[:, 0] = image.width - 1 - landmarks[:, 0]
        outline[:, 0] = image.width - 1 - outline[:, 0]
    low, high = outline.min(0), outline.max(0)
    limit = np.array(image.size) - 1
    low, high = np.clip(low, 0, limit), np.clip(high, 0, limit)
    image.info["quality"] = look.quality
    return image, tuple(float(v) for v in (*low, *high)), side, landmarks


class Bag:
    """Plain named values, so that the steps of a drawing can hand on what they chose."""

    def __init__(self, **values):
        self.__dict__.update(values)


@functools.lru_cache(maxsize=4)
def build_ear(seed, person, side):
    """The shape of one ear: height field, coverage, outline and landmarks."""
    t = draw_traits(seed, person, side)
    lines = draw_lines(t)
    stand = smooth_step(0.02, 0.5, GRID[0]) * t["stand_off"]
    height = relief(t, lines, stand)
    inside = Stroke(lines["edge"]).across
    x, y = GRID
    # Where the ear grows out of the cheek there is no edge to see: let it fade there instead.
    low = 0.72 + 0.30 * (1 - np.clip(t["lobe_hang"], 0, 1))
    grown = smooth_step(0.19, 0.07, x) * smooth_step(0.24, 0.40, y) * smooth_step(low + 0.10, low - 0.02, y)
    alpha = smooth_step(-0.004, 0.006 + 0.075 * grown, -inside)
    height = height * (1 - grown * (1 - smooth_step(0.0, 0.12, -inside)))
    landmarks = np.concatenate([even(lines["helix"], 20), even(lines["antihelix"], 15),
                                even(lines["concha_strip"], 15), even(lines["tragus"], 5)])
    soft = blur(height * alpha, 0.03) / np.maximum(blur(alpha, 0.03), 0.05)
    return Bag(height=height, alpha=alpha, soft=soft, outline=lines["outline"], landmarks=landmarks,
               lobe=lines["lobe"], traits=t)


def draw_traits(seed, person, side):
    both = np.random.default_rng(np.random.SeedSequence([seed, person, 0]))
    one = np.random.default_rng(np.random.SeedSequence([seed, person, 3, int(side == "right")]))
    shared = both.normal(size=len(TRAITS)).clip(-1.9, 1.9)
    own = 0.1 * one.normal(size=len(TRAITS))
    return {name: float(mean + spread * value)
            for (name, (mean, spread)), value in zip(TRAITS.items(), shared + own, strict=True)}


def draw_lines(t):
    """Splines of the anatomy in ear coordinates, from the traits of one ear."""
    crus = np.array([t["crus_length"], t["crus_height"]])
    helix = np.array([[0.270, 0.480], [0.195, 0.455], [0.130, 0.395], [0.098, 0.300], [0.112, 0.185],
                      [0.178, 0.085], [0.290, 0.040], [0.415, 0.062], [0.505, 0.145], [0.548, 0.270],
                      [0.540, 0.400], [0.508, 0.520], [0.466, 0.630], [0.432, 0.720], [0.412, 0.790]])
    helix[0] += crus
    helix[1] += crus * [0.4, 0.8]
    rim = spline(helix, 160)
    along = np.linspace(0, 1, 160)
    push = sum(t[name] * np.exp(-((along - at) / reach) ** 2) for name, at, reach in (
        ("rim_front", 0.30, 0.07), ("rim_top", 0.43, 0.09), ("rim_top_back", 0.56, 0.08),
        ("rim_back", 0.69, 0.09), ("rim_low", 0.83, 0.09), ("darwin", 0.61, 0.025)))
    rim = rim + normals(rim) * push[:, None]
    outer = rim + normals(rim) * rim_width(t, along)[:, None] * 0.5
    hang, long, wide = np.clip(t["lobe_hang"], 0, 1), t["lobe_length"], t["lobe_width"]
    tail = outer[-1, 0]
    lobe = np.array([[tail - 0.005 + wide * 0.6, 0.865 + long * 0.4],
                     [tail - 0.045 + wide, 0.940 + long * 0.8],
                     [0.310 + wide * 0.7, 0.988 + long], [0.228 + wide * 0.3, 0.982 + long * 0.9],
                     [0.165, 0.920 + long * 0.45 + 0.02 * hang],
                     [0.128 + 0.022 * hang, 0.855 + 0.012 * hang], [0.095, 0.795]])
    front = np.array([[0.040, 0.700], [0.015, 0.580], [0.020, 0.450], [0.045, 0.360]])
    seen = np.concatenate([outer[38:-3:6], lobe])
    lines = {"helix": rim, "edge": spline(np.concatenate([seen, front]), 200, closed=True),
             "outline": spline(seen[:-1], 120),
             "lobe": np.array([[0.275, 0.900 + long * 0.5], [0.275, 0.985 + long * 0.95]]) + [wide * 0.4, 0]}
    lines.update(inner_lines(t))
    return {name: (line * [t["width"], 1]).astype(np.float32) for name, line in lines.items()}


def inner_lines(t):
    """What lies inside the rim: antihelix and crura, concha, tragus, antitragus, fossa triangularis."""
    ax, bend, fork = t["anti_x"], t["anti_bend"], 0.315 + t["fork_y"]
    stem = np.array([[0.322 + ax * 0.3, 0.700], [0.378 + ax * 0.7, 0.640], [0.418 + ax + bend * 0.5, 0.560],
                     [0.430 + ax + bend, 0.470], [0.412 + ax + bend * 0.5, 0.385]])
    joint = np.array([0.378 + ax * 0.8, fork])
    superior = np.array([[0.348 + ax * 0.5 + t["superior_x"] * 0.5, (fork + 0.13) / 2 + 0.01],
                         [0.335 + t["superior_x"], 0.135]])
    down = t["inferior_y"]
    inferior = np.array([stem[4], joint + [-0.025, 0.002], [0.290, 0.262 + down * 0.7 + t["fork_y"] * 0.5],
                         [0.215, 0.248 + down], [0.150, 0.258 + down]])
    antihelix = spline(np.concatenate([superior[::-1], joint[None], stem[::-1]]), 90)
    ty, point, notch = t["tragus_y"], t["tragus_point"], t["notch_width"]
    tragus = np.array([[0.150, 0.485 + ty], [0.180 + point * 0.6, 0.525 + ty], [0.202 + point, 0.575 + ty],
                       [0.190 + point * 0.4, 0.630 + ty], [0.196 - notch, 0.680]])
    top = inferior[3][1] + 0.075
    front = 0.140 + t["concha_front"]
    wall = np.array([[front, 0.400], [front + 0.020, top + 0.010], [0.235, top], [0.310, top + 0.020],
                     [stem[4][0] - 0.052, stem[4][1] + 0.015], [stem[3][0] - 0.054, stem[3][1]],
                     [stem[2][0] - 0.056, stem[2][1] + 0.005], [stem[1][0] - 0.050, stem[1][1] - 0.005],
                     [0.290 + notch, 0.675], [0.245, 0.722]])
    concha = np.concatenate([wall, tragus[::-1], [[front, 0.440]]])
    return {"antihelix": antihelix, "inferior": spline(inferior, 56), "tragus": spline(tragus, 40),
            "concha": spline(concha, 150, closed=True), "concha_strip": spline(wall, 80),
            "antitragus": np.array([[0.300 + notch, 0.712]]),
            "fossa": np.array([[0.235, (inferior[3][1] + 0.135) / 2 + 0.01]])}


def rim_width(t, along):
    """Width of the helix from its crus (0) to its tail (1)."""
    grow = smooth_step(0.0, 0.22, along) * 0.35 + 0.65
    taper = 1 - (1 - t["helix_taper"]) * smooth_step(0.35, 0.75, along)
    end = 1 - 0.45 * smooth_step(t["helix_run"] - 0.1, t["helix_run"] + 0.12, along)
    return t["helix_width"] * grow * taper * end


def relief(t, lines, plate):
    """Heights above the head, in ear heights: the inner folds, over them the helix, then the tragus."""
    helix = Stroke(lines["helix"], every=1)
    half = rim_width(t, helix.along) / 2
    place = np.clip(helix.across / half, -4, 4)
    rise = smooth_step(0.0, 0.24, helix.along)
    tail = smooth_step(t["helix_run"] - 0.16, t["helix_run"] + 0.16, helix.along)
    curl = (0.40 + 0.60 * rise) * (1 - tail)
    # Outwards the rim rolls off round, inwards it overhangs the scapha and so ends steeply.
    tube = np.clip(1 - np.abs(place) ** np.where(place < 0, 3.0, 2.2), 0, 1) ** 0.6
    aside = 0.10 * np.clip(np.abs(place) - 1, 0, 3) + 0.20 * np.clip(helix.past / half - 1, 0, 3)
    gutter = 0.035 * np.exp(-((place + 1.7) / 0.8) ** 2) * rise * curl * smooth_step(0.03, 0, helix.past)
    body = plate + inner_relief(t, lines) - gutter
    rim = plate - 0.9 * t["concha_depth"] * (1 - rise) + t["helix_curl"] * curl * tube
    rim = rim - aside - 0.06 * tail ** 2
    merge = (0.012 + 0.035 * (1 - rise)) * smooth_step(0.18, 0.02, aside)
    height = 0.5 * (body + rim + np.sqrt((body - rim) ** 2 + merge ** 2))  # the higher, smoothly

    flap = Stroke(lines["tragus"])
    swell = np.sin(np.pi * np.clip(flap.along, 0.02, 0.98)) ** 0.7 * np.exp(-(flap.past / 0.03) ** 2)
    front = np.exp(-(flap.across / np.where(flap.across < 0, 0.075, 0.012)) ** 2)
    return blur(height + t["tragus_size"] * swell * front, 0.0055)


def inner_relief(t, lines):
    """Bowl of the concha, antihelix with crura, antitragus, fossa triangularis and lobule."""
    depth = Stroke(lines["concha"]).across
    steep = 0.035 + 0.055 * smooth_step(0.18, 0.40, GRID[0])
    bowl = smooth_step(-0.012, steep, -depth) ** 0.8
    canal = dome([0.205 * t["width"], 0.575 + t["tragus_y"]], 0.045, 0.055)

    stem = Stroke(lines["antihelix"])
    spread = t["anti_width"] * (1 + 0.25 * smooth_step(0.35, 0.0, stem.along))
    strength = t["superior_height"] + (1 - t["superior_height"]) * smooth_step(0.30, 0.55, stem.along)
    strength = strength * (0.35 + 0.65 * smooth_step(0.0, 0.16, stem.along))
    ridge = t["anti_height"] * strength * np.exp(-(stem.away / spread) ** 2)
    branch = Stroke(lines["inferior"])
    arm = t["anti_height"] * t["inferior_height"] * np.exp(-(branch.away / (0.75 * t["anti_width"])) ** 2)
    arm = arm * smooth_step(0.0, 0.35, branch.along)
    knob = t["antitragus_size"] * dome(lines["antitragus"][0], 0.052, 0.038)
    folds = (ridge ** 4 + arm ** 4 + knob ** 4) ** 0.25 * (1 - 0.85 * bowl)

    margin = np.clip(-Stroke(lines["edge"]).across, 0, 1)
    pillow = 0.085 * (1 - np.exp(-margin / 0.045)) * smooth_step(0.70, 0.84, GRID[1])
    return folds + pillow - 0.05 * dome(lines["fossa"][0], 0.055, 0.045) - bowl * (
        t["concha_depth"] + 0.13 * canal)


def dome(centre, wide, high):
    x, y = float(centre[0]), float(centre[1])
    return np.exp(-((GRID[0] - x) / wide) ** 2 - ((GRID[1] - y) / high) ** 2)


class Stroke:
    """Where the grid's points lie relative to a line.

    `away` is the distance, `across` the same with a sign (positive at the normals' side), `along` the
    share of the line's length, and `past` how far beyond an end.
    """

    def __init__(self, line, every=2):
        # Every other point of the grid will mostly do, and takes a quarter of the time.
        x, y = (axis[::every, ::every] for axis in GRID)
        squared = (x[0, :, None] - line[:, 0]) ** 2 + ((y[:, :1] - line[:, 1]) ** 2)[:, None]
        nearest = squared.argmin(2)
        offset = np.stack([x, y], 2) - line[nearest]
        normal = normals(line).astype(np.float32)[nearest]
        away = np.hypot(offset[..., 0], offset[..., 1])
        across = (offset * normal).sum(2)
        end = ((nearest == 0) | (nearest == len(line) - 1)) & (np.hypot(*(line[0] - line[-1])) > 0.05)
        past = np.where(end, np.sqrt(np.clip(away ** 2 - across ** 2, 0, None)), 0)
        along = nearest / np.float32(len(line) - 1)
        fields = away, across, past, along
        self.away, self.across, self.past, self.along = map(double, fields) if every == 2 else fields
        # Near the line the perpendicular is exact; far off, where sides meet, only `away` is smooth.
        far = (self.away - np.abs(self.across) - self.past > 0.012) | (self.away > 0.03) & (self.past == 0)
        self.across = np.where(far, np.copysign(self.away, self.across), self.across)


def double(coarse):
    """A field known at every other grid point, filled in between."""
    rows = np.repeat(coarse, 2, 0)
    rows[1:-1:2] = 0.5 * (coarse[:-1] + coarse[1:])
    full = np.repeat(rows, 2, 1)
    full[:, 1:-1:2] = 0.5 * (rows[:, :-1] + rows[:, 1:])
    height, width = GRID[0].shape
    return full[:height, :width]


def spline(points, count, closed=False):
    """Catmull-Rom through the points, resampled to `count` points of equal spacing."""
    points = np.asarray(points, float)
    if closed:
        padded = np.concatenate([points[-1:], points, points[:2]])
    else:
        padded = np.concatenate([2 * points[:1] - points[1:2], points, 2 * points[-1:] - points[-2:-1]])
    u = np.linspace(0, 1, 16, endpoint=False)[None, :, None]
    a, b, c, d = (padded[i:len(padded) - 3 + i, None] for i in range(4))
    cubic, square = 3 * b - 3 * c + d - a, 2 * a - 5 * b + 4 * c - d
    curve = 0.5 * (2 * b + (c - a) * u + square * u ** 2 + cubic * u ** 3)
    curve = np.concatenate([curve.reshape(-1, 2), padded[-2:-1]])
    return even(curve, count + 1)[:-1] if closed else even(curve, count)


def even(curve, count):
    run = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(curve, axis=0).T))])
    want = np.linspace(0, run[-1], count)
    return np.stack([np.interp(want, run, curve[:, 0]), np.interp(want, run, curve[:, 1])], 1)


def normals(line):
    """Unit normals pointing left of the walking direction: outwards along helix and outline."""
    step = np.gradient(line, axis=0)
    step = step / np.maximum(np.hypot(step[:, 0], step[:, 1]), 1e-9)[:, None]
    return np.stack([step[:, 1], -step[:, 0]], 1)


def smooth_step(low, high, value):
    part = np.clip((value - low) / (high - low), 0, 1)
    return part * part * (3 - 2 * part)


def blur(field, sigma):
    """Gaussian blur of a grid, sigma in ear heights (the grid's margin hides the wrap-around)."""
    return np.fft.irfft2(np.fft.rfft2(field) * blur_gain(sigma), s=field.shape).astype(np.float32)


@functools.lru_cache(maxsize=16)
def blur_gain(sigma):
    fy, fx = np.fft.fftfreq(GRID[0].shape[0])[:, None], np.fft.rfftfreq(GRID[0].shape[1])[None]
    return np.exp(-2 * (math.pi * sigma / STEP) ** 2 * (fx ** 2 + fy ** 2)).astype(np.float32)


def choose_look(rng, ear):
    """What differs between the photos of one person, other than the pose."""
    turn = rng.uniform(-1.3, 1.3) - math.pi / 2  # where the light comes from; mostly above
    lift = rng.uniform(0.55, 1.15)
    light = (math.cos(turn) * math.cos(lift), math.sin(turn) * math.cos(lift), math.sin(lift))
    melanin = np.clip(ear.traits["melanin"] + rng.normal(0, 0.15), 0, 1)
    pale, deep = np.log([0.74, 0.47, 0.345]), np.log([0.17, 0.078, 0.045])
    albedo = np.exp(pale + (deep - pale) * melanin) * np.exp(rng.normal(0, 0.03, 3))
    key, ambient = rng.uniform(0.55, 1.0), rng.uniform(0.24, 0.46)
    warmth = rng.normal(0, 0.085)
    black, brown, fair, grey = [0.012, 0.010, 0.009], [0.060, 0.032, 0.018], [0.28, 0.17, 0.085], [0.26] * 3
    hair = rng.choice([black, brown, fair, grey], p=[0.36, 0.34, 0.18, 0.12])
    look = Bag(light=light, albedo=albedo, key=key, ambient=ambient * np.array([1.0, 0.98, 1.02]),
               gloss=rng.uniform(0.01, 0.12), redness=rng.uniform(0.5, 1.6),
               gain=np.exp([warmth, rng.normal(0, 0.025), -warmth]), exposure=math.exp(rng.normal(0, 0.20)),
               hair=hair * np.exp(rng.normal(0, 0.25)) * np.exp(rng.normal(0, 0.06, 3)),
               style=rng.choice(["short", "long", "tied", "buzz"], p=[0.36, 0.22, 0.26, 0.16]),
               over=rng.random() < 0.18, earring=rng.choice(["", "stud", "ring"], p=[0.72, 0.16, 0.12]),
               metal=rng.choice([[0.85, 0.62, 0.25], [0.75, 0.76, 0.80]]),
               blur=rng.choice([0.3, 0.6, 1.0, 1.6], p=[0.35, 0.35, 0.2, 0.1]),
               noise=rng.uniform(0.003, 0.014), quality=int(rng.integers(62, 95)))
    look.flat = albedo * (look.ambient + key * wrap(light[2]))
    for name in ("albedo", "ambient", "gain", "hair", "metal", "flat"):  # doubles would slow all down
        setattr(look, name, getattr(look, name).astype(np.float32))
    return look


class Pose:
    """Where the ear lies in the photo: ear coordinates to pixels and back."""

    def __init__(self, size, centre, matrix, parallax):
        self.size, self.centre, self.matrix, self.parallax = size, centre, matrix, parallax
        self.scale = math.sqrt(abs(np.linalg.det(matrix)))
        self.columns, self.rows = np.meshgrid(*(np.arange(side, dtype=np.float32) for side in size))
        self.x, self.y = self.to_ear(self.columns, self.rows)

    def flat(self, points):
        """Pixels of points that lie on the head itself."""
        return (np.asarray(points, float) - [0.29, 0.5]) @ self.matrix.T + self.centre

    def to_photo(self, points, ear):
        """Pixels of points of the ear, whose height shifts them when the head is turned."""
        rise = lookup(ear.soft[..., None], points[:, 0], points[:, 1])[:, 0]
        return self.flat(points + np.stack([self.parallax * rise, 0 * rise], 1))

    def to_ear(self, columns, rows, ear=None):
        back = np.linalg.inv(self.matrix).tolist()
        dx, dy = columns - float(self.centre[0]), rows - float(self.centre[1])
        x, y = back[0][0] * dx + back[0][1] * dy + 0.29, back[1][0] * dx + back[1][1] * dy + 0.5
        if ear is None:
            return x, y
        source = x
        for _ in range(3):  # undo the shift by height: a fixed point, since the slope is mild
            source = x - self.parallax * lookup(ear.soft[..., None], source, y)[..., 0]
        return source, y


def choose_pose(rng, ear):
    width, height = [(480, 360), (480, 360), (400, 400), (360, 480), (512, 340)][rng.integers(5)]
    scale = math.exp(rng.uniform(math.log(112), math.log(min(238, height * 0.62))))
    yaw, roll = rng.uniform(-0.30, 0.30), ear.traits["tilt"] + rng.uniform(-0.22, 0.22)
    turn = np.array([[math.cos(roll), -math.sin(roll)], [math.sin(roll), math.cos(roll)]])
    squeeze = np.array([[math.cos(yaw), rng.normal(0, 0.03)], [0, math.cos(rng.uniform(-0.3, 0.3))]])
    room = np.array([0.40, 0.60]) * scale + 6
    last = np.array([width, height]) - room
    last[0] = min(last[0], 1.8 * scale)  # keeps the face, which is not drawn, outside the picture
    centre = rng.uniform(room, np.maximum(last, room + 1))
    return Pose((width, height), centre, scale * turn @ squeeze, 0.7 * math.sin(yaw))


def lookup(field, x, y):
    """Bilinear values of a grid with channels at ear coordinates."""
    height, width = field.shape[:2]
    column = np.clip((x - X0) / STEP, 0, width - 1.001).astype(np.float32)
    row = np.clip((y - Y0) / STEP, 0, height - 1.001).astype(np.float32)
    c, r = column.astype(np.int32), row.astype(np.int32)
    fc, fr = (column - c)[..., None], (row - r)[..., None]
    flat, at = field.reshape(height * width, -1), r * width + c
    top = flat[at] * (1 - fc) + flat[at + 1] * fc
    return top * (1 - fr) + (flat[at + width] * (1 - fc) + flat[at + width + 1] * fc) * fr


def wrap(cosine, by=0.30):
    """Lambert's law, let around the corner a little, as light in skin does."""
    return np.clip((cosine + by) / (1 + by), 0, 1)


def shade_ear(rng, ear, look, pose):
    """Linear colour and coverage of the ear on its grid, as one array of four channels."""
    raised = ear.height * ear.alpha
    bumps = blur(rng.standard_normal(raised.shape, np.float32), 0.006)
    surface = ear.height + 0.0022 * bumps
    slope_y, slope_x = np.gradient(surface, STEP)
    long = 1 / np.sqrt(slope_x ** 2 + slope_y ** 2 + 1)
    light = look.light
    cosine = (light[2] - slope_x * light[0] - slope_y * light[1]) * long
    half = np.array(light) + [0, 0, 1]
    half = (half / np.linalg.norm(half)).tolist()
    shine = np.clip((half[2] - slope_x * half[0] - slope_y * half[1]) * long, 0, 1)
    lit = 1 - cast_shadow(raised, light)
    hollow = [np.clip(blur(raised, size) - surface, 0, 1) / size for size in (0.015, 0.04, 0.10)]
    cavity = 0.35 * hollow[0] + 0.55 * hollow[1] + 0.62 * hollow[2]
    blotch = blur(rng.standard_normal(raised.shape, np.float32), 0.05) * 9
    patch = np.empty((*raised.shape, 4), np.float32)
    for channel, (around, sink, red) in enumerate(((0.45, 0.66, 0.0), (0.24, 1.0, 1.0), (0.20, 1.10, 0.95))):
        open_sky = np.exp(-sink * cavity)
        # Blood shows where skin is thin or shaded: the green and blue are taken back there.
        flush = look.redness * red * (0.10 + 0.16 * hollow[2] + 0.03 * blotch) * (0.35 + 0.65 * ear.alpha)
        soft = lit if channel else 0.12 + 0.88 * blur(lit, 0.014)
        tone = look.ambient[channel] * open_sky + look.key * wrap(cosine, around) * soft * open_sky ** 0.4
        patch[..., channel] = look.albedo[channel] * tone * np.exp(-np.clip(flush - 0.08, -0.1, 0.6))
    patch[..., :3] += (look.gloss * look.key * shine ** 16 * lit * np.exp(-cavity))[..., None]
    patch[..., 3] = ear.alpha
    if pose.scale < 170:  # shrinking needs smoothing first, or the fine folds break up
        patch = np.stack([blur(patch[..., i], 0.35 / pose.scale) for i in range(4)], -1)
    return patch


def cast_shadow(raised, light):
    """How much each point of a height field lies in the shadow of others, 0 to 1."""
    flat = math.hypot(light[0], light[1])
    worst = np.zeros_like(raised)
    for far in np.linspace(0.015, 0.24, 12):
        dx, dy = round(light[0] / flat * far / STEP), round(light[1] / flat * far / STEP)
        over = np.roll(raised, (-dy, -dx), (0, 1)) - raised - far * light[2] / flat
        np.maximum(worst, over, out=worst)
    return blur(smooth_step(0.0, 0.035, worst), 0.008)


def paste_ear(scene, patch, pose, ear):
    corners = pose.flat([[X0, Y0], [X1, Y0], [X0, Y1], [X1, Y1]])
    low = np.clip(np.floor(corners.min(0)).astype(int), 0, pose.size)
    high = np.clip(np.ceil(corners.max(0)).astype(int), 0, pose.size)
    window = np.s_[low[1]:high[1], low[0]:high[0]]
    x, y = pose.to_ear(pose.columns[window], pose.rows[window], ear)
    found = lookup(patch, x, y)
    cover = found[..., 3:] * ((x > X0) & (x < X1 - STEP) & (y > Y0) & (y < Y1 - STEP))[..., None]
    scene[window] += (found[..., :3] - scene[window]) * cover
    return scene


def polygon_mask(pose, points, soft):
    """Coverage of a polygon given in ear coordinates, its edge blurred by `soft` ear heights."""
    shrink = 2 if soft * pose.scale > 4 else 1  # a wide blur loses nothing by that, and is quicker
    mask = Image.new("L", (pose.size[0] // shrink, pose.size[1] // shrink))
    ImageDraw.Draw(mask).polygon([tuple(p) for p in pose.flat(points) / shrink], fill=255)
    mask = mask.filter(ImageFilter.GaussianBlur(max(float(soft) * pose.scale, 0.6) / shrink))
    return np.asarray(mask.resize(pose.size, Image.Resampling.BILINEAR), np.float32) / 255


def blend(scene, colour, cover):
    return scene + (np.asarray(colour, np.float32) - scene) * cover[..., None]


def draw_head(rng, pose, look):
    """Backdrop, clothes, neck and cheek, in linear light."""
    width, height = pose.size
    paint = rng.uniform(0.04, 0.5) * np.exp(rng.normal(0, 0.12, 3))
    small = paint * np.exp(rng.normal(0, 0.35, (4, 5, 1)) + rng.normal(0, 0.07, (4, 5, 3)))
    scene = np.stack([np.asarray(Image.fromarray(small[..., i].astype(np.float32)).resize(
        pose.size, Image.Resampling.BICUBIC)) for i in range(3)], -1).clip(0.01, 1)
    light = look.light
    round_off = (1 + 0.10 * light[0] * np.clip(pose.x, -2, 1.2)
                 + 0.10 * light[1] * np.clip(pose.y - 0.4, -1.5, 1.5))
    grain = Image.fromarray(rng.standard_normal((height // 2, width // 2), np.float32))
    grain = np.asarray(grain.resize(pose.size, Image.Resampling.BICUBIC))
    jaw = [[0.02, 0.86], [-0.06, 1.22], [-0.45, 1.62], [-1.6, 2.1], [-6, 4], [3, 4], [3, 0.6], [0.5, 0.6]]
    below = polygon_mask(pose, jaw, 0.10)[..., None] * np.float32([0.34, 0.42, 0.45])
    face = look.flat * (round_off * (1 + 0.012 * grain))[..., None] * (1 - below)
    scene = blend(scene, face, polygon_mask(pose, [[-6, -1.2], *SKULL, [-6, 4]], 0.015))
    shoulder = [[-3, 1.4], [-0.6, 0.42], [0.3, 0.15], [1.1, -0.18], [1.9, 0.10], [6, 1.2], [6, 9], [-3, 9]]
    cloth = polygon_mask(pose, np.array(shoulder) + [0, rng.uniform(1.55, 2.0)], 0.01)
    weave = 1 + 0.10 * grain + 0.15 * np.sin(3 * pose.x + 5 * pose.y)
    return blend(scene, rng.uniform(0.02, 0.5, 3).astype(np.float32) * weave[..., None], cloth)


CROWN = spline([[-1.3, -1.5], [-0.7, -1.9], [0.2, -2.05], [1.1, -1.7], [1.75, -0.95], [1.95, -0.2],
                [1.75, 0.5]], 40)
SKULL = [*CROWN[:-1], [1.75, 0.5], [1.22, 1.1], [1.08, 1.6], [1.2, 2.2]]
HAIRLINES = {  # behind the ear, from its top down and round to the back of the head
    "short": [[0.54, 0.08], [0.66, 0.28], [0.74, 0.60], [0.80, 0.95], [1.00, 1.28], [1.18, 1.38],
              [1.62, 0.95]],
    "buzz": [[0.55, 0.10], [0.72, 0.30], [0.76, 0.60], [0.84, 0.90], [0.98, 1.12], [1.15, 1.16]],
    "long": [[0.44, 0.08], [0.49, 0.30], [0.43, 0.65], [0.36, 1.00], [0.34, 1.60], [0.45, 4.0],
             [1.9, 4.0], [1.95, 1.5]],
    "tied": [[0.56, 0.08], [0.74, 0.35], [0.90, 0.70], [1.15, 0.95], [1.45, 0.95]],
}


def draw_behind_ear(scene, rng, pose, look, ear):
    """Hair on the head, then the soft shadow that the ear throws on hair and skin."""
    burn = rng.uniform(0.15, 0.55) if look.style in ("short", "buzz") else rng.uniform(0.0, 0.3)
    front = [[-1.2, -1.3], [-0.95, -0.9], [-0.62, -0.50], [-0.33, -0.12], [-0.26, burn * 0.6], [-0.17, burn],
             [-0.05, burn - 0.04], [0.02, 0.16], [0.13, 0.05], [0.32, 0.02]]
    line = np.array(front + HAIRLINES[look.style])
    line[:, 0] *= np.where(line[:, 0] > 0, ear.traits["width"], 1)
    crown = CROWN[::-1] * (1.0 if look.style == "buzz" else rng.uniform(1.01, 1.07))
    edge = np.concatenate([line + rng.normal(0, 0.02, line.shape), crown])
    strand, glint = strands(rng, pose.x, pose.y, look.style, pose.scale)
    fuzzy = {"short": 0.06, "buzz": 0.09, "long": 0.03, "tied": 0.05}[look.style]
    mask = polygon_mask(pose, edge, fuzzy)
    dense = smooth_step(0.22, 0.88, mask + 0.55 * (strand - 0.5) * (mask < 0.97))
    if look.style == "buzz":
        dense = dense * rng.uniform(0.45, 0.85)
    bright = look.key * (0.25 + 1.1 * strand ** 1.6) + 0.25
    shine = (0.25 * look.key * glint * strand ** 2)[..., None] * look.hair ** 0.5
    scene = blend(scene, look.hair * bright[..., None] + shine, dense)
    fall = -np.array(look.light[:2]) * ear.traits["stand_off"] * 0.55
    shade = polygon_mask(pose, ear.outline + fall, 0.02 + 0.16 * ear.traits["stand_off"])
    shade = shade * smooth_step(0.0, 0.22, pose.x)  # in front, the ear grows out of the cheek
    return scene * (1 - shade[..., None] * np.float32([0.66, 0.76, 0.79]))


def strands(rng, x, y, style, scale):
    """Brightness of hair strands that run away from a point of the head, and of their sheen."""
    cx, cy = {"short": (1.4, -2.6), "buzz": (0, 0), "long": (0.4, -3.4), "tied": (3.6, -0.5)}[style]
    sway = 0.04 * np.sin(1.7 * x + rng.uniform(0, 6)) * np.cos(2.3 * y + rng.uniform(0, 6))
    angle = np.arctan2(y - cy, x - cx) + sway
    away = np.hypot(x - cx, y - cy)
    if style == "buzz":
        noise = rng.random(x.shape).astype(np.float32)
        return 0.5 + 0.35 * (noise - 0.5), 0 * x
    fine = 0.38 * scale * math.hypot(cx - 0.3, cy - 0.3)  # two or three pixels a strand
    value = 0.5 * streaks(rng, angle * fine, away * 2.5) + 0.5 * streaks(rng, angle * fine / 4, away * 1.5)
    ring = away - math.hypot(cx, cy) - rng.uniform(-0.5, 0.8) + 0.2 * np.sin(9 * angle)
    return smooth_step(0.18, 0.82, value), np.exp(-(ring / 0.25) ** 2)


def streaks(rng, across, along):
    """Smooth noise, a new value at each whole number in both directions."""
    table = rng.random(1024 * 64, np.float32)
    a, b = np.floor(across), np.floor(along)
    fa, fb = smooth_step(0, 1, across - a), smooth_step(0, 1, along - b)
    a, b, c = a.astype(np.int32) % 1024 * 64, b.astype(np.int32) % 64, (b.astype(np.int32) + 1) % 64
    low = table[a + b] * (1 - fb) + table[a + c] * fb
    a = (a + 64) % (1024 * 64)
    return low * (1 - fa) + (table[a + b] * (1 - fb) + table[a + c] * fb) * fa


def draw_in_front(scene, rng, pose, look, ear):
    """An earring, and hair that falls over the top of the ear."""
    if look.earring:
        scene = draw_earring(scene, rng, pose, look, ear)
    count = rng.integers(10, 24) if look.over else rng.integers(0, 3)
    count = 0 if look.style == "buzz" else count
    start, end = rng.uniform([0.0, -0.3], [0.4, -0.2]), rng.uniform([0.5, 0.2], [0.8, 0.5])
    u = np.linspace(0, 1, 14)[:, None]
    for tint in (0.6, 1.2) if count else ():
        sheet = Image.new("L", (pose.size[0] * 2, pose.size[1] * 2))
        pen = ImageDraw.Draw(sheet)
        for _ in range(count):
            a, c = start + rng.normal(0, 0.07, 2), end + rng.normal(0, 0.08, 2)
            b = (a + c) / 2 + rng.normal([0.06, -0.08], 0.05)
            line = pose.flat((1 - u) ** 2 * a + 2 * u * (1 - u) * b + u ** 2 * c) * 2
            fill, width = rng.integers([120, 1], [230, 4]).tolist()
            pen.line([tuple(p) for p in line], fill=fill, width=width)
        cover = np.asarray(sheet.reduce(2), np.float32) / 255
        scene = blend(scene, look.hair * np.float32((look.key + 0.3) * tint), cover)
    return scene


def draw_earring(scene, rng, pose, look, ear):
    at, tip = pose.to_photo(ear.lobe, ear).tolist()
    across, down = pose.columns - at[0], pose.rows - at[1]
    if look.earring == "stud":
        radius = pose.scale * rng.uniform(0.022, 0.040)
        near = np.hypot(across, down - 0.5 * radius) / (1.3 * radius)
        scene = scene * (1 - 0.5 * np.exp(-near ** 2))[..., None]
        away = np.hypot(across, down) / radius
        spot = np.exp(-((across + 0.35 * radius) ** 2 + (down + 0.4 * radius) ** 2) / (0.3 * radius) ** 2)
        bright = 0.25 + 0.6 * np.clip(1 - away ** 2, 0, 1) + spot
        cover = np.clip((1 - away) * radius + 0.5, 0, 1)
    else:
        radius, narrow = pose.scale * rng.uniform(0.09, 0.17), rng.uniform(0.35, 0.8)
        thick = max(1.2, pose.scale * rng.uniform(0.010, 0.018))
        down = down - 0.95 * radius
        ring = np.hypot(across / narrow, down) - radius
        behind = (pose.rows < tip[1]) & (across > 0)  # the far half passes behind the lobule
        cover = np.clip(thick - np.abs(ring * (0.6 + 0.4 * narrow)) + 0.5, 0, 1) * ~behind
        bright = 0.35 + 0.65 * (0.5 + 0.5 * np.sin(5 * np.arctan2(down, across))) ** 3
        bright = bright * (1.25 - 0.8 * np.clip(ring / thick, 0, 1))
    metal = look.metal * np.float32(look.key + 0.2)
    return blend(scene, metal * bright[..., None].astype(np.float32), cover.astype(np.float32))


def develop(rng, scene, look):
    """From linear light to a picture: exposure, white balance, lens blur, noise, tone curve."""
    height, width = scene.shape[:2]
    middle = float(look.flat.mean())
    scene = scene * (look.gain * np.float32(look.exposure * 0.47 / (0.55 * middle + 0.45 * 0.42)))
    rows, columns = np.ogrid[-1:1:height * 1j, -1:1:width * 1j]
    scene *= (1 - rng.uniform(0, 0.16) * (rows ** 2 + columns ** 2)).astype(np.float32)[..., None]
    curve = np.clip(scene, 0, None)
    curve = curve / (0.9 + 0.22 * curve)  # highlights roll off instead of clipping
    picture = np.sqrt(np.clip(curve, 0, 1)) * 255  # near enough to the usual gamma of 2.2, and quicker
    image = Image.fromarray(picture.astype(np.uint8)).filter(ImageFilter.GaussianBlur(float(look.blur)))
    grain = rng.standard_normal((height, width), np.float32) * np.float32(255 * look.noise)
    shifts = (31, 7), (11, 53), (71, 29)  # a little colour in the noise, from shifted copies of it
    grain = np.stack([grain + 0.5 * np.roll(grain, shift, (0, 1)) for shift in shifts], -1)
    return Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))


if __name__ == "__main__":
    sys.exit(main())
