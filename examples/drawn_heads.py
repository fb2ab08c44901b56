"""Draw what surrounds the ear in a photo (head, hair, earring), and simulate light and camera.

* `choose_look` and `choose_pose` choose what differs between the photos of one person. Skin tone varies more between
  photos than between people, so that people can be recognised by shape only.
* The layers are drawn over each other in linear light, as float32; `develop` converts the result to an image.
* All positions are ear coordinates (see drawn_ears.py), which `Pose` maps to pixels, so that head and hair follow the
  ear. Only the ear has relief, and therefore parallax when the head turns.
* The face is never drawn: poses keep it outside the image.
"""

import math
from types import SimpleNamespace

import numpy as np
from drawn_fields import lookup, smooth_step, spline, wrap
from PIL import Image, ImageDraw, ImageFilter

PIVOT = 0.29, 0.5  # centre of the ear, about which the head turns

CROWN = spline([[-1.3, -1.5], [-0.7, -1.9], [0.2, -2.05], [1.1, -1.7], [1.75, -0.95], [1.95, -0.2], [1.75, 0.5]], 40)
SKULL = [*CROWN, [1.22, 1.1], [1.08, 1.6], [1.2, 2.2]]
# soft: width of the hairline's transition in ear heights; whorl: the point from which the strands radiate (none for
# buzzed hair); line: the hairline behind the ear, from the top of the ear down and to the back of the head
STYLES = {
    "short": {
        "soft": 0.06,
        "whorl": (1.4, -2.6),
        "line": [[0.54, 0.08], [0.66, 0.28], [0.74, 0.60], [0.80, 0.95], [1.00, 1.28], [1.18, 1.38], [1.62, 0.95]],
    },
    "buzz": {
        "soft": 0.09,
        "line": [[0.55, 0.10], [0.72, 0.30], [0.76, 0.60], [0.84, 0.90], [0.98, 1.12], [1.15, 1.16]],
    },
    "long": {
        "soft": 0.03,
        "whorl": (0.4, -3.4),
        "line": [
            [0.44, 0.08],
            [0.49, 0.30],
            [0.43, 0.65],
            [0.36, 1.00],
            [0.34, 1.60],
            [0.45, 4.0],
            [1.9, 4.0],
            [1.95, 1.5],
        ],
    },
    "tied": {
        "soft": 0.05,
        "whorl": (3.6, -0.5),
        "line": [[0.56, 0.08], [0.74, 0.35], [0.90, 0.70], [1.15, 0.95], [1.45, 0.95]],
    },
}


def choose_look(rng, ear):
    """Choose what differs between the photos of one person, except the pose."""
    turn = rng.uniform(-1.3, 1.3) - math.pi / 2  # direction of the light, mostly from above
    lift = rng.uniform(0.55, 1.15)
    light = (math.cos(turn) * math.cos(lift), math.sin(turn) * math.cos(lift), math.sin(lift))
    melanin = np.clip(ear.traits["melanin"] + rng.normal(0, 0.15), 0, 1)
    pale, deep = np.log([0.74, 0.47, 0.345]), np.log([0.17, 0.078, 0.045])
    albedo = np.exp(pale + (deep - pale) * melanin) * np.exp(rng.normal(0, 0.03, 3))
    key, ambient = rng.uniform(0.55, 1.0), rng.uniform(0.24, 0.46)
    warmth = rng.normal(0, 0.085)
    black, brown, fair, grey = [0.012, 0.010, 0.009], [0.060, 0.032, 0.018], [0.28, 0.17, 0.085], [0.26] * 3
    hair = rng.choice([black, brown, fair, grey], p=[0.36, 0.34, 0.18, 0.12])
    look = SimpleNamespace(
        light=light,
        albedo=albedo,
        key=key,
        ambient=ambient * np.array([1.0, 0.98, 1.02]),
        gloss=rng.uniform(0.01, 0.12),
        redness=rng.uniform(0.5, 1.6),
        gain=np.exp([warmth, rng.normal(0, 0.025), -warmth]),
        exposure=math.exp(rng.normal(0, 0.20)),
        hair=hair * np.exp(rng.normal(0, 0.25)) * np.exp(rng.normal(0, 0.06, 3)),
        style=rng.choice(["short", "long", "tied", "buzz"], p=[0.36, 0.22, 0.26, 0.16]),
        over=rng.random() < 0.18,  # whether hair falls over the ear
        earring=rng.choice(["", "stud", "ring"], p=[0.72, 0.16, 0.12]),
        metal=rng.choice([[0.85, 0.62, 0.25], [0.75, 0.76, 0.80]]),
        blur=rng.choice([0.3, 0.6, 1.0, 1.6], p=[0.35, 0.35, 0.2, 0.1]),
        noise=rng.uniform(0.003, 0.014),
        quality=int(rng.integers(62, 95)),
    )
    look.flat = albedo * (look.ambient + key * wrap(light[2]))  # skin that faces the camera
    for name in ("albedo", "ambient", "gain", "hair", "metal", "flat"):  # float64 would slow everything down
        setattr(look, name, getattr(look, name).astype(np.float32))
    return look


def choose_pose(rng, ear):
    """Choose the size of photo and ear, the rotation of the head, and the position of the ear."""
    width, height = [(480, 360), (480, 360), (400, 400), (360, 480), (512, 340)][rng.integers(5)]
    scale = math.exp(rng.uniform(math.log(112), math.log(min(238, height * 0.62))))
    yaw, roll = rng.uniform(-0.30, 0.30), ear.traits["tilt"] + rng.uniform(-0.22, 0.22)
    turn = np.array([[math.cos(roll), -math.sin(roll)], [math.sin(roll), math.cos(roll)]])
    squeeze = np.array([[math.cos(yaw), rng.normal(0, 0.03)], [0, math.cos(rng.uniform(-0.3, 0.3))]])
    room = np.array([0.40, 0.60]) * scale + 6
    last = np.array([width, height]) - room
    last[0] = min(last[0], 1.8 * scale)  # keeps the face, which is not drawn, outside the image
    centre = rng.uniform(room, np.maximum(last, room + 1))
    return Pose((width, height), centre, scale * turn @ squeeze, 0.7 * math.sin(yaw))


class Pose:
    """Mapping between ear coordinates and pixels of the photo.

    `scale`: height of the ear in pixels. `x`, `y`: ear coordinates of every pixel.
    """

    def __init__(self, size, centre, matrix, parallax):
        self.size, self.centre, self.matrix, self.parallax = size, centre, matrix, parallax
        self.scale = math.sqrt(abs(np.linalg.det(matrix)))
        self.columns, self.rows = np.meshgrid(*(np.arange(side, dtype=np.float32) for side in size))
        self.x, self.y = self.to_ear(self.columns, self.rows)

    def flat(self, points):
        """Return the pixels of points on the surface of the head."""
        return (np.asarray(points, float) - PIVOT) @ self.matrix.T + self.centre

    def to_photo(self, points, ear):
        """Return the pixels of points on the ear, shifted according to their height (parallax)."""
        rise = lookup(ear.soft, points[:, 0], points[:, 1])
        return self.flat(points + rise * [self.parallax, 0])

    def to_ear(self, columns, rows, ear=None):
        """Return the ear coordinates of pixels, on the head or, given an ear, on the ear's surface."""
        (a, b), (c, d) = np.linalg.inv(self.matrix).tolist()
        dx, dy = columns - float(self.centre[0]), rows - float(self.centre[1])
        x, y = a * dx + b * dy + PIVOT[0], c * dx + d * dy + PIVOT[1]
        if ear is None:
            return x, y
        source = x
        for _ in range(3):  # invert the parallax by fixed-point iteration
            source = x - self.parallax * lookup(ear.soft, source, y)[..., 0]
        return source, y


def draw_head(rng, pose, look):
    """Return background, clothes, neck and cheek in linear light, H,W,3."""
    width, height = pose.size
    paint = rng.uniform(0.04, 0.5) * np.exp(rng.normal(0, 0.12, 3))
    small = paint * np.exp(rng.normal(0, 0.35, (4, 5, 1)) + rng.normal(0, 0.07, (4, 5, 3)))
    scene = np.stack([enlarge(small[..., i].astype(np.float32), pose.size) for i in range(3)], -1)
    grain = enlarge(rng.standard_normal((height // 2, width // 2), np.float32), pose.size)
    light = look.light
    round_off = 1 + 0.10 * light[0] * np.clip(pose.x, -2, 1.2) + 0.10 * light[1] * np.clip(pose.y - 0.4, -1.5, 1.5)
    jaw = [[0.02, 0.86], [-0.06, 1.22], [-0.45, 1.62], [-1.6, 2.1], [-6, 4], [3, 4], [3, 0.6], [0.5, 0.6]]
    below = polygon_mask(pose, jaw, 0.10)[..., None] * np.float32([0.34, 0.42, 0.45])
    face = look.flat * (round_off * (1 + 0.012 * grain))[..., None] * (1 - below)
    scene = blend(scene.clip(0.01, 1), face, polygon_mask(pose, [[-6, -1.2], *SKULL, [-6, 4]], 0.015))
    shoulder = [[-3, 1.4], [-0.6, 0.42], [0.3, 0.15], [1.1, -0.18], [1.9, 0.10], [6, 1.2], [6, 9], [-3, 9]]
    cloth = polygon_mask(pose, np.array(shoulder) + [0, rng.uniform(1.55, 2.0)], 0.01)
    weave = 1 + 0.10 * grain + 0.15 * np.sin(3 * pose.x + 5 * pose.y)
    return blend(scene, rng.uniform(0.02, 0.5, 3).astype(np.float32) * weave[..., None], cloth)


def draw_hair(scene, rng, pose, look, ear):
    """Draw the hair: from the temple down the sideburn, round the ear, and over the crown."""
    style, buzz = STYLES[look.style], look.style == "buzz"
    burn = rng.uniform(0.15, 0.55) if look.style in ("short", "buzz") else rng.uniform(0.0, 0.3)
    front = [
        [-1.2, -1.3],
        [-0.95, -0.9],
        [-0.62, -0.50],
        [-0.33, -0.12],
        [-0.26, burn * 0.6],
        [-0.17, burn],
        [-0.05, burn - 0.04],
        [0.02, 0.16],
        [0.13, 0.05],
        [0.32, 0.02],
    ]
    line = np.array(front + style["line"])
    line[:, 0] *= np.where(line[:, 0] > 0, ear.traits["width"], 1)
    crown = CROWN[::-1] * (1.0 if buzz else rng.uniform(1.01, 1.07))
    edge = np.concatenate([line + rng.normal(0, 0.02, line.shape), crown])
    strand, glint = strands(rng, pose, style.get("whorl"))
    mask = polygon_mask(pose, edge, style["soft"])
    dense = smooth_step(0.22, 0.88, mask + 0.55 * (strand - 0.5) * (mask < 0.97))
    if buzz:  # the skin is visible through it
        dense = dense * rng.uniform(0.45, 0.85)
    bright = look.key * (0.25 + 1.1 * strand**1.6) + 0.25
    shine = (0.25 * look.key * glint * strand**2)[..., None] * look.hair**0.5
    return blend(scene, look.hair * bright[..., None] + shine, dense)


def draw_ear_shadow(scene, pose, look, ear):
    """Draw the soft shadow of the ear on hair and skin; its offset grows with the ear's protrusion."""
    fall = -np.array(look.light[:2]) * ear.traits["stand_off"] * 0.55
    shade = polygon_mask(pose, ear.outline + fall, 0.02 + 0.16 * ear.traits["stand_off"])
    shade = shade * smooth_step(0.0, 0.22, pose.x)  # none in front, where the ear joins the cheek
    return scene * (1 - shade[..., None] * np.float32([0.66, 0.76, 0.79]))


def draw_earring(scene, rng, pose, look, ear):
    """Draw a stud in the lobule or a ring through it, if the look has one."""
    if not look.earring:
        return scene
    (column, row), (_, lowest) = pose.to_photo(ear.lobe, ear).tolist()
    across, down = pose.columns - column, pose.rows - row
    if look.earring == "stud":
        radius = pose.scale * rng.uniform(0.022, 0.040)
        near = np.hypot(across, down - 0.5 * radius) / (1.3 * radius)
        scene = scene * (1 - 0.5 * np.exp(-(near**2)))[..., None]
        away = np.hypot(across, down) / radius
        spot = np.exp(-((across + 0.35 * radius) ** 2 + (down + 0.4 * radius) ** 2) / (0.3 * radius) ** 2)
        bright = 0.25 + 0.6 * np.clip(1 - away**2, 0, 1) + spot
        cover = np.clip((1 - away) * radius + 0.5, 0, 1)
    else:
        radius, narrow = pose.scale * rng.uniform(0.09, 0.17), rng.uniform(0.35, 0.8)
        thick = max(1.2, pose.scale * rng.uniform(0.010, 0.018))
        down = down - 0.95 * radius
        ring = np.hypot(across / narrow, down) - radius
        behind = (pose.rows < lowest) & (across > 0)  # the far half is behind the lobule
        cover = np.clip(thick - np.abs(ring * (0.6 + 0.4 * narrow)) + 0.5, 0, 1) * ~behind
        bright = 0.35 + 0.65 * (0.5 + 0.5 * np.sin(5 * np.arctan2(down, across))) ** 3
        bright = bright * (1.25 - 0.8 * np.clip(ring / thick, 0, 1))
    metal = look.metal * np.float32(look.key + 0.2)
    return blend(scene, metal * bright[..., None].astype(np.float32), cover.astype(np.float32))


def draw_loose_hair(scene, rng, pose, look):
    """Draw strands over the top of the ear: many if hair covers it, else at most two."""
    count = rng.integers(10, 24) if look.over else rng.integers(0, 3)
    start, end = rng.uniform([0.0, -0.3], [0.4, -0.2]), rng.uniform([0.5, 0.2], [0.8, 0.5])
    if count == 0 or look.style == "buzz":
        return scene
    u = np.linspace(0, 1, 14)[:, None]
    for tint in (0.6, 1.2):
        sheet = Image.new("L", (pose.size[0] * 2, pose.size[1] * 2))
        pen = ImageDraw.Draw(sheet)
        for _ in range(count):
            a, c = start + rng.normal(0, 0.07, 2), end + rng.normal(0, 0.08, 2)
            b = (a + c) / 2 + rng.normal([0.06, -0.08], 0.05)
            line = pose.flat((1 - u) ** 2 * a + 2 * u * (1 - u) * b + u**2 * c) * 2
            fill, width = rng.integers([120, 1], [230, 4]).tolist()
            pen.line([tuple(p) for p in line], fill=fill, width=width)
        cover = np.asarray(sheet.reduce(2), np.float32) / 255
        scene = blend(scene, look.hair * np.float32((look.key + 0.3) * tint), cover)
    return scene


def develop(rng, scene, look):
    """Convert linear light to an image: exposure, white balance, lens blur, noise, tone curve."""
    height, width = scene.shape[:2]
    middle = float(look.flat.mean())
    scene = scene * (look.gain * np.float32(look.exposure * 0.47 / (0.55 * middle + 0.45 * 0.42)))
    rows, columns = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    scene *= (1 - rng.uniform(0, 0.16) * (rows**2 + columns**2)).astype(np.float32)[..., None]
    curve = np.clip(scene, 0, None)
    curve = curve / (0.9 + 0.22 * curve)  # compress highlights instead of clipping them
    levels = np.sqrt(np.clip(curve, 0, 1)) * 255  # close to the usual gamma of 2.2, and faster
    image = Image.fromarray(levels.astype(np.uint8)).filter(ImageFilter.GaussianBlur(float(look.blur)))
    grain = rng.standard_normal((height, width), np.float32) * np.float32(255 * look.noise)
    shifts = (31, 7), (11, 53), (71, 29)  # slightly coloured noise, from shifted copies
    grain = np.stack([grain + 0.5 * np.roll(grain, shift, (0, 1)) for shift in shifts], -1)
    return Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))


def enlarge(small, size):
    """Resize a single-channel field to (width, height) with bicubic interpolation."""
    return np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC))


def polygon_mask(pose, points, soft):
    """Return the coverage of a polygon in ear coordinates, with its edge blurred by `soft` ear heights."""
    shrink = 2 if soft * pose.scale > 4 else 1  # faster, without visible difference for wide blurs
    mask = Image.new("L", (pose.size[0] // shrink, pose.size[1] // shrink))
    ImageDraw.Draw(mask).polygon([tuple(p) for p in pose.flat(points) / shrink], fill=255)
    mask = mask.filter(ImageFilter.GaussianBlur(max(float(soft) * pose.scale, 0.6) / shrink))
    return np.asarray(mask.resize(pose.size, Image.Resampling.BILINEAR), np.float32) / 255


def blend(scene, colour, cover):
    """Return the scene with a colour over it, at coverage `cover` H,W."""
    return scene + (np.asarray(colour, np.float32) - scene) * cover[..., None]


def strands(rng, pose, whorl):
    """Return the brightness of strands that radiate from the whorl, and of the ring of sheen around it."""
    x, y = pose.x, pose.y
    sway = 0.04 * np.sin(1.7 * x + rng.uniform(0, 6)) * np.cos(2.3 * y + rng.uniform(0, 6))
    if whorl is None:
        return 0.5 + 0.35 * (rng.random(x.shape).astype(np.float32) - 0.5), 0.0
    cx, cy = whorl
    angle, away = np.arctan2(y - cy, x - cx) + sway, np.hypot(x - cx, y - cy)
    fine = 0.38 * pose.scale * math.hypot(cx - 0.3, cy - 0.3)  # two or three pixels a strand
    value = 0.5 * streaks(rng, angle * fine, away * 2.5) + 0.5 * streaks(rng, angle * fine / 4, away * 1.5)
    ring = away - math.hypot(cx, cy) - rng.uniform(-0.5, 0.8) + 0.2 * np.sin(9 * angle)
    return smooth_step(0.18, 0.82, value), np.exp(-((ring / 0.25) ** 2))


def streaks(rng, across, along):
    """Return smooth value noise on the integer lattice of the two coordinates."""
    table = rng.random(1024 * 64, np.float32)
    a, b = np.floor(across), np.floor(along)
    fa, fb = smooth_step(0, 1, across - a), smooth_step(0, 1, along - b)
    a, b, c = a.astype(np.int32) % 1024 * 64, b.astype(np.int32) % 64, (b.astype(np.int32) + 1) % 64
    low = table[a + b] * (1 - fb) + table[a + c] * fb
    a = (a + 64) % (1024 * 64)
    return low * (1 - fa) + (table[a + b] * (1 - fb) + table[a + c] * fb) * fa
