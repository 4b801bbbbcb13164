"""Every test run: one thread; without a GPU Triton's interpreter, and `gpu` tests skipped."""

import os

import pytest
import torch

CUDA = torch.cuda.is_available()

if not CUDA:
    # read when triton is imported, so it has to be set before any test imports it
    os.environ["TRITON_INTERPRET"] = "1"

# tensors are tiny here: a second thread costs more than it brings, much more on a busy machine
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if CUDA:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch.cuda.is_available() is False")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
