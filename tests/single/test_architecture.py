"""The house, read from its imports: one way, no circle, Horovod and mpi4py in one file each, pure rooms pure."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "hvdlarge"
FILES = sorted(PACKAGE.rglob("*.py"))
# Whoever stands here imports only what stands before it: rooms, what rooms share, the spine, the doors.
ORDER = ["exits", "models", "schedule", "data", "optim", "reduction", "comm", "config", "replica", "resilience",
         "reporting", "telemetry", "checkpoint",
         "controller", "evaluation", "preflight", "world", "training", "study", "api"]  # fmt: skip
DOORS = {"__main__", "train", "launch", "plan", "report", "export", "pack", "doctor", "bench"}
PURE = {
    "schedule",
    "telemetry/timers.py",
    "bench/interleave.py",
    "comm/cost_model.py",
    "optim/presets.py",
    "data/order.py",
    "data/pydoc_text.py",
    "data/seeds.py",
    "data/text.py",
    "data/text_sizes.py",
}


def name_of(file):
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file) for file in FILES}


def imports(file):
    """Modules that a file imports, also those that it imports later, within a function."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are written in full"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else node.module)
    return found


def room_of(module):
    return module.split(".")[1]


def test_horovod_and_mpi4py_are_known_to_one_file_each():
    for package, home in (
        ("horovod", "comm/horovod_backend.py"),
        ("mpi4py", "comm/mpi_backend.py"),
    ):
        users = {
            file.relative_to(PACKAGE).as_posix()
            for file in FILES
            if any(module.split(".")[0] == package for module in imports(file))
        }
        assert users == {home}


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_run_one_way(file):
    importer = name_of(file)
    if importer == "hvdlarge":
        return
    for module in imports(file) & MODULES - {"hvdlarge"}:
        if room_of(module) == room_of(importer):
            continue
        assert room_of(module) not in DOORS, (
            f"{importer}: nothing imports a door, not even {module}"
        )
        if room_of(importer) not in DOORS:
            assert ORDER.index(room_of(module)) < ORDER.index(room_of(importer)), (
                f"{importer} must not import {module}"
            )


def test_there_is_no_circle():
    graph = {
        name_of(file): {
            module for module in imports(file) if module in MODULES and module != "hvdlarge"
        }
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
        pure = (
            any(inside == p.removesuffix(".py") or inside.startswith(p + "/") for p in PURE)
            or module == "hvdlarge.data"
        )
        assert top in sys.stdlib_module_names or top == "numpy" or (top == "hvdlarge" and pure), (
            f"{where} imports {module}"
        )


@pytest.mark.parametrize("door", ["plan", "doctor.__main__"])
def test_doors_that_work_without_torch_horovod_or_mpi(door):
    blocked = f"import sys\nfor name in ('torch', 'horovod', 'mpi4py'): sys.modules[name] = None\nimport hvdlarge.{door}\n"
    result = subprocess.run(
        [sys.executable, "-c", blocked], capture_output=True, text=True, cwd=PACKAGE.parent
    )
    assert result.returncode == 0, result.stderr


def test_the_house_has_at_most_30_entries():
    assert len([path for path in PACKAGE.iterdir() if path.name != "__pycache__"]) <= 30


def test_every_file_opens_with_what_it_is_for():
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        if text.strip():
            assert ast.get_docstring(ast.parse(text)), (
                f"{name_of(file)} does not say what it is for"
            )


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_no_function_is_longer_than_60_lines(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= 60, f"{name_of(file)}.{node.name} has {lines} lines"


def _is_for_type_checkers(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def test_names_are_not_attics():
    for file in FILES:
        assert file.stem not in {"utils", "util", "helpers", "common", "misc"}
        if file.name == "__init__.py":
            body = ast.parse(file.read_text(encoding="utf-8")).body
            if file.parent == PACKAGE:  # the public names, imported when they are first used
                body = body[:-1]
                body = [node for node in body if not isinstance(node, (ast.Import, ast.ImportFrom))]
                body = [node for node in body if not _is_for_type_checkers(node)]
            assert all(isinstance(node, (ast.Expr, ast.Assign)) for node in body), (
                f"{name_of(file)} does work"
            )
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                assert not node.name.endswith(("Manager", "Engine", "Handler"))
