"""Draw an ear: shape from a person's traits, shading, and its place in the image.

* A person has 35 traits (`TRAITS`). They shape the splines of the helix, antihelix with its two crura, concha,
  tragus, antitragus and lobule (`draw_lines`, `inner_lines`).
* The splines become a height field on a fixed grid (`relief`). Most folds are a profile over the distance to their
  line, which `Stroke` computes.
* The height field is shaded as skin (`shade_ear`): diffuse light that wraps around edges, cast shadows, ambient
  occlusion, weak gloss, and redness in the hollows.

Ear coordinates: x runs from the face to the back of the head, y from the top of the ear (0) to the bottom of the lobule
(about 1), both in ear heights. They describe a left ear, with the face at the left of the image; for a right ear the
finished image is mirrored.
"""

import functools
from typing import NamedTuple

import numpy as np
from drawn_fields import (
    GRID,
    STEP,
    X0,
    X1,
    Y0,
    Y1,
    Stroke,
    blur,
    cast_shadow,
    dome,
    even,
    lookup,
    normals,
    smooth_step,
    spline,
    wrap,
)

# name: (mean, standard deviation between people); that between the two ears of a person is a tenth of it
TRAITS = {
    "width": (1.0, 0.095),
    "tilt": (0.12, 0.08),
    "stand_off": (0.20, 0.07),
    "rim_front": (0, 0.016),
    "rim_top": (0, 0.020),
    "rim_top_back": (0, 0.026),
    "rim_back": (0, 0.026),
    "rim_low": (0, 0.022),
    "darwin": (0, 0.006),
    "helix_width": (0.082, 0.016),
    "helix_taper": (0.75, 0.16),
    "helix_curl": (0.115, 0.022),
    "helix_run": (0.80, 0.085),
    "crus_length": (0, 0.026),
    "crus_height": (0, 0.016),
    "anti_x": (0, 0.025),
    "anti_bend": (0, 0.020),
    "anti_height": (0.104, 0.020),
    "anti_width": (0.048, 0.008),
    "fork_y": (0, 0.032),
    "superior_x": (0, 0.026),
    "superior_height": (0.95, 0.15),
    "inferior_y": (0, 0.022),
    "inferior_height": (0.9, 0.15),
    "concha_depth": (0.17, 0.028),
    "concha_front": (0, 0.012),
    "tragus_size": (0.075, 0.018),
    "tragus_y": (0, 0.020),
    "tragus_point": (0, 0.013),
    "antitragus_size": (0.075, 0.022),
    "notch_width": (0, 0.013),
    "lobe_length": (0, 0.045),
    "lobe_width": (0, 0.024),
    "lobe_hang": (0.5, 0.40),
    "melanin": (0.40, 0.12),
}


class Ear(NamedTuple):
    """The shape of one ear. `height`, `alpha` and `soft` are fields on the grid."""

    height: np.ndarray  # above the head, in ear heights
    alpha: np.ndarray  # coverage: 1 on the ear, 0 outside
    soft: np.ndarray  # height without the folds, for the parallax when the head turns
    outline: np.ndarray  # the visible edge, from the front of the helix round to the lobule
    landmarks: np.ndarray  # 55 x 2: polylines of 20, 15, 15 and 5 points
    lobe: np.ndarray  # where an earring hangs, and the lowest point of the lobule
    traits: dict


@functools.lru_cache(maxsize=4)
def build_ear(seed, person, side):
    """Return the Ear of a side ("left" or "right"). A person's two ears have slightly different traits."""
    t = draw_traits(seed, person, side)
    lines = draw_lines(t)
    margin = -Stroke(lines["edge"]).across
    x, y = GRID
    # There is no visible edge where the ear joins the cheek: fade it out there.
    low = 0.72 + 0.30 * (1 - np.clip(t["lobe_hang"], 0, 1))
    grown = smooth_step(0.19, 0.07, x) * smooth_step(0.24, 0.40, y) * smooth_step(low + 0.10, low - 0.02, y)
    alpha = smooth_step(-0.004, 0.006 + 0.075 * grown, margin)
    height = relief(t, lines, margin) * (1 - grown * (1 - smooth_step(0.0, 0.12, margin)))
    soft = blur(height * alpha, 0.03) / np.maximum(blur(alpha, 0.03), 0.05)
    landmarks = np.concatenate(
        [
            even(lines["helix"], 20),
            even(lines["antihelix"], 15),
            even(lines["concha_strip"], 15),
            even(lines["tragus"], 5),
        ]
    )
    return Ear(height, alpha, soft, lines["outline"], landmarks, lines["lobe"], t)


def shade_ear(rng, ear, look, scale):
    """Return linear colour and coverage on the grid, H,W,4, of an ear `scale` pixels high."""
    raised = ear.height * ear.alpha
    bumps = blur(rng.standard_normal(raised.shape, np.float32), 0.006)
    surface = ear.height + 0.0022 * bumps
    slope_y, slope_x = np.gradient(surface, STEP)
    long = 1 / np.sqrt(slope_x**2 + slope_y**2 + 1)
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
    # Red light scatters furthest in skin: it wraps around edges most and darkens least in hollows and shadows.
    for channel, (around, sink, red) in enumerate(((0.45, 0.66, 0.0), (0.24, 1.0, 1.0), (0.20, 1.10, 0.95))):
        open_sky = np.exp(-sink * cavity)
        # Thin and shaded skin is redder: reduce green and blue there.
        flush = look.redness * red * (0.10 + 0.16 * hollow[2] + 0.03 * blotch) * (0.35 + 0.65 * ear.alpha)
        soft = lit if channel else 0.12 + 0.88 * blur(lit, 0.014)
        tone = look.ambient[channel] * open_sky + look.key * wrap(cosine, around) * soft * open_sky**0.4
        patch[..., channel] = look.albedo[channel] * tone * np.exp(-np.clip(flush - 0.08, -0.1, 0.6))
    patch[..., :3] += (look.gloss * look.key * shine**16 * lit * np.exp(-cavity))[..., None]
    patch[..., 3] = ear.alpha
    if scale < 170:  # smooth before downscaling, to avoid aliasing of the fine folds
        patch = np.stack([blur(patch[..., i], 0.35 / scale) for i in range(4)], -1)
    return patch


def paste_ear(scene, patch, pose, ear):
    """Draw a shaded ear over the scene, in place, at its pose, and return the scene."""
    corners = pose.flat([[X0, Y0], [X1, Y0], [X0, Y1], [X1, Y1]])
    low = np.clip(np.floor(corners.min(0)).astype(int), 0, pose.size)
    high = np.clip(np.ceil(corners.max(0)).astype(int), 0, pose.size)
    window = np.s_[low[1] : high[1], low[0] : high[0]]
    x, y = pose.to_ear(pose.columns[window], pose.rows[window], ear)
    found = lookup(patch, x, y)
    cover = found[..., 3:] * ((x > X0) & (x < X1 - STEP) & (y > Y0) & (y < Y1 - STEP))[..., None]
    scene[window] += (found[..., :3] - scene[window]) * cover
    return scene


def draw_traits(seed, person, side):
    """Return the traits of one ear: name -> value."""
    both = np.random.default_rng([seed, person, 0])
    one = np.random.default_rng([seed, person, 3, int(side == "right")])
    shared = both.normal(size=len(TRAITS)).clip(-1.9, 1.9)
    own = 0.1 * one.normal(size=len(TRAITS))
    return {
        name: float(mean + spread * value)
        for (name, (mean, spread)), value in zip(TRAITS.items(), shared + own, strict=True)
    }


def draw_lines(t):
    """Return the anatomy of one ear: name -> points N,2, mostly sampled splines."""
    crus = np.array([t["crus_length"], t["crus_height"]])
    helix = np.array(
        [
            [0.270, 0.480],
            [0.195, 0.455],
            [0.130, 0.395],
            [0.098, 0.300],
            [0.112, 0.185],
            [0.178, 0.085],
            [0.290, 0.040],
            [0.415, 0.062],
            [0.505, 0.145],
            [0.548, 0.270],
            [0.540, 0.400],
            [0.508, 0.520],
            [0.466, 0.630],
            [0.432, 0.720],
            [0.412, 0.790],
        ]
    )
    helix[0] += crus
    helix[1] += crus * [0.4, 0.8]
    rim = spline(helix, 160)
    along = np.linspace(0, 1, 160)
    push = sum(
        t[name] * np.exp(-(((along - at) / reach) ** 2))
        for name, at, reach in (
            ("rim_front", 0.30, 0.07),
            ("rim_top", 0.43, 0.09),
            ("rim_top_back", 0.56, 0.08),
            ("rim_back", 0.69, 0.09),
            ("rim_low", 0.83, 0.09),
            ("darwin", 0.61, 0.025),
        )
    )
    rim = rim + normals(rim) * push[:, None]
    outer = rim + normals(rim) * rim_width(t, along)[:, None] * 0.5
    hang, long, wide = np.clip(t["lobe_hang"], 0, 1), t["lobe_length"], t["lobe_width"]
    tail = outer[-1, 0]
    lobe = np.array(
        [
            [tail - 0.005 + wide * 0.6, 0.865 + long * 0.4],
            [tail - 0.045 + wide, 0.940 + long * 0.8],
            [0.310 + wide * 0.7, 0.988 + long],
            [0.228 + wide * 0.3, 0.982 + long * 0.9],
            [0.165, 0.920 + long * 0.45 + 0.02 * hang],
            [0.128 + 0.022 * hang, 0.855 + 0.012 * hang],
            [0.095, 0.795],
        ]
    )
    front = np.array([[0.040, 0.700], [0.015, 0.580], [0.020, 0.450], [0.045, 0.360]])
    seen = np.concatenate([outer[38:-3:6], lobe])
    lines = {
        "helix": rim,
        "edge": spline(np.concatenate([seen, front]), 200, closed=True),
        "outline": spline(seen[:-1], 120),
        "lobe": np.array([[0.275, 0.900 + long * 0.5], [0.275, 0.985 + long * 0.95]]) + [wide * 0.4, 0],
        **inner_lines(t),
    }
    return {name: (line * [t["width"], 1]).astype(np.float32) for name, line in lines.items()}


def inner_lines(t):
    """Return the lines inside the rim: antihelix and crura, concha, tragus, antitragus, fossa triangularis."""
    ax, bend, fork = t["anti_x"], t["anti_bend"], 0.315 + t["fork_y"]
    stem = np.array(
        [
            [0.322 + ax * 0.3, 0.700],
            [0.378 + ax * 0.7, 0.640],
            [0.418 + ax + bend * 0.5, 0.560],
            [0.430 + ax + bend, 0.470],
            [0.412 + ax + bend * 0.5, 0.385],
        ]
    )
    joint = np.array([0.378 + ax * 0.8, fork])
    superior = np.array(
        [[0.348 + ax * 0.5 + t["superior_x"] * 0.5, (fork + 0.13) / 2 + 0.01], [0.335 + t["superior_x"], 0.135]]
    )
    down = t["inferior_y"]
    inferior = np.array(
        [
            stem[4],
            joint + [-0.025, 0.002],
            [0.290, 0.262 + down * 0.7 + t["fork_y"] * 0.5],
            [0.215, 0.248 + down],
            [0.150, 0.258 + down],
        ]
    )
    antihelix = spline(np.concatenate([superior[::-1], joint[None], stem[::-1]]), 90)
    ty, point, notch = t["tragus_y"], t["tragus_point"], t["notch_width"]
    tragus = np.array(
        [
            [0.150, 0.485 + ty],
            [0.180 + point * 0.6, 0.525 + ty],
            [0.202 + point, 0.575 + ty],
            [0.190 + point * 0.4, 0.630 + ty],
            [0.196 - notch, 0.680],
        ]
    )
    top = inferior[3][1] + 0.075
    front = 0.140 + t["concha_front"]
    wall = np.array(
        [
            [front, 0.400],
            [front + 0.020, top + 0.010],
            [0.235, top],
            [0.310, top + 0.020],
            [stem[4][0] - 0.052, stem[4][1] + 0.015],
            [stem[3][0] - 0.054, stem[3][1]],
            [stem[2][0] - 0.056, stem[2][1] + 0.005],
            [stem[1][0] - 0.050, stem[1][1] - 0.005],
            [0.290 + notch, 0.675],
            [0.245, 0.722],
        ]
    )
    concha = np.concatenate([wall, tragus[::-1], [[front, 0.440]]])
    return {
        "antihelix": antihelix,
        "inferior": spline(inferior, 56),
        "tragus": spline(tragus, 40),
        "concha": spline(concha, 150, closed=True),
        "concha_strip": spline(wall, 80),
        "antitragus": np.array([[0.300 + notch, 0.712]]),
        "fossa": np.array([[0.235, (inferior[3][1] + 0.135) / 2 + 0.01]]),
    }


def rim_width(t, along):
    """Return the width of the helix at positions `along` it, from its crus (0) to its tail (1)."""
    grow = smooth_step(0.0, 0.22, along) * 0.35 + 0.65
    taper = 1 - (1 - t["helix_taper"]) * smooth_step(0.35, 0.75, along)
    end = 1 - 0.45 * smooth_step(t["helix_run"] - 0.1, t["helix_run"] + 0.12, along)
    return t["helix_width"] * grow * taper * end


def relief(t, lines, margin):
    """Return the height above the head on the grid: inner folds, helix and tragus."""
    plate = smooth_step(0.02, 0.5, GRID[0]) * t["stand_off"]
    helix = Stroke(lines["helix"], every=1)
    half = rim_width(t, helix.along) / 2
    place = np.clip(helix.across / half, -4, 4)
    rise = smooth_step(0.0, 0.24, helix.along)
    tail = smooth_step(t["helix_run"] - 0.16, t["helix_run"] + 0.16, helix.along)
    curl = (0.40 + 0.60 * rise) * (1 - tail)
    # The rim is rounded on the outside; inside it overhangs the scapha, so it ends steeply.
    tube = np.clip(1 - np.abs(place) ** np.where(place < 0, 3.0, 2.2), 0, 1) ** 0.6
    aside = 0.10 * np.clip(np.abs(place) - 1, 0, 3) + 0.20 * np.clip(helix.past / half - 1, 0, 3)
    gutter = 0.035 * np.exp(-(((place + 1.7) / 0.8) ** 2)) * rise * curl * smooth_step(0.03, 0, helix.past)
    body = plate + inner_relief(t, lines, margin) - gutter
    rim = plate - 0.9 * t["concha_depth"] * (1 - rise) + t["helix_curl"] * curl * tube
    rim = rim - aside - 0.06 * tail**2
    merge = (0.012 + 0.035 * (1 - rise)) * smooth_step(0.18, 0.02, aside)
    height = 0.5 * (body + rim + np.sqrt((body - rim) ** 2 + merge**2))  # smooth maximum
    flap = Stroke(lines["tragus"])
    swell = np.sin(np.pi * np.clip(flap.along, 0.02, 0.98)) ** 0.7 * np.exp(-((flap.past / 0.03) ** 2))
    front = np.exp(-((flap.across / np.where(flap.across < 0, 0.075, 0.012)) ** 2))
    return blur(height + t["tragus_size"] * swell * front, 0.0055)


def inner_relief(t, lines, margin):
    """Return the height of concha, antihelix with crura, antitragus, fossa triangularis and lobule on the grid."""
    depth = Stroke(lines["concha"]).across
    steep = 0.035 + 0.055 * smooth_step(0.18, 0.40, GRID[0])
    bowl = smooth_step(-0.012, steep, -depth) ** 0.8
    canal = dome([0.205 * t["width"], 0.575 + t["tragus_y"]], 0.045, 0.055)
    stem = Stroke(lines["antihelix"])
    spread = t["anti_width"] * (1 + 0.25 * smooth_step(0.35, 0.0, stem.along))
    strength = t["superior_height"] + (1 - t["superior_height"]) * smooth_step(0.30, 0.55, stem.along)
    strength = strength * (0.35 + 0.65 * smooth_step(0.0, 0.16, stem.along))
    ridge = t["anti_height"] * strength * np.exp(-((stem.away / spread) ** 2))
    branch = Stroke(lines["inferior"])
    arm = t["anti_height"] * t["inferior_height"] * np.exp(-((branch.away / (0.75 * t["anti_width"])) ** 2))
    arm = arm * smooth_step(0.0, 0.35, branch.along)
    knob = t["antitragus_size"] * dome(lines["antitragus"][0], 0.052, 0.038)
    folds = (ridge**4 + arm**4 + knob**4) ** 0.25 * (1 - 0.85 * bowl)
    pillow = 0.085 * (1 - np.exp(-np.clip(margin, 0, 1) / 0.045)) * smooth_step(0.70, 0.84, GRID[1])
    fossa = 0.05 * dome(lines["fossa"][0], 0.055, 0.045)
    return folds + pillow - fossa - bowl * (t["concha_depth"] + 0.13 * canal)
