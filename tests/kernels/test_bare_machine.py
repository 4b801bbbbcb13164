"""The kernels' tests on a machine that has torch, triton, numpy and pytest, and nothing else."""

import os
import subprocess
import sys

BARE = """
import sys
from importlib import metadata
from importlib.machinery import PathFinder

# torch, triton, numpy and pytest with what they need
KEPT = set("torch triton numpy pytest iniconfig pluggy packaging pygments typing-extensions"
           " filelock sympy mpmath networkx jinja2 markupsafe fsspec setuptools i2am".split())
hidden = {
    module
    for module, distributions in metadata.packages_distributions().items()
    if not KEPT & {name.lower().replace("_", "-") for name in distributions}
} - {"i2am", "kernels"}

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] not in hidden:
            return super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
assert {"diffusers", "transformers", "torchmetrics", "hypothesis", "PIL"} <= hidden

import pytest
import i2am.attribution, i2am.kernels
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def test_every_test_of_the_kernels_is_found():
    folder = os.path.dirname(__file__)
    done = subprocess.run(
        [sys.executable, "-P", "-c", BARE, folder],
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for file in ("test_fused", "test_joint", "test_api", "test_ahead_of_time"):
        assert f"{file}.py::" in done.stdout
