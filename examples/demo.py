"""Run every command of the README's walk-through, in order, on drawn ears.

python examples/demo.py [FOLDER]        # make demo: FOLDER is demo/
"""

import argparse
from pathlib import Path

from steps import EXAMPLES, enter_new_folder, main, run, step

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("folder", nargs="?", default="demo", help="output folder, must not exist (default: %(default)s)")
parser.add_argument("--people", type=int, default=60, help="people to draw (default: %(default)s)")
parser.add_argument("--epochs", type=int, default=20, help="epochs of training (default: %(default)s)")
parser.add_argument("--backbone", default="convnext_atto", help="timm model (default: %(default)s)")
parser.add_argument("--size", type=int, default=64, help="input side in pixels (default: %(default)s)")

OPEN_WITH_TIMM = """
import timm, torch
model = timm.create_model({backbone!r}, num_classes=0, checkpoint_path='teacher.safetensors').eval()
print('timm alone:', tuple(model(torch.zeros(1, 3, {size}, {size})).shape))"""


def steps() -> None:
    """Run all steps in a new folder."""
    args = parser.parse_args()
    enter_new_folder(args.folder)

    step("Draw ears of different people, with boxes. No person was photographed.")
    run("python", EXAMPLES / "make_sample_ears.py", "ears", "--people", args.people)

    step("Check every image and every box.")
    run("earteach", "validate-data", "ears/train_teacher.npy", "ears/val_teacher.npy", "--contact-sheet", "worst.png")

    step("Write the initial weights (untrained baseline) to a file, to evaluate them too.")
    run("python", EXAMPLES / "random_start.py", args.backbone, "start.safetensors")

    step("Train without labels; interrupt with Ctrl-C after the first epoch.")
    run(
        *("earteach", "train", "--train-metadata", "ears/train_teacher.npy", "--val-metadata", "ears/val_teacher.npy"),
        *("--backbone", args.backbone, "--pretrained-path", "start.safetensors"),
        *("--freeze-stride", 0, "--baseline-weight", 0),  # neither is useful with random weights
        *("--image-size", args.size, "--batch-size", 16, "--learning-rate", 1e-3, "--max-epochs", args.epochs),
        *("--warmup-epochs", 3, "--output-dir", "outputs", "--experiment-name", "first"),
        interrupt_when=Path("outputs/first/checkpoints/last.ckpt").exists,
    )

    step("Resume the run; no option has to be repeated.")
    run("earteach", "resume", "outputs/first")

    step("Write the report; open outputs/first/report.html in a browser.")
    run("earteach", "report", "outputs/first")

    step("Draw a collage of images and their reconstructions.")
    run("earteach", "collage", "outputs/first", "-o", "collage.png")

    step("Export the backbone, and open it with timm alone.")
    run("earteach", "export-backbone", "outputs/first", "teacher.safetensors")
    run("python", "-c", OPEN_WITH_TIMM.format(backbone=args.backbone, size=args.size))

    step("Embed people who were not in training, with the untrained baseline and with the teacher.")
    baseline = ["--weights", "start.safetensors", "--backbone", args.backbone, "--image-size", args.size]
    run("earteach", "embed", "ears/eval.csv", "start.npy", *baseline)
    run("earteach", "embed", "ears/eval.csv", "teacher.npy", "--weights", "teacher.safetensors")

    step(
        "Evaluate recognition: the teacher, with curves and its worst pairs, then compared with the untrained baseline."
    )
    run("earteach", "evaluate", "teacher.npy", "ears/eval.csv", "--plots", "plots", "--sheet", "look-alikes.png")
    run("earteach", "evaluate", "--compare", "start.npy", "teacher.npy", "ears/eval.csv", "--plots", "comparison")


if __name__ == "__main__":
    main(steps)
