"""Mutated manifests, images, checkpoints and embeddings: every outcome must be success or an error of ours.

    python tests/fuzz.py --manifests 100000 --images 4000 --weights 1000 --embeddings 1000     # make fuzz

A case is a function of (kind, seed, number): a fault is printed with these three, its bytes are kept with --keep, and
`--only KIND NUMBER` runs it again. Each case has a time limit, and the process a limit of memory.
"""

import argparse
import io
import json
import resource  # noqa: TID251  (limits of memory, to find what takes too much)
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from ear_teacher_cli.data.crop import buffered_box, check_box, cut, load_crop
from ear_teacher_cli.data.manifest import read_manifest, write_manifest
from ear_teacher_cli.data.preprocessing import Preprocessing
from ear_teacher_cli.embedding.files import read_embeddings
from ear_teacher_cli.errors import EarTeachError
from ear_teacher_cli.files import printable

SECONDS, MEMORY = 20, 12 * 2**30
PREPROCESSING = Preprocessing(32, 0.1, True, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
TOKENS = [b"NaN", b"Infinity", b"1e400", b"-1", b"0", b'"', b",", b"\n", b"\r", b"\0", b"[", b"{", b"]", b"null", b"=1+1",
          b"../../", b"/etc/passwd", b"\xff\xfe", b"\xf0\x9f", b"\x80\x04", b"cos\nsystem\n", b"R.", b"99999999999999999999",
          b"\x8a\xff", b"\x94", b"h\x00", b"(", b"t", b"e", b"image_path", b"bbox", b"x1", b"U999999999", b"O8"]  # fmt: skip


class TooSlow(BaseException):
    """Not an Exception: nothing under test may take it for one of its own."""


def mutated(data: bytes, others: list[bytes], chance: np.random.Generator) -> bytes:
    """A few of: flipped bits, other bytes, tokens, cuts, repeats, ends off, pieces of other files."""
    for _ in range(int(chance.integers(1, 4))):
        place = int(chance.integers(0, len(data) + 1))
        length = int(min(len(data) - place, 2 ** chance.integers(0, 6)))
        piece = data[place : place + length]
        way = int(chance.integers(0, 8))
        if way == 0 and piece:
            piece = bytes([piece[0] ^ (1 << int(chance.integers(8)))]) + piece[1:]
        elif way == 1:
            piece = chance.bytes(length)
        elif way == 2:
            piece = TOKENS[int(chance.integers(len(TOKENS)))] + piece
        elif way == 3:
            piece = TOKENS[int(chance.integers(len(TOKENS)))]
        elif way == 4:
            piece = b""
        elif way == 5:
            piece = piece * int(chance.integers(2, 20))
        elif way == 6:
            other = others[int(chance.integers(len(others)))]
            start = int(chance.integers(0, len(other) + 1))
            piece = other[start : start + length]
        else:
            return data[:place]
        data = data[:place] + piece + data[place + length :]
    return data


def changed(data: bytes, others: list[bytes], chance: np.random.Generator) -> bytes:
    """Mostly one small change, in the body of the file: what a reader takes further before it finds it."""
    if chance.random() < 0.3:
        return mutated(data, others, chance)
    body = 128 if data[:6] == b"\x93NUMPY" else 0
    place = int(chance.integers(body, len(data)))
    word = (
        TOKENS[int(chance.integers(len(TOKENS)))] if chance.random() < 0.5 else bytes([int(chance.integers(32, 127))])
    )
    return data[:place] + word + data[place + int(chance.integers(0, 1 + len(word))) :]


def manifest_corpus(folder: Path) -> list[tuple[str, bytes]]:
    rows = [("a.jpg", [1, 2, 30, 40]), ("b/c.png", [5.5, 6, 70, 80]), ("d.jpg", [0, 0, 9, 9])]
    paths, boxes = [path for path, _ in rows], np.array([box for _, box in rows], np.float32)
    found: list[tuple[str, bytes]] = []
    for protocol in range(6):
        file = io.BytesIO()
        content = {"image_paths": np.array(paths, object), "bboxes": boxes, "identities": ["x", "y", "z"]}
        if protocol % 2:
            content = {
                "image_paths": paths,
                "bboxes": [[list(box)] for box in boxes.tolist()],
                "sides": np.array(["l", "r", ""]),
            }
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
        import pickle

        pickle.dump(np.array(content, object), file, protocol)
        found.append((".npy", file.getvalue()))
    table = "image_path,x1,y1,x2,y2,identity,side\n" + "".join(f"{p},{','.join(map(str, b))},x,left\n" for p, b in rows)
    lines = "".join(json.dumps({"image_path": p, "bbox": b, "identity": "x"}) + "\n" for p, b in rows)
    coco = {"images": [{"id": i, "file_name": p} for i, p in enumerate(paths)],
            "annotations": [{"image_id": i, "bbox": b} for i, (_, b) in enumerate(rows)]}  # fmt: skip
    keypoints = np.array([[[1, 2, 2], [30, 40, 2], [0, 0, 0]]] * 3, np.float32)
    file = io.BytesIO()
    np.save(file, np.array({"image_paths": paths, "keypoints": keypoints, "box_format": "xyxy"}, object))
    found.append((".npy", file.getvalue()))
    sizes = "filename;X;Y;Width;Height;label\n" + "".join(f"{p};{';'.join(map(str, b))};ear\n" for p, b in rows)
    shares = "".join(json.dumps({"file_name": p, "cx": 0.5, "cy": 0.5, "w": 0.1, "h": 0.2}) + "\n" for p, _ in rows)
    texts = [(".csv", sizes), (".jsonl", shares), (".csv", table), (".jsonl", lines), (".json", json.dumps(coco))]
    return found + [(suffix, text.encode()) for suffix, text in texts]


def try_manifest(path: Path) -> None:
    """Read it, look at its rows as validate-data and training do, write it and read it back."""
    manifest = read_manifest(path, path.parent)
    image = Image.new("RGB", (64, 48))
    for i in range(min(4, len(manifest))):
        manifest.where(i), manifest.side(i), manifest.ear(i)
        try:
            manifest.file(i)
            if manifest.boxes[i] is not None:
                check_box(manifest.boxes[i])
                low, high = buffered_box(manifest.boxes[i], (64, 48), 0.1)[:2], (64, 48)
                assert all(value <= limit for value, limit in zip(low, high, strict=True)) or min(low) >= 0
            assert cut(image, manifest.boxes[i], PREPROCESSING).size == (32, 32)
        except EarTeachError:
            pass
    for suffix in (".npy", ".jsonl", ".csv"):
        out = path.with_name(f"back{suffix}")
        write_manifest(manifest, out)
        back = read_manifest(out, path.parent)
        paths = [path.removeprefix("./") for path in back.paths]
        assert paths == [path.removeprefix("./") for path in manifest.paths], "another path came back"
        assert list(back.identities or []) == list(manifest.identities or []), "another identity came back"


def image_corpus(folder: Path) -> list[tuple[str, bytes]]:
    noise = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    image, found = Image.fromarray(noise), []
    ways = [("JPEG", image, {"progressive": True}), ("JPEG", image, {}), ("JPEG", image.convert("CMYK"), {}), ("PNG", image, {}),
            ("PNG", image.convert("P"), {}), ("WEBP", image, {}), ("TIFF", image, {"compression": "tiff_lzw"}), ("TIFF", image, {}),
            ("BMP", image, {}), ("GIF", image, {"save_all": True, "append_images": [image.rotate(90)]}), ("JPEG2000", image, {}),
            ("PPM", image, {})]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = 8
    for form, source, options in [*ways, ("JPEG", image, {"exif": exif})]:
        file = io.BytesIO()
        source.save(file, form, **options)
        found.append((".jpg", file.getvalue()))
    return found


def try_image(path: Path) -> None:
    assert load_crop(str(path), None, PREPROCESSING).shape == (3, 32, 32)


def weights_corpus(folder: Path) -> list[tuple[str, bytes]]:
    """A checkpoint of a real run, its export, and a plain state dict."""
    import torch
    from safetensors.torch import save_file

    from ear_teacher_cli.config import TrainConfig
    from ear_teacher_cli.console import Console
    from ear_teacher_cli.export.export import export_backbone
    from ear_teacher_cli.model.checkpoint import read_checkpoint
    from ear_teacher_cli.training.run import train

    (folder / "ears").mkdir()
    for i in range(8):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 30, 3), np.uint8)).save(
            folder / "ears" / f"{i}.png"
        )
    ears = str(folder / "ears")
    config = TrainConfig(train_metadata=ears, val_metadata=ears, backbone="test_convnext", pretrained=False, image_size=32,
                         batch_size=4, num_workers=0, max_epochs=1, output_dir=str(folder), experiment_name="run",
                         allow_overlap=True)  # fmt: skip
    train(config, Console(quiet=True))
    whole = folder / "run" / "checkpoints" / "last.ckpt"
    export_backbone(whole, folder / "export.safetensors")
    state = read_checkpoint(whole).backbone_state
    torch.save(state, folder / "plain.pth")
    torch.save(state, folder / "old.pth", _use_new_zipfile_serialization=False)
    save_file({"a": torch.zeros(3)}, folder / "small.safetensors")
    names = ["export.safetensors", "small.safetensors", "plain.pth", "old.pth"]
    return [(".ckpt", whole.read_bytes()), *((Path(name).suffix, (folder / name).read_bytes()) for name in names)]


def mutated_weights(data: bytes, others: list[bytes], chance: np.random.Generator) -> bytes:
    """Bytes anywhere; or, of an archive, those of its pickle alone, with checksums that agree; or those of a header."""
    if data[:2] == b"PK" and chance.random() < 0.7:
        file = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w") as new:
            for name in old.namelist():
                content = old.read(name)
                new.writestr(name, changed(content, [content], chance) if name.endswith("data.pkl") else content)
        return file.getvalue()
    if chance.random() < 0.7:
        return changed(data[:4096], [data[:4096]], chance) + data[4096:]
    return mutated(data, others, chance)


def try_weights(path: Path) -> None:
    from ear_teacher_cli.embedding.embedder import load_embedder
    from ear_teacher_cli.model.checkpoint import read_checkpoint, read_tensors, require_fit

    if path.suffix == ".ckpt":
        checkpoint = read_checkpoint(path)
        require_fit(checkpoint, checkpoint.model_state)
    else:
        read_tensors(path)
    load_embedder(str(path), *(() if path.suffix == ".ckpt" else ("test_convnext", 32)))


def embeddings_corpus(folder: Path) -> list[tuple[str, bytes]]:
    rows = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    np.save(folder / "x.npy", rows)
    np.savez(
        folder / "x.npz", embeddings=rows, paths=np.array(["a", "b", "c", "d"]), boxes=np.zeros((4, 4), np.float32)
    )
    np.savez_compressed(folder / "y.npz", embeddings=rows, paths=np.array(["a", "b", "c", "d"]))
    table = "row,path,x1,y1,x2,y2,e0,e1,e2\n" + "".join(
        f"{i},p{i}.jpg,,,,,{r[0]},{r[1]},{r[2]}\n" for i, r in enumerate(rows)
    )
    files = [(Path(name).suffix, (folder / name).read_bytes()) for name in ("x.npy", "x.npz", "y.npz")]
    for name in ("x.npy", "x.npz", "y.npz"):
        (folder / name).unlink()
    return [*files, (".csv", table.encode())]


def try_embeddings(path: Path) -> None:
    if path.suffix == ".npy":
        path.with_suffix(".csv").write_text(
            "row,path,x1,y1,x2,y2,status\n" + "".join(f"{i},p{i},,,,,ok\n" for i in range(4))
        )
    found = read_embeddings(path)
    assert len(found.rows) == len(found.paths) == len(found.boxes)
    np.asarray(found.rows).sum()


KINDS: dict[str, tuple[Callable, Callable, Callable]] = {
    "manifests": (manifest_corpus, changed, try_manifest),
    "images": (image_corpus, changed, try_image),
    "weights": (weights_corpus, mutated_weights, try_weights),
    "embeddings": (embeddings_corpus, changed, try_embeddings),
}


def run(kind: str, count: int, seed: int, keep: Path | None, only: int | None = None) -> Counter:
    """Outcomes of `count` cases: 'read', 'refused', 'FAULT'. Faults are printed."""
    corpus_of, mutate, attempt = KINDS[kind]
    outcomes: Counter = Counter()

    def late(number: int, frame: object) -> None:
        raise TooSlow(f"not done in {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = corpus_of(folder)
        others = [data for _, data in corpus]
        for number in range(count) if only is None else [only]:
            chance = np.random.default_rng([seed, sorted(KINDS).index(kind), number])
            suffix, data = corpus[int(chance.integers(len(corpus)))]
            data = mutate(data, others, chance)
            path = folder / f"case{suffix}"
            path.write_bytes(data)
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                attempt(path)
                outcome = "read"
            except EarTeachError as error:
                outcome = "refused"
                text = printable(error)
                if len(text) > 2000:
                    outcome = "FAULT"
                    print(
                        f"FAULT {kind} --seed {seed} --only {kind} {number}: an error of {len(text)} characters: {text[:200]!r}"
                    )
            except (Exception, TooSlow):  # noqa: BLE001  (whatever it is, it is what is looked for)
                outcome = "FAULT"
                print(
                    f"FAULT {kind} --seed {seed} --only {kind} {number}\n{traceback.format_exc(limit=-4)}", flush=True
                )
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            if outcome == "FAULT" and keep is not None:
                keep.mkdir(exist_ok=True)
                (keep / f"{kind}-{seed}-{number}{suffix}").write_bytes(data)
            outcomes[outcome] += 1
            for left in folder.glob("case*"):
                left.unlink()
    return outcomes


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind in KINDS:
        parser.add_argument(f"--{kind}", type=int, default=0, help="cases (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the bytes that made a fault")
    parser.add_argument("--only", nargs=2, metavar=("KIND", "NUMBER"), help="one case again")
    options = parser.parse_args(words)
    counts = {kind: getattr(options, kind) for kind in KINDS}
    if options.only:
        counts = {options.only[0]: 1}
    faults = 0
    for kind, count in counts.items():
        if count:
            start = time.monotonic()
            outcomes = run(kind, count, options.seed, options.keep, int(options.only[1]) if options.only else None)
            faults += outcomes["FAULT"]
            figures = ", ".join(f"{outcomes[name]} {name}" for name in ("read", "refused", "FAULT"))
            print(f"{kind}: {sum(outcomes.values())} cases, {figures}; {time.monotonic() - start:.0f} s", flush=True)
    return 1 if faults else 0


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.RLIM_INFINITY))
    sys.exit(main())
