"""Which time group an evaluation belongs to: by noise, whichever way the run goes."""

import copy
import warnings

import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DPMSolverMultistepInverseScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    RePaintScheduler,
)

import i2am
from i2am.layouts import TokenLayout

GRID = (4, 3)
REFERENCE = slice(1, 13)
PATCHES = TokenLayout.cross_attention(GRID)
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


class Single:
    """A loop of one's own with one call per evaluation."""

    def __init__(self, tiny, scheduler):
        self.unet, self.scheduler, self.reference = tiny.loop().unet, scheduler, tiny.reference(2)

    def predict(self, latents, timestep):
        return self.unet(latents, timestep, encoder_hidden_states=self.reference).sample

    @torch.no_grad()
    def __call__(self, steps=6, timesteps=slice(None), begin=True, each=None):
        if begin:
            self.scheduler.set_timesteps(steps)
        latents = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(0))
        for timestep in self.scheduler.timesteps[timesteps]:
            noise = self.predict(latents, timestep)
            if each is not None:
                each(latents, timestep, noise)
            latents = self.scheduler.step(noise, timestep, latents).prev_sample
        return latents

    def record(self, **options):
        options = {"layout": PATCHES, "time_groups": 3, **options}
        return i2am.record(self.unet, scheduler=self.scheduler, **options)


def noise_of(scheduler, timesteps):
    """Truth: how noisy an evaluation is, from its timestep."""
    clean_first = getattr(scheduler.config, "invert_sigmas", False)
    return [-float(t) if clean_first else float(t) for t in timesteps]


@pytest.mark.parametrize(
    ("scheduler", "groups"),
    [
        (DDIMInverseScheduler(**BETAS, clip_sample=False), [2, 2, 1, 1, 0, 0]),
        (DPMSolverMultistepInverseScheduler(**BETAS), [2, 2, 1, 1, 0, 0]),
        (DDIMScheduler(**BETAS, clip_sample=False), [0, 0, 1, 1, 2, 2]),
        # its timesteps rise too, and noise falls
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), [0, 0, 1, 1, 2, 2]),
        (HeunDiscreteScheduler(**BETAS), [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]),
        (KDPM2DiscreteScheduler(**BETAS), [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]),
        (KDPM2AncestralDiscreteScheduler(**BETAS), [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]),
        (PNDMScheduler(**BETAS, skip_prk_steps=True), [0, 0, 0, 1, 1, 2, 2]),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("pairs", [False, True], ids=["layers", "pairs"])
def test_noisiest_group_is_first(tiny, oracle, scheduler, groups, pairs):
    single = Single(tiny, scheduler)
    with oracle.spy(single.unet, scheduler) as calls:
        plain = single()
    with single.record(pairs=pairs, impl="reference") as recorder:
        again = single()
    if not isinstance(scheduler, KDPM2AncestralDiscreteScheduler):  # draws noise by itself
        assert torch.equal(again, plain)
        maps, rows = recorder.maps(), lambda call: slice(None)
        oracle.assert_maps(maps, calls, groups=groups, rows=rows, reference=REFERENCE)
    maps = recorder.maps()
    # and by noise itself, of what was stepped
    noise = noise_of(scheduler, maps.provenance["timesteps"])
    means = [
        sum(n for n, group in zip(noise, groups, strict=True) if group == number)
        / groups.count(number)
        for number in range(3)
    ]
    assert means == sorted(means, reverse=True)
    if pairs:
        for group in range(3):
            found = maps.pairs.reference_to_generated(time=group).sum()
            assert found > 0
            torch.testing.assert_close(
                maps.pairs.g2r[:, group].mean(), pairs_of(recorder, maps, group), rtol=1e-4, atol=0
            )


def pairs_of(recorder, maps, group):
    """The same from the sums: every generated cell spends its share of one unit per evaluation."""
    total = sum(
        layer.generated_to_reference[:, group, :, 0].mean(1).sum() for layer in maps.layer_sums
    )
    cells = maps.pairs.g2r[:, group].numel()
    cells_generated = maps.pairs.generated_grid[0] * maps.pairs.generated_grid[1]
    return total / len(maps.layer_sums) * cells_generated / cells


@pytest.mark.parametrize("part", [slice(0, 4), slice(2, None)], ids=["its beginning", "its end"])
def test_part_of_an_inversion(tiny, oracle, part):
    single = Single(tiny, DDIMInverseScheduler(**BETAS, clip_sample=False))
    with oracle.spy(single.unet, single.scheduler) as calls:
        single(timesteps=part)
    with single.record(time_groups=2) as recorder:
        single(timesteps=part)
    maps = recorder.maps()
    # of a run that ends early nobody knows before that it will
    groups = [1, 1, 1, 0] if part.stop else [1, 1, 0, 0]
    rows = lambda call: slice(None)  # noqa: E731
    oracle.assert_maps(maps, calls, groups=groups, rows=rows, reference=REFERENCE)


def test_there_and_back_in_one_block(tiny, oracle):
    """An inversion and a sampling, each by a scheduler of its own, over one denoiser."""
    single = Single(tiny, DDIMScheduler(**BETAS, clip_sample=False))
    inverse = Single(tiny, DDIMInverseScheduler(**BETAS, clip_sample=False))
    inverse.unet = single.unet
    with oracle.spy(single.unet, single.scheduler) as calls:
        single()
    rows = lambda call: slice(None)  # noqa: E731
    with single.record() as recorder:
        inverse()
        single()
    maps = recorder.maps()
    oracle.assert_maps(maps, calls, groups=[0, 0, 1, 1, 2, 2], rows=rows, reference=REFERENCE)
    assert maps.provenance["other_calls"] == {"before the run": 6}
    with single.record() as recorder:
        single()
        inverse()
    maps = recorder.maps()
    oracle.assert_maps(maps, calls, groups=[0, 0, 1, 1, 2, 2], rows=rows, reference=REFERENCE)
    assert maps.provenance["other_calls"] == {"after the run": 6}
    # announced already: the way there ends at the timestep where the way back begins
    with oracle.gives_up(single.record(), ValueError, ".*several calls and no order"):
        single.scheduler.set_timesteps(6)
        inverse()
        single(begin=False)


def test_segments_are_told(tiny):
    """One pipeline call that begins several runs: the maps are of the last, and say so."""
    single = Single(tiny, DDIMScheduler(**BETAS, clip_sample=False))
    with single.record() as recorder:
        single()
        single(steps=3)
    with pytest.warns(UserWarning, match="2 runs were recorded since .* maps of the last one"):
        maps = recorder.maps()
    assert maps.provenance["evaluations"] == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with recorder:
            for _ in range(2):
                single()
                recorder.maps()


def test_a_scheduler_that_steps_twice_per_evaluation(tiny, oracle):
    """Two latents by one prediction: the second step is none of a new evaluation."""
    single = Single(tiny, DDIMScheduler(**BETAS, clip_sample=False))

    def twice(latents, timestep, noise):
        single.scheduler.step(noise, timestep, latents + 1)

    with oracle.spy(single.unet, single.scheduler) as calls:
        single()
    with single.record() as recorder:
        single(each=twice)
    maps = recorder.maps()
    assert maps.provenance["evaluations"] == 6
    rows = lambda call: slice(None)  # noqa: E731
    oracle.assert_maps(maps, calls, groups=[0, 0, 1, 1, 2, 2], rows=rows, reference=REFERENCE)


@torch.no_grad()
def windows(single, steps):
    """Every window is predicted and stepped by itself."""
    single.scheduler.set_timesteps(steps)
    latents = torch.ones(2, 4, 8, 12)
    for timestep in single.scheduler.timesteps:
        for left in (0, 6):
            part = latents[..., left : left + 6]
            noise = single.predict(part, timestep)
            latents[..., left : left + 6] = single.scheduler.step(noise, timestep, part).prev_sample


@pytest.mark.parametrize("enough", [False, True], ids=["too many steps", "a few steps"])
def test_windows_are_refused(tiny, oracle, enough):
    single = Single(tiny, DDIMScheduler(**BETAS, clip_sample=False))
    if not enough:
        message = ".*at most the 6 evaluations that set_timesteps announced"
        with oracle.gives_up(single.record(), RuntimeError, message):
            windows(single, 6)
        return
    with single.record() as recorder:
        single.scheduler.set_timesteps(6)
        for timestep in single.scheduler.timesteps[:3]:
            for _ in range(2):
                with torch.no_grad():
                    noise = single.predict(torch.ones(2, 4, 8, 6), timestep)
                single.scheduler.step(noise, timestep, torch.ones(2, 4, 8, 6))
    with pytest.raises(RuntimeError, match=r"steps of one image, got 2 evaluations at timestep"):
        recorder.maps()


def test_a_second_image_without_an_announcement(tiny, oracle):
    single = Single(tiny, DDIMScheduler(**BETAS, clip_sample=False))
    message = ".*got one more; call set_timesteps before every run"
    with oracle.gives_up(single.record(), RuntimeError, message):
        single()
        single(begin=False)


def test_timesteps_that_rise_and_fall(tiny):
    """RePaint goes back to noisier images: groups in order of calls would mix."""
    single = Single(tiny, RePaintScheduler(beta_start=0.00085, beta_end=0.012))
    scheduler, reference = single.scheduler, torch.zeros(2, 4, 8, 6)
    with single.record() as recorder, torch.no_grad():
        scheduler.set_timesteps(8, jump_length=2, jump_n_sample=2)
        for timestep in scheduler.timesteps:
            noise = single.predict(reference, timestep)
            scheduler.step(noise, timestep, reference, reference, reference)
    with pytest.raises(RuntimeError, match="timesteps that only fall, or only rise, got a run of"):
        recorder.maps()


@pytest.mark.parametrize("cls", [DDIMScheduler, EulerDiscreteScheduler])
def test_a_copy_of_the_scheduler_steps_itself(tiny, cls):
    """Made inside the block, as servers make one per request."""
    single = Single(tiny, cls(**BETAS))
    plain = single()
    with single.record() as recorder:
        copied = copy.deepcopy(single.scheduler)
        copied.set_timesteps(3)
        copied.step(torch.zeros(2, 4, 8, 6), copied.timesteps[0], torch.zeros(2, 4, 8, 6))
        assert len(single.scheduler.timesteps) == 6
        assert torch.equal(single(), plain)
    assert recorder.maps().provenance["evaluations"] == 6
    assert len(copied.timesteps) == 3
