"""`earteach train` and `earteach resume`."""

from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import EARLIER_PRESETS, PRESETS, RESUMABLE, TrainConfig, describe_recipe, preset
from ..config_fields import OPTIONS, Checked, kinds_of, option, shared
from ..config_files import read_toml
from ..console import Console, clock, counted
from ..distill_config import DistillConfig
from ..distributed import is_first_process
from ..errors import ConfigError
from ..files import printable, shell_word
from . import help_format, student_export
from .options import Given, argument, command, variable

if TYPE_CHECKING:
    from ..training.run import Outcome


@dataclass(frozen=True)
class RunOptions(Checked):
    """Options of `train` that are not part of the configuration of a run."""

    preset: str | None = option(
        None,
        OPTIONS,
        "Values of many options at once, in a table in --help-all; --config and other options override it. Default: "
        "recommended.",
        choices=tuple(PRESETS),
        earlier_choices=tuple(EARLIER_PRESETS),
        common=True,
    )
    config: str | None = option(
        None,
        OPTIONS,
        "TOML file of options; options on the command line override it.",
        metavar="FILE",
        private=True,
        common=True,
    )
    dry_run: bool = shared(
        "dry_run",
        help="Read the data, do one step, print the configuration (as TOML, to stdout) and an estimate of time and "
        "disk; write nothing.",
    )
    overwrite: bool = shared("overwrite", help="Delete the experiment of this name and start again.")
    help_all: bool = option(
        False,
        OPTIONS,
        "Show all options and presets, and exit.",
        switch=True,
        callback=help_format.print_whole,
        common=True,
    )


def _resumable(name: str) -> tuple[str, Any, Any]:
    """Return a field like that of TrainConfig, but without a default."""
    spec = next(each for each in fields(TrainConfig) if each.name == name)
    metadata = {key: value for key, value in spec.metadata.items() if key != "environment"}
    metadata |= {"panel": OPTIONS, "help": f"{spec.metadata['help']} Default: the run's."}
    return name, kinds_of(TrainConfig)[name] | None, field(default=None, metadata=metadata)


# What `resume` may change: fields of TrainConfig.
ResumeOptions = make_dataclass("ResumeOptions", map(_resumable, RESUMABLE), bases=(Checked,), frozen=True)


@command("train", example="earteach train --train-metadata train.npy --val-metadata val.npy --metric-loss arcface")
def train(options: RunOptions, given: Given[TrainConfig], console: Console) -> None:
    """Train a teacher on two manifests of ears, without labels.

    Writes checkpoints, TensorBoard events, metrics.csv, the configuration and a collage per epoch to
    OUTPUT_DIR/EXPERIMENT_NAME.
    """
    console = of_first_process(console)
    config = _configured(options, given)
    if given.environment:
        console.info(f"from the environment: {', '.join(map(variable, given.environment))}")
    console.summary([("recipe", describe_recipe(config))])
    run(config, options.dry_run, options.overwrite, console)


@command("resume", example="earteach resume ear_teacher/outputs/ear_teacher")
def resume(
    run: Annotated[str, argument("RUN", "An experiment folder, or one of its checkpoints.")],
    given: Given[ResumeOptions],  # type: ignore[valid-type]  # a class that is made at run time
    console: Console,
) -> None:
    """Continue an interrupted run with the options it was started with."""
    from ..training.run import resume as resume_run

    ResumeOptions(**given.typed)  # checks the values
    console = of_first_process(console)
    student_export.require_free(Path(run))
    _finish(resume_run(run, console, **given.typed), console)


def run(config: TrainConfig, dry_run: bool, overwrite: bool, console: Console) -> None:
    """Train or distil, or estimate what that would need."""
    if dry_run:
        from ..training import dry_run as trial

        config, estimate = trial.estimate(config, console)
        typer.echo(config.as_toml(), nl=False)
        console.info(trial.describe_estimate(estimate))
        console.info("dry run: nothing was written")
        return
    from ..training.run import train as train_run

    _finish(train_run(config, console, overwrite), console)


def _configured(options: RunOptions, given: Given[TrainConfig]) -> TrainConfig:
    """Return the configuration: what is typed wins over the file, that over the environment, that over the preset."""
    from_file = read_toml(options.config, options.preset) if options.config else {}
    below = preset(options.preset or "recommended")
    try:
        return TrainConfig(**below | given.environment | from_file | given.typed)
    except ConfigError as error:
        given = Given(given.typed | from_file, given.environment)
        raise given.blame_variable(error) from error


def of_first_process(console: Console) -> Console:
    """Return the console, for other processes than the first one a quiet one."""
    return console if is_first_process() else Console(quiet=True)


def _finish(outcome: "Outcome", console: Console) -> None:
    """Write what a run ends with, export a distilled student, and print what was made. Raises Exit for an interrupted
    run."""
    folder, named = printable(outcome.experiment), shell_word(outcome.experiment)
    if outcome.interrupted:
        console.info(
            f"interrupted{', saved within the epoch' if outcome.saved else ''}: continue with `earteach resume {named}`"
        )
        raise typer.Exit(outcome.interrupted)
    from ..report.write import write_final_outputs

    report = write_final_outputs(outcome, console)
    best = printable(outcome.best.name) if outcome.best else "none"
    took = f" in {clock(outcome.seconds)}" if outcome.seconds else ""
    if isinstance(outcome.config, DistillConfig):
        following = student_export.write(outcome.experiment, outcome.config, console, outcome.module is not None)
    else:
        following = [
            f"earteach collage {named} -o collage.png",
            f"earteach export-backbone {named} teacher.safetensors",
            f"tensorboard --logdir {named} --samples_per_plugin images=1000",
        ]
    console.summary(
        [
            ("done", f"{counted(outcome.epochs, 'epoch')}{took}: {folder}/"),
            ("best", f"checkpoints/{best}{': ' + outcome.why if outcome.why else ''}"),
            *[("" if number else "PSNR", line) for number, line in enumerate(outcome.reconstruction)],
            *([("report", printable(report))] if report else []),
            *[("" if number else "next", line) for number, line in enumerate(following)],
        ]
    )
