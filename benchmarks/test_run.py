"""A whole run: the pocket model anywhere, the custom model at full size on a GPU.

    pytest benchmarks/test_run.py

From images to images: encoders, 50 steps with guidance, decoder, and ``record()`` with its maps.
"""

import functools
from typing import Any

import pytest
import torch
from harness import Settings, compare
from unets import fill

import i2am
from i2am.models import POCKET, CustomPipeline
from i2am.models.configuration import FULL_SIZE

MODELS = {"pocket": POCKET, "full size": FULL_SIZE}
ROUNDS = 3


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("way", ["beside", "fused"])
def test_run(benchmark: Any, settings: Settings, model: str, way: str) -> None:
    if model == "full size" and not settings.on_gpu:
        pytest.skip("a run of the full-size model takes minutes without a GPU")
    pipe, batch = _pipeline(model, settings), settings.batch
    generator = torch.Generator().manual_seed(0)
    person, garment = (
        torch.rand(batch, 3, *pipe.default_size(), generator=generator) for _ in range(2)
    )
    mask = torch.zeros(1, *pipe.default_size())
    mask[:, pipe.default_size()[0] // 4 :] = 1

    def run() -> Any:
        return pipe(
            image=person,
            mask_image=mask,
            reference_image=garment,
            num_inference_steps=settings.steps,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images

    def recorded() -> Any:
        with i2am.record(pipe, attach=way) as recorder:
            images = run()
        return images, recorder.maps()

    benchmark.group = f"{model}, {settings.steps} steps, batch {batch}"
    benchmark.extra_info.update(
        level="run",
        model=model,
        steps=settings.steps,
        batch=batch,
        way=way,
        attends=True,
        ours=True,
        dtype=str(pipe.dtype).removeprefix("torch."),
    )
    compare(benchmark, recorded, run, settings, rounds=min(ROUNDS, settings.rounds), repeat=False)


@functools.lru_cache(maxsize=1)
def _pipeline(model: str, settings: Settings) -> CustomPipeline:
    configuration = MODELS[model]
    with torch.device("meta"):
        pipe = configuration.build()
    modules = {
        name: fill(module, settings.device, settings.dtype)
        for name, module in pipe.components.items()
        if isinstance(module, torch.nn.Module)
    }
    # a scheduler holds tensors too, which must not be made on the meta device
    scheduler = configuration.scheduler(**configuration.scheduler_options)
    pipe = CustomPipeline(
        **modules, scheduler=scheduler, reference_size=configuration.reference_size, trained=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
