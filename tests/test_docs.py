"""The pages below examples/docs, and the README, say what is there: commands, options, links, messages, snippets."""

import ast
import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import read_table

from ear_teacher_cli.command_config import EmbedConfig
from ear_teacher_cli.config import PRESETS, RENAMED, TrainConfig
from ear_teacher_cli.config_fields import flag
from ear_teacher_cli.config_files import read_toml
from ear_teacher_cli.console import Console

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "examples" / "docs"
sys.path.insert(0, str(DOCS))
import make  # noqa: E402  (the folder has to be on the path first)

ALL = sorted([*ROOT.glob("*.md"), *ROOT.glob("tests/*.md"), *ROOT.glob("examples/**/*.md")])
SAYING = [path for path in ALL if path.is_relative_to(DOCS) or path == ROOT / "README.md"]
OPENS = "Opens in one line"


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of fenced code."""
    return [(found[1], found[2]) for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)]


def section(text: str, title: str) -> str:
    return re.split(rf"^## {title}$", text, flags=re.MULTILINE)[1].split("\n## ")[0]


def formats(title: str) -> str:
    return section((DOCS / "formats.md").read_text(), title)


# The pages of the commands


def test_the_commands_pages_are_what_the_program_says():
    """Whatever the terminal and the environment."""
    env = {**os.environ, "COLUMNS": "30", "EARTEACH_NUM_WORKERS": "3", "EARTEACH_WEIGHTS": "x", "TERM": "dumb"}
    words = [sys.executable, str(DOCS / "make.py"), "--check"]
    done = subprocess.run(words, env={**env, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_page_that_is_other_missing_or_of_no_command_is_found(tmp_path, monkeypatch, capsys):
    shutil.copytree(make.PAGES, tmp_path / "commands")
    monkeypatch.setattr(make, "PAGES", tmp_path / "commands")
    assert make.main([]) == 0 and make.main(["--check"]) == 0
    (make.PAGES / "embed.md").write_text("other")
    (make.PAGES / "train.md").unlink()
    (make.PAGES / "gone.md").write_text("of no command")
    assert make.main(["--check"]) == 1 and "embed.md, gone.md, train.md" in capsys.readouterr().err
    assert make.main([]) == 0 and make.main(["--check"]) == 0 and not (make.PAGES / "gone.md").exists()


def test_every_command_has_a_page_with_all_of_its_options():
    index = (make.PAGES / "README.md").read_text()
    for name, command in make.commands().items():
        page = (make.PAGES / f"{name}.md").read_text()
        assert f"({name}.md)" in index
        for parameter in make.shown(command):
            words = [*parameter.opts, *parameter.secondary_opts] if parameter.param_type_name == "option" else []
            assert all(re.search(rf"`{re.escape(word)}[ `]", page) for word in words), (name, words)


# Links


def slug(heading: str) -> str:
    """As GitHub makes an anchor of it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_links_lead_somewhere(path):
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), f"{link}: no such file"
        if anchor:
            assert anchor in map(slug, re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)), link


def test_the_index_has_every_page():
    index = (DOCS / "README.md").read_text()
    assert all(f"({path.name})" in index for path in DOCS.glob("*.md") if path.name != "README.md")


# Commands and options


def options_of(name: str) -> set[str]:
    return {word for each in make.commands()[name].params for word in (*each.opts, *each.secondary_opts)} | {"--help"}


def said_in(text: str) -> list[str]:
    """What stands in code, each on a line of its own, and the text without it as the last."""
    lines = []
    for language, content in blocks(text):
        if language in ("", "bash", "console"):
            lines += content.replace("\\\n", " ").splitlines()
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    lines += re.findall(r"`([^`]+)`", text)
    return [*lines, re.sub(r"`[^`]+`", "", text)]


def commands_in(line: str) -> list[tuple[str, list[str]]]:
    """(command, words) of each `earteach COMMAND ...`, `-m ear_teacher_cli COMMAND ...` or `COMMAND --option` in a line."""
    found = []
    message = re.match(r"(earteach|warning): ", line)  # names commands in backticks, if any
    for part in re.findall(r"`([^`]*)`", line) if message else re.split(r"[|;>]| && |  +#|`", line):
        try:
            words = shlex.split(part)
        except ValueError:  # a sentence with an apostrophe
            words = part.split()
        for place, word in enumerate(words):
            follows = words[place + 1 : place + 2]
            if word in ("earteach", "ear_teacher_cli") and follows and re.fullmatch(r"[a-z][a-z-]+", follows[0]):
                found.append((follows[0], words[place + 2 :]))
                break
        else:
            if len(words) > 1 and words[0] in make.commands() and words[1].startswith("--"):
                found.append((words[0], words[1:]))
    return found


def flags(words: list[str]) -> list[str]:
    """`--batch_size` and `--batch-size` are one."""
    found = [re.match(r"(--[a-z][\w-]*|-[a-z]$)", word) for word in words]
    return [match[1].replace("_", "-") for match in found if match]


@pytest.mark.slow
@pytest.mark.parametrize("path", SAYING, ids=name_of)
def test_every_command_that_is_shown_exists(path):
    for line in said_in(path.read_text())[:-1]:
        for name, words in commands_in(line):
            assert name in make.commands(), line
            assert set(flags(words)) <= options_of(name), line


FOREIGN = ("python", "tensorboard", "docker", "torchrun", "pip", "ruff", "git", "srun", "make", "landmarker.py")


@pytest.mark.parametrize("path", SAYING, ids=name_of)
def test_every_option_that_is_named_exists(path):
    known = {option for name in make.commands() for option in options_of(name)}
    known |= {word for each in make.shown(make.get_command(make.app)) for word in each.opts}
    if path.name == "CHANGELOG.md":  # of earlier versions, too
        known |= {flag(name) for name in RENAMED}
    for line in said_in(path.read_text()):
        if line.split()[:1] and line.split()[0].lstrip("$ ") in FOREIGN:
            continue
        if re.match(r"(earteach|warning): ", line):  # a message, which may be of a misspelt option
            continue
        named = {word.replace("_", "-") for word in re.findall(r"(?<![\w-])--[a-z][\w-]*\w", line)}
        assert named <= known, f"{named - known}: {line[:200]}"


def test_a_command_or_an_option_that_is_not_there_would_be_found():
    assert commands_in("earteach trian --seed 1") == [("trian", ["--seed", "1"])]
    assert commands_in("find x | earteach embed - - --format npy > y")[0][0] == "embed"
    assert commands_in("torchrun -m ear_teacher_cli train --devices 8") == [("train", ["--devices", "8"])]
    assert commands_in("earteach: ears: is no run; say `earteach report RUN`") == [("report", ["RUN"])]
    assert commands_in("embed --no-whiten") == [("embed", ["--no-whiten"])]
    assert flags(["--batch_size=3", "x", "-o"]) == ["--batch-size", "-o"] and "--lerning" not in options_of("train")


# The seed's values


def seed_rows() -> dict[str, tuple[str, str]]:
    text = section((DOCS / "from-the-original.md").read_text(), "Arguments")
    rows = re.findall(r"^\| `--([\w-]+)` \| ([^|]*) \| ([^|]*) \|", text, re.MULTILINE)
    return {name.replace("-", "_"): (seed.strip(), here.strip()) for name, seed, here in rows}


def plain(text: str) -> object:
    text = text.strip("`")
    if text in ("on", "off"):
        return text == "on"
    try:
        return float(text)
    except ValueError:
        return text


def test_the_seeds_values_and_ours_are_as_the_page_has_them():
    rows = seed_rows()
    assert set(PRESETS["original"]) <= set(rows)
    configs = TrainConfig(**PRESETS["original"]), TrainConfig()
    own = {"arcface_margin": "margin", "arcface_scale": "scale"}
    for name, (seed, here) in rows.items():
        if name == "embedding_dim":
            continue
        here = seed if here == "the same" else here
        for config, said in zip(configs, (seed, here), strict=True):
            assert said == "not said" or plain(said) == getattr(config, own.get(name, name)), (name, said)


# Messages


def said_by_the_program() -> list[tuple[list[str], re.Pattern]]:
    """Of every text in the package what is constant in it, and a pattern: what is put into it may be anything, what is
    constant is in groups."""
    found = []
    for path in (ROOT / "ear_teacher_cli").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else None for part in node.values]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts = [node.value]
            else:
                continue
            constant = [part for part in parts if part]
            if sum(map(len, constant)) >= 8:
                pattern = "".join(".*?" if part is None else f"({re.escape(part)})" for part in parts)
                found.append((constant, re.compile(pattern)))
    return found


def unsaid(line: str, patterns: list[tuple[list[str], re.Pattern]]) -> list[str]:
    """Plain words of a line, but for what the system says in parentheses, that no text of the program has there."""
    covered = set()
    for constant, pattern in patterns:
        if not all(part in line for part in constant):
            continue
        for match in pattern.finditer(line):
            for group in range(1, (pattern.groups or 0) + 1):
                covered.update(range(*match.span(group)))
    words = re.finditer(r"(?<![\w./=-])[a-z]{2,}(?![\w./=-])", line)
    nested = r"\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)"
    covered.update(place for match in re.finditer(nested, line) for place in range(*match.span()))
    return [word[0] for word in words if not covered.issuperset(range(*word.span()))]


def quoted() -> list[str]:
    return [line for _, block in blocks((DOCS / "when-it-goes-wrong.md").read_text()) for line in block.splitlines()]


@pytest.mark.slow
def test_every_message_that_is_quoted_is_said():
    """But for a name or two that were put into it."""
    patterns = said_by_the_program()
    lost = {line: words for line in quoted() if len(words := unsaid(line, patterns)) > 2}
    assert len(quoted()) > 30 and not lost, lost
    assert len(unsaid("earteach: x.npy: is no soup at all; add salt, pepper and a carrot", patterns)) > 6


def test_every_figure_of_a_run_is_explained(run):
    text = (DOCS / "metrics.md").read_text().split("## Losses")[1].split("## Typical values")[0]
    for column in set(read_table(run / "metrics.csv")[-1]) - {"epoch", "step"}:
        split, _, name = column.partition("/")
        assert f"`{column}`" in text or (name.endswith("loss") and f"`{name}`" in text), column


# Formats


def test_the_names_of_columns_on_the_page_are_those_that_are_understood():
    from ear_teacher_cli.data.formats import columns

    page = (DOCS / "formats.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|$", page.split("### Recognised column names")[1], re.MULTILINE))
    named = {
        key: re.findall(r"`([^`]+)`", value.split(":")[0].split(" and the like")[0]) for key, value in rows.items()
    }
    for key, groups in (
        ("box as corners", columns.CORNERS),
        ("box as corner and size", columns.SIZES),
        ("box as centre and size", columns.CENTRES),
    ):
        assert named[key] == [", ".join(group) for group in groups]
    for key, names in (
        ("path of the image (required)", columns.PATH),
        ("box in one column", columns.BOX),
        ("order of that column", columns.BOX_ORDER),
        ("keypoints", columns.KEYPOINTS),
        ("side", columns.SIDE),
    ):
        assert tuple(named[key]) == names, key
    assert tuple(named["identity"][: len(columns.IDENTITY)]) == columns.IDENTITY


def test_the_manifests_on_the_page_are_one_list(tmp_path, monkeypatch):
    from ear_teacher_cli.data.manifest import read_manifest

    monkeypatch.chdir(tmp_path)
    suffixes = {"csv": ".csv", "jsonl": ".jsonl", "json": ".json"}
    for language, content in blocks(formats("Manifests")):
        if language == "python":
            exec(content, {})
        elif language in suffixes:
            (tmp_path / f"x{suffixes[language]}").write_text(content)
    first, *others = [read_manifest(tmp_path / f"x{suffix}") for suffix in (".npy", *suffixes.values())]
    assert first.paths == ["p016/00.jpg", "p016/01.jpg"] and first.identities == ["p016", "p016"]
    for other in others:
        assert (other.paths, other.identities, other.sides) == (first.paths, first.identities, first.sides)
        assert [box == pytest.approx(own) for box, own in zip(other.boxes, first.boxes, strict=True)] == [True, True]


@pytest.fixture(scope="module")
def opened(run, ears, tmp_path_factory) -> Path:
    """A folder with what the snippets open. One of the embedded images is missing."""
    from ear_teacher_cli.embedding.writer import embed
    from ear_teacher_cli.export.export import export_backbone

    folder = tmp_path_factory.mktemp("opened")
    names = (ears / "eval.csv").read_text().splitlines()
    gone = names[1].replace("images/", "images/gone/")
    (folder / "list.csv").write_text("\n".join([*names[:3], gone, *names[3:], ""]))
    quiet = Console(quiet=True)
    shutil.copytree(run, folder / "run")
    whitened = export_whitened(run, ears, folder)
    export_backbone(whitened, folder / "x.safetensors")
    if all(find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")):
        export_backbone(whitened, folder / "x.onnx")
    for out, options in (("out.npy", {}), ("all.csv", {}), ("raw.npy", {"whiten": False}), ("zipped.npz", {})):
        config = EmbedConfig(weights=str(folder / "x.safetensors"), root_dir=str(ears), num_workers=0, **options)
        embed(str(folder / "list.csv"), str(folder / out), config, quiet)
    (folder / "zipped.npz").rename(folder / "out.npz")
    shutil.copy(ears / "images" / "p008" / "00.jpg", folder / "photo.jpg")
    return folder


def export_whitened(run: Path, ears: Path, folder: Path) -> Path:
    """A run of one epoch that fits a whitening."""
    from conftest import small_config

    from ear_teacher_cli.training.run import train

    manifests = ["", str(ears / "train_teacher.npy"), "", str(ears / "val_teacher.npy")]
    config = small_config(manifests, output_dir=str(folder), experiment_name="white", max_epochs=1, whiten=True)
    return train(config, Console(quiet=True)).experiment


# What must hold after a snippet has run; N, the readable images of the list, is set before.
CHECKS = {
    "numpy:": "assert rows.shape == archive['embeddings'].shape and len(archive['paths']) == len(archive['boxes']) == N",
    "numpy, the whitening put on raw rows:": "assert abs(rows - numpy.load('out.npy')).max() < 1e-5",
    "numpy, which rows of `embed` are nearest to an image:": "assert nearest.shape == (5,) and query.shape == (1, 64)",
    "pandas:": "assert len(names) == len(table) == N and table.shape[1] == 64 and len(epochs) == 7",
    "FAISS (rows are of unit length, so the inner product is the cosine):": "assert neighbour[:, 0].tolist() == [0, 1, 2, 3, 4] and len(rows) == N",
    "The embedding projector (`tensorboard`'s \"Load\" button, or the one at projector.tensorflow.org, which runs in the browser):": "assert [len(open(f + '.tsv').readlines()) for f in ('vectors', 'metadata')] == [N, N]",
    "torch:": "assert len(rows) == N and 'stem.0.weight' in weights and 'model.backbone.stem.0.weight' in checkpoint['state_dict']",
    "onnxruntime:": "assert embedding.shape == (2, 64)",
}  # fmt: skip


def snippets() -> dict[str, str]:
    """What stands above a snippet -> the snippet."""
    return dict(re.findall(r"^([^\n]+:)\n\n```python\n(.*?)^```$", formats(OPENS), re.MULTILINE | re.DOTALL))


@pytest.mark.slow
@pytest.mark.parametrize("title", snippets(), ids=lambda title: re.match(r"[\w ]+", title)[0])
def test_a_snippet_opens_what_was_written(title, opened):
    code = snippets()[title]
    imported = [
        alias.name for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import) for alias in node.names
    ]
    imported += [node.module for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
    if missing := sorted({name.split(".")[0] for name in imported if not find_spec(name.split(".")[0])}):
        pytest.skip(f"{', '.join(missing)} not installed here; the snippet is for those who have it")
    count = json.loads((opened / "out.json").read_text())["rows"]
    code = f"N = {count}\n{code}\n{CHECKS[title]}\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=opened, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def run_snippet(code: str, folder: Path) -> str:
    """What it prints, run by a Python of its own in that folder."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def python_of(path: Path, word: str) -> str:
    """The block of Python on a page that has `word` in it."""
    (found,) = [
        content
        for language, content in blocks(path.read_text(encoding="utf-8"))
        if language == "python" and word in content
    ]
    return found


@pytest.mark.slow
def test_the_example_of_distillation_runs_after_an_export(run, ears, tmp_path):
    from ear_teacher_cli.export.export import export_backbone

    export_backbone(run, tmp_path / "teacher")
    shutil.copytree(ears / "images", tmp_path / "ears" / "images")
    said = run_snippet(python_of(DOCS / "distillation.md", "Distillation(teacher"), tmp_path).splitlines()
    losses = [float(line.split()[1]) for line in said]
    assert len(losses) == 20 and losses[-1] < 0.9 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["timm.task", "lightly_train"])
def test_other_tools_distil_from_an_exported_folder(tool, run, ears, tmp_path):
    from ear_teacher_cli.export.export import export_backbone

    pytest.importorskip(tool, reason=f"{tool} is not installed")
    export_backbone(run, tmp_path / "teacher")
    shutil.copytree(ears / "images", tmp_path / "images")
    code = python_of(DOCS / "distillation.md", f"import {'timm, timm.task' if tool == 'timm.task' else tool}")
    few = "batch_size=8, epochs=1, num_workers=0, method_args="
    run_snippet(code.replace("(96, 96)", "(64, 64)").replace("method_args=", few), tmp_path)


@pytest.mark.slow
def test_the_example_of_embedding_gives_a_row_of_embed(run, ears, tmp_path, earteach):
    shutil.copy(ears / "images" / "p008" / "00.jpg", tmp_path / "photo.jpg")
    assert earteach("export-backbone", run, tmp_path / "teacher.safetensors").code == 0
    (tmp_path / "list.csv").write_text("image_path,x1,y1,x2,y2\nphoto.jpg,40,30,180,260\n")
    words = ["embed", tmp_path / "list.csv", tmp_path / "x.npy", "--weights", tmp_path / "teacher.safetensors"]
    assert earteach(*words).code == 0
    check = "import numpy; assert abs(rows - numpy.load('x.npy')).max() < 1e-5 and rows.shape == (1, 64)"
    run_snippet(python_of(ROOT / "README.md", "load_embedder") + check, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("path", [ROOT / "README.md", DOCS / "from-the-original.md"], ids=name_of)
def test_the_example_of_training_runs_without_a_gpu(path, manifests, tmp_path):
    from conftest import small_config

    code = python_of(path, "pl.Trainer")
    small = small_config(manifests, output_dir=str(tmp_path), max_epochs=1).as_dict()
    for option, value in (
        ("batch_size=32, num_workers=4", "**small"),
        ("learning_rate=1e-4, max_epochs=100", "**small"),
        ("max_epochs=100, ", "max_epochs=1, "),
    ):
        assert code.count(option) == 1
        code = code.replace(option, value)
    assert "cuda" not in code and '"gpu"' not in code
    run_snippet(
        f"small = {small!r}\n{code}\nassert (model.trainer.current_epoch, model.trainer.global_step) == (1, 3)",
        tmp_path,
    )


def test_every_snippet_is_checked():
    assert set(snippets()) == set(CHECKS)
    assert formats(OPENS).count("```python") == len(CHECKS)


def test_headers_on_the_page_are_those_that_are_written(opened, run, tmp_path):
    def header(file: Path) -> list[str]:
        with open(file, encoding="utf-8", newline="") as lines:
            return next(csv.reader(lines))

    def first_lines(title: str, language: str) -> list[list[str]]:
        return [content.splitlines()[0].split(",") for kind, content in blocks(formats(title)) if kind == language]

    metrics, bad = first_lines("An experiment", "csv")
    assert set(metrics) <= set(header(run / "metrics.csv"))
    assert ",".join(bad) in (ROOT / "ear_teacher_cli/training/guards.py").read_text().replace('"', "").replace(
        ", ", ","
    )
    names, whole = first_lines("Embeddings", "csv")
    assert names == header(opened / "out.csv") and whole == header(opened / "all.csv")[: len(whole)]
    about = json.loads((opened / "out.json").read_text())
    shown = next(json.loads(content) for kind, content in blocks(formats("Embeddings")) if kind == "json")
    assert set(shown) <= set(about)
    toml = tmp_path / "config.toml"
    toml.write_text(next(content for kind, content in blocks(formats("An experiment")) if kind == "toml"))
    assert read_toml(toml)["pad"] is True
