"""`earteach distill`."""

from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any

from ..config_fields import OPTIONS, Checked, kinds_of, option, shared
from ..config_files import read_toml
from ..console import Console
from ..distill_config import NOT_OF_DISTILLATION, SET_BY_COMMAND, DistillConfig
from ..errors import ConfigError, UsageError
from . import help_format
from .options import Given, argument, command, variable
from .train import of_first_process, run


@dataclass(frozen=True)
class StudentOptions(Checked):
    """Options of `distill` that are not fields of DistillConfig under their own name."""

    student: str | None = option(
        None, "Distillation", "The student: any timm model with feature maps, for example mobilenetv3_small_100.",
        metavar="NAME", common=True,
    )  # fmt: skip
    student_size: int | None = option(
        None, "Distillation", "Side of the student's input in pixels, a multiple of 32. Default: the teacher's.",
        low=32, high=2048, multiple=32, common=True,
    )  # fmt: skip
    pad: bool | None = option(
        None, "Data", "Pad to a square with the mean colour; --no-pad stretches. Default: as the teacher's crops."
    )
    config: str | None = option(
        None, OPTIONS, "TOML file of options, for example that of a run; options on the command line override it, and TEACHER "
        "and OUT are not read from it.", metavar="FILE", private=True, common=True,
    )  # fmt: skip
    dry_run: bool = shared(
        "dry_run",
        help="Read the data, do one step, print the configuration (as TOML, to stdout) and an estimate of time and "
        "disk; write nothing.",
    )
    overwrite: bool = shared("overwrite", help="Delete the experiment of this name, replace OUT, and start again.")
    help_all: bool = option(
        False, OPTIONS, "Show all options, and exit.", switch=True, callback=help_format.print_whole, common=True
    )


def _offered(spec: Any) -> tuple[str, Any, Any]:
    return spec.name, kinds_of(DistillConfig)[spec.name], field(default=spec.default, metadata=spec.metadata)


# What `distill` offers of DistillConfig.
DistillOptions = make_dataclass(
    "DistillOptions",
    [_offered(spec) for spec in fields(DistillConfig) if spec.name not in (*SET_BY_COMMAND, *NOT_OF_DISTILLATION)],
    bases=(Checked,),
    frozen=True,
)


@command(
    "distill",
    example="earteach distill teacher/ student.safetensors --student mobilenetv3_small_100 --train-metadata train.npy "
    "--val-metadata val.npy",
)
def distill(
    teacher: Annotated[str, argument("TEACHER", "A run, a checkpoint or an export of a teacher.")],
    out: Annotated[
        str, argument("OUT", "The student's backbone: x.safetensors, x.onnx, or a folder that timm opens (local-dir:).")
    ],
    options: StudentOptions,
    given: Given[DistillOptions],  # type: ignore[valid-type]  # a class that is made at run time
    console: Console,
) -> None:
    """Train a small backbone to predict a teacher's feature maps and embeddings, without labels, and export it.

    The run is OUTPUT_DIR/EXPERIMENT_NAME, like that of train; the name is that of OUT unless it is given. After Ctrl-C
    `earteach resume` continues it and writes OUT.
    """
    from ..distillation import config_for
    from ..export.export import require_free

    console = of_first_process(console)
    from_file = read_toml(options.config, owner=DistillConfig) if options.config else {}
    student = options.student or from_file.get("backbone")
    if student is None:
        raise UsageError("--student: no model was named; give a timm model, for example mobilenetv3_small_100")
    require_free(out, options.overwrite)
    values = (
        given.environment
        | from_file
        | given.typed
        | {"backbone": student, "out": out, "replace_out": options.overwrite}
    )
    for name in ("teacher", "teacher_fingerprint", "bbox_buffer", "side_policy"):
        values.pop(name, None)
    values |= {"image_size": options.student_size} if options.student_size else {}
    values |= {"pad": options.pad} if options.pad is not None else {}
    if "experiment_name" not in given.typed:
        values["experiment_name"] = Path(out).stem
    if given.environment:
        console.info(f"from the environment: {', '.join(map(variable, given.environment))}")
    try:
        run(config_for(teacher, **values), options.dry_run, options.overwrite, console)
    except ConfigError as error:
        name = {"backbone": "student", "image_size": "student_size"}.get(error.field, error.field)
        raise given.blame_variable(ConfigError(name, error.found, error.remedy)) from error
