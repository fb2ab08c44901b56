"""Every command of a teacher's life in one process: `python life.py EARS OUT WORKERS CACHE`, as test_platform.py starts it.

Training is stopped by Ctrl-C in the middle of an epoch and resumed, embedding after two batches. With workers only what
has workers is run. Prints one line a command: its exit code and the last line it said.
"""

import contextlib
import io
import os
import signal
import sys

os.environ["HF_HUB_OFFLINE"] = "1"


def main(ears: str, out: str, workers: str, cache: str) -> None:
    from ear_teacher_cli.embedding.shards import Shards
    from ear_teacher_cli.training.module import EarTeacherLightningModule

    os.chdir(out)
    lists = [os.path.join(ears, name) for name in ("train_teacher.npy", "val_teacher.npy")]
    small = ["--backbone", "test_convnext", "--image-size", "64", "--no-pretrained", "--batch-size", "8"]
    loaders = ["--num-workers", workers]
    train = ["train", "--train-metadata", lists[0], "--val-metadata", lists[1], *small, *loaders, "--cache", cache]
    train += ["--output-dir", "outputs", "--experiment-name", "first", "--num-collage-samples", "4"]
    evaluated = os.path.join(ears, "eval.csv")
    embed = ["embed", evaluated, "rows.npy", "--weights", "teacher", "--batch-size", "4", *loaders]

    if workers == "0":
        earteach("validate-data", *lists, "--contact-sheet", "worst.png", "--json", "report.json")
        with interrupted(EarTeacherLightningModule, "training_step", 5):
            earteach(*train, "--max-epochs", "2")
        earteach("resume", "outputs/first")
        earteach(*train, "--overwrite", "--max-epochs", "1")  # what is there is replaced
        earteach("report", "outputs/first")
        earteach("collage", "outputs/first", "-o", "collage.png")
        for name in ("teacher.safetensors", "teacher", "teacher"):
            earteach("export-backbone", "outputs/first", name, *(["--overwrite"] if os.path.exists(name) else []))
        earteach("verify", "teacher", "--against", "teacher.safetensors")
    else:
        with interrupted(EarTeacherLightningModule, "training_step", 2):
            earteach(
                *train, "--max-epochs", "1", "--preset", "original", "--pad", "--pseudo-classes", "fixed", "--no-report"
            )
        earteach("resume", "outputs/first")
        earteach("export-backbone", "outputs/first", "teacher", "--num-workers", "0")
    with interrupted(Shards, "write", 3):
        earteach(*embed)
    earteach(*embed, "--resume")
    if workers == "0":
        earteach(*embed, "--overwrite")
        earteach("embed", evaluated, "rows.npz", "--weights", "teacher.safetensors", *loaders, "--overwrite")
    earteach("evaluate", "rows.npy", evaluated, "--bootstrap", "20", "--plots", "plots", "--sheet", "sheet.png")


def earteach(*words: str) -> None:
    from ear_teacher_cli.cli.app import main

    sys.argv = ["earteach", *words]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # `main` leaves it to the system
    told = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(told):
            main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    said = told.getvalue().strip().splitlines() or [""]
    print(code, words[0], said[-1], sep="\t", flush=True)


@contextlib.contextmanager
def interrupted(cls: type, method: str, call: int):
    """Ctrl-C at a call of a method."""
    original, calls = getattr(cls, method), []

    def with_signal(self, *arguments):
        calls.append(None)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return original(self, *arguments)

    setattr(cls, method, with_signal)
    try:
        yield
    finally:
        setattr(cls, method, original)


if __name__ == "__main__":
    main(*sys.argv[1:])
