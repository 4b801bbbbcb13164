"""Files are written and read by the functions of i2am.files alone, which do it without faults."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("i2am", "kernels", "benchmarks")
FORBIDDEN = {
    *("os.replace", "os.rename", "os.link", "os.fsync", "shutil.rmtree"),
    *("json.load", "json.loads", "torch.load"),
}
METHODS = {"rename", "replace"}


def uses(text):
    """What a module mentions of `FORBIDDEN`, under any name; and calls that rename a `Path`."""
    tree = ast.parse(text)
    names, found = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.add(f"{names.get(node.value.id, node.value.id)}.{node.attr}")
        # of a path, which has one argument; a string is replaced with two
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if len(node.args) == 1 and not node.keywords and node.func.attr in METHODS:
                found.add(f".{node.func.attr}")
    return found & (FORBIDDEN | {f".{name}" for name in METHODS})


def test_no_other_module_does_it():
    found = set()
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if not name.startswith("i2am/files/"):
                found |= {(name, use) for use in uses(path.read_text(encoding="utf-8"))}
    assert found == set()


@pytest.mark.parametrize(
    ("text", "use"),
    [
        ("import os\nos.replace(a, b)", "os.replace"),
        ("import os as system\nsystem.rename(a, b)", "os.rename"),
        ("from os import fsync\nfsync(1)", "os.fsync"),
        ("from shutil import rmtree as remove", "shutil.rmtree"),
        ("def f():\n    import json\n    return map(json.loads, lines)", "json.loads"),
        ("import torch\ntorch.load(file, weights_only=True)", "torch.load"),
        ("path.rename(other)", ".rename"),
        ("(folder / name).replace(other)", ".replace"),
    ],
)
def test_what_is_found(text, use):
    assert use in uses(text)


@pytest.mark.parametrize("text", ["text.replace('a', 'b')", "json.dumps(1)", "'os.replace(a, b)'"])
def test_what_is_not(text):
    assert uses(text) == set()
