"""Train a teacher on drawn ears without labels, export it, and train two small models with and without it.

python examples/students.py [FOLDER] [OPTION ...] [-- OPTION OF BOTH STUDENTS ...]  # make students: FOLDER is students/
"""

import argparse
import sys
from pathlib import Path

from steps import EXAMPLES, StepFailed, enter_new_folder, main, run, step

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument(
    "folder", nargs="?", default="students", help="output folder, must not exist (default: %(default)s)"
)
parser.add_argument("--people", type=int, default=190, help="people to draw (default: %(default)s)")
parser.add_argument("--val-people", type=int, default=12, help="of these, for validation (default: %(default)s)")
parser.add_argument("--eval-people", type=int, default=24, help="of these, to test the students (default: %(default)s)")
parser.add_argument(
    "--epochs",
    type=int,
    default=2,
    help="epochs of the teacher; four times as many from random weights (default: %(default)s)",
)
parser.add_argument("--backbone", help="timm model (default: tf_efficientnet_lite0; resnet18 from random weights)")
parser.add_argument(
    "--start",
    help="pretrained weights of the backbone, or none: random weights (default: from timm's hub; random weights if it "
    "cannot be reached)",
)
parser.add_argument("--size", type=int, default=96, help="input side of the teacher in pixels (default: %(default)s)")
parser.add_argument(
    "--seeds", type=int, nargs="+", default=[0, 1, 2], help="random seeds of the students (default: 0 1 2)"
)


def steps() -> None:
    """Run all steps in a new folder."""
    arguments = sys.argv[1:]
    own = arguments.index("--") if "--" in arguments else len(arguments)
    args, student_options = parser.parse_args(arguments[:own]), arguments[own + 1 :]
    start = args.start if args.start in (None, "none") else Path(args.start).resolve()
    enter_new_folder(args.folder)

    step("Draw ears with boxes and landmarks. No person was photographed.")
    people = ["--people", args.people, "--val-people", args.val_people, "--eval-people", args.eval_people]
    run("python", EXAMPLES / "make_sample_ears.py", "ears", *people, "--seed", 11)

    step("Train the teacher on the drawn ears, without identities and without landmarks.")
    train_teacher(args, start)

    step("Export the teacher as a folder, and verify it.")
    consent = ["--consent", "drawn ears: nobody was photographed", "--license", "as this project"]
    run("earteach", "export-backbone", "outputs/teacher", "teacher", *consent)
    run("earteach", "verify", "teacher")

    for name, model, drawn in (("landmarker", "landmark model", "landmarks"), ("detector", "detector", "detections")):
        step(f"Train a {model} with and without the teacher.")
        out = ["--draw", f"{drawn}.png", "--json", f"{drawn}.json"]
        script = EXAMPLES / "students" / f"{name}.py"
        data = ["ears"] if name == "landmarker" else ["ears/train_teacher.npy", "ears/eval.csv"]
        teacher = ["--teacher", "teacher=teacher", "--seeds", *args.seeds]
        run("python", script, *data, *teacher, *out, *student_options, tee=f"{drawn}.md")


def train_teacher(args: argparse.Namespace, start: Path | str | None) -> None:
    """Train the teacher from `start`, from timm's hub (None), or from random weights ("none", or if there is no hub)."""
    manifests = ["--train-metadata", "ears/train_teacher.npy", "--val-metadata", "ears/val_teacher.npy"]
    output = ["--output-dir", "outputs", "--experiment-name", "teacher"]
    teacher = ["earteach", "train", *manifests, "--image-size", args.size, *output]
    pretrained = ["--backbone", args.backbone or "tf_efficientnet_lite0", "--max-epochs", args.epochs]
    random = [
        "--backbone",
        args.backbone or "resnet18",
        "--no-pretrained",
        "--freeze-stride",
        0,
        "--baseline-weight",
        0,
    ]
    random += ["--learning-rate", 1e-3, "--head-lr-mult", 1, "--max-epochs", 4 * args.epochs]
    if start == "none":
        run(*teacher, *random)
    elif start is not None:
        run(*teacher, *pretrained, "--pretrained-path", start)
    else:
        try:
            run(*teacher, *pretrained, keep_errors=True)
        except StepFailed as failed:
            if "--no-pretrained" not in failed.errors:  # the message if timm's hub cannot be reached
                raise
            step("No pretrained weights: training from random weights, which hardly helps the students; see --start.")
            run(*teacher, *random)


if __name__ == "__main__":
    main(steps)
