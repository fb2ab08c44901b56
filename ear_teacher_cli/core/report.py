"""A run on one page: what it was told, how it went, what its embeddings are worth beside the untouched start.

Figures of metrics.csv are those that training measured; the comparison and the neighbours embed the validation
pictures again, with the best checkpoint and with the backbone as it was before training.
"""

import csv
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image

from ..config import TrainConfig, from_dict, read_toml
from ..data.crop import cut, read_picture
from ..data.datamodule import read_val_manifest
from ..data.embeddings import Embeddings
from ..data.inspect import PREVIEW
from ..data.manifest import Manifest
from ..errors import EarTeachError, PictureError
from ..files import printable, whole_file
from ..talk import Silence, Talk
from . import page, plots, runs
from .checkpoint import Checkpoint, read_checkpoint
from .diagnostics import JUDGED_ON, judge
from .embedder import Embedder, embed_manifest, embedder_of, untouched
from .evaluation import FEW_PEOPLE, Evaluation, excludes_0, look_alike_sheet, score
from .lightning_module import EarTeacherLightningModule
from .metrics import can_be_scored
from .pictures import read_own_picture

QUERIES, NEIGHBOURS = 6, 5
COLLAGES_SHOWN = 4
# What is not of one person's pictures, in the order of the page: (column of metrics.csv, words, form)
_FIGURES = (
    ("val/retrieval", "retrieval, %", "{:.1f}"),
    ("val/rank1", "rank-1, %", "{:.1f}"),
    ("val/eer", "EER, %", "{:.1f}"),
    ("val/psnr", "PSNR, dB", "{:.1f}"),
    ("val/loss", "validation loss", "{:.4g}"),
    ("val/spread", "spread", "{:.2f}"),
    ("val/effective_rank", "effective rank", "{:.0f}"),
    ("val/abs_cosine", "mean absolute cosine", "{:.2f}"),
)


@dataclass(frozen=True)
class Look:
    """Validation pictures as the teacher and the untouched start see them; rows of unit length.

    `teacher`: as `embed` gives them, whitened where the run fitted a whitening; `raw`: before that.
    """

    manifest: Manifest
    teacher: Embeddings
    raw: Embeddings
    start: Embeddings | None
    no_start: str = ""  # why


@dataclass(frozen=True)
class Story:
    """What a run's folder tells. `rows`: of metrics.csv. `missing`: why there is no look."""

    folder: Path
    config: TrainConfig
    rows: list[dict[str, str]]
    best: int
    checkpoint: Checkpoint
    look: Look | None
    missing: str = ""


def read_story(folder: Path, talk: Talk) -> Story:
    """Raises EarTeachError if the folder is no run, or no epoch of it is finished."""
    where = printable(folder)
    if not (folder / runs.CONFIG).is_file():
        raise EarTeachError(f"{where}: holds no {runs.CONFIG}; give a folder that earteach train made")
    config = from_dict(read_toml(folder / runs.CONFIG), printable(folder / runs.CONFIG))
    rows = runs.read_metrics(folder / runs.METRICS)
    if not any(int(row["epoch"]) for row in rows):
        raise EarTeachError(f"{where}: no epoch is finished yet; go on with `earteach resume {where}`")
    checkpoint = read_checkpoint(runs.checkpoint_of(folder, best=True))
    try:
        look, missing = look_at(checkpoint, talk), ""
    except EarTeachError as error:
        look, missing = None, f"{error} (paths start from the folder where the run was trained)"
        talk.warn(f"the pictures could not be looked at, so comparison and neighbours are missing: {missing}")
    return Story(folder, config, rows, checkpoint.epoch, checkpoint, look, missing)


def look_at(checkpoint: Checkpoint, talk: Talk) -> Look:
    """Embed the validation pictures (at most JUDGED_ON, evenly spaced). Raises EarTeachError if none can be read."""
    config = checkpoint.config
    manifest = read_val_manifest(config)
    some = np.unique(np.linspace(0, len(manifest) - 1, min(len(manifest), JUDGED_ON)).round().astype(int))
    manifest = manifest.subset(some.tolist())
    embedder = embedder_of(checkpoint)
    options = (manifest, config.batch_size, config.num_workers, talk, False)
    raw = embed_manifest(embedder, *options)
    fitted = embedder.whitening
    teacher = replace(raw, rows=fitted.apply(raw.rows), whitened=True) if fitted else raw
    try:
        start, why = embed_manifest(_untouched(config), *options[:3], Silence(), False), ""
    except EarTeachError as error:  # its weights may be gone, or on a hub that is out of reach
        start, why = None, str(error)
    return Look(manifest, teacher, raw, start, why)


def _untouched(config: TrainConfig) -> Embedder:
    """The backbone as `train` starts with it: from the same weights or the same seed."""
    before = torch.get_rng_state()
    pl.seed_everything(config.seed, verbose=False)
    module = EarTeacherLightningModule(config)
    receipt = module.load_pretrained() if config.pretrained else None
    torch.set_rng_state(before)
    return untouched(module.model.backbone, config.backbone, module.preprocessing, receipt)


def write_report(story: Story, out: Path, images: bool, talk: Talk) -> Path:
    """The page. `images` False: without a picture of an ear, and without names of people."""
    config = story.config
    curves, health, classes = plots.draw_run(story.rows, story.best)
    parts = [
        *_top(story),
        page.element("h2", "Is it better than the untouched backbone?"),
        *_comparison(story, talk),
        page.element("h2", "How it learned"),
        page.element(
            "p",
            "Dotted: the best epoch. Dashed: before training. The quality of embeddings is measured before whitening.",
            "faint",
        ),
        page.panels(curves),
        *(_collages(story) if images else []),
        page.element("h2", "Health of embeddings and pseudo-classes"),
        page.panels([*health, *classes, *_class_sizes(story)]),
        *(_neighbours(story) if images else []),
        *(_look_alikes(story, talk) if images else []),
        *([] if images else [page.element("p", "Pictures are left out, as --no-images asks.", "faint")]),
        page.element("h2", "What to do next"),
        page.commands(_next(story)),
        page.element("h2", "Configuration"),
        page.table(["option", "value"], [(name, _said(value)) for name, value in config.as_dict().items()]),
    ]
    with whole_file(out) as temporary:
        temporary.write_text(page.page(f"{config.experiment_name}: a teacher of ears", parts), encoding="utf-8")
    return out


def _top(story: Story) -> list[str]:
    config, rows = story.config, story.rows
    best, last, start = _row(rows, story.best), rows[-1], _row(rows, 0)
    monitored = dict(best).get(config.monitor, "")
    before = start.get(config.monitor, "")
    state, why = judge(_figures(best), _figures(start), len(story.look.manifest) if story.look else 1)
    facts = [
        (f"{story.best} of {int(last['epoch'])}", f"best epoch, by {config.monitor}", ""),
        (
            f"{float(monitored):.4g}" if monitored else "unknown",
            f"{config.monitor} there" + (f"; {float(before):.4g} before training" if before else ""),
            "",
        ),
        *([(f"{float(best['val/psnr']):.1f} dB", "PSNR of reconstructions there", "")] if best.get("val/psnr") else []),
        *([(state, "embeddings there" + (f": {why}" if why else ""), "bad" if why else "good")] if state else []),
    ]
    about = f"{config.backbone} at {config.image_size} px, {'from pretrained' if config.pretrained else 'from random'} weights"
    learned = f"Learned from {config.train_metadata}, judged on {config.val_metadata}."
    bad = _bad_pictures(story.folder)
    return [
        page.element("h1", f"{config.experiment_name}: a teacher of ears"),
        page.element("p", f"{about}. {learned}{bad}", "faint"),
        page.tiles(facts),
    ]


def _bad_pictures(folder: Path) -> str:
    if not (folder / runs.BAD).is_file():
        return ""
    with open(folder / runs.BAD, newline="", encoding="utf-8") as file:
        reasons = Counter(row.get("reason", "") for row in csv.DictReader(file))
    listed = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    return f" {reasons.total()} pictures could not be used ({listed}): {runs.BAD} lists them."


def _comparison(story: Story, talk: Talk) -> list[str]:
    parts = [page.element("h3", "While it trained")]
    rows = {"before training": _row(story.rows, 0), f"best (epoch {story.best})": _row(story.rows, story.best)}
    rows[f"last (epoch {int(story.rows[-1]['epoch'])})"] = story.rows[-1]
    lines = [
        (words, *(form.format(float(row[key])) if row.get(key) else "" for row in rows.values()))
        for key, words, form in _FIGURES
        if any(row.get(key) for row in rows.values())
    ]
    parts.append(page.table(["", *rows], lines, (1, 2, 3)))
    parts.append(
        page.element(
            "p",
            "Retrieval: share of validation pictures that are nearest to their own augmented view. All of these are of "
            "pictures like those of training; none sees another camera.",
            "faint",
        )
    )
    parts.append(page.element("h3", "By identity"))
    look = story.look
    if look is None:
        return [*parts, page.element("p", f"Not measured: {story.missing}")]
    if look.start is None:
        return [*parts, page.element("p", f"Not measured, the start is out of reach: {look.no_start}")]
    named = [ear for i in range(len(look.manifest)) if (ear := look.manifest.ear(i))]
    if not can_be_scored(named):
        reason = "the validation manifest names no identities" if not named else "too few pictures share an identity"
        return [*parts, page.element("p", f"Not measured: {reason}. `earteach evaluate` takes them from a list.")]
    try:
        plain = score([look.start, look.raw], [(None, ""), (None, "")], talk=Silence())
        white = None
        if look.teacher is not look.raw:
            white = score([look.start, look.teacher], [(None, ""), (None, "")], talk=Silence())
    except EarTeachError as error:
        return [*parts, page.element("p", f"Not measured: {error}")]
    return [*parts, *_identity_table(plain, white)]


def _identity_table(plain: Evaluation, white: Evaluation | None) -> list[str]:
    compared = [("teacher", plain), *([("teacher, whitened", white)] if white else [])]
    head = ["%", "untouched start"]
    for name, _ in compared:
        head += [name, "difference, 95 % interval"]
    lines = []
    for place, figure in enumerate(plain.systems[0].measured.figures):
        line = [figure.name, f"{100 * figure.value:.1f}"]
        for _, found in compared:
            change = found.difference[place]
            mark = " *" if excludes_0(change) else ""
            line.append(f"{100 * found.systems[1].measured.figures[place].value:.1f}")
            line.append(f"{100 * change.value:+.1f} [{100 * change.low:+.1f}, {100 * change.high:+.1f}]{mark}")
        lines.append(line)
    counts = plain.counts
    few = counts["people"] < FEW_PEOPLE
    return [
        page.table(head, lines, range(1, len(head))),
        page.element(
            "p",
            f"{counts['pictures']} validation pictures of {counts['people']} people. * The interval, from resamples of "
            "the people, excludes 0; without the star the difference can be chance. The best epoch was chosen on these "
            "very pictures, which flatters it, and part of what a whitening adds the start would gain by one, too: "
            "confirm it on other people, another camera and three seeds before you believe it."
            + (f" Intervals over fewer than {FEW_PEOPLE} people are themselves rough." if few else ""),
            "faint",
        ),
    ]


def _collages(story: Story) -> list[str]:
    found = [path for version in runs.versions(story.folder) for path in sorted(runs.collages(version))]
    if not found:
        return []
    places = sorted({round(i * (len(found) - 1) / max(1, COLLAGES_SHOWN - 1)) for i in range(COLLAGES_SHOWN)})
    parts = [page.element("h2", "Reconstructions, from first to last")]
    for place in places:
        words = f"reconstructions, {found[place].stem.replace('_', ' ')}"
        parts.append(page.wide(read_own_picture(found[place]), words))
    return parts


def _class_sizes(story: Story) -> list[str]:
    state = story.checkpoint.content.get("pseudo_classes")
    if not isinstance(state, dict) or story.config.pseudo_classes in ("batch", "instance"):
        return []
    labels = state["labels"].numpy()
    return [plots.draw_class_sizes(np.bincount(labels[labels >= 0], minlength=state["count"]))]


def _neighbours(story: Story) -> list[str]:
    look = story.look
    if look is None or len(look.teacher) < 3:
        return []
    parts = [
        page.element("h2", "Nearest neighbours"),
        page.element(
            "p",
            "Framed in black a validation picture; beside it, with their cosine similarity, the pictures that are nearest "
            "to it: for the teacher, and for the untouched start."
            + (" Green: the same ear." if look.manifest.identities else ""),
            "faint",
        ),
    ]
    systems = [("teacher", look.teacher), *([("untouched start", look.start)] if look.start else [])]
    for query in _queries(look, story.config.seed):
        try:
            rows = [(name, page.ears(_nearest(look, system, query))) for name, system in systems]
        except PictureError:  # gone since it was embedded
            continue
        parts.append(page.beside(rows))
    return parts


def _queries(look: Look, seed: int) -> list[int]:
    """Rows drawn by seed, of different ears where these are known, and of those that have another picture."""
    order = np.random.default_rng([seed, 5]).permutation(len(look.teacher)).tolist()
    ears = [_ear(look, row) for row in order]
    several = {ear for ear, count in Counter(ears).items() if count > 1 and ear}
    chosen, seen = [], set()
    for row, ear in zip(order, ears, strict=True):
        if not several or (ear in several and ear not in seen):
            chosen.append(row)
            seen.add(ear)
    return chosen[:QUERIES]


def _ear(look: Look, row: int) -> tuple[str, str] | None:
    identity = look.teacher.identities[row] if look.teacher.identities else ""
    side = look.teacher.sides[row] if look.teacher.sides else ""
    return (identity, side) if identity else None


def _nearest(look: Look, system: Embeddings, query: int) -> list[tuple[Image.Image, str, str]]:
    similarity = system.rows @ system.rows[query]
    similarity[query] = -np.inf
    tiles = [(_thumbnail(look, query), "", "query")]
    for row in np.argsort(-similarity)[:NEIGHBOURS]:
        same = _ear(look, row) is not None and _ear(look, row) == _ear(look, query)
        tiles.append((_thumbnail(look, row), f"{similarity[row]:.2f}", "same" if same else ""))
    return tiles


def _thumbnail(look: Look, row: int) -> Image.Image:
    seen = look.teacher
    manifest = Manifest(seen.source, look.manifest.root, seen.paths, seen.boxes, range(len(seen)))
    return cut(read_picture(manifest.file(row)).image, seen.boxes[row], PREVIEW)


def _look_alikes(story: Story, talk: Talk) -> list[str]:
    look = story.look
    if look is None or look.teacher.identities is None:
        return []
    try:
        found = score([look.teacher], [(None, "")], bootstrap=0, talk=Silence())
        sheet = look_alike_sheet(found, look.teacher, look.manifest.root, talk)
    except EarTeachError:  # too few identities: the comparison has said so
        return []
    return [
        page.element("h2", "Look-alikes"),
        page.element("p", "Where wrong labels show first, and what the teacher confuses.", "faint"),
        page.wide(sheet, "pairs of ears"),
    ]


def _next(story: Story) -> Sequence[str]:
    run = shlex.quote(printable(story.folder))
    more = max(int(story.rows[-1]["epoch"]), story.config.max_epochs)
    return (
        f"earteach resume {run}"
        if int(story.rows[-1]["epoch"]) < more
        else f"earteach resume {run} --max-epochs {2 * more}",
        f"earteach export-backbone {run} teacher.safetensors",
        f"earteach embed photos/ out.npy --weights {run}",
        "earteach evaluate out.npy labels.csv",
        f"tensorboard --logdir {run} --samples_per_plugin images=1000",
    )


def _row(rows: Sequence[dict[str, str]], epoch: int) -> dict[str, str]:
    return next((row for row in rows if int(row["epoch"]) == epoch), {})


def _figures(row: dict[str, str]) -> dict[str, float]:
    return {name.removeprefix("val/"): float(value) for name, value in row.items() if name.startswith("val/") and value}


def _said(value: object) -> str:
    if value is None:
        return ""
    return ("on" if value else "off") if isinstance(value, bool) else str(value)
