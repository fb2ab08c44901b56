"""The .npy reader builds arrays and plain values, and nothing else."""

import os
import pickle
import shlex

import numpy as np
import pytest

from ear_teacher_cli.data.npy import read_npy
from ear_teacher_cli.errors import ManifestError


class Command:
    """Unpickling it would run a command."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "content",
    [
        {"image_paths": ["a", "b"], "bboxes": np.arange(8, dtype=np.float32).reshape(2, 4)},
        {"image_paths": np.array(["a", "b"]), "bboxes": [[1, 2, 3, 4], [5, 6, 7, 8]]},
        {"image_paths": np.array(["a", "b"], dtype=object), "bboxes": np.arange(8.0).reshape(2, 4), "n": np.float64(3)},
    ],
)
def test_what_the_seed_saves_reads_back(tmp_path, content, protocol):
    path = tmp_path / "x.npy"
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
        pickle.dump(np.array(content, dtype=object), file, protocol=protocol)
    back = read_npy(path)
    assert set(back) == set(content)
    for name in content:
        assert np.array_equal(np.asarray(back[name]), np.asarray(content[name]))


def test_a_plain_array_reads_back(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(6).reshape(2, 3))
    assert np.array_equal(read_npy(tmp_path / "x.npy"), [[0, 1, 2], [3, 4, 5]])


def test_a_pickle_that_would_run_a_command_is_refused_and_runs_nothing(tmp_path):
    proof = tmp_path / "proof"
    np.save(tmp_path / "evil.npy", np.array({"image_paths": Command(f"touch {shlex.quote(str(proof))}")}, dtype=object))
    with pytest.raises(ManifestError, match=r"system.*nothing was run"):
        read_npy(tmp_path / "evil.npy")
    assert not proof.exists()
    np.load(tmp_path / "evil.npy", allow_pickle=True)  # noqa: TID251  (proves that the file does run it elsewhere)
    assert proof.exists()


@pytest.mark.parametrize("name", ["builtins.eval", "numpy.load", "functools.partial", "pathlib.PosixPath"])
def test_every_other_global_is_refused_by_name(tmp_path, name):
    module, attribute = name.rsplit(".", 1)
    code = f"c{module}\n{attribute}\n(S'1'\ntR.".encode()
    with open(tmp_path / "x.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
        file.write(code)
    with pytest.raises(ManifestError, match=name.replace(".", r"\.")):
        read_npy(tmp_path / "x.npy")


@pytest.mark.parametrize("cut", [3, 20, 90, 130, 200])
def test_damaged_files_are_our_error(tmp_path, cut):
    np.save(tmp_path / "x.npy", np.array({"image_paths": ["a"] * 20}, dtype=object))
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:cut])
    with pytest.raises(ManifestError, match=r"x\.npy"):
        read_npy(tmp_path / "x.npy")


class Structured:
    """A dtype whose state hides an object pointer among eight plain bytes."""

    def __reduce__(self):
        return np.dtype, ("V8", False, True), (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0)


class HiddenState(Structured):
    """The same, under the name of a plain type."""

    def __reduce__(self):
        return np.dtype, ("f8", False, True), (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0)


class Pointer:
    """An array (or scalar) of that type over bytes of the attacker's choice."""

    def __init__(self, kind, scalar: bool):
        self.kind, self.scalar = kind, scalar

    def __reduce__(self):
        if self.scalar:
            return np._core.multiarray.scalar, (self.kind(), b"A" * 8)
        return np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), (1, (1,), self.kind(), False, b"A" * 8)


@pytest.mark.parametrize("kind", [Structured, HiddenState])
@pytest.mark.parametrize("scalar", [True, False])
def test_a_type_that_forges_pointers_is_refused(tmp_path, kind, scalar):
    with open(tmp_path / "x.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
        pickle.dump({"image_paths": [Pointer(kind, scalar)]}, file, protocol=3)
    with pytest.raises(ManifestError, match="not plain"):
        read_npy(tmp_path / "x.npy")
