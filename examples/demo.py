"""The whole life of a teacher, on drawn ears: every command of the README's walk-through, in order.

python examples/demo.py [FOLDER]        (make demo: FOLDER is demo/)
"""

import argparse
from pathlib import Path

from steps import EXAMPLES, enter_new_folder, main, run, step

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("folder", nargs="?", default="demo", help="made anew, and holds everything")
parser.add_argument("--people", type=int, default=60)
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--backbone", default="convnext_atto", help="a timm model")
parser.add_argument("--size", type=int, default=64, help="input side in pixels")

TIMM_ALONE = """
import timm, torch
model = timm.create_model({backbone!r}, num_classes=0, checkpoint_path='teacher.safetensors').eval()
print('timm alone:', tuple(model(torch.zeros(1, 3, {size}, {size})).shape))"""


def steps() -> None:
    args = parser.parse_args()
    enter_new_folder(args.folder)

    step("Draw ears: people, photos of each ear, boxes. No person was photographed.")
    run("python", EXAMPLES / "make_sample_ears.py", "ears", "--people", args.people)

    step("ValidationEmbeddings at every image and every box.")
    run("earteach", "validate-data", "ears/train_teacher.npy", "ears/val_teacher.npy", "--contact-sheet", "worst.png")

    step("The untrained start, as a file, so that it can be measured too.")
    run("python", EXAMPLES / "random_start.py", args.backbone, "start.safetensors")

    step("Train without labels; Ctrl-C after the first epoch.")
    run(
        *("earteach", "train", "--train-metadata", "ears/train_teacher.npy", "--val-metadata", "ears/val_teacher.npy"),
        *(
            "--backbone",
            args.backbone,
            "--pretrained-path",
            "start.safetensors",
            "--freeze-stride",
            0,
            "--baseline-weight",
            0,
        ),
        *("--image-size", args.size, "--batch-size", 16, "--learning-rate", 1e-3, "--max-epochs", args.epochs),
        *("--warmup-epochs", 3, "--output-dir", "outputs", "--experiment-name", "first"),
        interrupt_when=Path("outputs/first/checkpoints/last.ckpt").exists,
    )

    step("Go on; nothing is typed again.")
    run("earteach", "resume", "outputs/first")

    step("How it went, on one page: open outputs/first/report.html in a browser.")
    run("earteach", "report", "outputs/first")

    step("See what it remembers.")
    run("earteach", "collage", "outputs/first", "-o", "collage.png")

    step("Hand the backbone on; open it with nothing but timm.")
    run("earteach", "export-backbone", "outputs/first", "teacher.safetensors")
    run("python", "-c", TIMM_ALONE.format(backbone=args.backbone, size=args.size))

    step("Embed people that training never saw, before and after.")
    start = ["--weights", "start.safetensors", "--backbone", args.backbone, "--image-size", args.size]
    run("earteach", "embed", "ears/eval.csv", "start.npy", *start)
    run("earteach", "embed", "ears/eval.csv", "teacher.npy", "--weights", "teacher.safetensors")

    step("Who is who? The teacher alone, with curves and the pairs that confuse it; then against the untrained start.")
    run("earteach", "evaluate", "teacher.npy", "ears/eval.csv", "--plots", "plots", "--sheet", "look-alikes.png")
    run("earteach", "evaluate", "--compare", "start.npy", "teacher.npy", "ears/eval.csv", "--plots", "comparison")


if __name__ == "__main__":
    main(steps)
