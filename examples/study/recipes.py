"""The rows of the study: options of training, spelled out so that they stay when defaults change."""

import re
from dataclasses import fields
from typing import Any, get_args, get_type_hints

from tables import Row

from ear_teacher_cli.config import TrainConfig
from ear_teacher_cli.errors import UsageError

# The fine-tuning of version 0.1.0: all rows except the presets have it, the methods of lightly too. They differ in the
# objective only.
FINE_TUNING = {
    "bbox_buffer": 0.10,
    "pad": True,
    "augment": True,
    "augmentation": "strong",
    "views": 2,
    "hflip": 0.0,
    "freeze_stride": 8,
    "freeze_statistics": True,
    "learning_rate": 3e-4,
    "layer_decay": 1.0,
    "head_lr_mult": 10.0,
    "weight_decay": 1e-4,
    "warmup_epochs": 1,
    "gradient_clip_val": 0.0,
    "ema_decay": 0.0,
    "baseline_weight": 0.5,
    "reconstruction_weight": 1.0,
    "denoise": False,
    "decoder_input": "embedding",
    "decoder_start": "random",
    "anchor_weight": 0.0,
}
RECONSTRUCTION = {
    **FINE_TUNING,
    "projection_dim": 256,
    "contrastive_weight": 0.0,
    "consistency_weight": 0.0,
    "pseudo_classes": "none",
}
# Margin and scale of unsupervised speaker verification (see README.md), without a warm-up because the runs are short.
CLASSES = {
    **RECONSTRUCTION,
    "metric_loss": "arcface",
    "metric_weight": 1.0,
    "arcface_margin": 0.2,
    "arcface_scale": 30.0,
    "margin_warmup_epochs": 0,
    "num_pseudo_classes": 512,
    "cluster_every": 20,
}
KMEANS = {**CLASSES, "pseudo_classes": "kmeans"}
# The defaults of version 0.1.0, without its whitening: measure.py fits one for every row.
VERSION_0_1_0 = {**KMEANS, "contrastive_weight": 1.0, "temperature": 0.2, "metric_weight": 0.5}

ROWS = {
    "random": Row("Random weights", "initial", {"pretrained": False}),
    "baseline": Row("Pretrained baseline", "initial"),
    "original": Row("Original recipe, documented values, k-means classes", "earteach", {"preset": "original"}),
    "original-batch": Row(
        "Original recipe, labels by place in batch (control)",
        "earteach",
        {"preset": "original", "pseudo_classes": "batch"},
    ),
    "reconstruction": Row("Reconstruction only", "earteach", RECONSTRUCTION),
    "fixed": Row("Fixed random classes (control)", "earteach", {**CLASSES, "pseudo_classes": "fixed"}),
    "instance": Row("One class per image", "earteach", {**CLASSES, "pseudo_classes": "instance"}),
    "kmeans": Row("k-means classes", "earteach", KMEANS),
    "v010": Row("Recipe of version 0.1.0", "earteach", VERSION_0_1_0),
    "recommended": Row("Recommended preset", "earteach", {"preset": "recommended"}),
    "simclr": Row("SimCLR (lightly)", "lightly", FINE_TUNING),
    "simsiam": Row("SimSiam (lightly)", "lightly", FINE_TUNING),
    "dino": Row("DINO (lightly)", "lightly", FINE_TUNING),
    # Checks of the measurement, all with the pretrained baseline.
    "shuffled": Row("Check: identities shuffled", "shuffled"),
    "grey": Row("Check: 32 x 32 grey pixels", "grey"),
    "masked": Row("Check: ear painted over", "masked"),
    "ear-only": Row("Check: all but the ear painted over", "ear-only"),
    "step0": Row("Check: step 0 of a run", "step0"),
}


def select_rows(names: str, tries: list[str]) -> dict[str, Row]:
    """Return the rows of --rows and --try by name. Raises UsageError."""
    wanted = list(ROWS) if names == "all" else names.split(",")
    for name in wanted:
        if name not in ROWS:
            raise UsageError(f"--rows {name}: is not a row; choose all, or from {', '.join(ROWS)}")
    rows = {name: ROWS[name] for name in ROWS if name in wanted}
    for text in tries:
        name, _, changes = text.partition(":")
        pairs = [change.split("=", 1) for change in changes.split(",")]
        if name not in ROWS or ROWS[name].kind != "earteach" or any(len(pair) < 2 for pair in pairs):
            raise UsageError(f"--try {text}: is not ROW:option=value; write, for example, kmeans:learning_rate=3e-4")
        options = {option.replace("-", "_"): _parse(option.replace("-", "_"), value) for option, value in pairs}
        label = f"{ROWS[name].label}, {changes}"
        rows[re.sub(r"[^\w.]+", "_", text)] = Row(label, "earteach", {**ROWS[name].options, **options})
    return rows


def _parse(option: str, value: str) -> Any:
    """Parse a value of --try for a field of TrainConfig. Raises UsageError."""
    if option not in {spec.name for spec in fields(TrainConfig)}:
        raise UsageError(f"--try {option}: is not an option of earteach train; see its --help")
    kinds = get_type_hints(TrainConfig)[option]
    if bool in (kinds, *get_args(kinds)):
        if value not in ("true", "false"):
            raise UsageError(f"--try {option}={value}: must be true or false")
        return value == "true"
    return value
