"""Damage in exports is found: any changed byte by `verify`, changed weights by `embed` and `evaluate`."""

import json
import random
import shutil
from pathlib import Path

import pytest
from safetensors.torch import save_file

from ear_teacher_cli.embedding.embedder import load_embedder
from ear_teacher_cli.errors import WeightsError
from ear_teacher_cli.export.verify import verify
from ear_teacher_cli.model.checkpoint import read_safetensors
from ear_teacher_cli.model.file_digest import KEY, read_digest


def flipped(data: bytes, place: int, bit: int) -> bytes:
    return data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :]


def initialisers(path: Path) -> list[tuple[int, int]]:
    """Return (start, length) in the file of the bytes of every initialiser of an ONNX model."""
    onnx = pytest.importorskip("onnx")
    data, found = path.read_bytes(), []
    for tensor in onnx.load(str(path)).graph.initializer:
        start = data.find(tensor.raw_data, found[-1][0] if found and data.find(tensor.raw_data) < found[-1][0] else 0)
        assert start >= 0 and tensor.raw_data, tensor.name
        found.append((start, len(tensor.raw_data)))
    return found


def test_every_flipped_byte_of_onnx_weights_is_found(exports, tmp_path, earteach):
    whole, path = exports / "teacher.onnx", tmp_path / "teacher.onnx"
    data, chance = whole.read_bytes(), random.Random(0)
    parts = initialisers(whole)
    assert sum(length for _, length in parts) > 0.9 * 4 * 207_000
    path.write_bytes(data)
    shutil.copy(exports / "teacher.whitening.safetensors", tmp_path)
    assert all(check.passed for check in verify(str(path)))
    places = [start + chance.randrange(length) for start, length in parts]  # one in each
    places += [chance.randrange(len(data)) for _ in range(200)]  # and anywhere: graph, names, metadata
    for number, place in enumerate(places):
        path.write_bytes(flipped(data, place, chance.randrange(8)))
        if number % 40:
            assert [(check.what, check.passed) for check in verify(str(path))] == [("file", False)], place
        else:
            result = earteach("verify", path, "--against", exports / "teacher.safetensors")
            assert result.code == 1 and result.out.startswith(b"WRONG  file  damaged or changed"), (place, result)
            result = earteach("verify", exports / "teacher.safetensors", "--against", path)
            assert result.code == 1 and "is damaged or was changed" in result.err and result.err.count("\n") == 1, (
                result
            )


def test_a_damaged_digest_is_not_taken_for_a_missing_one(exports, tmp_path):
    data = (exports / "teacher.onnx").read_bytes()
    shutil.copy(exports / "teacher.whitening.safetensors", tmp_path / "x.whitening.safetensors")
    start = data.index(KEY.encode())
    for place in range(start - 6, start + len(KEY) + 2 + 64):
        for bit in range(8):
            (tmp_path / "x.onnx").write_bytes(flipped(data, place, bit))
            try:
                assert not all(check.passed is not False for check in verify(str(tmp_path / "x.onnx"))), (place, bit)
            except WeightsError:  # not an ONNX file any more
                pass


def test_one_flipped_bit_in_any_tensor_is_refused_by_embed_and_evaluate(exports, ears, tmp_path, earteach):
    data, chance = (exports / "teacher.safetensors").read_bytes(), random.Random(1)
    shutil.copy(exports / "teacher.whitening.safetensors", tmp_path)
    path = tmp_path / "teacher.safetensors"
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__")
    assert len(header) == 99
    for number, (name, tensor) in enumerate(header.items()):
        first, end = tensor["data_offsets"]
        path.write_bytes(flipped(data, 8 + length + chance.randrange(first, end), chance.randrange(8)))
        with pytest.raises(WeightsError, match="is damaged or was changed: its weights and preprocessing"):
            load_embedder(str(path))
        if number % 33:
            continue
        for arguments in (["embed", ears / "eval.csv", tmp_path / "x.npy"], ["evaluate", ears / "eval.csv"]):
            result = earteach(*arguments, "--weights", path)
            assert (
                result.code == 1 and result.err.count("\n") == 1 and "teacher.safetensors: is damaged" in result.err
            ), name
        wrong = [check.what for check in verify(str(path)) if not check.passed]
        assert wrong[:2] == ["file", "fingerprint"], name
    assert not (tmp_path / "x.npy").exists()


def test_a_damaged_folder_is_refused_too(exports, ears, tmp_path, earteach):
    folder = shutil.copytree(exports / "teacher", tmp_path / "teacher")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(flipped(data, len(data) - 9, 3))
    result = earteach("embed", ears / "eval.csv", tmp_path / "x.npy", "--weights", folder)
    assert result.code == 1 and "model.safetensors: is damaged or was changed" in result.err
    result = earteach("verify", folder)
    assert result.code == 1 and b"WRONG  fingerprint" in result.out


def test_verify_finds_changes_that_do_not_affect_embeddings(exports, tmp_path):
    """Here in the sha256 of the source and in the version."""
    data = (exports / "teacher.safetensors").read_bytes()
    shutil.copy(exports / "teacher.whitening.safetensors", tmp_path)
    for word in (b'"source_sha256":"', b'"earteach":"'):
        place = data.index(word) + len(word)
        (tmp_path / "teacher.safetensors").write_bytes(flipped(data, place, 0))
        wrong = [check.what for check in verify(str(tmp_path / "teacher.safetensors")) if not check.passed]
        assert wrong == ["file"], word


def unsealed(exports: Path, folder: Path) -> tuple[Path, Path]:
    """Write the exports as version 0.1.0 did: without a digest of their bytes."""
    tensors, header = read_safetensors(exports / "teacher.safetensors")
    del header[KEY]
    save_file(tensors, folder / "teacher.safetensors", metadata=header)
    shutil.copy(exports / "teacher.whitening.safetensors", folder)
    onnx = pytest.importorskip("onnx")
    model = onnx.load(str(exports / "teacher.onnx"))
    kept = [entry for entry in model.metadata_props if entry.key != KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    (folder / "teacher.onnx").write_bytes(model.SerializeToString())
    return folder / "teacher.safetensors", folder / "teacher.onnx"


def test_an_export_without_a_digest_opens_and_verify_reports_what_is_not_checked(exports, ears, tmp_path, earteach):
    for path in unsealed(exports, tmp_path):
        result = earteach("verify", path, "--against", exports / "teacher")
        line = next(line for line in result.out.decode().splitlines() if line.split()[1] == "file")
        assert result.code == 0 and line.startswith("- ") and "not checked: " in line, result
    arguments = ["embed", ears / "eval.csv", tmp_path / "x.npy", "--weights", tmp_path / "teacher.safetensors"]
    assert earteach(*arguments).code == 0


def test_the_digest_is_of_all_other_bytes(exports):
    import hashlib

    separators = {"teacher.safetensors": b'":"', "teacher.onnx": b"\x12\x40", "teacher/model.safetensors": b'":"'}
    for name, separator in separators.items():
        data, digest = (exports / name).read_bytes(), read_digest(exports / name, separator)
        assert data.count(digest.recorded.encode()) == 1 and not digest.broken
        assert hashlib.sha256(data.replace(digest.recorded.encode(), b"0" * 64)).hexdigest() == digest.computed


def test_half_precision_passes_verify(run, tmp_path, earteach):
    assert earteach("export-backbone", run, tmp_path / "half.safetensors", "--half").code == 0
    assert load_embedder(str(tmp_path / "half.safetensors")).embedding_dim == 64
    assert all(check.passed for check in verify(str(tmp_path / "half.safetensors")))
