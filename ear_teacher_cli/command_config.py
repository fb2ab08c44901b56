"""Options of the commands that are not about training: each once, with default, help and checks.

config.py has those of `train`. cli/options.py makes the options of the command line from these fields.
"""

from dataclasses import dataclass

from .config_fields import OPTIONS, ListOptions, option, shared

EMBEDDING_FORMATS = ("npy", "npz", "csv")
LIST_FORMATS = ("npy", "csv")


@dataclass(frozen=True)
class PrepareConfig(ListOptions):
    """Options of `prepare`."""

    val_share: float = option(
        0.2, OPTIONS, "Share of the ears of every source (entry of RAW) for validation, above 0 and below 1."
    )
    seed: int = shared("seed", help="Random seed of the split.")
    format: str = option("npy", OPTIONS, "Format of the lists.", choices=LIST_FORMATS)
    folder_identities: bool = option(
        False,
        OPTIONS,
        "Take folder names as people where lists name none: RAW/source/p017/left.jpg, or RAW/p017/left.jpg if no image "
        "lies deeper.",
        switch=True,
    )
    num_workers: int = shared("num_workers")
    dry_run: bool = shared("dry_run", help="Read everything and print the result, but write nothing.")
    overwrite: bool = shared("overwrite")


@dataclass(frozen=True)
class ValidateConfig(ListOptions):
    """Options of `validate-data`."""

    json: str | None = shared("json")
    contact_sheet: str | None = option(
        None, OPTIONS, "Draw photos with their boxes, and the worst crops.", metavar="FILE.png", private=True
    )
    write_clean: str | None = option(
        None,
        OPTIONS,
        "Write the manifest without the rows that have errors (.npy, .csv, .jsonl).",
        metavar="FILE",
        private=True,
    )
    card: str | None = option(
        None,
        OPTIONS,
        "Write a data card: contents of the lists, errors found, consent, licence.",
        metavar="FILE.md",
        private=True,
    )
    consent: str | None = shared("consent")
    license: str | None = shared("license")
    num_workers: int = shared("num_workers")
    overwrite: bool = shared("overwrite")


@dataclass(frozen=True)
class ExportConfig(ListOptions):
    """Options of `export-backbone`."""

    features: bool = option(False, OPTIONS, "ONNX: output the feature maps, too.", switch=True)
    half: bool = option(False, OPTIONS, "Write weights as float16.", switch=True)
    ema: bool = option(
        True,
        OPTIONS,
        "Export the weights that were validated (the EMA, or interpolated with the initial weights, if the run does that); "
        "--no-ema: those of the last optimiser step.",
    )
    val_metadata: str | None = option(
        None,
        OPTIONS,
        "Folder: images for mean and variance of the feature maps. Default: the run's validation list.",
        private=True,
    )
    consent: str | None = shared("consent")
    license: str | None = shared("license")
    batch_size: int = shared("batch_size", help="Folder: images per forward pass.")
    num_workers: int = shared("num_workers")
    json: str | None = shared("json")
    overwrite: bool = shared("overwrite")


@dataclass(frozen=True)
class EmbedConfig(ListOptions):
    """Options of `embed`."""

    # fmt: off
    weights: str | None = shared("weights", help="A run, a checkpoint, an export, timm:NAME, or with --backbone a plain state dict. Default: EARTEACH_WEIGHTS, else the best checkpoint of the newest run.")
    backbone: str | None = shared("backbone")
    image_size: int | None = shared("image_size")
    format: str | None = option(None, "Options", "Format on stdout. Default: npy.", choices=EMBEDDING_FORMATS)
    normalize: bool = option(True, "Options", "Scale every row to unit length (L2).")
    whiten: bool = option(True, "Options", "Apply the whitening that was fitted in training (train --whiten), if there is one.")
    batch_size: int = shared("batch_size")
    precision: str = shared("precision", help="Floating-point precision of the backbone. Mixed ones are faster on most GPUs; rows are float32 in any case, and differ slightly. Without a GPU 16-mixed becomes 32-true.")
    compile: bool = shared("compile", help="Compile the backbone (torch.compile): takes a minute at first, then saves time on some machines.", switch=True)
    num_workers: int = shared("num_workers")
    load_timeout: int = shared("load_timeout")
    resume: bool = option(False, "Options", "Continue an interrupted embed; the result is byte-identical.", switch=True)
    overwrite: bool = shared("overwrite")
    # fmt: on


@dataclass(frozen=True)
class EvaluateConfig(ListOptions):
    """Options of `evaluate`."""

    # fmt: off
    weights: str | None = shared("weights", help="Embed images first, with these weights: a run, a checkpoint, an export, timm:NAME, or with --backbone a plain state dict.")
    backbone: str | None = shared("backbone")
    image_size: int | None = shared("image_size")
    center: tuple[str, ...] = option((), "Options", "Subtract the mean of these embeddings (of training images). With --compare give it twice, for A and for B; none leaves one unchanged.", metavar="FILE", private=True)
    whiten: tuple[str, ...] = option((), "Options", "Apply a PCA whitening fitted to these embeddings (of training images). With --compare give it twice, as --center.", metavar="FILE", private=True)
    raw: bool = option(False, "Options", "With --weights: do not apply the whitening that was fitted in training.", switch=True)
    whiten_dim: int | None = option(None, "Options", "Dimensions to keep when whitening. Default: all that vary.", low=1)
    far: tuple[float, ...] = option((), "Options", "Report TAR at this FAR; may be repeated. Default: those of 0.01, 0.001 and 0.0001 for which there are enough impostor pairs (30 false accepts).", metavar="FAR")
    sides: bool = option(True, "Options", "Count a person's left and right ear as two identities, if sides are known.")
    bootstrap: int = option(1000, "Options", "Resamples of the people for the 95 % intervals; 0: no intervals.", low=0, high=100_000)
    seed: int = shared("seed", help="Random seed of the resamples.")
    json: str | None = shared("json")
    plots: str | None = option(None, "Options", "Draw roc.png, cmc.png and scores.png into this folder.", metavar="DIR", private=True)
    sheet: str | None = option(None, "Options", "Draw the most similar impostor pairs and the least similar genuine pairs: wrong labels show here.", metavar="FILE.png", private=True)
    batch_size: int = shared("batch_size", help="Images per forward pass, with --weights.")
    num_workers: int = shared("num_workers")
    overwrite: bool = shared("overwrite")
    # fmt: on
