"""The comparison of teacher and baseline by identity, as a table of the report."""

from dataclasses import dataclass

from ..command_config import EvaluateConfig
from ..console import SilentConsole
from ..embedding.files import Embeddings
from ..errors import EarTeachError
from ..quality.identity_metrics import Figure, can_be_scored
from ..quality.scoring import FEW_PEOPLE, Evaluation, excludes_0, score
from .summary import RunSummary
from .validation_embeddings import ValidationEmbeddings

# With fewer people an interval means nothing.
FEWEST_PEOPLE = 3


@dataclass(frozen=True)
class Comparison:
    """A table with a remark, or why there is none. `teacher`: the evaluation of the teacher as `embed` gives it."""

    why_not: str = ""
    head: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    remark: str = ""
    teacher: Evaluation | None = None


def compare_with_baseline(summary: RunSummary) -> Comparison:
    """Score the validation embeddings by identity, each of the trained model's against the baseline's."""
    found = summary.embeddings
    if found is None:
        return Comparison(f"Not measured: {summary.missing}")
    if found.baseline is None:
        return Comparison(f"Not measured, the initial weights are not available: {found.no_baseline}")
    named = [ear for row in range(len(found.raw)) if (ear := found.ear(row))]
    if not can_be_scored(named):
        reason = "the validation manifest names no identities" if not named else "too few images share an identity"
        return Comparison(f"Not measured: {reason}. `earteach evaluate` takes them from a list.")
    if len({identity for identity, _ in named}) < FEWEST_PEOPLE:
        return Comparison(f"Not measured: fewer than {FEWEST_PEOPLE} people are named.")
    try:
        systems = {summary.model: _scored(found.baseline, found.raw)}
        if found.teacher is not found.raw:
            systems[f"{summary.model}, whitened"] = _scored(found.baseline, found.teacher)
    except EarTeachError as error:
        return Comparison(f"Not measured: {error}")
    return _table(found, systems)


def _scored(baseline: Embeddings, teacher: Embeddings) -> Evaluation:
    return score([baseline, teacher], [(None, ""), (None, "")], None, EvaluateConfig(), SilentConsole())


def _table(found: ValidationEmbeddings, systems: dict[str, Evaluation]) -> Comparison:
    """Return the comparison of `systems`, each scored beside the baseline."""
    plain = next(iter(systems.values()))
    few = plain.counts["people"] < FEW_PEOPLE
    head = ["%", "baseline"]
    for name in systems:
        head += [name, "difference, 95 % interval"]
    rows = []
    for place, figure in enumerate(plain.systems[0].measured.figures):
        row = [figure.name, f"{100 * figure.value:.1f}"]
        for evaluation in systems.values():
            row.append(f"{100 * evaluation.systems[1].measured.figures[place].value:.1f}")
            row.append(_difference(evaluation.difference[place], starred=not few))
        rows.append(tuple(row))
    remark = _remark(plain.counts, found, few)
    return Comparison(head=tuple(head), rows=tuple(rows), remark=remark, teacher=list(systems.values())[-1])


def _difference(change: Figure, starred: bool) -> str:
    """Return `+4.2 [+1.0, +7.3] *`, in points."""
    star = " *" if starred and excludes_0(change) else ""
    return f"{100 * change.value:+.1f} [{100 * change.low:+.1f}, {100 * change.high:+.1f}]{star}"


def _remark(counts: dict[str, int], found: ValidationEmbeddings, few: bool) -> str:
    """Return what the numbers are of, and how far to trust them."""
    sample = f", a sample of whole people out of {found.total}" if found.total > len(found.raw) else ""
    stars = (
        f"With fewer than {FEW_PEOPLE} people intervals are rough, and no difference is marked. "
        if few
        else "* The interval, from resamples of the people, excludes 0; one row in twenty does so by chance. "
    )
    return (
        f"{counts['pictures']} validation images of {counts['people']} people{sample}. {stars}The best epoch was chosen "
        "on these same images, so the result is optimistic, and whitening would also improve the baseline: confirm it on "
        "other people, another camera and three seeds."
    )
