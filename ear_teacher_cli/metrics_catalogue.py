"""Every metric that training logs, once: its name, unit, format and direction, and where it is shown.

Adding a metric takes two steps: compute it (one of the validation embeddings in `quality` of
training/epoch_metrics.py, one of a loss term in training/objectives.py), and add it to METRICS, a loss term to _TERMS. metrics.csv and the loggers
(TensorBoard, W&B, MLflow) record everything that is logged; terminal, report and model card show what METRICS says.
examples/docs has a page that defines every metric. No torch here.
"""

from dataclasses import dataclass
from typing import Any

# The curves of a report: title of each panel -> the section of the page it is in. A metric names its panel by title.
PANELS = {
    "Quality of held-out embeddings, %": "learning",
    "Loss": "learning",
    "Reconstruction loss (MSE)": "learning",
    "Metric loss": "learning",
    "Contrastive loss": "learning",
    "Anchor loss": "learning",
    "Consistency loss": "learning",
    "Map loss": "learning",
    "Embedding loss": "learning",
    "Relation loss": "learning",
    "PSNR of reconstructions, dB": "learning",
    "Learning rate": "learning",
    "Spread (1: all over the sphere)": "health",
    "Effective rank": "health",
    "Mean absolute cosine": "health",
    "Norm of the gradient": "health",
    "Gradient of the other terms / reconstruction's": "health",
    "Pseudo-classes": "classes",
}


# The charts of several metrics in TensorBoard's tab "custom scalars": title -> group. A metric names its chart by title.
CHARTS = {
    "spread": "Is it collapsing?",
    "effective rank": "Is it collapsing?",
    "mean absolute cosine": "Is it collapsing?",
    "pseudo-classes": "Is it collapsing?",
    "quality, %": "Is it learning?",
    "loss": "Is it learning?",
    "reconstruction": "Is it learning?",
    "PSNR, dB": "Is it learning?",
}


@dataclass(frozen=True)
class Metric:
    """A metric, and where it is shown.

    key: as in metrics.csv and in the loggers. label: in a sentence, a table and a legend. description: one sentence.
    unit: `%`, `dB` or nothing. format: of a number. direction: `max` (higher is better), `min`, or nothing if neither.
    monitor: whether --monitor accepts it.

    Terminal: `rank` (None: not in the table), where columns of a high rank are the first to go on a narrow terminal;
    `head` (default: label and unit); `width` (0: as the format makes it, else as many digits as fit). A metric of the
    table is also in the sentence that a log has instead, within the parentheses of `term_of` if it is a term of a loss;
    `in_log` adds one to the sentence only.
    Report: `report`, whether it has a row in the table; `panel`, one of PANELS; `legend` (default: label); `reference`,
    whether it is a constant that other metrics of the panel are compared with: a line across it.
    TensorBoard: every metric has a chart of its own; `chart`, one of CHARTS, shows it with others; `outcome`, whether the
    table of runs (hyper-parameters) has its last value, as it has those of all monitors.
    Model card: `card`, what it is called there (nothing: not in the card). `place`: order in these two tables.
    """

    key: str
    label: str
    description: str
    unit: str = ""
    format: str = ".4g"
    direction: str = ""
    monitor: bool = False
    rank: int | None = None
    head: str = ""
    width: int = 0
    term_of: str = ""
    in_log: bool = False
    report: bool = False
    place: int = 99
    panel: str = ""
    legend: str = ""
    reference: bool = False
    chart: str = ""
    outcome: bool = False
    card: str = ""

    def number(self, value: float) -> str:
        """Return `41.9`: the value in the metric's format, without its unit."""
        return f"{value:{self.format}}"

    def with_unit(self, text: str) -> str:
        """Return `41.9 %` of `41.9`."""
        return f"{text} {self.unit}" if self.unit else text

    def phrase(self, value: float) -> str:
        """Return `rank-1 41.9 %`, for a sentence."""
        return f"{self.label} {self.with_unit(self.number(value))}"

    def titled(self, label: str = "") -> str:
        """Return `rank-1, %`, for a row of a table; `label` instead of the metric's own."""
        return f"{label or self.label}, {self.unit}" if self.unit else label or self.label

    @property
    def in_sentence(self) -> bool:
        """Whether it has a phrase of its own in the sentence of a log; losses are listed together."""
        return (self.rank is not None or self.in_log) and not self.key.endswith("loss")

    @property
    def column_head(self) -> str:
        """The head of its column in the terminal."""
        return self.head or self.with_unit(self.label)

    def column_text(self, value: float) -> str:
        """Return the value as it stands in its column of the terminal."""
        if not self.width:
            return self.number(value)
        texts = (f"{value:.{digits}g}" for digits in (4, 3, 2, 1))
        return next((text for text in texts if len(text) <= self.width), f"{value:.1g}")


# Terms of the loss: name (logged as train/NAME_loss and val/NAME_loss), label, description. A panel has both.
_TERMS = (
    ("recon", "Reconstruction loss (MSE)", "Mean squared error of the reconstruction on [-1, 1]."),
    ("metric", "Metric loss", "Cross-entropy of the margin softmax over the pseudo-classes."),
    ("contrastive", "Contrastive loss", "NT-Xent: find the other view of an image among all views of the batch."),
    ("anchor", "Anchor loss", "Distance of the feature maps from the pretrained backbone's at twice the side."),
    ("consistency", "Consistency loss", "Negative cosine of a prediction with the projection of the other view."),
    ("map", "Map loss", "Distance of the student's projected feature maps from the teacher's."),
    ("embedding", "Embedding loss", "1 - cosine of the student's projected embedding with the teacher's."),
    (
        "relation",
        "Relation loss",
        "Squared difference of the cosines between the images of a batch from the teacher's.",
    ),
)


def _losses(split: str, word: str, rank: int, **of: dict[str, Any]) -> list[Metric]:
    """Return the loss of `split` (train or val) and its terms, which have `rank`.

    `of` has further fields of some of them, by the name in _TERMS; `total` for the sum.
    """
    common: dict[str, Any] = {"direction": "min", "width": 6, "legend": word}
    own = common | of.get("total", {})
    found = [
        Metric(
            f"{split}/loss",
            f"{word} loss",
            "Weighted sum of the terms.",
            head=split,
            rank=0,
            panel="Loss",
            chart="loss",
            **own,
        )
    ]
    for name, panel, description in _TERMS:
        key, label = f"{split}/{name}_loss", panel.removesuffix(" (MSE)").lower()
        own = {"head": name, "rank": rank, "term_of": f"{split}/loss", "panel": panel}
        own |= {"chart": "reconstruction"} if name == "recon" else {}
        found.append(Metric(key, label, description, **common | own | of.get(name, {})))
    return found


# In the order of the terminal's columns.
# fmt: off
METRICS: tuple[Metric, ...] = (
    *_losses("train", "training", rank=6),
    *_losses("val", "validation", rank=7, total={"monitor": True, "report": True, "place": 6}, metric={"monitor": True},
             recon={"monitor": True, "place": 5, "card": "reconstruction loss"}),
    Metric("val/psnr", "PSNR", "Peak signal-to-noise ratio of the reconstruction.", "dB", ".1f", "max", monitor=True,
           rank=2, report=True, place=4, panel="PSNR of reconstructions, dB", chart="PSNR, dB", legend="validation",
           card="PSNR of the reconstruction"),
    Metric("val/psnr_mean_image", "PSNR of the mean training image", "PSNR of the mean training image, whatever the input.",
           "dB", ".1f", report=True, place=4, panel="PSNR of reconstructions, dB", chart="PSNR, dB", reference=True,
           legend="mean training image"),
    Metric("val/psnr_pca64", "PSNR of PCA with 64 components",
           "PSNR of the projection onto 64 principal components of the training crops.",
           "dB", ".1f", report=True, place=4, panel="PSNR of reconstructions, dB", chart="PSNR, dB", reference=True,
           legend="PCA, 64 components"),
    Metric("val/retrieval", "retrieval", "Share of validation images that are nearest to their own augmented view.",
           "%", ".1f", "max", monitor=True, rank=0, report=True, place=1, panel="Quality of held-out embeddings, %", chart="quality, %",
           card="validation images found from their own augmented view"),
    Metric("val/rank1", "rank-1", "Share of validation images whose nearest other image is of the same identity.",
           "%", ".1f", "max", monitor=True, rank=3, report=True, place=2, panel="Quality of held-out embeddings, %", chart="quality, %",
           card="rank-1 by identity"),
    Metric("val/eer", "EER", "Equal error rate of pairs of validation images, by identity.",
           "%", ".1f", "min", monitor=True, rank=4, report=True, place=3, panel="Quality of held-out embeddings, %", chart="quality, %",
           card="equal error rate by identity"),
    Metric("val/spread", "spread", "Standard deviation of the unit embeddings' components, times sqrt(D).",
           format=".2f", rank=5, report=True, place=7, panel="Spread (1: all over the sphere)", chart="spread",
           outcome=True),
    Metric("val/effective_rank", "effective rank", "Number of directions that the embeddings use (RankMe).",
           format=".0f", rank=5, head="eff. rank", report=True, place=8, panel="Effective rank", chart="effective rank", outcome=True,
           card="effective rank of the embeddings"),
    Metric("val/abs_cosine", "mean absolute cosine", "Mean absolute cosine of two embeddings about their mean.",
           format=".2f", report=True, place=9, panel="Mean absolute cosine", chart="mean absolute cosine"),
    Metric("val/agreement", "agreement", "Share of validation images whose augmented view has the same prototype.",
           format=".2f", direction="max"),
    Metric("classes/in_use", "in use", "Share of the pseudo-classes that contain an image.",
           format=".2f", in_log=True, panel="Pseudo-classes", chart="pseudo-classes", legend="share in use"),
    Metric("classes/entropy", "entropy", "Entropy of the sizes of the pseudo-classes, divided by log K.",
           format=".2f", in_log=True, panel="Pseudo-classes", chart="pseudo-classes"),
    Metric("classes/largest", "largest", "Share of the images in the largest pseudo-class.", format=".2f"),
    Metric("classes/nmi", "NMI", "Normalised mutual information of the last two clusterings.",
           format=".2f", in_log=True, panel="Pseudo-classes", chart="pseudo-classes", legend="NMI of rounds"),
    Metric("train/lr", "learning rate", "Base learning rate.", panel="Learning rate"),
    Metric("train/gradient_norm", "gradient norm", "Norm of the gradient of all parameters, before clipping.",
           panel="Norm of the gradient", legend="before clipping"),
    Metric("train/grad_ratio", "gradient ratio", "Gradient of the other terms / reconstruction's, in what the decoder reads.",
           panel="Gradient of the other terms / reconstruction's", legend="ratio"),
    Metric("machine/data_wait", "waiting for data", "Share of an epoch's training time spent waiting for the next batch.",
           "%", ".0f", "min", rank=5, head="wait %"),
    Metric("machine/peak_memory", "peak memory", "Peak memory of the GPU or, without one, of the process.",
           "GB", ".1f", "min", rank=5, head="GB"),
)
# fmt: on


def metric_of(key: str) -> Metric:
    """Return the metric of that key. Raises KeyError if there is none."""
    return {metric.key: metric for metric in METRICS}[key]


def monitors() -> dict[str, str]:
    """Return the metrics that may select the best checkpoint, with their directions."""
    return {metric.key: metric.direction for metric in METRICS if metric.monitor}


def outcomes() -> list[str]:
    """Return the keys of the metrics in TensorBoard's table of runs: the monitors first."""
    return [*monitors(), *(metric.key for metric in METRICS if metric.outcome)]


def charts() -> dict[str, dict[str, list[str]]]:
    """Return the keys of the metrics of each chart by group and title, in the order of CHARTS."""
    found: dict[str, dict[str, list[str]]] = {}
    for title, group in CHARTS.items():
        found.setdefault(group, {})[title] = [metric.key for metric in METRICS if metric.chart == title]
    return found


def report_rows() -> list[Metric]:
    """Return the metrics of the report's table, in its order."""
    return sorted((metric for metric in METRICS if metric.report), key=lambda metric: metric.place)


def card_rows() -> list[Metric]:
    """Return the metrics of the model card, in its order."""
    return sorted((metric for metric in METRICS if metric.card), key=lambda metric: metric.place)


def panels(section: str) -> list[tuple[str, list[Metric]]]:
    """Return (title, metrics) of the panels in a section of the report, in the order of PANELS."""
    return [
        (title, [metric for metric in METRICS if metric.panel == title])
        for title, where in PANELS.items()
        if where == section
    ]
