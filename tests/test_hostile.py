"""Files from strangers: none runs code, reads outside its place, exhausts the machine or sends anything."""

import io
import json
import os
import pickle
import resource  # noqa: TID251  (limits of memory, to find what takes too much)
import socket
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL
from PIL import Image
from safetensors.torch import save_file

from ear_teacher_cli.data.crop import load_crop, read_image
from ear_teacher_cli.data.manifest import images_manifest, read_manifest
from ear_teacher_cli.data.npy import map_npy, read_npy, read_npz
from ear_teacher_cli.data.preprocessing import preprocessing_of
from ear_teacher_cli.errors import EarTeachError, ImageError, ManifestError, WeightsError
from ear_teacher_cli.model.checkpoint import read_checkpoint, read_safetensors, read_tensors


def npy_of(path: Path, header: dict, data: bytes) -> Path:
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.write(data)
    return path


OBJECT = {"descr": "|O", "fortran_order": False, "shape": ()}


def laughs() -> bytes:
    """A list that names one list a thousand times, and so on: a few kilobytes that unfold into 10^15 values."""
    value = ["a"] * 1000
    for _ in range(4):
        value = [value] * 1000
    return pickle.dumps({"image_paths": value})


def nested() -> bytes:
    value: list = []
    for _ in range(200):
        value = [value]
    return pickle.dumps({"image_paths": value})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("header", "data"),
    [
        (OBJECT, laughs()),
        (OBJECT, nested()),
        (OBJECT, pickle.dumps({"image_paths": ["a" * 2**20] * 10_000})),
        (OBJECT, b"(" * 10**6 + b"t" * 10**6 + b"."),
        (OBJECT, b"X\xff\xff\xff\x7f"),  # a string of two gigabytes that is not there
        (OBJECT, b"\x80\x02]r\xff\xff\xff\x7f."),  # a place in the memo: sixteen gigabytes
        (OBJECT, b"]p2000000000\n."),
        (OBJECT, b"\x80\x05\x96\xff\xff\xff\xff\x03\x00\x00\x00."),
        (OBJECT, b"\x8a\xff" + b"\xff" * 255 + b"."),
        ({"descr": "<f8", "fortran_order": False, "shape": (2**40,)}, b"12345678"),
        ({"descr": "<U250000000", "fortran_order": False, "shape": (1,)}, b"1234"),
        ({"descr": "<f8", "fortran_order": False, "shape": (10**30,)}, b"1"),
        ({"descr": "<f8", "fortran_order": False, "shape": (-1,)}, b"1"),
    ],
)
def test_npy_that_unfolds_or_lies_is_refused_in_little_memory(tmp_path, header, data):
    path = npy_of(tmp_path / "x.npy", header, data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ManifestError, match=r"x\.npy"):
        read_manifest(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_what_the_fuzzer_found(tmp_path):
    """Each of these once ended in something else than an error of ours (tests/fuzz.py)."""
    text = np.array([0x110000, 65], "<u4").view("<U1")  # a character beyond Unicode: SystemError when taken out
    kind = pickle.dumps(text.copy(), 2)
    npy_of(tmp_path / "a.npy", OBJECT, b"\x80\x02}q\x00X\x0b\x00\x00\x00image_paths" + kind[2:-1] + b"s.")
    np.save(tmp_path / "b.npy", text)
    np.savez(tmp_path / "c.npz", paths=text)
    (tmp_path / "d.npy").write_bytes(b"\x93NUMPY\x01\x00\x40\x00" + b"{'descr': '<f4', 'shape': (4, 3(".ljust(64))
    with zipfile.ZipFile(tmp_path / "e.npz", "w") as archive:
        archive.writestr("embeddings.npy", b"x")
    data = bytearray((tmp_path / "e.npz").read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1  # it says that it is encrypted
    (tmp_path / "e.npz").write_bytes(data)
    for name, read in (
        ("a.npy", read_npy),
        ("b.npy", read_npy),
        ("c.npz", read_npz),
        ("d.npy", map_npy),
        ("e.npz", read_npz),
    ):
        with pytest.raises(ManifestError, match=name):
            read(tmp_path / name)


def test_a_header_bomb_is_refused(tmp_path):
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + b"(" * 10**6)
    with pytest.raises(ManifestError):
        read_npy(tmp_path / "x.npy")


def test_a_zip_bomb_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("embeddings.npy", "w", force_zip64=True) as member:
            header = {"descr": "<f4", "fortran_order": False, "shape": (2**26, 1)}
            np.lib.format.write_array_header_1_0(member, header)
            for _ in range(256):
                member.write(bytes(2**20))
    assert (tmp_path / "x.npz").stat().st_size < 2**20
    with pytest.raises(ManifestError, match="unpacks to"):
        read_npz(tmp_path / "x.npz")
    np.savez_compressed(tmp_path / "y.npz", embeddings=np.ones((4, 3), np.float32))
    assert read_npz(tmp_path / "y.npz")["embeddings"].shape == (4, 3)


def test_a_checkpoint_that_would_unfold_is_refused(tmp_path, run):
    whole = run / "checkpoints" / "last.ckpt"
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(tmp_path / "x.ckpt", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(WeightsError, match="compressed"):
        read_checkpoint(tmp_path / "x.ckpt")


@pytest.mark.slow
def test_every_flipped_bit_of_a_checkpoint_is_found_or_means_nothing(tmp_path, run):
    """torch.load does not look at the checksums of its own archive."""
    whole = (run / "checkpoints" / "last.ckpt").read_bytes()
    content = read_checkpoint(run / "checkpoints" / "last.ckpt").content["state_dict"]
    chance, found, unseen_by_torch = np.random.default_rng(0), 0, 0
    path = tmp_path / "x.ckpt"
    for place in chance.integers(0, len(whole), 150).tolist():
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << int(chance.integers(8)))]) + whole[place + 1 :])
        try:
            read = read_checkpoint(path).content["state_dict"]
            assert all(torch.equal(read[name], content[name]) for name in content)
        except WeightsError as error:
            assert "x.ckpt" in str(error)
            found += 1
            try:
                torch.load(path, weights_only=True)  # noqa: TID251  (what others would have got)
                unseen_by_torch += 1
            except (RuntimeError, pickle.UnpicklingError, ValueError, UnicodeDecodeError):
                pass
    assert found > 100 and unseen_by_torch > 50


@pytest.mark.parametrize("kind", ["header", "overlap", "beyond", "missing", "metadata", "dtype"])
def test_safetensors_that_lie_are_refused(kind, tmp_path, earteach, ears):
    save_file({"a": torch.zeros(4), "b": torch.ones(4)}, tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    if kind == "header":
        (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", 2**62) + data[8:])
    else:
        if kind == "overlap":
            header["b"]["data_offsets"] = header["a"]["data_offsets"]
        elif kind == "beyond":
            header["b"]["data_offsets"] = [16, 2**40]
        elif kind == "missing":
            del header["b"]
        elif kind == "metadata":
            header["__metadata__"] = {"earteach_export": "1", "architecture": "../../etc"}
        else:
            header["b"]["dtype"] = "F1000"
        text = json.dumps(header).encode()
        (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    if kind == "metadata":
        assert read_safetensors(tmp_path / "x.safetensors")[0].keys() == {"a", "b"}
    else:
        with pytest.raises(WeightsError, match=r"x\.safetensors"):
            read_tensors(tmp_path / "x.safetensors")
    said = earteach("embed", ears / "eval.csv", tmp_path / "x.npy", "--weights", tmp_path / "x.safetensors")
    assert said.code in (1, 2) and len(said.err.splitlines()) == 1


@pytest.mark.parametrize("name", ["x.csv", "x.npy", "x.jsonl", "x.json"])
def test_a_fifo_or_a_device_is_no_manifest_and_waits_for_nobody(tmp_path, name, earteach):
    os.mkfifo(tmp_path / name)
    said = earteach("validate-data", tmp_path / name)
    assert said.code == 1 and "not a regular file" in (said.err + said.out.decode())
    if name != "x.jsonl":
        assert earteach("evaluate", tmp_path / name).code == 1
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    assert earteach("validate-data", tmp_path / name).code == 1


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../x.jpg", "a/../../x.jpg", "link/x.jpg", "fifo.jpg", "/dev/zero", "nul\0.jpg"]
)
def test_paths_that_leave_the_root_or_are_no_files_are_refused(tmp_path, path):
    root = tmp_path / "root"
    root.mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "x.jpg")
    (root / "link").symlink_to(tmp_path)
    os.mkfifo(root / "fifo.jpg")
    (tmp_path / "list.jsonl").write_text(json.dumps({"image_path": path}))
    manifest = read_manifest(tmp_path / "list.jsonl", root)
    with pytest.raises(ImageError) as caught:
        read_image(manifest.file(0))
    assert caught.value.reason in ("outside-root", "unreadable")


def test_control_characters_reach_no_terminal_and_no_csv(tmp_path, run, ears, earteach):
    evil = "\x1b]0;owned\x07\x1b[2J\u202egpj.exe"
    (tmp_path / "list.jsonl").write_text(
        "".join(json.dumps({"image_path": path, "identity": evil}) + "\n" for path in (evil, evil + "2", "line\nbreak"))
    )
    for words in (
        ["validate-data", tmp_path / "list.jsonl", "--json", tmp_path / "report.json"],
        ["validate-data", tmp_path / f"{evil}.csv"],
        ["embed", tmp_path / "list.jsonl", tmp_path / "x.npy", "--weights", run],
        ["train", "--train-metadata", tmp_path / "list.jsonl", "--val-metadata", ears / "val_teacher.npy", *SMALL],
        ["evaluate", tmp_path / f"{evil}.npy"],
        ["collage", tmp_path / evil, "-o", tmp_path / "x.png"],
        ["export-backbone", tmp_path / evil, tmp_path / "x.safetensors"],
        ["train", "--backbone", evil, "--output-dir", tmp_path],
        ["train", "--config", tmp_path / evil],
    ):
        said = earteach(*words)
        everything = said.out + said.err.encode()
        assert said.code in (1, 2), words
        assert b"\x07" not in everything and b"\x1b]" not in everything and "\u202e".encode() not in everything, words
    image = ears / "images" / "p008" / "00.jpg"
    (tmp_path / evil).write_bytes(image.read_bytes())
    assert earteach("embed", tmp_path / "list.jsonl", tmp_path / "x.npy", "--weights", run).code == 0
    table = (tmp_path / "x.csv").read_bytes()
    assert b"\x1b" not in table and b"\x07" not in table and table.count(b"\r\n") == table.count(b"\n") == 4


def picture_bytes(kind: str) -> bytes:
    file = io.BytesIO()
    grey16 = Image.fromarray(np.full((9, 7), 40_000, np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "x" * 60_000
    images = {
        "1 x 1": (Image.new("RGB", (1, 1)), "PNG", {}),
        "1 x 60,000": (Image.new("RGB", (1, 60_000)), "PNG", {}),
        "60,000 x 1": (Image.new("RGB", (60_000, 1)), "JPEG", {}),
        "animated": (Image.new("P", (9, 7)), "GIF", {"save_all": True, "append_images": [Image.new("P", (9, 7), 3)] * 50}),
        "16-bit": (grey16, "PNG", {}),
        "CMYK": (Image.new("CMYK", (9, 7)), "JPEG", {}),
        "palette": (Image.new("P", (9, 7)), "PNG", {}),
        "alpha": (Image.new("RGBA", (9, 7)), "WEBP", {}),
        "grey and alpha": (Image.new("LA", (9, 7)), "PNG", {}),
        "one bit": (Image.new("1", (9, 7)), "TIFF", {}),
        "huge EXIF": (Image.new("RGB", (9, 7)), "JPEG", {"exif": exif}),
    }  # fmt: skip
    image, form, options = images[kind]
    image.save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "kind",
    ["1 x 1", "1 x 60,000", "60,000 x 1", "animated", "16-bit", "CMYK", "palette", "alpha", "grey and alpha", "one bit", "huge EXIF"],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".jpg", ".png"])  # of which one lies
def test_odd_images_become_crops(kind, suffix, tmp_path):
    (tmp_path / f"x{suffix}").write_bytes(picture_bytes(kind))
    preprocessing = preprocessing_of("convnext_tiny", 64, 0.1, True)
    assert load_crop(str(tmp_path / f"x{suffix}"), None, preprocessing).shape == (3, 64, 64)


def png_that_claims(width: int, height: int) -> bytes:
    data = bytearray(picture_bytes("1 x 1"))
    data[16:24] = struct.pack(">II", width, height)
    import zlib

    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "truncated"),
        (png_that_claims(100_000, 100_000), "too-large"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not-an-image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>", "not-an-image"),
        (b"\x7fELF" + bytes(100), "not-an-image"),
    ],
)
def test_bombs_and_lies_have_their_reason(data, reason, tmp_path):
    (tmp_path / "x.jpg").write_bytes(data)
    with pytest.raises(ImageError) as caught:
        read_image(str(tmp_path / "x.jpg"))
    assert caught.value.reason == reason
    assert Image.MAX_IMAGE_PIXELS == 89_478_485  # PIL's own limit stays on


def test_a_decoder_that_loops_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("ear_teacher_cli.data.crop._DECODE_SECONDS", 0.2)
    (tmp_path / "x.png").write_bytes(picture_bytes("1 x 1"))

    def for_ever(self):
        while True:
            pass

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", for_ever)
    with pytest.raises(ImageError) as caught:
        read_image(str(tmp_path / "x.png"))
    assert caught.value.reason == "too-slow"


@pytest.mark.slow
def test_the_commands_open_no_connection(ears, tmp_path, earteach, monkeypatch):
    """The whole life of a teacher with every socket shut, and without the switch that keeps the hub offline."""
    monkeypatch.delenv("HF_HUB_OFFLINE")

    def shut(*arguments, **options):
        raise AssertionError(f"a connection was wanted: {arguments[1:]}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, shut)
    monkeypatch.setattr(socket, "getaddrinfo", shut)
    experiment = tmp_path / "ear_teacher"
    for words in (
        ["validate-data", ears / "train_teacher.npy", "--num-workers", 0],
        ["train", "--train-metadata", ears / "train_teacher.npy", "--val-metadata", ears / "val_teacher.npy", *SMALL,
         "--max-epochs", 1, "--output-dir", tmp_path],
        ["resume", experiment, "--max-epochs", 2],
        ["collage", experiment, "-o", tmp_path / "x.png"],
        ["export-backbone", experiment, tmp_path / "x.safetensors"],
        ["embed", ears / "eval.csv", tmp_path / "x.npy", "--weights", tmp_path / "x.safetensors"],
        ["evaluate", tmp_path / "x.npy", "--bootstrap", 20],
    ):  # fmt: skip
        said = earteach(*words)
        assert said.code == 0, said.err
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"


def test_what_is_handed_on_names_no_folder_of_this_machine(run, ears, tmp_path, earteach):
    assert earteach("export-backbone", run, tmp_path / "x.safetensors").code == 0
    assert earteach("embed", ears / "eval.csv", tmp_path / "x.npy", "--weights", tmp_path / "x.safetensors").code == 0
    for name in ("x.safetensors", "x.csv", "x.json", "x.npy"):
        data = (tmp_path / name).read_bytes()
        for folder in (run.parent, ears.parent, tmp_path, Path.home()):
            assert os.fsencode(folder) not in data, name


def test_no_images_leaves_no_image_anywhere(manifests, tmp_path, earteach):
    said = earteach("train", *manifests, *SMALL, "--max-epochs", 1, "--output-dir", tmp_path, "--no-images")
    assert said.code == 0, said.err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix in (".png", ".gif", ".jpg")]
    events = b"".join(path.read_bytes() for path in files if "tfevents" in path.name)
    assert b"PNG" not in events and b"train/loss" in events


def test_nothing_that_people_are_told_to_start_listens_to_the_world():
    root = Path(__file__).parent.parent
    for path in [root / "README.md", *root.glob("examples/**/*"), *root.glob("ear_teacher_cli/**/*.py")]:
        if path.suffix in (".md", ".py", ".sh"):
            text = path.read_text()
            assert "--bind_all" not in text and "0.0.0.0" not in text, path


@pytest.mark.slow
def test_a_device_is_no_list_of_images(run, ears):
    words = [sys.executable, "-m", "ear_teacher_cli", "embed", "/dev/stdin", "x.npy", "--weights", str(run)]
    done = subprocess.run(words, input=b"", capture_output=True, timeout=120)
    assert done.returncode in (1, 2) and b"Traceback" not in done.stderr


@pytest.mark.parametrize("suffix", [".npy", ".csv", ".jsonl", ".json"])
def test_a_path_longer_than_any_is_refused(tmp_path, suffix):
    long = "a\\" * 10_000
    contents = {
        ".npy": None,
        ".csv": f"image_path\n{long}\n",
        ".jsonl": json.dumps({"image_path": long}),
        ".json": json.dumps({"images": [{"id": 1, "file_name": long}], "annotations": [{"image_id": 1, "bbox": [0, 0, 1, 1]}]}),
    }  # fmt: skip
    path = tmp_path / f"x{suffix}"
    if suffix == ".npy":
        np.save(path, np.array({"image_paths": [long]}, dtype=object))
    else:
        path.write_text(contents[suffix])
    with pytest.raises(EarTeachError, match="4096"):
        read_manifest(path)


def test_a_list_is_a_list_of_images_not_of_anything(tmp_path):
    (tmp_path / "x.jpg").write_text("root:x:0:0")
    manifest = images_manifest([str(tmp_path / "x.jpg")], "stdin")
    with pytest.raises(ImageError):
        read_image(manifest.file(0))
