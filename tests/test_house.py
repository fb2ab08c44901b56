"""The house rules: imports go down, dangerous calls have one home."""

import ast
import re
import tomllib
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "ear_teacher_cli"
# A package imports its own modules, those to its left, and the modules beside the packages.
PACKAGES = ("data", "model", "embedding", "export", "quality", "distillation", "training", "report", "cli", "__main__")


def floor(name: str) -> int:
    top = name.split("/")[0]
    return 1 + PACKAGES.index(top) if top in PACKAGES else 0


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


def test_imports_go_down():
    for name, tree in modules().items():
        for other in imported(name, tree) - {"__init__"}:
            if name != "__init__":  # which imports lazily, by name
                assert floor(other) <= floor(name), f"{name} imports {other}"


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
        "torch.load": ["model/checkpoint"],
        "np.load": [],
        "numpy.load": [],
        "pickle.load": [],
        "pickle.loads": [],
        "Image.open": ["data/crop", "data/jpeg", "drawing"],
    }
    for call, expected in homes.items():
        assert sorted(name for name, tree in modules().items() if call in calls(tree)) == expected, call


def test_only_the_command_line_prints():
    for name, tree in modules().items():
        if not name.startswith("cli/"):
            assert "print" not in calls(tree), name


def test_only_the_command_line_imports_typer():
    for name, tree in modules().items():
        imports = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
        imports += [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        knows = any(module.split(".")[0] == "typer" for module in imports)
        assert name.startswith("cli/") or not knows, name


def test_functions_and_modules_stay_short():
    for name, tree in modules().items():
        assert len((PACKAGE / f"{name}.py").read_text().splitlines()) <= 400, name
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 80, f"{name}: {node.name}"


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
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert settings["packages"] == {"find": {"include": ["ear_teacher_cli*"]}}
    assert all((folder / "__init__.py").exists() for folder in folders)  # without one it is not found
    data = settings["package-data"]["ear_teacher_cli"]
    others = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert {path for pattern in data for path in PACKAGE.glob(pattern)} == others and PACKAGE / "py.typed" in others
