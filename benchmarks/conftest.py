"""Options of the benchmarks, what they measure by default, and what their JSON says of the machine.

pytest benchmarks --shapes dit --batch 1        # see also: pytest benchmarks --help
"""

import gc
from collections.abc import Iterator
from typing import Any

import harness
import pytest
import shapes
import torch
import unets

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LEFT_OUT: list[dict[str, str]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("i2am", "i2am benchmarks")
    group.addoption("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    group.addoption("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 on a CPU")
    group.addoption("--batch", type=int, action="append", help="several: 1, 8, 32 on a GPU, else 1")
    group.addoption("--shapes", choices=shapes.GROUPS, action="append", help="attention shapes")
    group.addoption("--unet", choices=unets.SIZES, action="append", help="size of the UNet")
    group.addoption(
        "--rounds", type=int, default=11, help="default: 11, fewer of what takes seconds"
    )
    group.addoption("--steps", type=int, default=50, help="of a whole run")


def settings_of(config: pytest.Config) -> harness.Settings:
    kind = config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = kind == "cuda"
    return harness.Settings(
        device=torch.device(kind),
        dtype=DTYPES[config.getoption("--dtype") or ("bf16" if on_gpu else "fp32")],
        batches=tuple(config.getoption("--batch") or ((1, 8, 32) if on_gpu else (1,))),
        rounds=config.getoption("--rounds"),
        steps=config.getoption("--steps"),
    )


@pytest.fixture(scope="session")
def settings(pytestconfig: pytest.Config) -> harness.Settings:
    return settings_of(pytestconfig)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config, chosen = metafunc.config, settings_of(metafunc.config)
    kind = chosen.device.type
    if "shape" in metafunc.fixturenames:
        groups = config.getoption("--shapes") or shapes.DEFAULT_GROUPS[kind]
        cases = [shape for group in groups for shape in shapes.GROUPS[group]]
        metafunc.parametrize("shape", cases, ids=str)
    if "size" in metafunc.fixturenames:
        metafunc.parametrize("size", config.getoption("--unet") or unets.DEFAULT_SIZES[kind])
    if "batch" in metafunc.fixturenames:
        metafunc.parametrize("batch", chosen.batches, ids=lambda batch: f"batch{batch}")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """What does not fit the device is left out, and said to be."""
    gc.collect()
    torch.cuda.empty_cache()
    try:
        return (yield)
    except torch.OutOfMemoryError:
        pytest.skip("out of memory")
    except harness.LeftOut as reason:
        pytest.skip(str(reason))
    except Exception as error:
        if harness.is_lost():
            _leave_out(pyfuncitem.nodeid, str(error))
            pytest.exit("no kernel runs any more in this process", returncode=3)
        raise


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.outcome == "passed" or report.when == "teardown":
        return
    reason = report.longrepr[2] if report.skipped else str(report.longrepr).splitlines()[-1]
    _leave_out(report.nodeid, reason.removeprefix("Skipped: "))


def _leave_out(test: str, reason: str) -> None:
    LEFT_OUT.append({"test": test, "reason": reason})


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["i2am"] = harness.describe(settings_of(config).device)


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]
) -> None:
    output_json["left_out"] = LEFT_OUT
