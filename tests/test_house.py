"""The house rules: imports go down, dangerous calls have one home."""

import ast
import re
import tomllib
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "ear_teacher_cli"
FLOORS = {
    "errors": 0,
    "files": 0,
    "config": 0,
    "talk": 0,
    "machine": 0,
    "platform": 0,
    "__init__": 0,
    "help_format": 1,
    "usage": 2,
    "data": 2,
    "core": 3,
    "commands": 4,
    "cli": 5,
    "__main__": 6,
}


@cache
def modules() -> dict[str, ast.Module]:
    return {p.relative_to(PACKAGE).with_suffix("").as_posix(): ast.parse(p.read_text()) for p in PACKAGE.rglob("*.py")}


def imported(name: str, tree: ast.Module) -> set[str]:
    """Modules of the package that `name` imports, by path; also imports inside functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            parts = name.split("/")
            base = parts[: len(parts) - node.level] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                path = "/".join([*base, alias.name])
                found.add(path if (PACKAGE / f"{path}.py").exists() else "/".join(base) or "__init__")
    return found


def test_imports_go_down_and_verbs_do_not_import_verbs():
    for name, tree in modules().items():
        floor = FLOORS[name.split("/")[0]]
        for other in imported(name, tree) - {"__init__"}:
            if name == "__init__":  # lazily, by name
                continue
            below = FLOORS[other.split("/")[0]]
            assert below < floor or (below == floor and floor < 4), f"{name} imports {other}"


def test_no_import_cycles():
    graph = {name: imported(name, tree) for name, tree in modules().items() if name != "__init__"}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@cache
def calls(tree: ast.Module) -> list[str]:
    return [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_dangerous_readers_have_one_home():
    homes = {
        "torch.load": ["core/checkpoint"],
        "np.load": [],
        "numpy.load": [],
        "pickle.load": [],
        "pickle.loads": [],
        "Image.open": ["core/pictures", "data/crop", "data/jpeg"],
    }
    for call, expected in homes.items():
        assert sorted(name for name, tree in modules().items() if call in calls(tree)) == expected, call


def test_the_core_never_prints():
    for name, tree in modules().items():
        if FLOORS[name.split("/")[0]] < 5:
            assert "print" not in calls(tree), name


def test_only_the_mouth_and_its_help_know_typer():
    for name, tree in modules().items():
        imports = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
        imports += [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        knows = any(module.split(".")[0] == "typer" for module in imports)
        assert knows == (name in ("cli", "help_format")), name


def test_no_blind_except():
    for name, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None and ast.unparse(node.type) not in ("Exception", "BaseException"), name


def test_mean_and_std_have_one_home():
    for path in PACKAGE.rglob("*.py"):
        assert "0.485" not in path.read_text(), path


def test_the_readme_has_a_line_for_every_file():
    readme = (PACKAGE.parent / "README.md").read_text()
    layout = readme[readme.index("\near_teacher_cli/\n") :].split("```")[0]
    found, folders = [], {}
    for line in layout.splitlines():
        entry = re.match(r"^( +)(\w+\.py|\w+/)(?: +\S.*)?$", line)
        if entry and entry[2].endswith("/"):
            folders[len(entry[1])] = folders.get(len(entry[1]) - 2, "") + entry[2]
        elif entry:
            found.append(folders.get(len(entry[1]) - 2, "") + entry[2])
    files = [p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py")]
    assert sorted(found) == sorted(name for name in files if name.count("/") == 0 or not name.endswith("__init__.py"))


def test_a_built_package_has_every_module_and_its_mark_of_types():
    settings = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {path.parent.relative_to(PACKAGE.parent).as_posix().replace("/", ".") for path in PACKAGE.rglob("*.py")}
    assert set(settings["packages"]) == folders
    assert settings["package-data"] == {"ear_teacher_cli": ["py.typed"]} and (PACKAGE / "py.typed").exists()
