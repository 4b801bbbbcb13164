"""The law of imports: which room may import which. The exceptions only become fewer."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

# what every room may import: leaves, which import each other and nothing else of ours
LEAVES = {"files", "lazy", "memory", "missing", "wording"}
# room -> the rooms below it that it may import
LAW = {
    "kernels": set(),
    "attribution": {"kernels"},
    "data": {"attribution"},
    "metrics": {"attribution", "data"},
    "layouts": {"attribution"},
    "plots": {"attribution", "data"},
    "viewer": {"attribution", "data", "plots"},
    "adapters": {"attribution", "data", "kernels", "layouts"},
    "models": {"adapters", "attribution", "data", "layouts"},
    "training": {"adapters", "attribution", "data", "layouts", "metrics", "models", "plots"},
    "evaluation": {"adapters", "attribution", "data", "metrics", "models"},
    "testing": {"attribution", "kernels"},
}
LAW["cli"] = {*LAW} - {"testing"}
# names of the package itself
PUBLIC = {"AttributionMaps", "Recorder", "__version__", "record"}
EXCEPTIONS = {
    # AttributionMaps.plot and its picture in a notebook
    ("attribution", "plots"),
    ("attribution", "viewer"),
}


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of ours, with its room."""
    for path in sorted((ROOT / "i2am").rglob("*.py")):
        room = path.relative_to(ROOT / "i2am").parts[0].removesuffix(".py")
        if room not in ("__init__", "__main__"):
            yield room, path
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        yield "kernels", path


def imported(path: Path) -> set[str]:
    """The rooms that a module imports, also inside of functions and for types alone."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "i2am":
            names += [f"i2am.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports by a relative name"
            names.append(node.module or "")
    return {name.split(".")[1] for name in names if name.startswith("i2am.")}


def arrows() -> dict[tuple[str, str], list[str]]:
    """From which room to which, and the modules that import so."""
    found: dict[tuple[str, str], list[str]] = {}
    for room, path in modules():
        for other in imported(path) - {room, *PUBLIC}:
            found.setdefault((room, other), []).append(str(path.relative_to(ROOT)))
    return found


def test_nothing_imports_upward():
    for (room, other), where in arrows().items():
        allowed = LEAVES if room in LEAVES else LAW[room] | LEAVES
        assert other in allowed or (room, other) in EXCEPTIONS, (
            f"{room} must not import {other}: {', '.join(where)}"
        )


def test_every_exception_is_needed():
    assert arrows().keys() >= EXCEPTIONS


def test_the_law_has_no_circles():
    for room, below in LAW.items():
        for other in below:
            assert room not in LAW[other], f"{room} and {other} may import each other"
