"""Every test run: one thread; without a GPU Triton's interpreter, and `gpu` tests skipped."""

import contextlib
import functools
import gzip
import json
import multiprocessing
import os
import re
import signal
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

# tensors are tiny here: a second thread costs more than it brings, much more on a busy machine;
# read when torch is imported, here and in the processes that tests start
os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.nn.functional as F

CUDA = torch.cuda.is_available()
SIXTEEN_BITS = (torch.float16, torch.bfloat16)

if not CUDA:
    # read when triton is imported, so it has to be set before any test imports it
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)

with contextlib.suppress(ImportError):  # the kernels' tests run without it
    import hypothesis

    # how long an example takes says nothing on a busy machine
    hypothesis.settings.register_profile(
        "busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("busy")


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
    if CUDA:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch.cuda.is_available() is False")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@functools.cache
def _faults_of_attention() -> frozenset[str]:
    """What PyTorch's own attention says in 16 bits where it cannot; no real CPU is known to.

    One that has AMX and is told to be older (`ATEN_CPU_CAPABILITY=avx2`) is: PyTorch then packs
    tokens, from 64 on, for instructions that it was told not to use.
    """
    faults = set()
    for dtype in SIXTEEN_BITS:
        tokens = torch.zeros(1, 1, 64, 64, dtype=dtype)
        try:
            F.scaled_dot_product_attention(tokens, tokens, tokens)
        except RuntimeError as error:
            faults.add(str(error))
    return frozenset(faults)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Skips a test that dies of what PyTorch's own attention dies of on this machine."""
    try:
        return (yield)
    except RuntimeError as error:
        if str(error) in _faults_of_attention():
            pytest.skip(f"PyTorch's own attention fails on this machine: {error}")
        raise


# Processes of their own, without the seconds that imports take


class Fork:
    """What tests need of `subprocess.Popen`, for a process that was forked; both pipes are text."""

    def __init__(self, process: Any, stdout: int, stderr: int) -> None:
        self._process = process
        self.pid: int = process.pid
        self.stdout = open(stdout, encoding="utf-8")
        self.stderr = open(stderr, encoding="utf-8")

    @property
    def returncode(self) -> int | None:
        """None while it runs; the negative number of a signal that ended it."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Waits for its end and returns what it wrote; after so many seconds it is killed."""
        out: list[str] = []
        reader = threading.Thread(target=lambda: out.append(self.stdout.read()))
        alarm = threading.Timer(timeout, self.kill)
        reader.start()
        alarm.start()
        err = self.stderr.read()
        reader.join()
        self._process.join()
        alarm.cancel()
        return out[0], err

    def close(self) -> None:
        """Kills it if it runs."""
        self.kill()
        self._process.join()
        self.stdout.close()
        self.stderr.close()


# what runs in the fork, before the code of a test
_PREPARE = """
import os, sys
for number, pipe in enumerate(pipes, 1):
    os.dup2(pipe.fileno(), number)
os.environ |= environment
sys.argv[1:] = arguments
exec(code, {"__name__": "__main__"})
"""


PRELOADED = [
    "diffusers.models",
    "diffusers.schedulers",
    "i2am.cli.evaluating",
    "i2am.cli.recording",
    "i2am.models.custom",
    "i2am.models.pocket",
    "transformers.models.clip.modeling_clip",
]


@pytest.fixture(scope="session")
def _zygote() -> Any:
    """A context whose processes are forks of one that has imported what is slow to import."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


@pytest.fixture
def fork(_zygote: Any) -> Iterator[Callable[..., Fork]]:
    """Runs code in a process of its own: a fork of one that has imported torch and diffusers.

    For tests that need another process, not a fresh interpreter: what an import costs or needs does
    not show. Hashes are salted otherwise than in this process.
    """
    forks: list[Fork] = []

    def start(code: str, *arguments: object, **environment: str) -> Fork:
        (out, stdout), (err, stderr) = (_zygote.Pipe(duplex=False) for _ in range(2))
        names = {
            "pipes": (stdout, stderr),
            "environment": environment,
            "arguments": [str(argument) for argument in arguments],
            "code": code,
        }
        process = _zygote.Process(target=exec, args=(_PREPARE, names))
        process.start()
        # only the fork holds the other ends, so that reading ends with it
        for pipe in (stdout, stderr):
            pipe.close()
        forks.append(Fork(process, os.dup(out.fileno()), os.dup(err.fileno())))
        return forks[-1]

    yield start
    for each in forks:
        each.close()


# Checkpoints with the names of the published ones, and reproducible random numbers in them


@pytest.fixture(scope="session")
def published_keys() -> Callable[[str], dict[str, tuple[tuple[int, ...], str]]]:
    """Shape and kind of every tensor of a system's published checkpoint, by its name.

    From the original modules, see tests/golden/checkpoints/README.md.
    """

    def read(system: str) -> dict[str, tuple[tuple[int, ...], str]]:
        file = Path(__file__).parent / "golden" / "checkpoints" / f"{system}.json.gz"
        with gzip.open(file, "rt", encoding="utf-8") as text:
            return {key: (tuple(shape), kind) for key, (shape, kind) in json.load(text).items()}

    return read


@pytest.fixture(scope="session")
def synthetic() -> Callable[[Mapping[str, tuple[tuple[int, ...], str]]], dict[str, torch.Tensor]]:
    """Values for tensors of given shapes and kinds, which depend on nothing but them and the name.

    The recipe of the golden files: they were computed with these values.
    """

    def fill(keys: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, torch.Tensor]:
        tensors = {}
        for key, (shape, kind) in keys.items():
            generator = torch.Generator().manual_seed(zlib.crc32(f"1:{key}".encode()))
            values = torch.randn(shape, generator=generator)
            if kind == "matrix":
                values *= values[0].numel() ** -0.5
            else:
                values *= 0.1
                values += 1 if kind == "norm" else 0
            tensors[key] = values
        return tensors

    return fill


@pytest.fixture(scope="session")
def tiny_keys(published_keys: Any) -> Callable[[str], dict[str, tuple[tuple[int, ...], str]]]:
    """As `published_keys`, for a model of the same structure with narrow and few layers."""

    def shrink(system: str) -> dict[str, tuple[tuple[int, ...], str]]:
        return {
            key: (tuple(_narrow(key, size) for size in shape), kind)
            for key, (shape, kind) in published_keys(system).items()
            if not any(int(number) >= TINY_LAYERS[at] for at, number in _LAYER.findall(key))
        }

    return shrink


@pytest.fixture(scope="session")
def tiny_checkpoint(
    tiny_keys: Any, synthetic: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A file with the tensors of `tiny_keys`, as a training framework writes it; made once."""

    @functools.cache
    def save(system: str) -> Path:
        file = tmp_path_factory.mktemp("published") / f"{system}.ckpt"
        torch.save({"state_dict": synthetic(tiny_keys(system)), "global_step": 1}, file)
        return file

    return save


TINY_LAYERS = {"encoder.layers.": 4, "resblocks.": 1, "dinov2.model.blocks.": 2}
_LAYER = re.compile(rf"({'|'.join(map(re.escape, TINY_LAYERS))})(\d+)")
# by the beginning of names: sizes of the published and of the tiny model
_TINY_SIZES = {
    r"(model|control_model|diffusion)\.": {768: 24, 1037: 13}
    | {320 * factor: 32 * factor for factor in range(1, 33)},
    r"(first_stage_model|encoder|decoder)\.": {128: 32, 256: 64, 512: 128, 1536: 384},
    r"cond_stage_model\.": {257: 5, 1024: 64, 3072: 192, 4096: 256},
    r"(learnable_vector|proj_out)": {768: 24, 1024: 64},
    r"vgg\.": {64: 4, 128: 4, 256: 4, 512: 4},
    r"mlp\.": {768: 24, 1536: 64, 4608: 192, 6144: 256, 12288: 512},
    r"dinov2\.": {1370: 17, 1536: 64, 4608: 192, 8192: 352, 4096: 176},
}


def _narrow(key: str, size: int) -> int:
    for beginning, sizes in _TINY_SIZES.items():
        if re.match(beginning, key):
            return sizes.get(size, size)
    return size


KINDS = (
    *("two references", "words", "reference and words", "frames"),
    *("head counts", "gridless", "resized", "everything"),
)


@pytest.fixture
def record() -> Callable[..., Any]:
    """Makes a recording of a kind, of one sample, with masks and a region."""
    from i2am.attribution import Patch
    from i2am.testing import make_maps, make_site

    def recorded(kind: str, **options: Any) -> Any:
        several = ("reference 1", (5, 4)), ("reference 2", (10, 8))
        one = (("reference", (5, 4)),)
        places = {"two references": several, "everything": several, "words": ()}.get(kind, one)
        words = ("cat", "hat") if kind in ("words", "reference and words", "everything") else ()
        said = {"frames": 3 if kind in ("frames", "everything") else 1}
        if len(places) != 1 or words:
            said["measure"] = "share"
        sites = []
        for layer, grid in (("down.attn", (4, 3)), ("up.attn", (8, 6))):
            heads = 3 if (kind, layer) == ("head counts", "down.attn") else 2
            lost = (kind, layer) == ("gridless", "down.attn")
            for name, place in places:
                given = {"heads": heads, "source": name, **said}
                sites.append(make_site(layer, grid, None if lost else place, **given))
            for tokens, word in enumerate(words, 1):
                given = {"heads": heads, "source": word, "role": "text", "tokens": tokens}
                sites.append(make_site(layer, grid, None, **given, **said))
        mask, reference_mask = torch.zeros(48, 36), torch.zeros(50, 40)
        mask[:, :18] = reference_mask[10:30] = 1
        given = {
            "samples": 1,
            "mask": mask,
            "reference_mask": reference_mask if places else None,
            "regions": {"logo": Patch(2, 1, (8, 6))},
            "provenance": {"steps": 3, "regions": {"logo": "2,1@8x6"}},
            "sums": "resized" if kind in ("resized", "everything") else "native",
        }
        return make_maps(sites, **given, **options)

    return recorded


@pytest.fixture(params=KINDS)
def every_kind(request: pytest.FixtureRequest, record: Callable[..., Any]) -> Any:
    """A recording of every kind that there is, see `record`."""
    return record(request.param)
