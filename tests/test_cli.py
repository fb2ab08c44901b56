"""Words: what is typed, what is answered, and with which exit code."""

import dataclasses
import io
import json
import logging
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ear_teacher_cli import __version__, config_fields, library_messages
from ear_teacher_cli.cli import help_format
from ear_teacher_cli.cli.app import app, get_command
from ear_teacher_cli.command_config import EmbedConfig, EvaluateConfig
from ear_teacher_cli.config import PRESETS, RESUMABLE, TrainConfig, describe_recipe, preset
from ear_teacher_cli.config_files import from_dict, read_toml
from ear_teacher_cli.errors import ConfigError

COMMANDS = [
    "prepare",
    "validate-data",
    "train",
    "resume",
    "report",
    "collage",
    "export-backbone",
    "verify",
    "distill",
    "embed",
    "evaluate",
]
# As the seed prints it in "Custom Configuration", with its underscores.
SEED_COMMAND = """--batch_size 64 --learning_rate 1e-3 --max_epochs 200 --reconstruction_weight 1.0 --metric_weight 0.1
    --metric_loss arcface --num_pseudo_classes 512 --arcface_margin 0.5 --precision bf16-mixed --devices 1
    --experiment_name my_experiment"""
SMALL_AND_DRY = "--no-pretrained --backbone test_convnext --image-size 64 --num-workers 0 --dry-run -q".split()
SEED_DEFAULTS = dict(
    train_metadata="data/preprocessed/train_teacher.npy",
    val_metadata="data/preprocessed/val_teacher.npy",
    batch_size=32,
    num_workers=8,
    image_size=224,
    bbox_buffer=0.10,
    augment=False,
    pretrained_path="models/convnext_tiny_22k_224.pth",
    projection_dim=256,
    learning_rate=1e-4,
    weight_decay=1e-4,
    warmup_epochs=10,
    max_epochs=100,
    reconstruction_weight=1.0,
    metric_weight=0.1,
    metric_loss="arcface",
    num_pseudo_classes=512,
    arcface_margin=0.5,
    arcface_scale=64.0,
    num_collage_samples=10,
    precision="16-mixed",
    output_dir="ear_teacher/outputs/",
    experiment_name="ear_teacher",
)


def test_the_original_preset_has_the_seeds_defaults():
    config = TrainConfig(**PRESETS["original"])
    assert {name: getattr(config, name) for name in SEED_DEFAULTS if not name.startswith("arcface")} | {
        "arcface_margin": config.margin,
        "arcface_scale": config.scale,
    } == SEED_DEFAULTS
    assert config.hflip == 0.0 and config.backbone == "convnext_tiny"


def test_version_0_1_0_called_the_preset_seed():
    assert preset("seed") == preset("original") == PRESETS["original"] and "seed" not in PRESETS


def test_a_preset_in_a_file_is_below_the_files_options_and_the_flags(manifests, tmp_path, earteach):
    """And below a preset that is typed."""

    def resolved(*words) -> dict:
        small = "--no-pretrained --backbone test_convnext --image-size 64 --num-workers 0 --batch-size 8 --dry-run -q"
        said = earteach("train", *manifests, *small.split(), "--config", tmp_path / "c.toml", *words)
        assert said.code == 0, said.err
        return tomllib.loads(said.out.decode())

    (tmp_path / "c.toml").write_text('learning_rate = 0.5\npreset = "original"\n')
    original, recommended = (preset(name) | {"learning_rate": 0.5} for name in ("original", "recommended"))
    assert original.items() <= resolved().items()
    assert (original | {"views": 2, "augment": True}).items() <= resolved("--views", 2, "--augment").items()
    assert recommended.items() <= resolved("--preset", "recommended").items()
    (tmp_path / "c.toml").write_text('preset = "seed"\n')
    assert preset("original").items() <= resolved().items()
    (tmp_path / "c.toml").write_text("max_bad = 0.5\n")
    assert recommended.items() <= resolved("--learning-rate", 0.5).items()
    assert original.items() <= resolved("--learning-rate", 0.5, "--preset", "original").items()


def test_the_seeds_command_is_accepted_with_its_underscores(ears, manifests, tmp_path, earteach):
    names = sorted(path.relative_to(ears).as_posix() for path in (ears / "images").glob("p00[0-5]/*.jpg"))
    (tmp_path / "many.csv").write_text("\n".join(["image_path", *names * 3]))  # 72 rows: a batch is 64
    small = "--no-pretrained --backbone test_convnext --image_size 64 --num_workers 0 --dry-run"
    lists = ["--train-metadata", tmp_path / "many.csv", *manifests[2:], "--root-dir", ears, "--allow-overlap"]
    said = earteach("train", *lists, *shlex.split(SEED_COMMAND), *small.split())
    assert said.code == 0, said.err
    for line in (
        "batch_size = 64",
        "learning_rate = 0.001",
        "max_epochs = 200",
        'precision = "bf16-mixed"',
        "devices = 1",
        'experiment_name = "my_experiment"',
    ):
        assert line in said.out.decode()


@pytest.mark.parametrize("option", sorted({*SEED_DEFAULTS, "embedding_dim"} - {"augment"}))
def test_every_option_of_the_seed_takes_its_underscores(option, earteach):
    # a value that none of them takes: the explain_system_error is about the value, so the name was understood
    said = earteach("train", f"--{option}", "")
    assert said.code in (1, 2) and "No such option" not in said.err


def test_options_and_config_fields_are_the_same():
    own = {"config", "preset", "dry_run", "overwrite", "quiet", "verbose", "help_all"}
    options = {option.name: option for option in get_command(app).commands["train"].params}
    assert set(options) - own == {f.name for f in dataclasses.fields(TrainConfig)}
    for field in dataclasses.fields(TrainConfig):
        assert options[field.name].default == field.default
        assert field.metadata["help"].endswith(".")


def test_every_option_is_a_field_and_written_once():
    """Fields of one name in several commands come from one place, `shared`, or are those of TrainConfig."""
    found: dict[str, list] = {}
    for command in get_command(app).commands.values():
        for option in command.params:
            if option.param_type_name == "option":
                spec = help_format.spec_of(option)
                assert spec["help"] == option.help and spec["panel"] in config_fields.PANELS, option.name
                found.setdefault(option.name, []).append((command.name, spec))
    for name, specs in found.items():
        several = [spec for command, spec in specs if command not in ("resume", "distill")]
        if len(several) > 1 and name not in ("out", "format", "whiten", "val_metadata"):  # other options of that name
            assert name in config_fields._SHARED, name
            assert len({spec.get("metavar") for spec in several}) == 1
    folder = Path(config_fields.__file__).parent
    makers = [
        path.relative_to(folder).as_posix() for path in folder.rglob("*.py") if "typer.Option(" in path.read_text()
    ]
    assert sorted(makers) == ["cli/app.py", "cli/options.py"]  # of app.py: --version


def test_distill_has_trains_options_with_the_same_help():
    commands = get_command(app).commands
    of_train = {option.name: help_format.spec_of(option) for option in commands["train"].params}
    own = {"pad", "config", "dry_run", "overwrite", "help_all", "head_lr_mult", "monitor", "pretrained_path", "images"}
    own |= {"experiment_name", "compile", "accumulate_grad_batches"}
    for option in commands["distill"].params:
        if option.name in of_train.keys() - own:
            assert help_format.spec_of(option)["help"] == of_train[option.name]["help"], option.name


def test_resume_has_trains_options_and_no_defaults():
    commands = get_command(app).commands
    of_train = {option.name: help_format.spec_of(option) for option in commands["train"].params}
    for option in commands["resume"].params:
        if option.name in RESUMABLE:
            spec = help_format.spec_of(option)
            assert spec["default"] is None and spec["help"] == f"{of_train[option.name]['help']} Default: the run's."
            assert option.envvar is None


def test_options_with_a_path_or_a_name_are_private_and_not_loggable():
    for owner in (TrainConfig, EmbedConfig, EvaluateConfig):
        for spec in dataclasses.fields(owner):
            free = config_fields.scalar_of(config_fields.kinds_of(owner)[spec.name]) is str
            if free and "choices" not in spec.metadata and spec.name not in ("backbone", "accelerator"):
                assert spec.metadata.get("private"), spec.name
    told = TrainConfig(root_dir="/home/me", identity_column="patient").loggable()
    assert told["metric_loss"] == "arcface" and told["batch_size"] == 32
    private = {spec.name for spec in dataclasses.fields(TrainConfig) if spec.metadata.get("private")}
    assert {"train_metadata", "root_dir", "identity_column", "pretrained_path", "experiment_name"} <= private
    assert not private & set(told) and not {"num_workers", "devices", "output_dir", "precision"} & set(told)


def test_earlier_names_of_options_still_work_and_are_not_shown(manifests, tmp_path, earteach):
    words = ["train", *manifests, *SMALL_AND_DRY, "--batch-size", 8]
    said = earteach(*words, "--keep-start", 0.25, "--head_rate", 3)
    assert said.code == 0, said.err
    assert b"baseline_weight = 0.25\n" in said.out and b"head_lr_mult = 3.0\n" in said.out
    (tmp_path / "c.toml").write_text("keep-start = 0.75\nhead_rate = 2\n")
    said = earteach(*words, "--config", tmp_path / "c.toml")
    assert b"baseline_weight = 0.75\n" in said.out and b"head_lr_mult = 2.0\n" in said.out
    old = TrainConfig().as_dict() | {"keep_start": 0.125}
    del old["baseline_weight"]
    assert from_dict(old, "old.ckpt").baseline_weight == 0.125
    shown = earteach("train", "--help-all").out.decode()
    assert "--baseline-weight" in shown and not re.search("keep.start|head.rate", shown)
    assert "--baseline-weight: 2.0 is too large" in earteach("train", "--keep-start", 2).err


def test_the_original_preset_clusters_as_its_document_says_and_batch_is_the_control(manifests, earteach):
    words = ["train", *manifests, *SMALL_AND_DRY, "--batch-size", 8]
    for name in ("original", "seed"):
        said = earteach(*words, "--preset", name)
        assert said.code == 0 and b'pseudo_classes = "kmeans"' in said.out and b"views = 1" in said.out, said.err
    said = earteach(*words, "--preset", "original", "--pseudo-classes", "batch")
    assert said.code == 0 and b'pseudo_classes = "batch"' in said.out
    assert "seed" not in earteach("train", "--help").out.decode().split("Data:")[0]
    # of a version that had no such option
    old = {name: value for name, value in TrainConfig().as_dict().items() if name != "pseudo_classes"}
    assert from_dict(old, "old.ckpt").pseudo_classes == "batch"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "recommended (defaults; the original package's documented values: --preset original)"),
        (["--preset", "original", "--seed", 3], "original (the documented values of the original ear_teacher package)"),
        (["--metric-loss", "cosface"], "recommended + 1 option changed: --metric-loss"),
        (
            ["--preset", "original", "--metric-loss", "cosface", "--max-epochs", 3],
            "original + 2 options changed: --max-epochs, --metric-loss",
        ),
    ],
)
def test_train_prints_which_recipe_is_followed(words, line, manifests, earteach):
    said = earteach("train", *manifests, "--dry-run", "--num-workers", 0, "--pretrained-path", "nope.pth", *words)
    assert said.code == 1 and said.err.splitlines()[0] == f"recipe: {line}", said.err


def test_a_recipe_with_many_changes_stays_one_line():
    options = {"batch_size": 8, "image_size": 64, "pretrained": False, "backbone": "x", "hflip": 0.5, "denoise": False}
    line = describe_recipe(TrainConfig(**options, temperature=0.1, max_bad=0.5, seed=4))
    assert line.startswith("recommended + 7 options changed: --") and line.endswith(" and 1 more") and len(line) < 140


def test_verbose_shows_the_traceback_before_the_line_and_quiet_contradicts_it(tmp_path, monkeypatch, earteach):
    plain = earteach("embed", "nope", tmp_path / "x.npy")
    said = earteach("embed", "nope", tmp_path / "x.npy", "-v")
    assert plain.code == said.code == 1 and said.err.endswith(plain.err) and len(plain.err.splitlines()) == 1
    assert said.err.startswith("Traceback (most recent call last):") and "ManifestError" in said.err
    assert earteach("embed", "nope", tmp_path / "x.npy").err == plain.err  # the next command is not verbose
    for command in COMMANDS:
        arguments = {"resume": ["x"], "report": ["x"], "verify": ["x"], "collage": ["x", "-o", "y.png"]}
        two = arguments.get(
            command, ["x", "y"] if command in ("prepare", "embed", "export-backbone", "distill") else []
        )
        said = earteach(command, *two, "-q", "-v")
        assert said.code == 2 and said.err == "earteach: --verbose: contradicts --quiet; give one of the two\n"
    monkeypatch.setenv("EARTEACH_QUIET", "1")
    assert "Traceback" in earteach("embed", "nope", tmp_path / "x.npy", "--verbose").err


def test_messages_of_libraries_are_shown_only_if_asked_for(monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    monkeypatch.setattr(logging.root.manager, "disable", 0)  # whatever was tested before
    log = logging.getLogger("some_library")
    library_messages.show(True)
    try:
        log.info("loading")
        assert library_messages.are_shown() and library_messages.warning_action() == "default"
    finally:
        library_messages.show(False)
    log.info("loading again")
    assert stream.getvalue() == "some_library: loading\n" and library_messages.warning_action() == "ignore"


@pytest.mark.slow
def test_results_as_json_have_the_documented_keys(run, ears, tmp_path, earteach):
    page = (Path(__file__).parent.parent / "examples" / "docs" / "formats.md").read_text(encoding="utf-8")
    section = page.split("## Results as JSON")[1].split("\n## ")[0]
    documented = [json.loads(block) for block in re.findall(r"^```json\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)]
    out, rows = tmp_path / "teacher.safetensors", tmp_path / "rows.npy"
    for words, keys in zip(
        (
            ["export-backbone", run, out],
            ["verify", out],
            ["embed", ears / "eval.csv", rows, "--weights", out, "--num-workers", 0],
        ),
        documented,
        strict=True,
    ):
        target = tmp_path / f"{words[0]}.json"
        said = earteach(*words, "--json", target)
        assert said.code == 0, said.err
        content = json.loads(target.read_text())
        assert list(content) == list(keys)
        assert earteach(*words, "--json", target).code == 2  # it exists
        said = earteach(*words, "--json", "-", "--overwrite")
        assert said.code == 0 and list(json.loads(said.out)) == list(keys)
    assert (content["rows"], content["skipped"], content["dim"]) == (12, 0, 64) and content["out"] == str(rows)
    said = earteach("embed", ears / "eval.csv", "-", "--weights", out, "--json", "-")
    assert said.code == 2 and "--json -: stdout has the embeddings already" in said.err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_page_ends_in_an_example(command, earteach):
    said = earteach(command, "--help")
    assert said.code == 0 and f"earteach {command}" in said.out.decode() and b"Example:" in said.out
    assert said.out.decode().split("Example:")[1].count("--help") == 0  # at the end of the page


def test_help_loads_neither_torch_nor_numpy_nor_pillow():
    code = (
        "import sys; sys.argv = ['earteach', '--help']\nfrom ear_teacher_cli.cli.app import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'numpy', 'PIL', 'timm', 'pytorch_lightning') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_validate_data_loads_no_torch(ears):
    code = (
        f"import sys; sys.argv = ['earteach', 'validate-data', {str(ears / 'val_teacher.npy')!r}]\n"
        "from ear_teacher_cli.cli.app import main\ntry: main()\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_without_words_it_shows_the_way(earteach):
    said = earteach()
    lines = said.out.decode().splitlines()
    assert said.code == 0 and said.err == "" and len(lines) <= len(COMMANDS) + 3 and max(map(len, lines)) <= 80
    named = re.findall(r"^  earteach ([a-z-]+)", said.out.decode(), re.MULTILINE)
    assert named == [command for command in COMMANDS if command != "verify"] and "verify" in said.out.decode()


@pytest.mark.slow
def test_the_environment_has_defaults(manifests, monkeypatch, earteach, tmp_path):
    (tmp_path / "c.toml").write_text("devices = 1\n")
    monkeypatch.setenv("EARTEACH_NUM_WORKERS", "3")
    monkeypatch.setenv("EARTEACH_CACHE_LIMIT", "1")
    monkeypatch.setenv("EARTEACH_IMAGES", "false")
    monkeypatch.setenv("EARTEACH_DEVICES", "64")
    words = ["--no-pretrained", "--backbone", "test_convnext", "--image-size", "64", "--config", tmp_path / "c.toml"]
    said = earteach("train", *manifests, *words, "--cache-limit", "2", "--dry-run")
    toml = said.out.decode()
    assert said.code == 0, said.err
    assert "num_workers = 3\n" in toml and "images = false" in toml
    assert "cache_limit = 2.0\n" in toml and "devices = 1\n" in toml  # typed, and from the file
    assert "from the environment: EARTEACH_NUM_WORKERS, " in said.err and "EARTEACH_IMAGES" in said.err


def test_strange_variables_of_the_environment_are_said(monkeypatch, earteach):
    monkeypatch.setenv("EARTEACH_NUMWORKERS", "3")
    assert "EARTEACH_NUMWORKERS: earteach knows no such environment variable" in earteach().err
    assert "did you mean EARTEACH_NUM_WORKERS?" in earteach().err
    monkeypatch.delenv("EARTEACH_NUMWORKERS")
    monkeypatch.setenv("EARTEACH_PRECISION", "8")
    said = earteach("train")
    assert said.code == 2 and "EARTEACH_PRECISION: '8' is not known" in said.err


def test_no_variable_of_the_environment_is_part_of_a_recipe():
    variables = {spec.name for spec in dataclasses.fields(TrainConfig) if spec.metadata.get("environment")}
    assert len(variables) > 10 and not variables & {name for values in PRESETS.values() for name in values}


@pytest.mark.parametrize(
    "words, expected",
    [
        ("train --metric-loss ", "arcface"),
        ("train --preset r", "recommended"),
        ("train --monitor val/r", "val/retrieval"),
        ("train --cach", "--cache"),
        ("embed x - --format ", "npz"),
        ("exp", "export-backbone"),
    ],
)
def test_the_shell_completes_commands_options_and_choices(words, expected):
    shell = {
        "_EARTEACH_COMPLETE": "complete_bash",
        "COMP_WORDS": f"earteach {words}",
        "COMP_CWORD": str(len(f"earteach {words}".split(" ")) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-c", "from ear_teacher_cli.cli.app import main; main()"],
        env=os.environ | shell,
        capture_output=True,
        text=True,
    )
    assert expected in done.stdout.split(), (done.stdout, done.stderr)


def test_version(earteach):
    said = earteach("--version")
    assert said.code == 0 and said.out.decode() == f"earteach {__version__}\n"


@pytest.mark.parametrize(
    "words, hint",
    [
        (["trian"], "train"),
        (["train", "--batch-sise", "3"], "train: no such option --batch-sise; did you mean --batch-size? See"),
        (["embed", "x"], "OUT"),
        (["resume"], "RUN"),
        (["fit"], "no such command 'fit'; see `earteach --help`"),
        (["eval", "x.npy"], "no such command 'eval'; did you mean evaluate? See `earteach --help`"),
        (["train", "-x"], "train: no such option -x; see `earteach train --help`"),
        (["train", "--batch"], "no such option --batch; did you mean --batch-size?"),
        (["--batch-size", "3"], "no such option --batch-size before the command; give it after: `earteach COMMAND "),
        (["train", "--max-epochs"], "earteach: --max-epochs: no value is given; give a whole number\n"),
        (["train", "--metric-loss"], "--metric-loss: no value is given; give one of arcface, cosface, none\n"),
        (
            ["train", "--experiment-name", "--overwrite"],
            "--experiment-name: no value is given before --overwrite; give",
        ),
        (["train", "--pad=yes"], "--pad: takes no value; give --pad or --no-pad alone\n"),
        (["train", "more"], "train: too many arguments (more); usage: earteach train [OPTIONS]\n"),
        (["embed", "a", "b", "c"], "embed: too many arguments (c); usage: earteach embed [OPTIONS] INPUT OUT\n"),
        (["embed", "x"], "embed: OUT is missing; usage: earteach embed [OPTIONS] INPUT OUT\n"),
        (["collage", "x"], "--out is missing; add --out FILE.png\n"),
        (["evaluate", "--compare", "a"], "--compare: needs 2 values; give A B\n"),
        (
            ["train", "--batch-size", "many"],
            "earteach: --batch-size: 'many' is not a whole number; give a whole number\n",
        ),
        (["train", "--batch_size=3.5"], "--batch-size: '3.5' is not a whole number; give a whole number\n"),
        (["train", "--learning-rate", "fast"], "--learning-rate: 'fast' is not a number; give a number\n"),
        (["evaluate", "x", "--far", "0.1", "--far", "x"], "--far: 'x' is not a number; give a number\n"),
        (["evaluate", "x", "--bootstrap", "-3"], "--bootstrap: -3 is too small; use at least 0\n"),
        (["evaluate", "x", "--bootstrap", "1000000"], "--bootstrap: 1000000 is too large; use at most 100000\n"),
    ],
)
def test_wrong_words_are_exit_2_with_a_hint(words, hint, earteach):
    said = earteach(*words)
    assert said.code == 2 and hint in said.err and said.out == b"" and len(said.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("EARTEACH_NUM_WORKERS", "many", "'many' is not a whole number; give a whole number"),
        ("EARTEACH_NUM_WORKERS", "-1", "-1 is too small; use at least 0"),
        ("EARTEACH_QUIET", "perhaps", "'perhaps' is not true or false; give true or false"),
    ],
)
def test_a_wrong_value_in_the_environment_names_the_variable(name, value, found, monkeypatch, earteach):
    monkeypatch.setenv(name, value)
    said = earteach("embed", "x", "y.npy")
    assert said.code == 2 and said.err == f"earteach: {name}: {found}\n"


def test_resume_says_of_every_option_of_train_that_the_run_fixes_it(earteach):
    own = {each.name: each for each in get_command(app).commands["resume"].params}
    free = [f"--{name.replace('_', '-')}" for name in own if name in RESUMABLE]
    assert len(free) == len(RESUMABLE)
    for option in get_command(app).commands["train"].params:
        for name in [*option.opts, *option.secondary_opts] if option.name not in own else []:
            said = earteach("resume", "x", name.replace("-", "_").replace("__", "--", 1), "8")
            fixed = option.name not in ("dry_run", "overwrite", "help_all")
            assert said.code == 2 and len(said.err.splitlines()) == 1, said.err
            assert (f"{name}: is fixed by the run; leave it out, or start a new run" in said.err) == fixed, said.err
            assert (f"(resume may change {', '.join(free[:-1])} and {free[-1]})" in said.err) == fixed
            assert not (fixed and "did you mean" in said.err)


def test_an_option_that_is_given_twice_counts_the_last_time(tmp_path, monkeypatch, earteach):
    monkeypatch.chdir(tmp_path)
    words = ["train", "--batch-size", "64", "--batch_size=1", "--pad", "--no-pad", "--overwrite", "--overwrite"]
    first, second, last = earteach(*words).err.splitlines()
    assert first == "--batch-size: given more than once; the last one counts (1)"
    assert second == "--pad and --no-pad: the last one counts (--no-pad)"
    assert last == "earteach: --batch-size: 1 is too small; use at least 2"
    assert earteach(*words, "-q").err.splitlines() == [last]
    assert "more than once" not in earteach("evaluate", "x.npy", "--far", "0.1", "--far", "0.2").err


@pytest.mark.parametrize(
    "words, named",
    [
        (["train", "--batch-size", "0"], "--batch-size: 0 is too small; use at least 2"),
        (["train", "--image-size", "100"], "--image-size: 100 is not a multiple of 32; use 96 or 128"),
        (["train", "--learning-rate", "nan"], "--learning-rate: nan is not a finite number"),
        (
            ["train", "--metric-loss", "triplet"],
            "--metric-loss: 'triplet' is not known; choose one of arcface, ",
        ),
        (["train", "--backbone", "convnext_tinny", "--no-pretrained"], "--backbone: timm has no model"),
        (
            ["train", "--preset", "original", "--metric-loss", "none", "--reconstruction-weight", "0"],
            "nothing to learn",
        ),
        (["train", "--preset", "best"], "--preset: 'best' is not known; choose one of recommended, original"),
        (
            ["train", "--monitor", "val/metric_loss", "--pseudo-classes", "none"],
            "--monitor: val/metric_loss is not part of this run",
        ),
        (
            ["train", "--views", "1"],
            "--contrastive-weight: compares two views, but there is one; add --views 2, or --contrastive-weight 0",
        ),
        (["train", "--no-augment"], "--views: 2 of an image that does not vary are one; add --augment, or --views 1"),
        (["train", "--experiment-name", "a/b"], "--experiment-name"),
        (
            ["train", "--no-pretrained", "--accelerator", "abacus"],
            "--accelerator: 'abacus' with 1 device(s) is not available on this machine",
        ),
    ],
)
def test_impossible_values_name_the_flag_and_the_range(words, named, manifests, earteach):
    said = earteach(*words, *manifests)
    assert said.code == 2 and named in said.err and len(said.err.splitlines()) <= 2


@pytest.mark.parametrize(
    ("size", "told"),
    [
        (24, None),
        (25, None),
        (33, "33 is more than the 24 images of "),
        (10**6, "1000000 is more than the 24 images of "),
    ],
)
def test_a_batch_may_be_all_images_and_no_more(size, told, manifests, earteach):
    """But the default, which nobody typed."""
    said = earteach("train", *manifests, *SMALL_AND_DRY, "--batch-size", size)
    if told:
        assert said.code == 2 and f"--batch-size: {told}" in said.err and said.err.endswith("; use at most 24\n")
        return
    assert said.code == 0
    said = earteach("train", *manifests, *SMALL_AND_DRY[:-1], "--batch-size", size)
    line = f"batch size: {size} is more than the 24 images there are; every step takes all of them"
    assert (line in said.err) == (size > 24)


def test_more_processes_than_cores_are_warned_of(manifests, monkeypatch, earteach):
    words = [*SMALL_AND_DRY, "--batch-size", 8, "--accelerator", "cpu", "--devices", 4]
    monkeypatch.setattr("ear_teacher_cli.training.launch.usable_cores", lambda: 2)
    said = earteach("train", *manifests, *words)
    assert said.code == 0 and "--devices: 4 processes are to share 2 CPU cores" in said.err
    assert said.err.count("warning") == 1 and "use --devices 2 or less" in said.err
    assert "warning" not in earteach("train", *manifests, *words[:-1], 2).err


@pytest.mark.parametrize(
    "words",
    [
        ["validate-data", "nope.npy"],
        ["train", "--train-metadata", "nope.npy"],
        ["resume", "nope"],
        ["report", "nope"],
        ["collage", "nope", "-o", "c.png"],
        ["export-backbone", "nope", "x.safetensors"],
        ["embed", "nope", "x.npy"],
        ["train", "--config", "nope.toml"],
        ["embed", "nope.jpg", "x.npy"],
        ["evaluate", "nope.npy"],
    ],
)
def test_a_missing_file_is_one_line_and_exit_1(words, tmp_path, monkeypatch, earteach):
    monkeypatch.chdir(tmp_path)
    said = earteach(*words)
    assert said.code == 1 and ("nope" in said.err or b"nope" in said.out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text, named",
    [
        ("batch_sise = 3", "c.toml line 1: unknown option 'batch_sise'; did you mean batch_size?"),
        ("batch_size = ", "not readable as TOML"),
        ("# mine\n\nbatch_size = 'many'", "c.toml line 3: batch_size: 'many' is not a whole number"),
        ("views = 2\n'metric-loss' = 'arcfce'", "c.toml line 2: metric_loss: 'arcfce' is not known; choose one of"),
        ("views = 2\n[model]\nbackbone = 'x'", "c.toml line 2: unknown option 'model'"),
        ("backbone = ['x']", "c.toml line 1: backbone: holds several values"),
        ('experiment_name = "a\\u0000b"', "holds a NUL byte"),
        ("batch_size = 1", "c.toml line 1: batch_size: 1 is too small; use at least 2"),
        ("augment = 1", "is not true or false"),
        ("batch-size = 2.5", "2.5 is not a whole number"),
        ("batch-size = 2\nbatch_size = 3", "given twice"),
        (
            "views = 2\npreset = 'best'",
            "c.toml line 2: preset: 'best' is not known; choose one of recommended, original",
        ),
        ("preset = ['original']", "c.toml line 1: preset: holds several values"),
        ("presett = 'original'", "unknown option 'presett'; did you mean preset?"),
        (
            "overwrite = true",
            "c.toml line 1: 'overwrite' cannot be set in a file; give --overwrite on the command line",
        ),
    ],
)
def test_config_files_are_checked(text, named, tmp_path, earteach):
    (tmp_path / "c.toml").write_text(text + "\n")
    said = earteach("train", "--config", tmp_path / "c.toml")
    assert said.code in (1, 2) and named in said.err


def test_config_holds_plain_values_only():
    import numpy as np

    config = TrainConfig(batch_size=np.int64(4), learning_rate=np.float32(0.5), root_dir=Path("/tmp"))
    assert {type(v) for v in config.as_dict().values()} <= {str, int, float, bool, type(None)}


def test_cosface_has_its_own_margin_also_through_a_saved_config(tmp_path):
    assert TrainConfig(metric_loss="cosface", margin_preset="paper").margin == 0.35
    assert TrainConfig(metric_loss="cosface", arcface_margin=0.2).margin == 0.2
    (tmp_path / "c.toml").write_text(TrainConfig(metric_loss="arcface", margin_preset="paper").as_toml())
    assert TrainConfig(**read_toml(tmp_path / "c.toml") | {"metric_loss": "cosface"}).margin == 0.35
    with pytest.raises(ConfigError):
        TrainConfig(arcface_margin=-0.1)


def test_a_warmup_that_does_not_fit_is_a_fifth_of_the_run():
    assert TrainConfig(max_epochs=3, warmup_epochs=10).warmup == pytest.approx(0.6)
    assert TrainConfig(max_epochs=100, warmup_epochs=10).warmup == 10


def test_16_mixed_falls_back_in_one_line(manifests, earteach):
    said = earteach(
        "train",
        *manifests,
        "--no-pretrained",
        "--backbone",
        "test_convnext",
        "--image-size",
        "64",
        "--num-workers",
        "0",
        "--dry-run",
        "--accelerator",
        "cpu",
    )
    assert said.err.count("precision: 16-mixed needs a GPU; training in full precision (32-true)") == 1
    assert b'precision = "32-true"' in said.out


def test_no_pretrained_weights_and_no_network_name_both_ways_out(manifests, tmp_path, monkeypatch, earteach):
    monkeypatch.chdir(tmp_path)
    said = earteach("train", *manifests)
    assert said.code == 1 and "--pretrained-path" in said.err and "--no-pretrained" in said.err
    assert list(tmp_path.iterdir()) == []


def test_readme_and_commands_agree():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    assert {c for c in re.findall(r"earteach ([a-z][a-z-]+)", readme)} - {"alone"} == set(COMMANDS)
