"""Steps, evaluations and time groups under every kind of scheduler."""

import warnings
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    UniPCMultistepScheduler,
)

import i2am
from i2am.adapters.clock import RunClock
from i2am.layouts import TokenLayout

TEXT = TokenLayout.cross_attention((2, 3))  # prompts stand for a reference of 1 + 6 tokens
PATCHES = TokenLayout.cross_attention((4, 3))
SCALED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
BETAS = {**SCALED, "steps_offset": 1}

# diffusers' own, about NumPy
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


def every_step_once(steps):
    return list(range(steps))


def every_step_twice_but_the_last(steps):
    return [index // 2 for index in range(2 * steps - 1)]


def first_step_twice(steps):
    return [0, *range(steps)]


def runge_kutta_first(steps):
    return [index // 4 for index in range(12)] + list(range(3, steps))


SCHEDULERS = {
    "ddim": (DDIMScheduler, {**BETAS, "clip_sample": False}, every_step_once),
    "ddpm": (DDPMScheduler, {**BETAS, "clip_sample": False}, every_step_once),
    "pndm": (PNDMScheduler, {**BETAS, "skip_prk_steps": True}, first_step_twice),
    "pndm prk": (PNDMScheduler, BETAS, runge_kutta_first),
    "heun": (HeunDiscreteScheduler, BETAS, every_step_twice_but_the_last),
    "kdpm2": (KDPM2DiscreteScheduler, BETAS, every_step_twice_but_the_last),
    "kdpm2 ancestral": (KDPM2AncestralDiscreteScheduler, BETAS, every_step_twice_but_the_last),
    "euler": (EulerDiscreteScheduler, BETAS, every_step_once),
    "euler ancestral": (EulerAncestralDiscreteScheduler, BETAS, every_step_once),
    "dpm++ multistep": (DPMSolverMultistepScheduler, BETAS, every_step_once),
    "dpm++ singlestep": (DPMSolverSinglestepScheduler, SCALED, every_step_once),
    "deis": (DEISMultistepScheduler, BETAS, every_step_once),
    "unipc": (UniPCMultistepScheduler, BETAS, every_step_once),
    "lcm": (LCMScheduler, BETAS, every_step_once),
}


def grouped(steps_of_evaluations, time_groups):
    """attribution.md section 4: step s of n goes to group s * n_groups // n."""
    steps = steps_of_evaluations[-1] + 1
    return [step * time_groups // steps for step in steps_of_evaluations]


def units(maps):
    """Evaluations in each time group: every one adds a map that sums to 1. [samples, groups]"""
    return maps.layer_sums[0].reference_to_generated[:, :, :, 0].sum((-2, -1)).mean(-1)


def text_to_image(tiny, pipeline, **options):
    settings = {"num_inference_steps": 10, "height": 8, "width": 8, "guidance_scale": 3.0}
    return tiny.run(pipeline, **{**settings, **tiny.prompts(), **options})


@pytest.mark.parametrize("name", SCHEDULERS)
def test_text_to_image(tiny, oracle, name):
    cls, options, steps_of_evaluations = SCHEDULERS[name]
    pipeline = tiny.stable_diffusion(scheduler=cls(**options))
    with oracle.spy(pipeline.unet, pipeline.scheduler) as calls:
        plain = text_to_image(tiny, pipeline)
    with i2am.record(pipeline, layout=TEXT, time_groups=4) as recorder:
        recorded = text_to_image(tiny, pipeline)
    # also says that the generator still reached schedulers that add noise
    assert torch.equal(plain, recorded)
    assert plain.isfinite().all()
    maps = recorder.maps()
    evaluations = steps_of_evaluations(10)
    assert maps.provenance["steps"] == 10
    assert maps.provenance["evaluations"] == len(evaluations)
    assert len(maps.provenance["timesteps"]) == len(evaluations)
    oracle.assert_maps(
        maps,
        calls,
        groups=grouped(evaluations, 4),
        rows=oracle.last(1),
        reference=slice(1, 7),
    )


@pytest.mark.parametrize("strength", [0.1, 0.6, 0.9])
@pytest.mark.parametrize("name", ["ddim", "pndm", "heun", "euler", "unipc", "lcm"])
def test_image_to_image(tiny, oracle, name, strength):
    cls, options, steps_of_evaluations = SCHEDULERS[name]
    pipeline = tiny.stable_diffusion(StableDiffusionImg2ImgPipeline, scheduler=cls(**options))

    def images():
        return tiny.run(
            pipeline,
            **tiny.prompts(),
            image=tiny.picture(0, 8, 8),
            strength=strength,
            num_inference_steps=10,
        )

    with oracle.spy(pipeline.unet, pipeline.scheduler) as calls:
        plain = images()
    steps = round(10 * strength)
    made = max(call.evaluation for call in calls) + 1
    if name == "lcm":
        steps = made  # spreads its steps by itself
    evaluations = steps_of_evaluations(steps)[:made]
    time_groups = min(3, steps)
    with i2am.record(pipeline, layout=TEXT, time_groups=time_groups) as recorder:
        assert torch.equal(images(), plain)
    maps = recorder.maps()
    assert (maps.provenance["steps"], maps.provenance["evaluations"]) == (steps, made)
    oracle.assert_maps(
        maps,
        calls,
        groups=grouped(evaluations, time_groups),
        rows=oracle.last(1),
        reference=slice(1, 7),
    )


class Count:
    """Drives a clock as a pipeline would, and lists the group of every evaluation."""

    def __init__(self, scheduler: Any, time_groups: int) -> None:
        self.scheduler = scheduler
        self.clock = RunClock(scheduler, time_groups=time_groups)

    def groups(self, steps: int, skipped: int = 0, tell: bool = True, calls: int = 1) -> list[int]:
        self.clock.attach()
        groups = []
        sample = torch.zeros(1, 4, 2, 2)
        self.scheduler.set_timesteps(steps)
        if tell and hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(skipped)
        for timestep in self.scheduler.timesteps[skipped:]:
            for _ in range(calls):
                self.clock.arrive()
            groups.append(self.clock.group)
            sample = self.scheduler.step(sample, timestep, sample).prev_sample
        self.clock.detach()
        return groups


@pytest.mark.parametrize(
    ("cls", "options"),
    [(FlowMatchEulerDiscreteScheduler, {}), (FlowMatchHeunDiscreteScheduler, {})],
    ids=["flow euler", "flow heun"],
)
@pytest.mark.parametrize("calls", [1, 2])
def test_flow_matching(cls, options, calls):
    count = Count(cls(**options), 4)
    order = every_step_once if cls.order == 1 else every_step_twice_but_the_last
    assert count.groups(8, calls=calls) == grouped(order(8), 4)


@pytest.mark.parametrize(
    ("name", "steps", "time_groups"),
    # every two of them meet
    [
        (name, steps, (1, 2, 5)[(row + column) % 3])
        for row, name in enumerate(["ddim", "pndm", "heun", "euler"])
        for column, steps in enumerate([1, 2, 3, 7, 50])
    ],
)
def test_every_number_of_steps(name, steps, time_groups):
    cls, options, steps_of_evaluations = SCHEDULERS[name]
    count = Count(cls(**options), time_groups)
    groups = min(time_groups, steps)
    evaluations = steps_of_evaluations(steps)[: len(evaluations_of(count.scheduler, steps))]
    assert count.groups(steps) == grouped(evaluations, groups)
    assert count.clock.groups == groups
    assert set(count.groups(steps)) == set(range(groups))


def evaluations_of(scheduler, steps):
    scheduler.set_timesteps(steps)
    return scheduler.timesteps


@pytest.mark.parametrize(
    ("name", "skipped_steps", "tell"),
    # every two of them meet; without the index of the beginning the timestep has to tell
    [
        (name, skipped, (row + skipped) % 2 == 0)
        for row, name in enumerate(["ddim", "pndm", "heun", "kdpm2", "euler"])
        for skipped in range(6)
    ],
)
def test_start_inside_the_schedule(name, skipped_steps, tell):
    """Pipelines slice the timesteps; repeated ones must not mislead."""
    cls, options, steps_of_evaluations = SCHEDULERS[name]
    count = Count(cls(**options), 4)
    groups = count.groups(10, skipped=skipped_steps * cls.order, tell=tell)
    assert groups == grouped(steps_of_evaluations(10 - skipped_steps), 4)
    assert count.clock.evaluation == count.clock.evaluations == len(groups)


def recorded_and_said(denoiser, run, **options):
    """Maps of a run, and what `maps` warns of; the second time it has nothing to say."""
    with i2am.record(denoiser, **options) as recorder:
        run()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        maps = recorder.maps()
        recorder.maps()
    return maps, [str(warning.message) for warning in said]


@pytest.mark.parametrize("options", [{}, {"sums": "resized"}, {"pairs": True}], ids=str)
@pytest.mark.parametrize("steps", [1, 4])
def test_in_a_run_of_fewer_steps_each_is_a_group(tiny, steps, options):
    loop, reference = tiny.loop(), tiny.reference()

    def run():
        loop(reference, steps=steps)

    options = {"layout": PATCHES, **options}
    wanted, nothing = recorded_and_said(loop, run, time_groups=steps, **options)
    maps, said = recorded_and_said(loop, run, time_groups=5, **options)
    assert nothing == []
    (remark,) = said
    groups = (
        "1 step: its maps have 1 time group"
        if steps == 1
        else ("4 steps: its maps have 4 time groups")
    )
    assert remark == f"5 time groups were asked for and the run has {groups}"
    assert maps.time_groups == steps
    assert maps.provenance["steps"] == steps
    for got, want in zip(maps.layer_sums, wanted.layer_sums, strict=True):
        assert torch.equal(got.reference_to_generated, want.reference_to_generated)
        assert torch.equal(got.generated_to_reference, want.generated_to_reference)
    if "pairs" in options:
        assert maps.pairs.time_groups == steps
        assert torch.equal(maps.pairs.g2r, wanted.pairs.g2r)
        assert torch.equal(maps.pairs.r2g, wanted.pairs.r2g)


def test_steps_that_are_skipped_make_no_groups(tiny):
    pipeline = tiny.stable_diffusion(StableDiffusionImg2ImgPipeline)

    def run():
        image = tiny.picture(0, 8, 8)
        tiny.run(pipeline, **tiny.prompts(), image=image, strength=0.3, num_inference_steps=10)

    maps, said = recorded_and_said(pipeline, run, layout=TEXT, time_groups=5)
    assert said == [
        "5 time groups were asked for and the run has 3 steps: its maps have 3 time groups"
    ]
    torch.testing.assert_close(units(maps), torch.ones(1, 3))


def test_interrupted_run(tiny):
    pipeline = tiny.stable_diffusion()

    def interrupt(pipe, index, timestep, tensors):
        pipe._interrupt = index >= 3
        return tensors

    with i2am.record(pipeline, layout=TEXT, time_groups=5) as recorder:
        text_to_image(tiny, pipeline, callback_on_step_end=interrupt)
        recorder.maps()  # nothing to remark: the run may still go on
    with pytest.warns(UserWarning, match="4 of 10 announced evaluations") as warned:
        maps = recorder.maps()
    assert len(warned) == 1
    assert maps.provenance["evaluations"] == 4
    torch.testing.assert_close(units(maps), torch.tensor([[2.0, 2, 0, 0, 0]]))
    assert maps.provenance["calls"] == dict.fromkeys(maps.layers, 4)


def test_loop_of_ones_own_with_scheduler(tiny):
    """A bare denoiser; the schedule may have been set before recording."""
    loop = tiny.loop()
    unet, scheduler, reference = loop.unet, loop.scheduler, tiny.reference()

    def denoise():
        latents = torch.ones(1, 4, 8, 6)
        for timestep in scheduler.timesteps:
            with torch.no_grad():
                noise = unet(latents, timestep, reference, return_dict=False)[0]
            latents = scheduler.step(noise, timestep, latents).prev_sample

    scheduler.set_timesteps(6)
    with i2am.record(unet, scheduler=scheduler, layout=PATCHES, time_groups=3) as recorder:
        denoise()
    before = recorder.maps()
    with i2am.record(unet, scheduler=scheduler, layout=PATCHES, time_groups=3) as recorder:
        scheduler.set_timesteps(6)
        denoise()
    inside = recorder.maps()
    assert before.provenance == inside.provenance
    for maps in (before, inside):
        torch.testing.assert_close(units(maps), torch.full((1, 3), 2.0))
    assert torch.equal(before.reference_to_generated(), inside.reference_to_generated())


def test_denoiser_without_any_scheduler(tiny):
    unet, reference = tiny.unet(), tiny.reference(2)

    def denoise(calls, seed=0):
        torch.manual_seed(seed)
        for index in range(calls):
            with torch.no_grad():
                unet(torch.randn(2, 4, 8, 6), index, reference)

    options = {"layout": PATCHES, "num_inference_steps": 6, "time_groups": 3}
    with i2am.record(unet, **options) as recorder:
        denoise(6)
    maps = recorder.maps()
    assert maps.n_samples == 2  # every row is a sample
    assert maps.provenance["scheduler"] is None
    torch.testing.assert_close(units(maps), torch.full((2, 3), 2.0))
    # what comes after the announced number is a new run
    with i2am.record(unet, **options) as recorder:
        denoise(6, seed=1)
        denoise(6, seed=0)
    assert torch.equal(recorder.maps().reference_to_generated(), maps.reference_to_generated())
    # without a number there is one group and one run
    with i2am.record(unet, layout=PATCHES, time_groups=1) as recorder:
        denoise(4)
    maps = recorder.maps()
    assert (maps.provenance["steps"], maps.provenance["evaluations"]) == (4, 4)


def test_last_of_several_runs_is_kept(tiny):
    loop = tiny.loop()
    with i2am.record(loop, layout=PATCHES, time_groups=2) as recorder:
        loop(tiny.reference(seed=1), steps=4)
    alone = recorder.maps()
    with i2am.record(loop, layout=PATCHES, time_groups=2) as recorder:
        loop(tiny.reference(3, seed=2), steps=6, size=(6, 4))
        loop(tiny.reference(seed=1), steps=4)
    last = recorder.maps()
    assert last.provenance == alone.provenance
    assert torch.equal(last.reference_to_generated(), alone.reference_to_generated())


def test_run_that_never_calls_the_denoiser_does_not_wipe_the_last_one(tiny):
    loop = tiny.loop()
    with i2am.record(loop, layout=PATCHES) as recorder:
        loop(tiny.reference())
        kept = recorder.maps()
        # another pipeline with the same scheduler object
        loop.scheduler.set_timesteps(2)
        sample = torch.zeros(1, 4, 2, 2)
        loop.scheduler.step(sample, loop.scheduler.timesteps[0], sample)
    assert torch.equal(recorder.maps().reference_to_generated(), kept.reference_to_generated())
    assert recorder.maps().provenance == kept.provenance


def test_scheduler_wrapped_by_somebody_else_too(tiny):
    """A wrapper put over ours stays; one found in place comes back."""
    scheduler = tiny.loop().scheduler
    found = scheduler.step
    scheduler.step = theirs = lambda *args, **kwargs: found(*args, **kwargs)
    clock = RunClock(scheduler, time_groups=1)
    clock.attach()
    ours = scheduler.set_timesteps
    scheduler.set_timesteps = over = lambda *args, **kwargs: ours(*args, **kwargs)
    clock.detach()
    assert scheduler.step is theirs
    assert scheduler.set_timesteps is over
