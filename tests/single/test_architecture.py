"""The house, read from its imports: one way, no circle, Horovod and mpi4py in one file each, pure rooms pure."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "hvdlarge"
FILES = sorted(PACKAGE.rglob("*.py"))
DOORS = {"train", "launch", "plan", "doctor", "bench"}
ROOMS = {"schedule", "data", "models", "optim", "comm", "measure"}
PURE = {
    "schedule",
    "measure/timers.py",
    "measure/turns.py",
    "measure/cost_model.py",
    "optim/presets.py",
    "data/sizes.py",
    "data/order.py",
    "data/layout.py",
    "data/seeds.py",
}


def name_of(file):
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file) for file in FILES}


def imports(file, nested=True):
    """Modules that a file imports; with nested=False only those it imports when it is itself imported."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = set()
    later = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or (
            isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        ):
            later.update(id(child) for child in ast.walk(node) if child is not node)
    for node in ast.walk(tree):
        if not nested and id(node) in later:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are written in full"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else node.module)
    return found


def room_of(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else None


def floor_of(module):
    """0 for a room, 1 for the spine, 2 for a door."""
    if room_of(module):
        return 0
    return 2 if module.split(".")[-1] in DOORS else 1


def test_horovod_and_mpi4py_are_known_to_one_file_each():
    for package, home in (("horovod", "comm/horovod_wire.py"), ("mpi4py", "comm/mpi_wire.py")):
        users = {
            file.relative_to(PACKAGE).as_posix()
            for file in FILES
            if any(module.split(".")[0] == package for module in imports(file))
        }
        assert users == {home}


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_run_one_way(file):
    importer = name_of(file)
    for module in imports(file):
        if module in MODULES and module != "hvdlarge":
            assert floor_of(module) <= floor_of(importer), f"{importer} must not import {module}"
            assert floor_of(module) < 2, f"{importer}: nothing imports a door, not even {module}"


def test_there_is_no_circle():
    graph = {
        name_of(file): {module for module in imports(file, nested=False) if module in MODULES and module != "hvdlarge"}
        for file in FILES
    }
    done, path = set(), []

    def visit(module):
        assert module not in path, f"a circle: {' -> '.join([*path[path.index(module) :], module])}"
        if module not in done:
            path.append(module)
            for imported in sorted(graph[module]):
                visit(imported)
            path.pop()
            done.add(module)

    for module in sorted(graph):
        visit(module)
    assert done == MODULES


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_pure_rooms_import_the_standard_library_numpy_and_each_other(file):
    where = file.relative_to(PACKAGE).as_posix()
    if not any(where == pure or where.startswith(pure + "/") for pure in PURE):
        return
    for module in imports(file):
        top = module.split(".")[0]
        inside = module.replace(".", "/").removeprefix("hvdlarge/")
        pure = any(inside == p.removesuffix(".py") or inside.startswith(p + "/") for p in PURE) or module == "hvdlarge.data"
        assert top in sys.stdlib_module_names or top == "numpy" or (top == "hvdlarge" and pure), f"{where} imports {module}"


@pytest.mark.parametrize("door", ["plan", "doctor"])
def test_doors_that_work_without_torch_horovod_or_mpi(door):
    blocked = f"import sys\nfor name in ('torch', 'horovod', 'mpi4py'): sys.modules[name] = None\nimport hvdlarge.{door}\n"
    result = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert result.returncode == 0, result.stderr


def test_every_file_opens_with_what_it_is_for():
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        if text.strip():
            assert ast.get_docstring(ast.parse(text)), f"{name_of(file)} does not say what it is for"


def test_names_are_not_attics():
    for file in FILES:
        assert file.stem not in {"utils", "util", "helpers", "common", "misc"}
        if file.name == "__init__.py":
            body = ast.parse(file.read_text(encoding="utf-8")).body
            assert all(isinstance(node, (ast.Expr, ast.Assign)) for node in body), f"{name_of(file)} does work"
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                assert not node.name.endswith(("Manager", "Engine", "Handler"))
