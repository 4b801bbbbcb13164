"""A small data set, and runs over it."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from i2am.data import write_viton_hd
from i2am.evaluation.opening import Opened, Sources, open_run

PAIRS = 5


@pytest.fixture(scope="session")
def dolls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five people in the layout of VITON-HD; never changed."""
    folder = tmp_path_factory.mktemp("dolls") / "set"
    write_viton_hd(folder, train=0, test=PAIRS)
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Workers set the number of threads of their plan, which is 1 in these tests."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def open_dolls() -> Callable[..., tuple[Opened, Sources]]:
    """The pocket model over a folder, with few steps."""

    def opened(
        folder: Path, *, missing: str = "raise", **options: object
    ) -> tuple[Opened, Sources]:
        sources = Sources("pocket", folder, missing=missing)
        few = {"steps": 2, "time_groups": 2, "threads": 1, "batch": 2, "shard": 2}
        return open_run(sources, {**few, **options}), sources

    return opened


@pytest.fixture(scope="session")
def digest() -> Callable[[Path], str]:
    """SHA-256 over all shards and images of a run; temporary files must not be there."""

    def of(run: Path) -> str:
        total = hashlib.sha256()
        for kind in ("shards", "images"):
            for path in sorted((run / kind).rglob("*")):
                assert not path.name.startswith("."), f"{path} was left behind"
                if path.is_file():
                    total.update(path.relative_to(run).as_posix().encode() + path.read_bytes())
        return total.hexdigest()

    return of
