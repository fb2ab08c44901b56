"""What differs between operating systems: a simulation of Windows for the whole life of a teacher, then part by part."""

import ast
import ctypes
import importlib.util
import multiprocessing
import ntpath
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import pytest
from conftest import read_table
from PIL import Image

from ear_teacher_cli import platform
from ear_teacher_cli.config import TrainConfig
from ear_teacher_cli.config_files import read_toml
from ear_teacher_cli.data import manifest as lists
from ear_teacher_cli.data.manifest import read_manifest
from ear_teacher_cli.errors import EarTeachError, ImageError
from ear_teacher_cli.files import has_writer, only_writer, remove_stale_temporaries, whole_file, whole_folder

ROOT = Path(__file__).parent.parent
SIMULATION = ROOT / "tests" / "without_posix"
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (SIMULATION, ROOT)))}


def in_simulation(*words, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600, **options)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "cache"), [(0, "disk"), (2, "ram")])
def test_the_life_of_a_teacher_without_posix(ears, tmp_path, workers, cache):
    done = in_simulation(SIMULATION / "life.py", ears, tmp_path, workers, cache)
    assert done.returncode == 0, done.stderr
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    stopped = [number for number, line in enumerate(lines) if line[0] == "130"]
    assert [lines[number][1] for number in stopped] == ["train", "embed"], done.stdout + done.stderr
    assert [line for line in lines if line[0] not in ("0", "130")] == [], done.stdout + done.stderr
    said = [line[1] for line in lines]
    whole = [
        *("validate-data", "train", "resume", "train", "report", "collage", "export-backbone", "export-backbone"),
        *("export-backbone", "verify", "embed", "embed", "embed", "embed", "evaluate"),
    ]
    # with workers, each of which is a Python that imports torch, what has workers
    assert said == (["train", "resume", "export-backbone", "embed", "embed", "evaluate"] if workers else whole)
    assert "earteach resume" in lines[stopped[0]][2] and "--resume continues" in lines[stopped[1]][2]
    left = {path.name for path in tmp_path.rglob("*")}
    assert {"model.safetensors", "rows.npy", "metrics.csv"} <= left
    assert workers or {"worst.png", "report.html", "collage.png", "rows.npz", "sheet.png"} <= left
    assert not [name for name in left if name.endswith((".part", ".unfinished", ".earlier"))]
    assert len(read_table(tmp_path / "rows.csv")) == 12
    assert len(list((tmp_path / "outputs" / ".crops").glob("*"))) == (2 if cache == "disk" else 0)


@pytest.mark.slow
def test_the_simulation_takes_away_what_windows_lacks():
    """And for the package alone: what others need of the system it runs on is there for them."""
    code = """
import os, signal, sys
from pathlib import Path
assert os.name == "posix" and hasattr(os, "fork") and hasattr(signal, "SIGHUP")
from ear_teacher_cli import platform
assert platform.os.name == os.name and not platform.OPEN_FILES_CAN_BE_REMOVED and not platform.MEMORY_IS_SHARED_FREELY
print([number.name for number in platform.STOP_SIGNALS], platform.free_memory() > 0, platform.usable_cores())
sys.path.insert(0, os.getcwd())
import probe
"""
    # a file of a folder of the package's name is taken for the package
    probe = """
import os, signal
for module, name in [(os, "fork"), (os, "memfd_create"), (os, "geteuid"), (signal, "SIGHUP"), (signal, "setitimer")]:
    assert not hasattr(module, name), name
for name in ("fcntl", "resource"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(name)
with open(__file__ + ".txt", "w", encoding="utf-8") as file:
    for call in (lambda: os.unlink(file.name), lambda: os.replace(__file__, file.name)):
        try:
            call()
        except PermissionError:
            continue
        raise AssertionError("an open file was removed")
os.unlink(file.name)
print("as on Windows")
"""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        inside = Path(folder) / "ear_teacher_cli"
        inside.mkdir()
        (inside / "probe.py").write_text(probe, encoding="utf-8")
        done = in_simulation("-c", code.replace("os.getcwd()", repr(str(inside))), cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "as on Windows" and done.stdout.startswith("['SIGINT', 'SIGTERM'] True ")


def test_only_one_module_knows_what_systems_lack():
    tree = ast.parse((SIMULATION / "sitecustomize.py").read_text(encoding="utf-8"))
    lists_of_names = [
        n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) in ("MODULES", "MISSING")
    ]
    names = {node.value for found in lists_of_names for node in ast.walk(found) if isinstance(node, ast.Constant)}
    assert {"SIGHUP", "memfd_create", "fcntl"} <= names and "replace" not in names
    for path in (ROOT / "ear_teacher_cli").rglob("*.py"):
        if path.name == "platform.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in ("os", "signal")
            ):
                assert node.attr not in names and node.attr != "name", f"{path.name}: {ast.unparse(node)}"
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not node.value.startswith("/proc"), f"{path.name}: {node.value}"


# Locks


def in_another_process(code: str, *words: object) -> subprocess.Popen:
    script = f"import sys; from pathlib import Path; from ear_teacher_cli import files, platform\n{code}"
    command = [sys.executable, "-c", script, *map(str, words)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.slow
def test_a_folder_has_one_writer_who_is_named_until_it_ends(tmp_path):
    code = "with files.only_writer(Path(sys.argv[1])): print('ready', flush=True); sys.stdin.read()"
    assert not has_writer(tmp_path)
    with in_another_process(code, tmp_path) as other:
        assert has_writer(tmp_path)
        with pytest.raises(EarTeachError, match=f"process {other.pid} on .* is writing there"), only_writer(tmp_path):
            pass
        other.kill()
    assert not has_writer(tmp_path)
    with only_writer(tmp_path):
        assert has_writer(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system starts no process by fork")
def test_a_forked_process_does_not_keep_its_dead_parents_lock(tmp_path):
    code = (
        "import os, time\n"
        "with files.only_writer(Path(sys.argv[1])):\n"
        "    child = os.fork()\n"
        "    if child == 0: time.sleep(60); os._exit(0)\n"
        "    print('ready', flush=True); print(child, flush=True); sys.stdin.read()"
    )
    with in_another_process(code, tmp_path) as parent:
        child = int(parent.stdout.readline())
        try:
            assert has_writer(tmp_path)
            parent.kill()
            parent.wait()
            until = time.monotonic() + 5  # the child may only just have been forked
            while has_writer(tmp_path) and time.monotonic() < until:
                time.sleep(0.01)
            assert not has_writer(tmp_path)
            os.kill(child, 0)  # which is still there
        finally:
            os.kill(child, signal.SIGTERM)


@pytest.mark.slow
def test_what_a_process_writes_is_not_swept_and_a_dead_ones_is(tmp_path):
    code = (
        "with files.whole_file(Path(sys.argv[1]) / 'x.txt') as path: path.write_text('half'); print('ready', flush=True); "
        "sys.stdin.read()"
    )
    with in_another_process(code, tmp_path) as other:
        part = next(tmp_path.glob(".x.txt.*.part"))
        with whole_file(tmp_path / "x.txt") as path:
            path.write_text("mine")
        assert part.exists()
        other.kill()
    with whole_file(tmp_path / "x.txt") as path:
        path.write_text("mine again")
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]


def test_without_locks_files_and_folders_are_written_all_the_same(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    pytest.importorskip("fcntl")
    monkeypatch.setattr("fcntl.flock", no_locks)
    with only_writer(tmp_path), whole_file(tmp_path / "x.txt") as path:
        path.write_text("half")
        with whole_file(tmp_path / "x.txt") as second:  # which does not take the first for a leftover
            second.write_text("other")
        path.write_text("whole")
    with whole_folder(tmp_path / "y", ["z"]) as folder:
        (folder / "z").write_text("whole")
    assert (tmp_path / "x.txt").read_text() == (tmp_path / "y" / "z").read_text() == "whole"
    assert sorted(p.name for p in tmp_path.rglob("*")) == [".lock", "x.txt", "y", "z"]


# Signals


def test_signals_that_were_ignored_stay_ignored(monkeypatch):
    before = {number: signal.getsignal(number) for number in platform.STOP_SIGNALS}
    try:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        heard = []
        platform.handle_stop_signals(lambda number, frame: heard.append(number))
        for number in platform.STOP_SIGNALS:
            signal.raise_signal(number)
        assert heard == [number for number in platform.STOP_SIGNALS if number != signal.SIGTERM]
        platform.ignore_stop_signals()
        assert {signal.getsignal(number) for number in platform.STOP_SIGNALS} == {signal.SIG_IGN}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_without_a_timer_a_decoder_may_take_its_time(monkeypatch):
    monkeypatch.setattr(platform, "signal", SimpleNamespace())
    with platform.cpu_time_limit(0.001, AssertionError):
        assert sum(range(200_000)) > 0


# Files and memory


@pytest.mark.parametrize("without", [[], ["pread", "pwrite"]])
def test_bytes_are_read_and_written_at_their_place(tmp_path, monkeypatch, without):
    for name in without:
        monkeypatch.delattr(os, name)
    handle = platform.open_private_file(tmp_path / "x", os.O_CREAT)
    try:
        platform.write_at(handle, b"behind", 10)
        platform.write_at(handle, b"first", 0)
        assert platform.read_at(handle, 6, 10) == b"behind" and platform.read_at(handle, 100, 0)[:6] == b"first\0"
    finally:
        os.close(handle)


def shout(name: str) -> None:
    shared = platform.SharedBytes(name)
    shared.write(shared.read(5, 1000).upper(), 2000)
    shared.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["memfd", "block"])
def test_memory_is_shared_with_other_processes(monkeypatch, kind):
    if kind == "memfd" and not platform.MEMORY_IS_SHARED_FREELY:
        pytest.skip("this system has no memfd")
    monkeypatch.setattr(platform, "MEMORY_IS_SHARED_FREELY", kind == "memfd")
    memory = platform.SharedMemory(4096)
    mine = platform.SharedBytes(memory.name)
    mine.write(b"hello", 1000)
    other = multiprocessing.get_context("spawn").Process(target=shout, args=(memory.name,))
    other.start()
    other.join()
    assert mine.read(5, 2000) == b"HELLO" and mine.read(3, 0) == b"\0\0\0"
    platform.SharedBytes(memory.name).close()  # it is there until it is closed
    if kind == "block":
        with pytest.raises(OSError):
            mine.write(b"too far", 10**6)
    mine.close()
    memory.close()
    with pytest.raises(OSError):
        platform.SharedBytes(memory.name)


def test_free_memory_as_windows_tells_it(monkeypatch):
    def status(reference):
        reference._obj.free = 3 * 2**30

    monkeypatch.delattr(os, "sysconf")
    monkeypatch.setattr(platform, "Path", lambda *_: ROOT / "no" / "proc" / "here")
    assert platform.free_memory() == 2**31  # a system that says nothing
    monkeypatch.setattr(
        ctypes, "windll", SimpleNamespace(kernel32=SimpleNamespace(GlobalMemoryStatusEx=status)), raising=False
    )
    assert platform.free_memory() == 3 * 2**30


def test_words_are_quoted_as_the_systems_shell_takes_them(monkeypatch):
    assert platform.quoted("a b") == "'a b'" and platform.quoted("a/b") == "a/b"
    monkeypatch.setattr(platform.os, "name", "nt")
    try:
        assert platform.quoted(r"C:\my ears\x") == r'"C:\my ears\x"' and platform.quoted("R&D") == '"R&D"'
        assert platform.quoted(r"C:\ears\x_1.npy") == r"C:\ears\x_1.npy"
    finally:
        monkeypatch.undo()


# Paths of Windows


@pytest.fixture
def windows_list(tmp_path) -> Path:
    """A list as the original package writes it on Windows, the images beside it."""
    (tmp_path / "raw" / "a b").mkdir(parents=True)
    Image.new("RGB", (20, 30)).save(tmp_path / "raw" / "a b" / "ä.jpg")
    (tmp_path / "list.csv").write_text("image_path,x1,y1,x2,y2\nraw\\a b\\ä.jpg,1,2,11,22\n", encoding="utf-8")
    return tmp_path / "list.csv"


def test_backslashes_in_a_list_are_slashes(windows_list):
    manifest = read_manifest(windows_list)
    assert (
        manifest.paths == ["raw/a b/ä.jpg"] and Path(manifest.file(0)) == windows_list.parent / "raw" / "a b" / "ä.jpg"
    )


def test_a_path_with_a_drive_is_no_path_here_and_is_said_to_be_windows(tmp_path, windows_list, earteach):
    text = windows_list.read_text(encoding="utf-8").replace("raw\\", "C:\\Users\\me\\raw\\")
    windows_list.write_text(text, encoding="utf-8")
    manifest = read_manifest(windows_list)
    assert manifest.paths == ["C:/Users/me/raw/a b/ä.jpg"] and not Path(manifest.file(0)).exists()
    said = earteach("train", "--train-metadata", windows_list, "--val-metadata", windows_list, "--no-pretrained")
    assert said.code == 1 and "C:/Users/me/raw" in said.err and "paths of Windows" in said.err, said.err


@pytest.mark.parametrize(
    ("path", "inside"),
    [
        ("raw/x.jpg", True),
        ("C:/Data/Ears/raw/x.jpg", True),
        ("c:/data/ears/raw/x.jpg", True),  # file names have no case there
        ("D:/Data/Ears/raw/x.jpg", False),
        ("../x.jpg", False),
        ("C:/Data/Earshot/x.jpg", False),
        ("//server/share/x.jpg", False),
    ],
)
def test_paths_stay_in_the_root_as_windows_reads_them(monkeypatch, path, inside):
    windows = SimpleNamespace(path=ntpath, sep="\\")
    monkeypatch.setattr(lists, "os", windows)
    manifest = lists.Manifest("x.csv", PureWindowsPath("C:/Data/Ears"), [path], [None], [0])
    if inside:
        assert PureWindowsPath(manifest.file(0)) == PureWindowsPath("C:/Data/Ears/raw/x.jpg")
    else:
        with pytest.raises(ImageError, match="leaves"):
            manifest.file(0)


def test_options_with_backslashes_come_back_from_the_saved_configuration(tmp_path):
    config = TrainConfig(
        train_metadata="C:\\Users\\new\\train.npy", output_dir="D:\\out", val_metadata="\\\\server\\x.npy"
    )
    (tmp_path / "config.toml").write_text(config.as_toml(), encoding="utf-8")
    found = read_toml(tmp_path / "config.toml")
    assert (found["train_metadata"], found["output_dir"]) == ("C:\\Users\\new\\train.npy", "D:\\out")
    assert TrainConfig(**found) == config


def test_backslashes_in_a_configuration_file_are_explained(tmp_path, earteach):
    (tmp_path / "c.toml").write_text('train_metadata = "C:\\Users\\me\\train.npy"\n', encoding="utf-8")
    said = earteach("train", "--config", tmp_path / "c.toml")
    assert said.code == 1 and "'C:\\Users\\...'" in said.err and len(said.err.splitlines()) == 1, said.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoding", "locale", "told"),
    [("ascii", "C.UTF-8", b"missing"), ("cp1252", "C.UTF-8", b"missing"), ("ascii", "C", b"set PYTHONUTF8=1")],
)
def test_a_character_that_has_no_form_there_is_no_traceback(encoding, locale, told, tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "LC_ALL": locale}
    name = "ухо-耳.csv"
    (tmp_path / name).write_text("image_path\n耳.jpg\n", encoding="utf-8")
    command = [sys.executable, "-m", "ear_teacher_cli", "validate-data", str(tmp_path / name)]
    done = subprocess.run(command, env=environment, capture_output=True, cwd=ROOT)
    assert done.returncode == 1 and b"Traceback" not in done.stderr and told in done.stdout + done.stderr, done


def test_a_loader_that_hangs_is_killed_and_the_others_end(ears, manifests, monkeypatch):
    from conftest import small_config

    from ear_teacher_cli.data import datamodule

    data = datamodule.EarDataModule(small_config(manifests, num_workers=2))
    data.setup()
    monkeypatch.setattr(datamodule, "_SECONDS_TO_END", 0.5)
    monkeypatch.setattr("ear_teacher_cli.data.dataset.load_crop", lambda *_: signal.sigwait({signal.SIGUSR1}))
    data.val_set.cache = None
    loader = data.val_dataloader()
    iter(loader)  # its workers hang at their first image
    assert len(multiprocessing.active_children()) == 2
    before = signal.getsignal(signal.SIGCHLD)
    data.on_exception(KeyboardInterrupt())
    assert multiprocessing.active_children() == [] and signal.getsignal(signal.SIGCHLD) is before


def test_an_error_in_a_thread_is_not_hidden_by_the_end_of_the_loaders(manifests):
    from conftest import small_config

    from ear_teacher_cli.data.datamodule import EarDataModule

    data = EarDataModule(small_config(manifests))
    data.setup()
    iter(data.val_dataloader())
    raised = []

    def work():
        try:
            data.on_exception(KeyboardInterrupt())
        except ValueError as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert raised == []


def test_what_another_user_left_does_not_stop_an_export(tmp_path, monkeypatch):
    left = tmp_path / ".y.abc_0123.part"
    left.mkdir()
    listdir = os.listdir

    def refused(path="."):
        if Path(path) == left:
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refused)
    with whole_folder(tmp_path / "y", ["z"]) as folder:
        (folder / "z").write_text("whole")
    assert left.exists() and (tmp_path / "y" / "z").exists()


def test_a_folder_that_is_about_to_take_its_name_is_not_swept(tmp_path, monkeypatch):
    rename = os.rename

    def swept_before(source, target):
        remove_stale_temporaries(tmp_path, "y", ["z"])
        rename(source, target)

    monkeypatch.setattr(os, "rename", swept_before)
    with whole_folder(tmp_path / "y", ["z"]) as folder:
        (folder / "z").write_text("whole")
    assert (tmp_path / "y" / "z").read_text() == "whole"


FAULTS = """
import resource
from ear_teacher_cli import platform
print(platform.reuse_freed_memory())
for time in range(6):
    if time == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = b"x" * 200_000_000
    del block
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def is_glibc() -> bool:
    return "CS_GNU_LIBC_VERSION" in getattr(os, "confstr_names", ()) and bool(os.confstr("CS_GNU_LIBC_VERSION"))


@pytest.mark.skipif(not is_glibc(), reason="the function is for glibc, and does nothing elsewhere")
def test_freed_memory_is_used_again():
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    run = [
        subprocess.run([sys.executable, "-c", FAULTS], env=clean | changes, capture_output=True, text=True, check=True)
        for changes in ({}, {"MALLOC_TRIM_THRESHOLD_": "131072"})
    ]
    (reuses, faults), (without, as_set_up) = (done.stdout.split() for done in run)
    assert reuses == "True" and without == "False"  # the environment decides
    assert int(faults) < 0.1 * int(as_set_up)


WAITING = """
import ctypes, sys
from ear_teacher_cli.cli.process import lifetime
with lifetime():
    assert "torch" not in sys.modules
    ctypes.CDLL(sys.argv[1])
"""


@pytest.mark.parametrize(
    "chosen, spins", [({}, "20000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")]
)
def test_threads_of_torch_wait_without_taking_a_core_from_the_loaders(chosen, spins):
    folder = Path(importlib.util.find_spec("torch").origin).parent
    found = [*folder.glob("lib/libgomp*"), *folder.with_name("torch.libs").glob("libgomp*")]
    if not found:
        # wheels for Linux do; macOS has LLVM's and Windows Microsoft's OpenMP, which do not know the variable
        pytest.skip("this torch brings no OpenMP of GNU")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, "-c", WAITING, str(found[0])]
    shown = {"OMP_DISPLAY_ENV": "VERBOSE"}  # OpenMP prints its settings when it is loaded
    done = subprocess.run(command, env=clean | shown | chosen, capture_output=True, text=True, check=True)
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr


def test_older_versions_of_glibc_refuse_the_threshold(monkeypatch):
    for name in ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    asked: dict[int, int] = {}

    def mallopt(parameter: int, value: int) -> int:
        asked[parameter] = value
        return int(parameter != platform._MMAP_THRESHOLD)

    monkeypatch.setattr(os, "confstr", lambda name: "glibc 2.31", raising=False)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    assert platform.reuse_freed_memory()
    assert asked == {platform._MMAP_THRESHOLD: 2**30, platform._MMAP_MAX: 0, platform._TRIM_THRESHOLD: -1}


def test_other_c_libraries_manage_memory_as_they_do(monkeypatch):
    for name in ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "confstr", lambda name: None, raising=False)
    assert not platform.reuse_freed_memory()
    monkeypatch.delattr(os, "confstr")  # Windows
    assert not platform.reuse_freed_memory()
