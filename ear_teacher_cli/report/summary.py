"""A run on one page: what it was told, how it went, what its embeddings are worth beside the untouched start.

Figures of metrics.csv are those that training measured; the comparison and the neighbours embed the validation
images again, with the best checkpoint and with the backbone as it was before training.
"""

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePath

import numpy as np
from PIL import Image

from .. import run_folder
from ..config import TrainConfig, from_dict, read_toml
from ..console import Console, SilentConsole
from ..drawing import read_saved_image
from ..embedding.files import Embeddings
from ..errors import EarTeachError, ImageError, WeightsError
from ..files import printable, shell_word, whole_file
from ..model.checkpoint import Checkpoint, read_checkpoint
from ..quality import plots
from ..quality.collapse import judge
from ..quality.evaluation import FEW_PEOPLE, Evaluation, excludes_0, look_alike_sheet, score
from ..quality.identity_metrics import can_be_scored
from ..training.describe import of_other_weights
from . import page
from .validation_embeddings import ValidationEmbeddings, embed_validation_set

QUERIES, NEIGHBOURS = 6, 5
COLLAGES_SHOWN = 4
# Of fewer people no interval says anything.
FEWEST_PEOPLE = 3
# What training measured of an epoch: (column of metrics.csv, words, form)
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
_PATHS = ("train_metadata", "val_metadata", "root_dir", "pretrained_path", "output_dir")


@dataclass(frozen=True)
class RunSummary:
    """What a run's folder tells. `rows`: of metrics.csv. `missing`: why there is no look. `running`: it is not over."""

    folder: Path
    config: TrainConfig
    rows: list[dict[str, str]]
    checkpoint: Checkpoint
    look: ValidationEmbeddings | None
    missing: str = ""
    running: bool = False

    @property
    def epoch(self) -> int:
        """Of the checkpoint that is looked at."""
        return self.checkpoint.epoch

    @property
    def last(self) -> int:
        return int(self.rows[-1]["epoch"])

    @property
    def is_best(self) -> bool:
        """Whether the checkpoint was kept as one of the best, and not for being the last that is left."""
        return self.checkpoint.path.name.startswith("best-")

    def row(self, epoch: int) -> dict[str, str]:
        return next((row for row in self.rows if int(row["epoch"]) == epoch), {})


def summarise_run(folder: Path, console: Console, root_dir: str | None = None, running: bool = False) -> RunSummary:
    """Raises EarTeachError if the folder is no run, or no epoch of it is finished."""
    where = printable(folder)
    if not (folder / run_folder.CONFIG).is_file():
        raise EarTeachError(f"{where}: holds no {run_folder.CONFIG}; give a folder that earteach train made")
    config = from_dict(read_toml(folder / run_folder.CONFIG), printable(folder / run_folder.CONFIG))
    rows = run_folder.read_metrics(folder / run_folder.METRICS)
    if not any(int(row["epoch"]) for row in rows):
        raise EarTeachError(
            f"{where}: its {run_folder.METRICS} has no finished epoch; go on with `earteach resume {shell_word(folder)}`"
        )
    checkpoint = _best_whole(folder, console)
    try:
        look, missing = embed_validation_set(checkpoint, console, root_dir), ""
    except EarTeachError as error:
        look = None
        missing = (
            f"{error} (paths start from the folder where the run was trained; --root-dir is where the images are now)"
        )
        console.warn(f"the images could not be looked at, so comparison and neighbours are missing: {missing}")
    return RunSummary(folder, config, rows, checkpoint, look, missing, running)


def _best_whole(folder: Path, console: Console) -> Checkpoint:
    """The best; of those that are not damaged, which are said. Raises the first one's WeightsError if none is whole."""
    first: WeightsError | None = None
    best = run_folder.checkpoint_of(folder, best=True)
    for path in dict.fromkeys(chain([best], run_folder.checkpoints(folder))):
        try:
            return read_checkpoint(path)
        except WeightsError as error:
            first = first or error
            console.warn(f"{error}. Trying another")
    raise first


def write_report(story: RunSummary, out: Path, images: bool, console: Console) -> Path:
    """The page. `images` False: without an image of an ear, and without names of people."""
    config = story.config
    curves, health, classes = plots.draw_run(story.rows, story.epoch)
    plain, white, why_not = _scored(story)
    compared = [page.element("p", why_not)] if plain is None else _identity_table(story.look, plain, white)
    parts = [
        *_top(story),
        page.element("h2", "Is it better than the untouched backbone?"),
        *_while_it_trained(story),
        page.element("h3", "By identity"),
        *compared,
        page.element("h2", "How it learned"),
        page.element(
            "p",
            f"Dotted: epoch {story.epoch}. Dashed: before training. The quality of embeddings is measured before "
            "whitening.",
            "faint",
        ),
        page.panels(curves),
        *(_collages(story) if images else []),
        page.element("h2", "Health of embeddings and pseudo-classes"),
        page.panels([*health, *classes, *_class_sizes(story)]),
        *(_neighbours(story) if images else []),
        *(_look_alikes(story.look, white or plain, console) if images and plain else []),
        *([] if images else [page.element("p", "Images are left out, as --no-images asks.", "faint")]),
        page.element("h2", "What to do next"),
        page.commands(_next(story)),
        page.element("h2", "Configuration"),
        page.table(["option", "value"], [(name, _said(name, value)) for name, value in config.as_dict().items()]),
    ]
    with whole_file(out) as temporary:
        temporary.write_text(page.page(f"{story.folder.name}: a teacher of ears", parts), encoding="utf-8")
    return out


def _top(story: RunSummary) -> list[str]:
    config, row = story.config, story.row(story.epoch)
    monitored, before = row.get(config.monitor, ""), story.row(0).get(config.monitor, "")
    images = int(story.checkpoint.content["earteach"].get("judged_on", 0))  # older checkpoints do not say
    state, why = judge(_figures(row), _figures(story.row(0)), images)
    unit = UNITS.get(config.monitor, "")
    kind = (
        f"best epoch, by {config.monitor}" if story.is_best else "epoch of the checkpoint that is left: no best one is"
    )
    ahead = ""
    if story.last < config.max_epochs:
        ahead = f"; of {config.max_epochs}, {'still running' if story.running else 'not finished'}"
    lines = [
        (f"{story.epoch} of {story.last}", kind + ahead, ""),
        (
            f"{float(monitored):.4g}{unit}" if monitored else "unknown",
            f"{config.monitor} there" + (f"; {float(before):.4g}{unit} before training" if before else ""),
            "",
        ),
        *([(f"{float(row['val/psnr']):.1f} dB", "PSNR of reconstructions there", "")] if row.get("val/psnr") else []),
        *([(state, "embeddings there" + (f": {why}" if why else ""), "bad" if why else "good")] if state else []),
    ]
    start = "from pretrained weights" if config.pretrained else "from random weights"
    lists = f"Learned from {_path(config.train_metadata)}, judged on {_path(config.val_metadata)}."
    return [
        page.element("h1", f"{story.folder.name}: a teacher of ears"),
        page.element(
            "p",
            f"{config.backbone} at {config.image_size} px, {start}. {lists}{_bad_images(story.folder)}",
            "faint",
        ),
        page.tiles(lines),
    ]


def _bad_images(folder: Path) -> str:
    if not (folder / run_folder.BAD).is_file():
        return ""
    with open(folder / run_folder.BAD, newline="", encoding="utf-8", errors="replace") as file:
        reasons = Counter(row.get("reason") or "" for row in csv.DictReader(file))
    listed = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    return f" {reasons.total()} images could not be used ({listed}): {run_folder.BAD} lists them."


def _while_it_trained(story: RunSummary) -> list[str]:
    kind = "best" if story.is_best else "left"
    rows = {"before training": story.row(0), f"{kind} (epoch {story.epoch})": story.row(story.epoch)}
    rows[f"last (epoch {story.last})"] = story.rows[-1]
    lines = [
        (words, *(form.format(float(row[key])) if row.get(key) else "" for row in rows.values()))
        for key, words, form in _FIGURES
        if any(row.get(key) for row in rows.values())
    ]
    return [
        page.element("h3", "While it trained"),
        page.table(["", *rows], lines, (1, 2, 3)),
        page.element(
            "p",
            "Retrieval: share of validation images that are nearest to their own augmented view. All of these are of "
            "images like those of training; none sees another camera.",
            "faint",
        ),
        *([page.element("p", of_other_weights(story.config), "faint")] if of_other_weights(story.config) else []),
    ]


def _scored(story: RunSummary) -> tuple[Evaluation | None, Evaluation | None, str]:
    """(start against teacher, start against the whitened teacher if there is one, why neither)."""
    look = story.look
    if look is None:
        return None, None, f"Not measured: {story.missing}"
    if look.start is None:
        return None, None, f"Not measured, the start is out of reach: {look.no_start}"
    named = [ear for row in range(len(look.raw)) if (ear := look.ear(row))]
    if not can_be_scored(named):
        reason = "the validation manifest names no identities" if not named else "too few images share an identity"
        return None, None, f"Not measured: {reason}. `earteach evaluate` takes them from a list."
    if len({identity for identity, _ in named}) < FEWEST_PEOPLE:
        return None, None, f"Not measured: fewer than {FEWEST_PEOPLE} people are named."
    try:
        plain = score([look.start, look.raw], [(None, ""), (None, "")], console=SilentConsole())
        if look.teacher is look.raw:
            return plain, None, ""
        return plain, score([look.start, look.teacher], [(None, ""), (None, "")], console=SilentConsole()), ""
    except EarTeachError as error:
        return None, None, f"Not measured: {error}"


def _identity_table(look: ValidationEmbeddings, plain: Evaluation, white: Evaluation | None) -> list[str]:
    compared = [("teacher", plain), *([("teacher, whitened", white)] if white else [])]
    counts = plain.counts
    few = counts["people"] < FEW_PEOPLE
    head = ["%", "untouched start"]
    for name, _ in compared:
        head += [name, "difference, 95 % interval"]
    lines = []
    for place, figure in enumerate(plain.systems[0].measured.figures):
        line = [figure.name, f"{100 * figure.value:.1f}"]
        for _, found in compared:
            change = found.difference[place]
            mark = " *" if excludes_0(change) and not few else ""
            line.append(f"{100 * found.systems[1].measured.figures[place].value:.1f}")
            line.append(f"{100 * change.value:+.1f} [{100 * change.low:+.1f}, {100 * change.high:+.1f}]{mark}")
        lines.append(line)
    sample = f", a sample of whole people out of {look.of}" if look.of > len(look.raw) else ""
    stars = (
        f"Of fewer than {FEW_PEOPLE} people intervals are rough, and no difference is marked. "
        if few
        else "* The interval, from resamples of the people, excludes 0; of twenty rows one may by chance. "
    )
    return [
        page.table(head, lines, range(1, len(head))),
        page.element(
            "p",
            f"{counts['pictures']} validation images of {counts['people']} people{sample}. {stars}The best epoch was "
            "chosen on these very images, which flatters it, and part of what a whitening adds the start would gain by "
            "one, too: confirm it on other people, another camera and three seeds before you believe it.",
            "faint",
        ),
    ]


def _collages(story: RunSummary) -> list[str]:
    found = [path for version in run_folder.versions(story.folder) for path in run_folder.collages(version)]
    places = (
        sorted({round(i * (len(found) - 1) / (COLLAGES_SHOWN - 1)) for i in range(COLLAGES_SHOWN)}) if found else []
    )
    parts = []
    for place in places:
        words = f"reconstructions, {found[place].stem.replace('_', ' ')}"
        try:
            parts.append(page.wide(read_saved_image(found[place]), words))
        except OSError:  # damaged since
            continue
    return [page.element("h2", "Reconstructions, from first to last"), *parts] if parts else []


def _class_sizes(story: RunSummary) -> list[str]:
    state = story.checkpoint.content.get("pseudo_classes")
    if not isinstance(state, dict) or story.config.pseudo_classes in ("batch", "instance"):
        return []
    labels = state["labels"].numpy()
    return [plots.draw_class_sizes(np.bincount(labels[labels >= 0], minlength=state["count"]))]


def _neighbours(story: RunSummary) -> list[str]:
    look = story.look
    if look is None or len(look.teacher) < 3:
        return []
    parts = [
        page.element("h2", "Nearest neighbours"),
        page.element(
            "p",
            "Framed in black a validation image; beside it, with their cosine similarity, the images that are nearest "
            "to it: for the teacher, and for the untouched start."
            + (" Whitening spreads cosines: compare who is near, not the numbers." if look.teacher.whitened else "")
            + (" Green: the same ear." if look.teacher.identities else ""),
            "faint",
        ),
    ]
    systems = [("teacher", look.teacher), *([("untouched start", look.start)] if look.start else [])]
    for query in _queries(look, story.config.seed):
        try:
            rows = [(name, page.ears(_nearest(look, system, query))) for name, system in systems]
        except ImageError:  # gone since it was embedded
            continue
        parts.append(page.beside(rows))
    return parts


def _queries(look: ValidationEmbeddings, seed: int) -> list[int]:
    """Rows drawn by seed, of different ears where these are known, and of those that have another image."""
    order = np.random.default_rng([seed, 5]).permutation(len(look.teacher)).tolist()
    ears = [look.ear(row) for row in order]
    several = {ear for ear, count in Counter(ears).items() if count > 1 and ear}
    chosen, seen = [], set()
    for row, ear in zip(order, ears, strict=True):
        if not several or (ear in several and ear not in seen):
            chosen.append(row)
            seen.add(ear)
    return chosen[:QUERIES]


def _nearest(look: ValidationEmbeddings, system: Embeddings, query: int) -> list[tuple[Image.Image, str, str]]:
    similarity = system.rows @ system.rows[query]
    similarity[query] = -np.inf
    tiles = [(look.thumbnail(query), "", "query")]
    for row in np.argsort(-similarity)[:NEIGHBOURS].tolist():
        same = look.ear(row) is not None and look.ear(row) == look.ear(query)
        tiles.append((look.thumbnail(row), f"{similarity[row]:.2f}", "same" if same else ""))
    return tiles


def _look_alikes(look: ValidationEmbeddings, scored: Evaluation, console: Console) -> list[str]:
    try:
        sheet = look_alike_sheet(scored, look.teacher, look.root, console)
    except EarTeachError:  # their images are gone since
        return []
    return [
        page.element("h2", "ValidationEmbeddings-alikes"),
        page.element("p", "Where wrong labels show first, and what the teacher confuses.", "faint"),
        page.wide(sheet, "pairs of ears"),
    ]


def _next(story: RunSummary) -> Sequence[str]:
    run = shell_word(story.folder)
    more = "" if story.last < story.config.max_epochs else f" --max-epochs {2 * story.last}"
    return (
        *([] if story.running else [f"earteach resume {run}{more}"]),
        f"earteach export-backbone {run} teacher.safetensors",
        f"earteach embed photos/ out.npy --weights {run}",
        "earteach evaluate out.npy labels.csv",
        f"tensorboard --logdir {run} --samples_per_plugin images=1000",
    )


def _figures(row: dict[str, str]) -> dict[str, float]:
    return {name.removeprefix("val/"): float(value) for name, value in row.items() if name.startswith("val/") and value}


def _said(name: str, value: object) -> str:
    if value is None:
        return ""
    if name in _PATHS:
        return _path(str(value))
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


def _path(path: str) -> str:
    """The page may be sent around: of a path from the root its name is enough."""
    return PurePath(path).name if PurePath(path).is_absolute() else path
