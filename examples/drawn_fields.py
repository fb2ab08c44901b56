"""Curves in ear coordinates (see drawn_ears.py) and fields on a fixed grid of them.

Lines are points N,2; fields are float arrays on `GRID`.
"""

import functools
import math

import numpy as np

STEP = 1 / 200  # grid spacing of the height field, in ear heights
X0, X1, Y0, Y1 = -0.16, 0.86, -0.14, 1.20
GRID = np.meshgrid(np.arange(X0, X1, STEP, np.float32), np.arange(Y0, Y1, STEP, np.float32))


class Stroke:
    """Position of the grid's points relative to a line.

    `away` is the distance, `across` the signed distance (positive on the side of the normals), `along` the position as a
    fraction of the line's length, and `past` the distance beyond an end of the line.
    """

    def __init__(self, line, every=2):
        # Every other grid point is usually precise enough, and takes a quarter of the time.
        x, y = (axis[::every, ::every] for axis in GRID)
        squared = (x[0, :, None] - line[:, 0]) ** 2 + ((y[:, :1] - line[:, 1]) ** 2)[:, None]
        nearest = squared.argmin(2)
        offset = np.stack([x, y], 2) - line[nearest]
        normal = normals(line).astype(np.float32)[nearest]
        away = np.hypot(offset[..., 0], offset[..., 1])
        across = (offset * normal).sum(2)
        end = ((nearest == 0) | (nearest == len(line) - 1)) & (np.hypot(*(line[0] - line[-1])) > 0.05)
        past = np.where(end, np.sqrt(np.clip(away**2 - across**2, 0, None)), 0)
        along = nearest / np.float32(len(line) - 1)
        fields = away, across, past, along
        self.away, self.across, self.past, self.along = map(double, fields) if every == 2 else fields
        # The perpendicular distance is exact near the line; far from it only `away` is smooth.
        far = (self.away - np.abs(self.across) - self.past > 0.012) | (self.away > 0.03) & (self.past == 0)
        self.across = np.where(far, np.copysign(self.away, self.across), self.across)


def double(coarse):
    """Interpolate a field given at every other grid point to the full grid."""
    rows = np.repeat(coarse, 2, 0)
    rows[1:-1:2] = 0.5 * (coarse[:-1] + coarse[1:])
    full = np.repeat(rows, 2, 1)
    full[:, 1:-1:2] = 0.5 * (rows[:, :-1] + rows[:, 1:])
    height, width = GRID[0].shape
    return full[:height, :width]


def dome(centre, wide, high):
    """Return a Gaussian bump on the grid."""
    x, y = centre
    return np.exp(-(((GRID[0] - x) / wide) ** 2) - ((GRID[1] - y) / high) ** 2)


def spline(points, count, closed=False):
    """Return a Catmull-Rom spline through the points, as `count` points of equal spacing."""
    points = np.asarray(points, float)
    if closed:
        padded = np.concatenate([points[-1:], points, points[:2]])
    else:
        padded = np.concatenate([2 * points[:1] - points[1:2], points, 2 * points[-1:] - points[-2:-1]])
    u = np.linspace(0, 1, 16, endpoint=False)[None, :, None]
    a, b, c, d = (padded[i : len(padded) - 3 + i, None] for i in range(4))
    cubic, square = 3 * b - 3 * c + d - a, 2 * a - 5 * b + 4 * c - d
    curve = 0.5 * (2 * b + (c - a) * u + square * u**2 + cubic * u**3)
    curve = np.concatenate([curve.reshape(-1, 2), padded[-2:-1]])
    return even(curve, count + 1)[:-1] if closed else even(curve, count)


def even(curve, count):
    """Resample a curve to `count` points of equal spacing."""
    run = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(curve, axis=0).T))])
    want = np.linspace(0, run[-1], count)
    return np.stack([np.interp(want, run, curve[:, 0]), np.interp(want, run, curve[:, 1])], 1)


def normals(line):
    """Return unit normals, left of the direction of the line (outwards for helix and outline)."""
    step = np.gradient(line, axis=0)
    step = step / np.maximum(np.hypot(step[:, 0], step[:, 1]), 1e-9)[:, None]
    return np.stack([step[:, 1], -step[:, 0]], 1)


def smooth_step(low, high, value):
    """Return 0 below `low`, 1 above `high`, and a smooth transition between them (reversed if low > high)."""
    part = np.clip((value - low) / (high - low), 0, 1)
    return part * part * (3 - 2 * part)


def blur(field, sigma):
    """Blur a field with a Gaussian of `sigma` ear heights. It is periodic; the margin of the grid hides that."""
    return np.fft.irfft2(np.fft.rfft2(field) * blur_gain(sigma), s=field.shape).astype(np.float32)


@functools.lru_cache(maxsize=16)
def blur_gain(sigma):
    """Return the Gaussian in the frequency domain, for rfft2 of the grid."""
    fy, fx = np.fft.fftfreq(GRID[0].shape[0])[:, None], np.fft.rfftfreq(GRID[0].shape[1])[None]
    return np.exp(-2 * (math.pi * sigma / STEP) ** 2 * (fx**2 + fy**2)).astype(np.float32)


def cast_shadow(raised, light):
    """Return how much each point of a height field is in shadow, 0 to 1."""
    flat = math.hypot(light[0], light[1])
    worst = np.zeros_like(raised)
    for far in np.linspace(0.015, 0.24, 12):
        dx, dy = round(light[0] / flat * far / STEP), round(light[1] / flat * far / STEP)
        over = np.roll(raised, (-dy, -dx), (0, 1)) - raised - far * light[2] / flat
        np.maximum(worst, over, out=worst)
    return blur(smooth_step(0.0, 0.035, worst), 0.008)


def wrap(cosine, by=0.30):
    """Return diffuse brightness for a cosine, with light wrapped around edges as in skin."""
    return np.clip((cosine + by) / (1 + by), 0, 1)


def lookup(field, x, y):
    """Interpolate a field with channels bilinearly at ear coordinates."""
    height, width = field.shape[:2]
    column = np.clip((x - X0) / STEP, 0, width - 1.001).astype(np.float32)
    row = np.clip((y - Y0) / STEP, 0, height - 1.001).astype(np.float32)
    c, r = column.astype(np.int32), row.astype(np.int32)
    fc, fr = (column - c)[..., None], (row - r)[..., None]
    flat, at = field.reshape(height * width, -1), r * width + c
    top = flat[at] * (1 - fc) + flat[at + 1] * fc
    return top * (1 - fr) + (flat[at + width] * (1 - fc) + flat[at + width + 1] * fc) * fr
