"""Every test run: two threads; without a GPU Triton's interpreter, and `gpu` tests skipped."""

import os

import pytest
import torch

CUDA = torch.cuda.is_available()

if not CUDA:
    # read when triton is imported, so it has to be set before any test imports it
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if CUDA:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch.cuda.is_available() is False")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
