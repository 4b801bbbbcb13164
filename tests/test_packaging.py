"""What is installed, what an import costs, and that the name ``kernels`` stays Hugging Face's.

Every import runs in a process of its own, since this one has imported everything already.
"""

import os
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import (
    PackageNotFoundError,
    entry_points,
    metadata,
    requires,
    version,
)
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import i2am

ROOT = Path(__file__).resolve().parent.parent

PUBLIC = [
    "IMACS",
    "AttributionMaps",
    "Direction",
    "Patch",
    "Recorder",
    "TokenLayout",
    "__version__",
    "imacs",
    "load_maps",
    "record",
    "release",
]


def run(code, *, path=(), cwd="/", safe_path=True):
    """Run code in a fresh interpreter and return what it printed."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path:
        env["PYTHONPATH"] = os.pathsep.join(map(str, path))
    flags = ["-P"] if safe_path else []
    done = subprocess.run(
        [sys.executable, *flags, "-c", code],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


# The surface


def test_public_names_are_pinned():
    assert i2am.__all__ == PUBLIC
    assert set(PUBLIC) <= set(dir(i2am))


def test_packages_are_attributes_and_listed():
    code = """
import i2am, sys
print(*sorted(set(dir(i2am)) - set(vars(i2am)) - set(i2am.__all__)), "torch" in sys.modules)
print(i2am.metrics.imacs_scores.__name__)
"""
    *rooms, torch_is_loaded, name = run(code, path=[ROOT])
    folders = {path.parent.name for path in (ROOT / "i2am").glob("*/__init__.py")}
    assert set(rooms) == {*folders, "kernels"} - {"cli"}
    assert (torch_is_loaded, name) == ("False", "imacs_scores")


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_resolves(name):
    assert getattr(i2am, name) is not None


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'i2am' has no attribute 'recrod'"):
        _ = i2am.recrod


def test_version_is_one():
    assert version("i2am") == i2am.__version__


def test_command_is_installed():
    (script,) = [entry for entry in entry_points(group="console_scripts") if entry.name == "i2am"]
    assert script.value == "i2am.cli:main"


def test_requirements_are_lower_bounds():
    core = [line for line in requires("i2am") if "extra ==" not in line]
    assert {"torch", "diffusers"} <= {line.split(">=")[0] for line in core}
    for line in core:
        assert ">=" in line
        assert not any(sign in line.split(";")[0] for sign in ("==", "<", "~="))


def needed(line, extra=""):
    """Everything that a requirement brings, as requirements."""
    requirement = Requirement(line)
    if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
        yield requirement
        try:
            lines = requires(requirement.name) or []
        except PackageNotFoundError:  # torchvision and what comes with it, in a CPU environment
            return
        for further in {"", *requirement.extras}:
            for line in lines:
                if requirement.name != "torch":
                    yield from needed(line, further)


@pytest.mark.parametrize("extra", sorted(metadata("i2am").get_all("Provides-Extra")))
def test_extras_take_any_torch(extra):
    for line in requires("i2am"):
        for requirement in needed(line, extra):
            assert requirement.name.lower().replace("_", "-") not in (
                "torchvision",
                "torch-fidelity",
            )
            if requirement.name == "torch":
                assert {clause.operator for clause in requirement.specifier} <= {">=", "!="}


# What an import costs


def test_import_i2am_stays_light():
    loaded = run(
        "import i2am, sys; print(*{name.partition('.')[0] for name in sys.modules})", path=[ROOT]
    )
    heavy = {"PIL", "click", "diffusers", "matplotlib", "torchmetrics", "transformers"}
    assert "i2am" in loaded
    assert not heavy & set(loaded)


def test_core_names_bring_torch_and_nothing_else_heavy():
    names = ["AttributionMaps", "Direction", "Patch", "TokenLayout", "imacs", "load_maps"]
    code = f"""
import sys, torch
before = "triton" in sys.modules
import i2am
for name in {names}:
    getattr(i2am, name)
loaded = {{name.partition('.')[0] for name in sys.modules}}
print(*loaded & {{"PIL", "click", "diffusers", "matplotlib", "torchmetrics", "transformers"}})
print(*["triton"] * (("triton" in loaded) != before))
"""
    assert run(code) == []


def test_help_needs_no_torch():
    code = """
import sys
from i2am.cli import main
code = main(["--help"])
print("exit", code, "torch" in sys.modules, "PIL" in sys.modules, "numpy" in sys.modules)
"""
    assert run(code)[-5:] == ["exit", "0", "False", "False", "False"]


# The name `kernels`


def fake_owner(folder, marker="owner"):
    """A stand-in for Hugging Face's package, with metadata, as if installed into `folder`."""
    (folder / "kernels").mkdir(parents=True)
    (folder / "kernels" / "__init__.py").write_text(
        f"from kernels import helper\nget_kernel = {marker!r}\nNAME = __name__\n"
    )
    (folder / "kernels" / "helper.py").write_text("HELP = 1\n")
    info = folder / "kernels-0.17.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.17.2\n")
    return folder


def test_checkout_on_the_path_leaves_diffusers_and_transformers_importable():
    code = """
from diffusers import UNet2DConditionModel
from transformers import CLIPVisionModel
from diffusers.utils import is_kernels_available as first
from transformers.utils.import_utils import is_kernels_available as second
print(first(), second())
"""
    assert run(code, path=[ROOT])[-2:] == ["False", "False"]


def test_checkout_shadow_is_inert_without_an_owner():
    code = """
import kernels, sys
print([name for name in vars(kernels) if not name.startswith("_")] == [] or vars(kernels).keys())
print(hasattr(kernels, "__version__"), "torch" in sys.modules, "triton" in sys.modules)
"""
    found = run(code, path=[ROOT])
    assert found[-3:] == ["False", "False", "False"]


def test_shadowed_owner_gets_its_name_back(tmp_path):
    owner = fake_owner(tmp_path / "site")
    code = """
import importlib.util, kernels
from kernels import get_kernel, helper
print(importlib.util.find_spec("kernels").origin, get_kernel, kernels.NAME, helper.__file__)
import i2am.kernels
print(i2am.kernels.__file__, i2am.kernels.__name__)
"""
    origin, get_kernel, name, helper, ours, our_name = run(code, path=[ROOT, owner])
    # the checkout still comes first on the path; what is imported is the owner's
    assert (get_kernel, name) == ("owner", "kernels")
    assert Path(helper).parent == owner / "kernels"
    assert Path(origin) == owner / "kernels" / "__init__.py"
    assert Path(ours) == ROOT / "kernels" / "__init__.py"
    assert our_name == "i2am.kernels"


def test_i2am_kernels_does_not_touch_the_other_name(tmp_path):
    owner = fake_owner(tmp_path / "site")
    code = """
import sys, i2am.kernels
print("kernels" in sys.modules)
import kernels
print(kernels.get_kernel)
"""
    assert run(code, path=[owner]) == ["False", "owner"]


def test_checkout_that_was_never_installed_works():
    # -S: no site-packages, so no editable install; torch is put back by hand
    code = f"""
import sys
sys.path += [entry for entry in {sys.path!r} if entry.endswith("site-packages")]
import i2am, i2am.kernels
from i2am.kernels import Impl
print(i2am.__file__, i2am.kernels.__file__, Impl.FUSED)
"""
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        str(ROOT / "i2am" / "__init__.py"),
        str(ROOT / "kernels" / "__init__.py"),
        "fused",
    ]


# What is shipped


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """Names in the wheel, and in the source archive below its top folder."""
    folder = tmp_path_factory.mktemp("dist")
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    source = folder / "source"
    for name in filter(None, tracked.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    code = (
        "from setuptools import build_meta\n"
        f"build_meta.build_sdist({str(folder)!r})\n"
        f"build_meta.build_wheel({str(folder)!r})"
    )
    run(code, cwd=source)
    (sdist,) = folder.glob("*.tar.gz")
    (wheel,) = folder.glob("*.whl")
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist()), in_sdist


def modules(folder, prefix):
    return {f"{prefix}/{path.relative_to(ROOT / folder)}" for path in (ROOT / folder).rglob("*.py")}


@pytest.mark.slow
def test_wheel_holds_every_module_under_its_import_path(shipped):
    wheel, _ = shipped
    python = {name for name in wheel if name.endswith(".py")}
    assert python == modules("i2am", "i2am") | modules("kernels", "i2am/kernels")
    assert "i2am/py.typed" in wheel


@pytest.mark.slow
def test_wheel_takes_no_other_top_level_name(shipped):
    wheel, _ = shipped
    assert {name.split("/")[0] for name in wheel} == {"i2am", f"i2am-{i2am.__version__}.dist-info"}


@pytest.mark.slow
def test_wheel_holds_no_test_data(shipped):
    wheel, _ = shipped
    assert not [name for name in wheel if name.endswith((".npz", ".png", ".json.gz"))]


@pytest.mark.slow
def test_source_archive_can_build_the_wheel(shipped):
    _, sdist = shipped
    assert modules("i2am", "i2am") | modules("kernels", "kernels") <= sdist
    assert {"setup.py", "pyproject.toml", "LICENSE", "PKG-INFO"} <= sdist
