"""README.md: its Python runs in a base install as it stands, and its commands exist.

The lines on words run in tests/families/test_readme_words.py, those on a layout in
tests/adapters/test_joint_attention.py.
"""

import ast
import re
import shlex
import sys
from importlib.metadata import metadata
from pathlib import Path

import pytest
import torch

import i2am
from i2am.cli.app import app

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
FIRST, _KONTEXT, _LAYOUT, DATA = re.findall(r"```python\n(.+?)```", README, re.DOTALL)
SHELL = "".join(re.findall(r"```sh\n(.+?)```", README, re.DOTALL))
# without accelerate and scipy, which diffusers takes where they are installed
EXTRAS = ("matplotlib", "pyarrow", "ray", "torch_fidelity", "torchmetrics", "torchvision", "zarr")


def run(block, names):
    """Executes a block, and gives ``[shape, value]`` of every line whose comment tells them."""
    lines, shown = block.splitlines(), []
    for statement in ast.parse(block).body:
        told = re.search(r"# (\[[\d, ]+\])(?:: ([\d.]+))?", lines[statement.end_lineno - 1])
        if isinstance(statement, ast.Expr):
            value = eval(ast.unparse(statement), names)
            if told:
                shown.append((value, ast.literal_eval(told[1]), told[2]))
        else:
            exec(ast.unparse(statement), names)
    return shown


@pytest.fixture
def base_install(monkeypatch, tmp_path):
    """An empty folder, and no package of an extra."""
    for name in [*sys.modules]:
        if name.partition(".")[0] in EXTRAS:
            monkeypatch.delitem(sys.modules, name)
    for name in EXTRAS:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.chdir(tmp_path)


def test_the_first_lines_tell_what_they_give_and_give_it_twice(base_install):
    runs = []
    for _ in range(2):
        shown = run(FIRST, names := {})
        assert len(shown) == 4
        for value, shape, number in shown:
            assert list(value.shape) == shape
            assert number is None or value.item() == pytest.approx(float(number), abs=0.01)
        files = {name: Path(name).read_bytes() for name in ("maps.safetensors", "r2g.png")}
        runs.append(([value for value, *_ in shown], names["image"].tobytes(), files))
        for name in files:
            Path(name).unlink()
    (first, *rest), (again, *rest_again) = runs
    assert all(map(torch.equal, first, again))
    assert rest == rest_again


def test_the_data_set_is_where_the_commands_look(base_install):
    run(DATA, {})
    folders = set(re.findall(r"--data (\S+)", SHELL)) - {"paper-doll"}
    assert [Path(name).is_dir() for name in folders] == [True]


def test_commands_exist():
    lines = re.findall(r"^i2am (.+?)(?: +#.*)?$", SHELL, re.MULTILINE)
    assert len(lines) >= 10
    for line in lines:
        name, *arguments = shlex.split(line)
        # parses, and checks every option and choice
        app.commands[name].make_context(name, arguments)


def test_the_wheel_and_the_extras_are_those_that_exist():
    assert f"i2am-{i2am.__version__}-py3-none-any.whl" in README
    installing = README.partition("## Install\n")[2].partition("\n## ")[0]
    told = re.findall(r"^\| `(\w+)` \|", installing, re.MULTILINE)
    assert sorted(told) == sorted({*metadata("i2am").get_all("Provides-Extra")} - {"dev", "test"})
