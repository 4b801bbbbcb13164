"""A denoiser captured once and replayed in every later step: recorded like one that is called.

A graph knows addresses and nothing of Python. Where there is no GPU a tape stands in, which runs
the captured operations again on the tensors that they were given.
"""

import pytest
import torch
from diffusers import DDIMScheduler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import i2am
from i2am.adapters.attention import sites
from i2am.adapters.clock import RunClock
from i2am.attribution.layers import tensors
from i2am.layouts import TokenLayout

PATCHES = TokenLayout.cross_attention((4, 3))
STEPS, GROUPS, CAPTURED = 7, 4, 2


class Tape(TorchDispatchMode):
    """Operations as they were called, to be run again in place: what a CUDA graph does."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.i2am.record_attention.default:
            with self:  # a graph holds what is inside
                return sites._record_attention._init_fn(*args, **kwargs)
        output = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, output))
        return output

    def replay(self):
        for func, args, kwargs, output in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(output), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class CudaGraph:
    """The same of a real graph, whose capture computes nothing."""

    def __init__(self):
        self.graph = torch.cuda.CUDAGraph()
        self.capture = torch.cuda.graph(self.graph)

    def __enter__(self):
        self.capture.__enter__()

    def __exit__(self, *exception):
        self.capture.__exit__(*exception)
        self.graph.replay()

    def replay(self):
        self.graph.replay()


@torch.no_grad()
def denoise(unet, scheduler, reference, graph=None):
    """Guided denoising; with a graph the denoiser is called in the first steps only."""
    scheduler.set_timesteps(STEPS)
    device, samples = reference.device, len(reference)
    latents = torch.randn(samples, 4, 8, 6, generator=torch.Generator().manual_seed(0)).to(device)
    context = torch.cat([torch.zeros_like(reference), reference])
    given, time = torch.cat([latents, latents]), torch.zeros((), device=device)

    def call():
        return unet(given, time, encoder_hidden_states=context).sample

    for index, timestep in enumerate(scheduler.timesteps):
        given.copy_(torch.cat([latents, latents]))
        time.fill_(timestep.item())
        if graph is None or index < CAPTURED:
            output = call()
        elif index == CAPTURED:
            with graph:
                output = call()
        else:
            graph.replay()
        without, conditional = output.chunk(2)
        noise = without + 2 * (conditional - without)
        latents = scheduler.step(noise, timestep, latents).prev_sample
    return latents


def both_ways(tiny, graph, device, **options):
    unet = tiny.loop().unet.to(device)
    scheduler = DDIMScheduler(clip_sample=False)
    reference = tiny.reference(2).to(device)
    results = []
    for how in (None, graph):
        with i2am.record(
            unet, scheduler=scheduler, layout=PATCHES, time_groups=GROUPS, **options
        ) as recorder:
            latents = denoise(unet, scheduler, reference, how)
        results.append((latents, recorder.maps()))
    return results


def assert_recorded_alike(results):
    (called, maps), (replayed, from_graph) = results
    assert torch.equal(called, replayed)
    assert from_graph.provenance["evaluations"] == STEPS
    for one, other in zip(maps.layer_sums, from_graph.layer_sums, strict=True):
        for name, sums in tensors(one).items():
            if name == "calls":
                continue
            assert torch.equal(getattr(other, name), sums)
            # steps differ, and so do groups: one that got another's steps would show
            assert all(not torch.equal(sums[:, i], sums[:, i + 1]) for i in range(GROUPS - 1))
    if maps.pairs is not None:
        for name in ("generated_to_reference", "reference_to_generated"):
            for group in range(GROUPS):
                wanted = getattr(maps.pairs, name)(time=group)
                assert torch.equal(getattr(from_graph.pairs, name)(time=group), wanted)


KEPT = pytest.mark.parametrize(
    "options",
    [
        {},
        {"sums": "resized"},
        {"pairs": True},
        {"branch": "both"},
        {"values": "norm", "normalise": "conditional"},
    ],
    ids=["native", "resized", "pairs", "both", "on request"],
)


# the clock knows of CUDA graphs, not of tapes
@pytest.mark.filterwarnings("ignore:the denoiser was not called")
@KEPT
def test_replays_are_recorded(tiny, options):
    tape = Tape()
    assert_recorded_alike(both_ways(tiny, tape, "cpu", impl="streaming", **options))
    assert any(func is torch.ops.i2am.accumulate.default for func, *_ in tape.calls)


@pytest.mark.gpu
@KEPT
@pytest.mark.parametrize("attach", ["beside", "fused"])
def test_replays_of_a_cuda_graph_are_recorded(tiny, options, attach):
    results = both_ways(tiny, CudaGraph(), "cuda", attach=attach, **options)
    assert_recorded_alike(results)


REFUSED = "run must begin with calls of the denoiser itself and capture a CUDA graph of its own"


class Run:
    """A clock and the scheduler that it follows."""

    def __init__(self):
        self.scheduler = DDIMScheduler()
        self.clock = RunClock(self.scheduler, time_groups=1)
        self.clock.attach()

    def begin(self):
        self.scheduler.set_timesteps(4)

    def step(self, *, called=True, captured=False):
        """An evaluation: of a denoiser that is called, captured meanwhile, or only replayed."""
        if called:
            self.clock.arrive()
        self.clock.captured |= captured
        sample = torch.zeros(1, 4, 2, 2)
        self.scheduler.step(sample, self.scheduler.timesteps[0], sample)


@pytest.fixture
def after_a_graph():
    """The second run of a recording whose first run was captured and replayed."""
    run = Run()
    run.begin()
    run.step(captured=True)
    run.step(called=False)
    assert run.clock.evaluation == 2
    run.begin()
    return run


def test_a_run_of_replays_alone_is_refused(after_a_graph):
    """Nobody tells the recorder where it begins: its sums would land in the last run's."""
    with pytest.raises(RuntimeError, match=REFUSED):
        after_a_graph.step(called=False)


def test_a_graph_of_an_earlier_run_is_refused(after_a_graph):
    after_a_graph.step()
    with pytest.raises(RuntimeError, match=REFUSED):
        after_a_graph.step(called=False)


def test_a_run_may_have_a_graph_of_its_own(after_a_graph):
    after_a_graph.step()
    after_a_graph.step(captured=True)
    after_a_graph.step(called=False)
    assert after_a_graph.clock.evaluation == 3


def test_without_graphs_steps_that_nobody_called_for_are_somebody_elses():
    run = Run()
    run.begin()
    run.step(called=False)
    assert run.clock.evaluation == 0
