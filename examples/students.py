"""From photographs without labels to better students, on drawn ears: a teacher is trained, exported, and two small models
learn with and without it.

    python examples/students.py [FOLDER] [OPTION ...] [-- OPTION OF BOTH STUDENTS ...]     (make students: FOLDER is students/)
"""

import argparse
import sys
from pathlib import Path

from steps import EXAMPLES, StepFailed, enter_new_folder, main, run, step

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("folder", nargs="?", default="students", help="made anew, and holds everything")
parser.add_argument("--people", type=int, default=190)
parser.add_argument("--val-people", type=int, default=12, help="of these, to validate on")
parser.add_argument("--eval-people", type=int, default=24, help="of these, to test the students on")
parser.add_argument("--epochs", type=int, default=2, help="of the teacher; four times as many from random weights")
parser.add_argument("--backbone", help="a timm model (default: tf_efficientnet_lite0; resnet18 from random weights)")
parser.add_argument(
    "--start",
    help="pretrained weights of the backbone (default: timm's hub, and random weights where it cannot be reached); "
    "none: random weights",
)
parser.add_argument("--size", type=int, default=96, help="the teacher's input side in pixels")
parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the students")


def steps() -> None:
    words = sys.argv[1:]
    own = words.index("--") if "--" in words else len(words)
    args, options = parser.parse_args(words[:own]), words[own + 1 :]
    start = args.start if args.start in (None, "none") else Path(args.start).resolve()
    enter_new_folder(args.folder)

    step("Draw ears with boxes and landmarks. No person was photographed.")
    people = ["--people", args.people, "--val-people", args.val_people, "--eval-people", args.eval_people]
    run("python", EXAMPLES / "make_sample_ears.py", "ears", *people, "--seed", 11)

    step("Train the teacher on the drawn ears, without identities and without landmarks.")
    train_teacher(args, start)

    step("Hand it over.")
    consent = ["--consent", "drawn ears: nobody was photographed", "--license", "as this project"]
    run("earteach", "export-backbone", "outputs/teacher", "teacher", *consent)
    run("earteach", "verify", "teacher")

    for name, title, drawn in (("landmarker", "landmarker", "landmarks"), ("detector", "detector", "detections")):
        step(f"A {title}, with and without it.")
        out = ["--draw", f"{drawn}.png", "--json", f"{drawn}.json"]
        script = EXAMPLES / "students" / f"{name}.py"
        run("python", script, "ears", "teacher", "--seeds", *args.seeds, *out, *options, tee=f"{drawn}.md")


def train_teacher(args: argparse.Namespace, start: Path | str | None) -> None:
    teacher = [
        "earteach",
        "train",
        "--train-metadata",
        "ears/train_teacher.npy",
        "--val-metadata",
        "ears/val_teacher.npy",
    ]
    teacher += ["--image-size", args.size, "--output-dir", "outputs", "--experiment-name", "teacher"]
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
            if "timm's hub gave none" not in failed.errors:
                raise
            step(
                "NO PRETRAINED WEIGHTS: the teacher starts from random ones, and will be of little use (--start FILE)."
            )
            run(*teacher, *random)


if __name__ == "__main__":
    main(steps)
