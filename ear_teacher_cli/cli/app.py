"""The Typer command line: parse arguments, call one command, print its result. Only this and the help know Typer.

stdout is data, stderr is console. Exit 0 done, 1 your data or file, 2 your words, 130 interrupted. Verbs are
imported when called, so that `--help` loads neither torch nor numpy.
"""

import inspect
import io
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Annotated, Any, NoReturn, get_args, get_type_hints

import typer
from typer.main import get_command

from .. import __version__, platform
from ..config import (
    AUTO,
    BOX_FORMATS,
    BOX_UNITS,
    CACHES,
    ENVIRONMENT,
    PRESETS,
    Reading,
    TrainConfig,
    nearest,
    read_toml,
)
from ..config import preset as preset_options
from ..console import Console, clock, counted
from ..distributed import is_first_process
from ..errors import ConfigError, EarTeachError, Stopped, UsageError
from ..files import printable, shell_word
from ..system_errors import explain_system_error
from . import help_format, usage


class _Command(help_format.Command):
    """A command that notices what Typer lets pass."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        repeated = [] if ctx.resilient_parsing else usage.look_over(self, ctx, args)
        rest = super().parse_args(ctx, args)
        for option in repeated if is_first_process() else []:
            Console(ctx.params.get("quiet", False)).info(usage.about_repeated(option, ctx.params.get(option.name)))
        return rest


class _Program(typer.Typer):
    """Commands of that kind."""

    def command(self, name: str | None = None, **settings: Any) -> Any:
        return super().command(name, cls=_Command, **settings)


app = _Program(
    name="earteach",
    cls=help_format.Group,
    pretty_exceptions_enable=False,
    add_completion=True,
    rich_markup_mode=None,
    # the seed's spelling, --batch_size, beside --batch-size
    context_settings={
        "token_normalize_func": lambda word: word.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
    },
)


def _from_choices(choices: Iterable[str]) -> Callable[[str], list[str]]:
    """What the shell completes an option's value to."""
    return lambda incomplete: [choice for choice in choices if choice.startswith(incomplete)]


LISTS = "Lists of ears"  # the group of options that say how they are read
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Say nothing but warnings and errors.", envvar="EARTEACH_QUIET")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace outputs that exist.")]
RootDir = Annotated[
    str | None,
    typer.Option(
        help="Folder the manifest's paths start from, and must not leave.",
        show_default=False,
        envvar="EARTEACH_ROOT_DIR",
        rich_help_panel=LISTS,
    ),
]
BoxFormat = Annotated[
    str,
    typer.Option(
        metavar="|".join(BOX_FORMATS),
        help="Order of a box's numbers in lists that do not name it; auto: judged by all boxes, or refused.",
        autocompletion=_from_choices(BOX_FORMATS),
        rich_help_panel=LISTS,
    ),
]
BoxUnits = Annotated[
    str,
    typer.Option(
        metavar="|".join(BOX_UNITS),
        help="Units of boxes in lists that do not name them; auto: relative if no number is above 1.1.",
        autocompletion=_from_choices(BOX_UNITS),
        rich_help_panel=LISTS,
    ),
]
IdentityColumn = Annotated[
    str | None,
    typer.Option(
        help="Column that says who is on an image. Default: identity, if there is one.",
        show_default=False,
        rich_help_panel=LISTS,
    ),
]
Backbone = Annotated[str | None, typer.Option(help="The timm model a plain state dict is of.", show_default=False)]
ImageSize = Annotated[
    int | None,
    typer.Option(help="Input side for weights that do not carry their own. Default: 224.", min=32, show_default=False),
]
Workers = Annotated[
    int,
    typer.Option(
        help="Processes that decode images; at most one per CPU core is used.", min=0, envvar="EARTEACH_NUM_WORKERS"
    ),
]
Consent = Annotated[
    str | None,
    typer.Option(
        help="What the card says of the consent of those photographed. Default: EARTEACH_CONSENT, else not stated.",
        show_default=False,
    ),
]
License = Annotated[
    str | None,
    typer.Option(
        help="What the card says of the licence. Default: EARTEACH_LICENSE, else not stated.", show_default=False
    ),
]
# Beside config.ENVIRONMENT, the variables that other commands know.
_OTHER_VARIABLES = ("quiet", "weights", "consent", "license")
_GUIDE = """\
The life of a teacher, from photographs to numbers (RUN: what train wrote):

  earteach prepare photos/ data                     split without leaks
  earteach validate-data train.npy val.npy          look at images and boxes
  earteach train                                    learn, without labels
  earteach resume RUN                               after Ctrl-C or a crash
  earteach report RUN                               how it went, on one page
  earteach collage RUN -o collage.png               what it remembers of an ear
  earteach export-backbone RUN teacher.safetensors  hand it on (and verify it)
  earteach embed photos/ out.npy --weights RUN      a row of numbers an image
  earteach evaluate out.npy labels.csv              who is who, with intervals

COMMAND --help: options and an example. --install-completion: Tab in your shell.
"""


def main() -> None:
    """The `earteach` command: every error of ours becomes one line and its exit code."""
    told: list[int] = []
    process = os.getpid()

    def stop(number: int, frame: Any) -> None:
        if os.getpid() == process:  # not in a loader that was just forked
            told.append(number)
            raise Stopped(number)

    def unraisable(what: Any) -> None:
        if not isinstance(what.exc_value, Stopped):  # raised in a hook of Python's that cannot pass it on
            sys.__unraisablehook__(what)

    def fail(message: Any, code: int = 1) -> NoReturn:
        typer.echo(f"earteach: {printable(message)}", err=True)  # whatever strange names it holds
        sys.exit(code)

    sys.unraisablehook = unraisable
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a pipe on Windows, or a locale, may hold few characters
            stream.reconfigure(errors="backslashreplace")
    platform.handle_stop_signals(stop, but=(signal.SIGINT,))  # which Python makes a KeyboardInterrupt of
    try:
        sys.exit(app(prog_name="earteach", standalone_mode=False))
    except _UsageError as error:
        fail(usage.explain(error, get_command(app), sys.argv[1:]), 2)
    except EarTeachError as error:
        message = str(error)
        if isinstance(error, ConfigError):  # the core names the field; the flag is the user's word for it
            message = f"--{error.field.replace('_', '-')}{message.removeprefix(error.field)}"
        if is_first_process() or not error.raised_by_all_ranks:
            fail(message, error.exit_code)
        sys.exit(error.exit_code)
    except SystemExit as end:  # of Typer too, which turns every KeyboardInterrupt into 130
        sys.exit(128 + told[0] if told else end.code)
    except KeyboardInterrupt:
        sys.exit(128 + told[0] if told else 130)
    except OSError as error:  # a full /dev/shm or disk, a name too long: the system's words are clear enough
        meant = None if error.filename else explain_system_error(error)
        found = f"{printable(error.filename or 'output')}: {error.strerror or error}; check the path"
        fail(meant or found)
    except UnicodeEncodeError as error:  # LC_ALL=C with Python's UTF-8 mode turned off
        fail(f"{error.object}: the name of a file has no form in this locale ({error.encoding}); set PYTHONUTF8=1")
    except (RuntimeError, MemoryError) as error:
        if told:  # what broke was on its way out: a loader that the signal reached, too
            sys.exit(128 + told[0])
        meant = explain_system_error(error)
        if meant is None:
            raise
        fail(meant)
    finally:
        sys.unraisablehook = lambda what: None  # what half-built objects say on their way out
        platform.ignore_stop_signals()  # we are ending already
        with platform.child_exits_unnoticed():
            for child in multiprocessing.active_children():
                child.kill()  # one that hangs in a decoder would be waited for
                child.join(10)
        platform.handle_stop_signals(signal.SIG_DFL, ignored_too=True)  # whatever may still hang, they end it


# Typer exports one of the complaints that it has about words; this is what they all are.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"earteach {__version__}")
        raise typer.Exit()


@app.callback(epilog="Example: `earteach train --metric-loss arcface`", invoke_without_command=True)
def earteach(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Learn ear features from unlabelled photographs, and hand them on.

    prepare -> validate-data -> train (resume) -> report, collage -> export-backbone (verify) -> embed -> evaluate
    """
    if is_first_process():
        _warn_of_strange_variables()
    if context.invoked_subcommand is None:
        typer.echo(_GUIDE, nl=False)


def _warn_of_strange_variables() -> None:
    known = [name.upper() for name in (*ENVIRONMENT, *_OTHER_VARIABLES)]
    for name in sorted(os.environ):
        short = name.removeprefix("EARTEACH_")
        if short != name and short not in known:
            hint = (
                nearest(short, known).replace("mean ", "mean EARTEACH_")
                or "`earteach --help` and the commands' help have those that there are"
            )
            Console().warn(f"{name}: earteach knows no such variable of the environment; {hint.strip()}")


@app.command("prepare", epilog="Example: `earteach prepare photos/ data --folder-identities`")
def prepare(
    raw: Annotated[
        str, typer.Argument(metavar="RAW", help="A folder of images and their annotations, of any sources; or a list.")
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder for the lists and prepare.json, the report.")],
    val_share: Annotated[
        float,
        typer.Option(
            help="Share of the ears to validate on, above 0 and below 1, of every source (every entry of RAW)."
        ),
    ] = 0.2,
    seed: Annotated[int, typer.Option(help="Which groups are for validation.", min=0)] = 0,
    format: Annotated[
        str,
        typer.Option(metavar="npy|csv", help="Format of the lists.", autocompletion=_from_choices(("npy", "csv"))),
    ] = "npy",
    box_format: BoxFormat = AUTO,
    box_units: BoxUnits = AUTO,
    identity_column: IdentityColumn = None,
    root_dir: RootDir = None,
    folder_identities: Annotated[
        bool,
        typer.Option(
            "--folder-identities",
            help=(
                "Folders are people, where lists name nobody: RAW/source/p017/left.jpg, or RAW/p017/left.jpg if no image "
                "lies deeper."
            ),
        ),
    ] = False,
    num_workers: Workers = TrainConfig.num_workers,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read and say everything, write nothing.")] = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Make a training and a validation list of a folder of mixed sources, with no person, photo or duplicate in both.

    RAW may hold crops, COCO (.json), CSV (*_annotations.csv), .pts and YOLO labels. Images are not copied: paths in
    the lists start from the working directory if RAW is below it, else from RAW, and other commands need --root-dir RAW.
    """
    from ..data import prepare as verb

    verb.prepare(
        raw,
        out,
        Console(quiet),
        val_share=val_share,
        seed=seed,
        format=format,
        reading=Reading(box_format, box_units, identity_column),
        root_dir=root_dir,
        folder_identities=folder_identities,
        num_workers=num_workers,
        dry_run=dry_run,
        overwrite=overwrite,
    )


@app.command("validate-data", epilog="Example: `earteach validate-data train.npy val.npy --contact-sheet worst.png`")
def validate_data(
    manifests: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MANIFEST",
            show_default=False,
            help=(
                "Manifests (.npy, .csv, .jsonl, COCO .json) or folders of crops. Default: the training and validation manifests."
            ),
        ),
    ] = None,
    root_dir: RootDir = None,
    box_format: BoxFormat = AUTO,
    box_units: BoxUnits = AUTO,
    identity_column: IdentityColumn = None,
    json: Annotated[str | None, typer.Option(metavar="FILE", help="Write the report as JSON; - for stdout.")] = None,
    contact_sheet: Annotated[
        str | None, typer.Option(metavar="FILE.png", help="Draw photos with their boxes, and the worst crops.")
    ] = None,
    write_clean: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Write the manifest without the rows that have errors (.npy, .csv, .jsonl)."),
    ] = None,
    card: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.md", help="Write a data card: what is in the lists, what is wrong, consent, licence."
        ),
    ] = None,
    consent: Consent = None,
    license: License = None,
    num_workers: Workers = TrainConfig.num_workers,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Decode every image and check every box; exit 1 if anything is wrong."""
    from ..data import audit as verb

    sources = manifests or [TrainConfig.train_metadata, TrainConfig.val_metadata]
    report = verb.validate_data(
        sources,
        Console(quiet),
        root_dir=root_dir,
        reading=Reading(box_format, box_units, identity_column),
        json_file=json,
        contact_sheet=contact_sheet,
        write_clean=write_clean,
        card=card,
        consent=consent,
        license=license,
        num_workers=num_workers,
        overwrite=overwrite,
    )
    if json == "-":
        import json as json_text

        typer.echo(json_text.dumps(report.as_dict(), indent=2))
    else:
        _print_report(report, verb.ERRORS | verb.WARNINGS)
    raise typer.Exit(1 if report.errors else 0)


def _train_signature() -> inspect.Signature:
    """`train`'s options are TrainConfig's fields, and their defaults its defaults."""
    hints = get_type_hints(TrainConfig)
    parameters = []
    for spec in fields(TrainConfig):
        kind = next(t for t in get_args(hints[spec.name]) or (hints[spec.name],) if t is not type(None))
        name = spec.name.replace("_", "-")
        choices = spec.metadata.get("choices")
        option = typer.Option(
            f"--{name}/--no-{name}" if kind is bool else f"--{name}",
            help=spec.metadata["help"],
            show_default=spec.default is not None,
            rich_help_panel=spec.metadata["panel"],
            metavar="|".join(choices) if choices else None,
            autocompletion=_from_choices(choices) if choices else None,
            envvar=f"EARTEACH_{spec.name.upper()}" if spec.name in ENVIRONMENT else None,
        )
        parameters.append(
            inspect.Parameter(
                spec.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=spec.default,
                annotation=Annotated[hints[spec.name], option],
            )
        )
    extra = [p for p in inspect.signature(_train).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    return inspect.Signature([p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in extra] + parameters)


def _print_whole_help(context: typer.Context, asked: bool) -> None:
    if asked:
        context.meta[help_format.WHOLE] = True
        typer.echo(context.get_help())
        raise typer.Exit()


def _train(
    context: typer.Context,
    preset: Annotated[
        str,
        typer.Option(
            "--preset",
            metavar="|".join(PRESETS),
            help="Values of many options at once: original has those of the package ear_teacher. --config and options win over it; --help-all lists what each sets.",
            show_default=True,
            autocompletion=_from_choices(PRESETS),
        ),
    ] = "recommended",
    config: Annotated[
        str | None, typer.Option("--config", metavar="FILE", help="TOML file of these options; flags win over it.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Read everything, do one step forward and back, print the configuration and an estimate; write nothing.",
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove the experiment of this name and start anew.")
    ] = False,
    quiet: Quiet = False,
    help_all: Annotated[
        bool,
        typer.Option(
            "--help-all", help="Show all options, rare ones too, and exit.", is_eager=True, callback=_print_whole_help
        ),
    ] = False,
    **options: Any,
) -> None:
    """Train a teacher on two manifests of ears, without labels.

    Writes checkpoints, TensorBoard events, metrics.csv, the configuration and a collage per epoch under
    OUTPUT_DIR/EXPERIMENT_NAME.
    """
    recipe = preset_options(preset)
    chosen = preset if context.get_parameter_source("preset").name == "COMMANDLINE" else None
    from_file = read_toml(config, chosen) if config else {}
    from_environment, typed = (
        {name: value for name, value in options.items() if context.get_parameter_source(name).name == source}
        for source in ("ENVIRONMENT", "COMMANDLINE")
    )
    try:
        resolved = TrainConfig(**recipe | from_environment | from_file | typed)
    except ConfigError as error:
        if error.field in from_environment.keys() - from_file.keys() - typed.keys():
            raise UsageError(f"EARTEACH_{error.field.upper()}: {error}") from error
        raise
    console = Console(quiet or not is_first_process())
    if from_environment:
        console.info(f"from the environment: {', '.join(f'EARTEACH_{name.upper()}' for name in from_environment)}")
    from ..training import run as verb

    if dry_run:
        resolved, estimate = verb.dry_run(resolved, console)
        typer.echo(resolved.as_toml(), nl=False)
        console.info(verb.describe_estimate(estimate))
        console.info("dry run: nothing was written")
        return
    _finish(verb.train(resolved, console, overwrite), console)


setattr(_train, "__signature__", _train_signature())  # noqa: B010 - types know no attributes of functions
app.command(
    "train", epilog="Example: `earteach train --train-metadata train.npy --val-metadata val.npy --metric-loss arcface`"
)(_train)


@app.command("resume", epilog="Example: `earteach resume ear_teacher/outputs/ear_teacher`")
def resume(
    run: Annotated[str, typer.Argument(metavar="RUN", help="An experiment folder, or one of its checkpoints.")],
    max_epochs: Annotated[
        int | None, typer.Option(help="Train to this many epochs instead.", min=1, show_default=False)
    ] = None,
    devices: Annotated[
        int | None, typer.Option(help="Train on this many devices instead.", min=1, show_default=False)
    ] = None,
    num_nodes: Annotated[
        int | None, typer.Option(help="Train on this many nodes instead.", min=1, show_default=False)
    ] = None,
    num_workers: Annotated[
        int | None, typer.Option(help="Load images with this many processes instead.", min=0, show_default=False)
    ] = None,
    load_timeout: Annotated[
        int | None, typer.Option(help="Seconds that loading a batch may take instead.", min=0, show_default=False)
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(CACHES),
            help="Keep crops here instead.",
            show_default=False,
            autocompletion=_from_choices(CACHES),
        ),
    ] = None,
    cache_limit: Annotated[
        float | None, typer.Option(help="GB that the kept crops may take instead.", min=0, show_default=False)
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Go on with a run that was interrupted; nothing has to be typed again."""
    from ..training import run as verb

    console = Console(quiet or not is_first_process())
    changes = {name: value for name, value in locals().items() if name in verb.RESUMABLE}
    _finish(verb.resume(run, console, **changes), console)


@app.command("report", epilog="Example: `earteach report ear_teacher/outputs/ear_teacher`")
def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="An experiment folder.")],
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE.html",
            help="Default: report.html in the folder, which is replaced.",
            show_default=False,
        ),
    ] = None,
    root_dir: RootDir = None,
    images: Annotated[
        bool,
        typer.Option(
            "--images/--no-images",
            help="Images of ears, and who is on them, where the run keeps any.",
            envvar="EARTEACH_IMAGES",
        ),
    ] = True,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Put a run on one page: curves, collages, health, neighbours, the comparison with its untouched start.

    The page holds all it shows and asks for nothing. `train` writes it at the end, too.
    """
    from ..report import write as verb

    console = Console(quiet)
    written = verb.report(run, console, out, root_dir=root_dir, images=images, overwrite=overwrite)
    console.info(f"{printable(written)}: written")


@app.command("collage", epilog="Example: `earteach collage ear_teacher/outputs/ear_teacher -o collage.png`")
def collage(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CKPT", help="A checkpoint, or an experiment folder (its best).")
    ],
    out: Annotated[str, typer.Option("--out", "-o", metavar="FILE.png", help="Where to draw.")],
    metadata: Annotated[
        str | None,
        typer.Option(
            help="Manifest or folder to take images from. Default: what the run was validated on.", show_default=False
        ),
    ] = None,
    root_dir: RootDir = None,
    box_format: BoxFormat = AUTO,
    box_units: BoxUnits = AUTO,
    identity_column: IdentityColumn = None,
    num_samples: Annotated[int, typer.Option(help="Images to show.", min=1, max=100)] = TrainConfig.num_collage_samples,
    seed: Annotated[int, typer.Option(help="Which images.", min=0)] = TrainConfig.seed,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Draw originals above, reconstructions below."""
    from ..report import collage as verb

    made = verb.collage(
        checkpoint,
        out,
        metadata=metadata,
        root_dir=root_dir,
        reading=Reading(box_format, box_units, identity_column),
        num_samples=num_samples,
        seed=seed,
        overwrite=overwrite,
    )
    Console(quiet).info(
        f"{printable(made.path)}: {made.images} images of {printable(made.metadata)}, mean PSNR {made.psnr:.1f} dB"
    )


@app.command(
    "export-backbone", epilog="Example: `earteach export-backbone ear_teacher/outputs/ear_teacher teacher.safetensors`"
)
def export_backbone(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CKPT", help="A checkpoint, or an experiment folder (its best).")
    ],
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="x.safetensors, x.onnx, or a folder for timm (local-dir) and students.")
    ],
    features: Annotated[bool, typer.Option("--features", help="ONNX: the feature maps, too.")] = False,
    half: Annotated[bool, typer.Option("--half", help="Weights in float16.")] = False,
    ema: Annotated[
        bool,
        typer.Option(
            "--ema/--no-ema",
            help="The weights that the run validated (averaged, or moved back to the start, where it was told to), or those it would go on learning with.",
        ),
    ] = True,
    val_metadata: Annotated[
        str | None,
        typer.Option(
            help="Folder: images for the mean and variance of the maps. Default: what the run was validated on.",
            show_default=False,
        ),
    ] = None,
    root_dir: RootDir = None,
    box_format: BoxFormat = AUTO,
    box_units: BoxUnits = AUTO,
    identity_column: IdentityColumn = None,
    consent: Consent = None,
    license: License = None,
    batch_size: Annotated[int, typer.Option(help="Folder: images at a time.", min=1)] = TrainConfig.batch_size,
    num_workers: Workers = TrainConfig.num_workers,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Write the backbone under timm's names, proven by loading it back."""
    from ..export import export as verb

    console = Console(quiet)
    made = verb.export_backbone(
        checkpoint,
        out,
        overwrite,
        features=features,
        half=half,
        ema=ema,
        val_metadata=val_metadata,
        root_dir=root_dir,
        reading=Reading(box_format, box_units, identity_column),
        consent=consent,
        license=license,
        batch_size=batch_size,
        num_workers=num_workers,
        console=console,
    )
    kind = "compared with torch in onnxruntime" if made.kind == "onnx" else "loaded back into timm strictly"
    console.info(
        f"{printable(made.path)}: {made.architecture}, {made.tensors} tensors, {made.embedding_dim} numbers an image; {kind}, "
        f"largest difference {made.difference:.2g}"
        + (f"; maps of strides {', '.join(map(str, made.maps))}" if made.maps else "")
        + (f"; float16 moves the embeddings by {made.rounding:.2g} of the largest" if made.rounding is not None else "")
        + (f"; its whitening: {printable(made.whitening.name)}" if made.whitening else "")
        + f"; fingerprint {made.fingerprint[:16]}"
    )


@app.command("verify", epilog="Example: `earteach verify teacher.onnx --against teacher.safetensors`")
def verify(
    export: Annotated[
        str, typer.Argument(metavar="EXPORT", help="A .safetensors, a .onnx or a folder of export-backbone.")
    ],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="WEIGHTS",
            help="Another form of the same teacher (an export, a checkpoint, a run) to compare with, computed here.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Check an export on this machine: every byte, weights, fingerprint, golden batch."""
    from ..export import verify as verb

    checks = verb.verify(export, against)
    width = max(len(check.what) for check in checks)
    for check in checks:
        typer.echo(f"{verb.MARKS[check.passed]:<6} {check.what:<{width}}  {check.found}")
    wrong = [check.what for check in checks if check.passed is False]
    if wrong and wrong[0].startswith("against "):
        raise EarTeachError(
            f"{printable(export)}: is in order, but not the same as {printable(against)}; look which you want"
        )
    if wrong:
        raise EarTeachError(f"{printable(export)}: is not what it says ({', '.join(wrong)}); export it again")


@app.command("embed", epilog="Example: `find photos -name '*.jpg' | earteach embed - - --format npy > rows.npy`")
def embed(
    input: Annotated[
        str, typer.Argument(metavar="INPUT", help="A folder, a manifest, an image, or - for paths on stdin.")
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="A .npy, .npz or .csv file, or - for stdout.")],
    weights: Annotated[
        str | None,
        typer.Option(
            help="A run, a checkpoint, an export, timm:NAME, or with --backbone a plain state dict. Default: EARTEACH_WEIGHTS, else the best of the newest run.",
            show_default=False,
        ),
    ] = None,
    backbone: Backbone = None,
    image_size: ImageSize = None,
    format: Annotated[
        str | None,
        typer.Option(
            metavar="npy|npz|csv",
            help="Format on stdout. Default: npy.",
            show_default=False,
            autocompletion=_from_choices(("npy", "npz", "csv")),
        ),
    ] = None,
    normalize: Annotated[bool, typer.Option("--normalize/--no-normalize", help="Rows at unit length.")] = True,
    whiten: Annotated[
        bool, typer.Option("--whiten/--no-whiten", help="Whitened, where the run fitted a whitening (train --whiten).")
    ] = True,
    root_dir: RootDir = None,
    box_format: BoxFormat = AUTO,
    box_units: BoxUnits = AUTO,
    identity_column: IdentityColumn = None,
    batch_size: Annotated[int, typer.Option(help="Images at a time.", min=1)] = TrainConfig.batch_size,
    num_workers: Workers = TrainConfig.num_workers,
    load_timeout: Annotated[
        int,
        typer.Option(help="Seconds that loading a batch may take; 0: for ever.", min=0, envvar="EARTEACH_LOAD_TIMEOUT"),
    ] = TrainConfig.load_timeout,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what an interrupted or killed embed left, to the same bytes.")
    ] = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Write one row of numbers per image, with names and provenance beside it."""
    from ..embedding import writer as verb

    console = Console(quiet)
    done = verb.embed(
        input,
        out,
        weights=weights,
        backbone=backbone,
        image_size=image_size,
        format=format,
        normalize=normalize,
        whiten=whiten,
        root_dir=root_dir,
        reading=Reading(box_format, box_units, identity_column),
        batch_size=batch_size,
        num_workers=num_workers,
        load_timeout=load_timeout,
        resume=resume,
        overwrite=overwrite,
        console=console,
    )
    skipped = f", {done.skipped} skipped" if done.skipped else ""
    if is_first_process():
        console.info(f"{'stdout' if out == '-' else printable(out)}: {done.rows} rows of {done.dim}{skipped}")


@app.command(
    "evaluate", epilog="Example: `earteach evaluate teacher.npy eval.csv --plots plots --sheet look-alikes.png`"
)
def evaluate(
    embeddings: Annotated[
        str | None,
        typer.Argument(
            metavar="EMBEDDINGS",
            show_default=False,
            help="What embed wrote (.npy, .npz, .csv); with --weights a folder, a manifest or an image list (-).",
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Argument(
            metavar="LABELS",
            show_default=False,
            help="A manifest with identities, say a CSV of image_path,identity[,side]. Default: what EMBEDDINGS came from, else the images' folders (identity/image.jpg).",
        ),
    ] = None,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="A B",
            help="Instead of EMBEDDINGS: two files. B minus A on the images both have, from the same resamples.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Embed images first: a run, a checkpoint, an export, timm:NAME, or with --backbone a plain state dict.",
            show_default=False,
        ),
    ] = None,
    backbone: Backbone = None,
    image_size: ImageSize = None,
    center: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="Subtract the mean of these embeddings (of training images). With --compare twice: for A, then B; none leaves one as it is.",
            show_default=False,
        ),
    ] = None,
    whiten: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="PCA whitening fitted on these embeddings (of training images). With --compare twice, like --center.",
            show_default=False,
        ),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="With --weights: do not whiten as the run fitted it.")] = False,
    whiten_dim: Annotated[
        int | None,
        typer.Option(help="Keep this many whitened dimensions. Default: all that vary.", min=1, show_default=False),
    ] = None,
    far: Annotated[
        list[float] | None,
        typer.Option(
            metavar="FAR",
            help="TAR at this FAR; may be repeated. Default: 0.01, 0.001 and 0.0001, as far as the impostor pairs carry them (30 false accepts).",
            show_default=False,
        ),
    ] = None,
    sides: Annotated[
        bool, typer.Option("--sides/--no-sides", help="A person's left and right ear are two identities, where known.")
    ] = True,
    bootstrap: Annotated[
        int, typer.Option(help="Resamples of the people for the 95 % intervals; 0 for none.", min=0, max=100_000)
    ] = 1000,
    seed: Annotated[int, typer.Option(help="Which resamples.", min=0)] = TrainConfig.seed,
    json: Annotated[str | None, typer.Option(metavar="FILE", help="Write all as JSON; - for stdout.")] = None,
    plots: Annotated[
        str | None, typer.Option(metavar="DIR", help="Draw roc.png, cmc.png and scores.png into this folder.")
    ] = None,
    sheet: Annotated[
        str | None,
        typer.Option(metavar="FILE.png", help="Draw the hardest impostor and genuine pairs: where wrong labels show."),
    ] = None,
    root_dir: RootDir = None,
    box_format: BoxFormat = AUTO,
    box_units: BoxUnits = AUTO,
    identity_column: IdentityColumn = None,
    batch_size: Annotated[int, typer.Option(help="Images at a time, with --weights.", min=1)] = TrainConfig.batch_size,
    num_workers: Workers = TrainConfig.num_workers,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Score embeddings by identity: rank-k, mAP@R, AUC, EER, TAR at a FAR.

    Rank-k and mAP@R ask each image for its nearest others, never itself; AUC, EER and TAR are of all pairs.
    Duplicates are left out. Intervals come from a bootstrap over people. `--compare A B [LABELS]` scores the
    difference of two files; it counts where its interval excludes 0.
    """
    if compare is not None:
        if labels is not None:
            raise UsageError(
                f"--compare: {printable(embeddings)} is one file too many; say `--compare A B` and at most LABELS"
            )
        sources, labels = list(compare), embeddings
    elif embeddings is not None:
        sources = [embeddings]
    else:
        raise UsageError("EMBEDDINGS: none given; name what embed wrote, or two files with --compare")
    from ..quality import evaluate as verb

    report = verb.evaluate(
        sources,
        labels,
        weights=weights,
        backbone=backbone,
        image_size=image_size,
        centre_on=center or (),
        whiten_on=whiten or (),
        whiten_dim=whiten_dim,
        whitened=not raw,
        fars=far or (),
        by_sides=sides,
        bootstrap=bootstrap,
        seed=seed,
        json_file=json,
        plots=plots,
        sheet=sheet,
        root_dir=root_dir,
        reading=Reading(box_format, box_units, identity_column),
        batch_size=batch_size,
        num_workers=num_workers,
        overwrite=overwrite,
        console=Console(quiet),
    )
    if json == "-":
        import json as json_text

        typer.echo(json_text.dumps(report.as_dict(), indent=2))
    else:
        typer.echo(verb.table(report))


def _finish(outcome: Any, console: Console) -> None:
    from ..report.write import write_final_outputs

    report = write_final_outputs(outcome, console)
    folder, named = printable(outcome.experiment), shell_word(outcome.experiment)
    if outcome.interrupted:
        console.info(
            f"interrupted{', saved within the epoch' if outcome.saved else ''}: go on with `earteach resume {named}`"
        )
        raise typer.Exit(outcome.interrupted)
    best = printable(outcome.best.name) if outcome.best else "none"
    took = f" in {clock(outcome.seconds)}" if outcome.seconds else ""
    console.summary(
        [
            ("done", f"{counted(outcome.epochs, 'epoch')}{took}: {folder}/"),
            ("best", f"checkpoints/{best}{': ' + outcome.why if outcome.why else ''}"),
            *([("report", printable(report))] if report else []),
            ("next", f"earteach collage {named} -o collage.png"),
            ("", f"earteach export-backbone {named} teacher.safetensors"),
            ("", f"tensorboard --logdir {named} --samples_per_plugin images=1000"),
        ]
    )


def _print_report(report: Any, meanings: dict[str, str]) -> None:
    """The table by reason: rows and paths of the first few (--json has all)."""
    for reason, group in report.by_reason().items():
        kind = "error  " if group[0].is_error else "warning"
        typer.echo(f"{kind} {reason}: {len(group)} ({meanings[reason]})")
        for finding in group[:5]:
            place = (
                ""
                if finding.row is None
                else f"{printable(finding.manifest)} row {finding.row} ({printable(finding.path)}): "
            )
            typer.echo(f"    {place}{printable(finding.detail)}" + (f"; as {finding.other}" if finding.other else ""))
        if len(group) > 5:
            typer.echo(f"    and {len(group) - 5} more (--json FILE lists all)")
    typer.echo(f"{report.rows} rows, {report.images} images: {report.errors} errors, {report.warnings} warnings")


if __name__ == "__main__":
    main()
