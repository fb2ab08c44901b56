"""Machines and files that fail under a run: nothing is lost, and one line says what happened."""

import os
import re
import resource  # noqa: TID251  (a limit on file sizes is what a full disk is to a program)
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import forked
import pytest
import torch
from conftest import SMALL, read_table, small_config
from test_resume import assert_same_weights

from ear_teacher_cli import run_folder
from ear_teacher_cli.console import Console
from ear_teacher_cli.data.manifest import read_manifest
from ear_teacher_cli.errors import EarTeachError
from ear_teacher_cli.model.checkpoint import read_checkpoint
from ear_teacher_cli.model.teacher import TeacherModel
from ear_teacher_cli.system_errors import explain_system_error
from ear_teacher_cli.training.module import EarTeacherLightningModule
from ear_teacher_cli.training.run import resume, train

QUIET = Console(quiet=True)


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(
        {
            "cut": data[:middle],
            "empty": b"",
            "flipped": data[:middle] + bytes([data[middle] ^ 8]) + data[middle + 1 :],
            "foreign": b"no checkpoint",
        }[how]
    )


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cut", "empty", "flipped", "foreign"])
def test_resume_passes_over_damaged_checkpoints(how, run, tmp_path, earteach):
    copy = shutil.copytree(run, tmp_path / "copy")
    for path in (copy / "checkpoints").glob("best-*"):
        path.unlink()
    damage(copy / "checkpoints" / "last.ckpt", how)
    said = earteach("resume", copy)
    assert said.code == 0, said.err
    assert (
        "warning: " in said.err and "last.ckpt: " in said.err and "restored: epoch_0005.ckpt: epoch 5 of 6" in said.err
    )
    assert_same_weights(run, copy)


@pytest.mark.slow
def test_a_whole_checkpoint_can_be_named_where_the_last_is_damaged(run, tmp_path, earteach):
    copy = shutil.copytree(run, tmp_path / "copy")
    damage(copy / "checkpoints" / "last.ckpt", "flipped")
    for path in (copy / "checkpoints").glob("best-*_0006-*"):
        path.unlink()
    said = earteach("resume", copy / "checkpoints" / "epoch_0005.ckpt")
    assert said.code == 0 and "restored: epoch_0005.ckpt" in said.err, said.err


def test_without_times_the_newest_epoch_is_the_newest(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    for age, path in enumerate(run_folder.checkpoints(copy)):
        os.utime(path, (age, age))
    names = [path.name for path in run_folder.checkpoints(copy)]
    epochs = [int(re.search(r"epoch_(\d+)", name)[1]) for name in names[1:]]
    assert names[0] == "last.ckpt" and epochs == sorted(epochs, reverse=True)


def test_without_a_whole_checkpoint_all_are_named_and_nothing_is_touched(run, tmp_path, earteach):
    copy = shutil.copytree(run, tmp_path / "copy")
    for path in (copy / "checkpoints").iterdir():
        damage(path, "flipped")
    before = {path.name: path.read_bytes() for path in (copy / "checkpoints").iterdir()}
    said = earteach("resume", copy)
    assert said.code == 1 and all(name in said.err for name in before)
    assert before == {path.name: path.read_bytes() for path in (copy / "checkpoints").iterdir()}


def changed(run: Path, into: Path, **hyper_parameters) -> Path:
    copy = shutil.copytree(run, into / "copy")
    path = copy / "checkpoints" / "last.ckpt"
    content = read_checkpoint(path).content
    content["hyper_parameters"] |= {"max_epochs": 9, **hyper_parameters}
    torch.save(content, path)
    for other in (copy / "checkpoints").iterdir():
        if other != path:
            other.unlink()
    return copy


def test_a_checkpoint_of_another_architecture_is_refused(run, tmp_path, earteach):
    copy = changed(run, tmp_path, backbone="test_convnext2")
    for words in (["resume", copy], ["collage", copy, "-o", tmp_path / "x.png"], ["export-backbone", copy, tmp_path / "x.safetensors"]):  # fmt: skip
        said = earteach(*words)
        assert said.code == 1 and "last.ckpt" in said.err and "test_convnext2" in said.err, said.err


def test_a_checkpoint_of_another_version_is_refused(run, tmp_path, earteach):
    said = earteach("resume", changed(run, tmp_path, colour_of_the_sky="blue"))
    assert said.code == 1 and "colour_of_the_sky are unknown" in said.err


@pytest.mark.parametrize("part", ["optimizer_states", "lr_schedulers", "loops"])
def test_a_checkpoint_with_a_part_that_does_not_fit_is_one_line(part, run, tmp_path, earteach):
    copy = changed(run, tmp_path)
    path = copy / "checkpoints" / "last.ckpt"
    content = read_checkpoint(path).content
    content[part] = {"state": 1} if isinstance(content.get(part), dict) else [{"state": {}, "param_groups": []}]
    torch.save(content, path)
    said = earteach("resume", copy)
    assert said.code == 1 and re.search(r"last\.ckpt: cannot resume from it .*another checkpoint$", said.err.strip())


class Limited:
    """No file may grow beyond `size` bytes: what a full disk is to a program."""

    def __init__(self, size: int):
        self.size = size

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


@pytest.mark.slow
def test_a_disk_that_fills_up_leaves_the_last_good_checkpoint(run, manifests, tmp_path, earteach):
    words = ["train", *manifests, *SMALL, "--max-epochs", 6, "--output-dir", tmp_path]
    with Limited(600_000):  # metrics fit, a checkpoint does not
        said = earteach(*words)
    assert said.code == 1 and re.search(r"\.ckpt: cannot be written", said.err), said.err
    folder = tmp_path / "ear_teacher"
    assert not list(folder.rglob("*.part")) and not list(folder.rglob("*.ckpt"))
    copy = shutil.copytree(run, tmp_path / "copy")
    before = (copy / "checkpoints" / "last.ckpt").read_bytes()
    with Limited(600_000):
        assert earteach("resume", copy, "--max-epochs", 8).code == 1
    assert (copy / "checkpoints" / "last.ckpt").read_bytes() == before and not list(copy.rglob("*.part"))
    assert earteach("resume", copy, "--max-epochs", 7).code == 0


@pytest.mark.parametrize(
    ("words", "size"),
    [
        (["collage", "RUN", "-o", "x.png"], 500),
        (["export-backbone", "RUN", "x.safetensors"], 20_000),
        (["embed", "EARS/eval.csv", "x.npy", "--weights", "RUN"], 500),
        (["embed", "EARS/eval.csv", "x.npz", "--weights", "RUN"], 3500),
        (["embed", "EARS/eval.csv", "x.csv", "--weights", "RUN"], 4000),
        (["validate-data", "EARS/eval.csv", "--contact-sheet", "x.png"], 500),
        (["validate-data", "EARS/eval.csv", "--write-clean", "y.npy"], 400),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    words, size, run, ears, tmp_path, monkeypatch, earteach
):
    monkeypatch.chdir(tmp_path)
    with Limited(size):
        said = earteach(*(w.replace("RUN", str(run)).replace("EARS", str(ears)) for w in words))
    assert said.code == 1 and len(said.err.splitlines()) <= 4, said.err
    assert "cannot be written" in said.err.splitlines()[-1], said.err
    assert not [p for p in tmp_path.iterdir() if not p.name.endswith(".unfinished")]


def test_outputs_that_cannot_be_are_known_before_the_first_epoch(manifests, tmp_path, earteach):
    (tmp_path / "file").write_text("x")
    (tmp_path / "ear_teacher").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", tmp_path, Path("/proc/nowhere")):
        said = earteach("train", *manifests, *SMALL, "--output-dir", folder)
        assert said.code in (1, 2) and "epoch 1/" not in said.err, said.err
        assert str(folder) in said.err


@pytest.fixture
def own_ears(ears, tmp_path):
    return shutil.copytree(ears, tmp_path / "ears")


def spoil(path: Path, how: str) -> None:
    data = path.read_bytes()
    path.unlink()
    if how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "folder":
        path.mkdir()
    elif how == "fifo":
        os.mkfifo(path)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_go_bad_in_mid_run_are_skipped_and_listed(own_ears, tmp_path, monkeypatch, workers):
    manifest = read_manifest(own_ears / "train_teacher.npy", own_ears)
    ways = dict(zip((2, 9, 14, 20), ("gone", "cut", "folder", "fifo"), strict=True))
    original = EarTeacherLightningModule.on_train_epoch_start

    def spoiling(self):
        if self.current_epoch == 1:
            for row, how in ways.items():
                spoil(Path(manifest.file(row)), how)
        original(self)

    monkeypatch.setattr(EarTeacherLightningModule, "on_train_epoch_start", spoiling)
    words = [
        "--train-metadata",
        str(own_ears / "train_teacher.npy"),
        "--val-metadata",
        str(own_ears / "val_teacher.npy"),
    ]
    options = dict(max_epochs=4, max_bad=0.2, batch_size=4, num_workers=workers, output_dir=str(tmp_path))
    outcome = train(small_config(words, **options), QUIET)
    assert outcome.epochs == 4
    bad = read_table(outcome.experiment / "bad_images.csv")
    assert {int(row["row"]): row["reason"] for row in bad} == {
        2: "missing",
        9: "truncated",
        14: "unreadable",
        20: "unreadable",
    }
    shutil.rmtree(outcome.experiment)
    with pytest.raises(EarTeachError, match=r"--max-bad 0\.05: bad_images\.csv lists them"):
        train(small_config(words, **options | {"max_bad": 0.05}), QUIET)
    assert len(read_table(outcome.experiment / "bad_images.csv")) > 0.05 * 24


@pytest.mark.slow
def test_a_killed_or_hanging_loader_ends_the_run_with_one_line(own_ears, tmp_path):
    """In a process of its own: an image of row 5 kills its worker, or takes for ever there."""
    for what, words in (("os.kill(os.getpid(), 9)", "was killed"), ("time.sleep(600)", "--load-timeout")):
        script = (
            "import os, sys, time; from ear_teacher_cli.data import dataset; from ear_teacher_cli.cli.app import main\n"
            "read = dataset.load_crop\n"
            "def evil(path, box, preprocessing):\n"
            f"    if path.endswith('p001/01.jpg') and os.getpid() != {os.getpid()} and dataset.torch.utils.data.get_worker_info():\n"
            f"        {what}\n"
            "    return read(path, box, preprocessing)\n"
            "dataset.load_crop = evil\n"
            "main()"
        )
        command = [sys.executable, "-c", script, "train", "--train-metadata", own_ears / "train_teacher.npy", "--val-metadata",
                   own_ears / "val_teacher.npy", *SMALL, "--num-workers", 2, "--load-timeout", 6, "--output-dir", tmp_path, "--overwrite"]  # fmt: skip
        start = time.monotonic()
        done = forked.run(command, timeout=120)
        assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert time.monotonic() - start < 90


@pytest.mark.slow
def test_two_runs_in_one_folder_are_refused_and_a_dead_ones_lock_is_nobodys(manifests, tmp_path, earteach):
    words = ["train", *manifests, *SMALL, "--max-epochs", 200, "--output-dir", tmp_path]
    command = [sys.executable, "-m", "ear_teacher_cli", *map(str, words)]
    with forked.Popen(command, stderr=forked.PIPE, text=True) as other:
        for line in other.stderr:
            if line.startswith("epoch 2/200: train"):  # the first has been saved
                break
        folder = tmp_path / "ear_teacher"
        for again in (["resume", folder], [*words, "--overwrite"]):
            said = earteach(*again)
            assert said.code == 1 and f"process {other.pid} on " in said.err, said.err
        other.kill()
    done = read_checkpoint(run_folder.last_checkpoint(folder)).epoch
    assert resume(folder, QUIET, max_epochs=done + 1).epochs == done + 1


@pytest.mark.slow
@pytest.mark.parametrize("steps", [2, 3])
def test_steps_without_a_finite_loss_are_left_out_and_the_third_in_a_row_ends_the_run(
    manifests, tmp_path, monkeypatch, steps, earteach
):
    """In training steps 5, 6 (and 7) of 3 an epoch the network's input, so all batch statistics, are infinite."""
    original, calls = TeacherModel.embed_with_maps, 0

    def broken(self, images):
        nonlocal calls
        if self.training and torch.is_grad_enabled():
            calls += 1
            if 5 <= calls < 5 + steps:
                return original(self, torch.full_like(images, float("inf")))
        return original(self, images)

    monkeypatch.setattr(TeacherModel, "embed_with_maps", broken)
    said = earteach("train", *manifests, *SMALL, "--max-epochs", 3, "--output-dir", tmp_path)
    assert said.err.count("the step is skipped") == 2
    assert re.search(r"epoch 2, step \d+: the loss is nan for train_teacher.npy row \d+ \(images/", said.err)
    if steps == 2:
        assert said.code == 0, said.err
        weights = read_checkpoint(tmp_path / "ear_teacher" / "checkpoints" / "last.ckpt").content["state_dict"]
        assert all(torch.isfinite(value).all() for value in weights.values())
    else:
        assert said.code == 1 and "3rd such step in a row; the last good checkpoint is" in said.err
        assert re.search(r"last good checkpoint is .+\.ckpt", said.err)
        assert read_checkpoint(tmp_path / "ear_teacher" / "checkpoints" / "last.ckpt").epoch == 2


def test_weights_that_are_no_numbers_replace_no_checkpoint(manifests, tmp_path, monkeypatch):
    """The last step but one of the second epoch ruins them, and a signal comes."""
    original = EarTeacherLightningModule.on_before_optimizer_step

    def ruin(self, optimizer):
        original(self, optimizer)
        if self.global_step == 4:
            next(self.parameters()).grad.fill_(float("nan"))
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(EarTeacherLightningModule, "on_before_optimizer_step", ruin)
    outcome = train(small_config(manifests, max_epochs=3, output_dir=str(tmp_path)), QUIET)
    assert outcome.interrupted == 143 and not outcome.saved
    checkpoint = read_checkpoint(outcome.experiment / "checkpoints" / "last.ckpt")
    assert (checkpoint.epoch, checkpoint.steps_done) == (1, 0)


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("group", [True, False])
def test_a_stopped_run_with_workers_says_so_and_nothing_else(manifests, tmp_path, sign, group):
    words = ["train", *manifests, *SMALL, "--num-workers", 2, "--max-epochs", 500, "--output-dir", tmp_path]
    start = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from ear_teacher_cli.cli.app import main; main()"
    command = [sys.executable, "-c", start, *map(str, words)]
    with forked.Popen(command, stderr=forked.PIPE, text=True, start_new_session=True) as process:
        said, sent = "", False
        for line in process.stderr:
            said += line
            if line.startswith("before training") and not sent:  # a line that was interrupted may be written twice
                sent = True
                (os.killpg if group else os.kill)(process.pid, sign)
    assert process.returncode == 128 + sign and "Traceback" not in said and "Error" not in said, said
    assert said.splitlines()[-1].startswith("interrupted"), said


def test_a_lock_that_points_elsewhere_writes_nowhere(run, tmp_path, earteach):
    copy = shutil.copytree(run, tmp_path / "copy")
    precious = tmp_path / "thesis.txt"
    precious.write_text("years of work")
    for link in (os.symlink, os.link):
        (copy / ".lock").unlink()
        link(precious, copy / ".lock")
        said = earteach("resume", copy)
        assert said.code == 1 and ".lock" in said.err and precious.read_text() == "years of work"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device"), "/dev/shm.*--num-workers 0"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), "GPU memory: .*--batch-size"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are "
                      "out of shared memory. Please try to raise your shared memory limit."), "shm-size"),
        (RuntimeError("unable to write to file </torch_123_456_7>: No space left on device (28)"), "--num-workers 0"),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), "lower --num-workers"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"), "^memory"),
        (MemoryError(), "^memory"),
        (RuntimeError("Too many open files. Communication with the workers is no longer possible."), "ulimit -n"),
        (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  x\n"
                      "RuntimeError: unable to allocate shared memory(shm) for file </torch_1>: No space left"), r"\(RuntimeError: unable"),
    ],
)  # fmt: skip
def test_what_the_machine_complains_of_is_said_in_our_words(error, words):
    assert re.search(words, str(explain_system_error(error)))
    assert explain_system_error(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


@pytest.mark.slow
def test_too_much_memory_is_one_line(manifests, tmp_path):
    """A limit of memory in a process of its own, and crops that cannot fit into it."""
    script = (
        "import resource, sys, torch, timm, pytorch_lightning\n"
        "from ear_teacher_cli.cli.app import main\n"
        "import ear_teacher_cli.training.run\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20,) * 2)\n"
        "main()"
    )
    words = ["train", *manifests, *SMALL, "--image-size", 1024, "--batch-size", 24, "--output-dir", tmp_path]
    done = forked.run([sys.executable, "-c", script, *words])
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert re.search(r"earteach: .*--batch-size", done.stderr), done.stderr


def on_a_small_disk(size: str, folder: Path, script: str, *words: object) -> subprocess.CompletedProcess:
    """`script` (sh; "$@" is an `earteach` command) where `folder` is a disk of `size` of its own, in a mount namespace."""
    own = ["unshare", "--mount", "--map-root-user"]
    if not shutil.which("unshare") or subprocess.run([*own, "mount", "-t", "tmpfs", "none", folder]).returncode:
        pytest.skip("this machine lets no test mount a small disk")
    mounted = f'mount -t tmpfs -o size={size} none "{folder}" && {script}'
    command = [sys.executable, "-m", "ear_teacher_cli", *map(str, words)]
    return subprocess.run([*own, "sh", "-c", mounted, "sh", *command], capture_output=True, text=True, timeout=240)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["4k", "80k"])  # too small to start a loader, and for what one loads
def test_shared_memory_too_small_is_one_line(size, manifests, run, ears, tmp_path):
    shm = Path("/dev/shm")
    if not shm.is_dir():
        pytest.skip("no /dev/shm here")
    loaders = ["--num-workers", "1", "--batch-size", "8"]
    training = ["train", *manifests, *SMALL, *loaders, "--output-dir", tmp_path]
    embedding = ["embed", ears / "eval.csv", tmp_path / "x.npy", "--weights", run, *loaders]
    for words in (training, embedding):
        done = on_a_small_disk(size, shm, 'exec "$@"', *words)
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        assert re.search(r"\nearteach: .*/dev/shm.*--num-workers 0[^\n]*\n$", done.stderr), done.stderr


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_good_checkpoint(manifests, run, ears, tmp_path):
    """A real one: it has room for the first epoch's checkpoints, not for many more."""
    last = (run / "checkpoints" / "last.ckpt").stat().st_size
    disk = tmp_path / "disk"
    disk.mkdir()
    rows = tmp_path / "rows.npy"
    after = [
        sys.executable,
        "-m",
        "ear_teacher_cli",
        "embed",
        ears / "eval.csv",
        rows,
        "--weights",
        disk / "ear_teacher",
    ]
    after = shlex.join(map(str, after))
    script = f'"$@"; code=$?; find {shlex.quote(str(disk))} -name "*.part"; {after} || exit 9; exit $code'
    words = ["train", *manifests, *SMALL, "--max-epochs", "30", "--output-dir", disk]
    done = on_a_small_disk(str(int(last * 3.5)), disk, script, *words)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert re.search(r"earteach: .*No space left on device", done.stderr) and ".part" not in done.stdout, done
    assert rows.stat().st_size > 0


@pytest.mark.slow
def test_rubbish_of_a_killed_run_goes_with_the_next(run, tmp_path, earteach, ears):
    copy = shutil.copytree(run, tmp_path / "copy")
    rubbish = [
        copy / "checkpoints" / ".last.ckpt.abc_0123.part",
        copy / ".metrics.csv.abc_0123.part",
        tmp_path / ".x.png.abc_0123.part",
    ]
    for path in rubbish:
        path.write_bytes(b"half")
    assert earteach("resume", copy, "--max-epochs", 7).code == 0
    assert earteach("collage", copy, "-o", tmp_path / "x.png").code == 0
    assert not [path for path in rubbish if path.exists()]


def stopped_pair(*command, until: str) -> tuple[int, str]:
    """Two processes (DistributedDataParallel over gloo), the second started by Lightning; SIGTERM to the first when
    `until` is said."""
    text = ""
    with forked.Popen(command, stderr=forked.PIPE, text=True) as process:
        timer = threading.Timer(240, process.kill)
        timer.start()
        for line in process.stderr:
            text += line
            if until and line.startswith(until):
                process.terminate()
                until = ""
        timer.cancel()
    return process.returncode, text


@pytest.mark.slow
def test_bad_images_of_one_process_do_not_hang_the_others(own_ears, tmp_path):
    manifest = read_manifest(own_ears / "train_teacher.npy", own_ears)
    for row in (1, 4, 5, 16):
        Path(manifest.file(row)).unlink()
    words = ["train", "--train-metadata", own_ears / "train_teacher.npy", "--val-metadata", own_ears / "val_teacher.npy", *SMALL,
             "--batch-size", 2, "--max-epochs", 2, "--accelerator", "cpu", "--output-dir", tmp_path]  # fmt: skip
    command = [sys.executable, "-m", "ear_teacher_cli", *words, "--devices", 2]
    code, said = forked.ranks([*command, "--max-bad", 0.2], 2)
    assert code == 0 and "Traceback" not in said, said
    bad = read_table(tmp_path / "ear_teacher" / "bad_images.csv")
    assert [int(row["row"]) for row in bad] == [1, 4, 5, 16]
    code, said = forked.ranks([*command, "--max-bad", 0.1, "--pseudo-classes", "fixed", "--overwrite"], 2)
    assert code == 1 and "more than --max-bad 0.1" in said and "Traceback" not in said, said


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_saves_the_step_of_both(manifests, tmp_path):
    words = ["train", *manifests, *SMALL, "--batch-size", 2, "--max-epochs", 3, "--accelerator", "cpu"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    command = [sys.executable, "-m", "ear_teacher_cli", *words, "--devices", 2]
    assert forked.ranks([*command, "--output-dir", whole], 2)[0] == 0
    code, said = stopped_pair(*command, "--output-dir", stopped, until="epoch 1/3: train")
    assert code == 143 and "Traceback" not in said and "interrupted" in said, said
    folder = stopped / "ear_teacher"
    code, said = forked.ranks([*command[:3], "resume", folder], 2)
    assert code == 0, said
    assert_same_weights(whole / "ear_teacher", folder)
