"""Compiled denoisers: every step recorded, one compilation, the same maps."""

import gc

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import i2am
from i2am.layouts import TokenLayout

PATCHES = TokenLayout.cross_attention((4, 3))

pytestmark = pytest.mark.slow

ONE_LEVEL = {  # compiles sooner, and still has four layers to record
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_same_maps(one, other):
    assert one.provenance["calls"] == other.provenance["calls"]
    for left, right in zip(one.layer_sums, other.layer_sums, strict=True):
        for name in ("reference_to_generated", "generated_to_reference"):
            torch.testing.assert_close(getattr(left, name), getattr(right, name))


def wrap(loop, backend):
    loop.unet = torch.compile(loop.unet, backend=backend, fullgraph=True)


def in_place(loop, backend):
    loop.unet.compile(backend=backend, fullgraph=True)


def regionally(loop, backend):
    loop.unet.compile_repeated_blocks(backend=backend, fullgraph=True)


@pytest.mark.parametrize("way", [wrap, in_place, regionally], ids=lambda way: way.__name__)
def test_whole_graph(tiny, way):
    loop = tiny.loop(1, **ONE_LEVEL)
    reference = tiny.reference(2)
    with i2am.record(loop, layout=PATCHES) as recorder:
        eager_latents = loop(reference)
    eager = recorder.maps()
    backend = CompileCounterWithBackend("aot_eager")
    way(loop, backend)
    before = tiny.state(loop)
    plain = loop(reference)
    graphs = backend.frame_count
    for _ in range(3):
        with i2am.record(loop, layout=PATCHES) as recorder:
            recorded = loop(reference)
        # one more graph, with the recording in it: for all steps, layers and later recordings
        assert backend.frame_count == 2 * graphs
        assert torch.equal(recorded, plain)
        assert_same_maps(recorder.maps(), eager)
        assert set(recorder.maps().provenance["calls"].values()) == {6}
    torch.testing.assert_close(plain, eager_latents)
    assert torch.equal(loop(reference), plain)
    assert backend.frame_count == 2 * graphs
    assert tiny.state(loop) == before
    torch._dynamo.reset()


@pytest.mark.parametrize("way", [wrap, in_place, regionally], ids=lambda way: way.__name__)
def test_a_lost_recorder_frees_a_compiled_model(tiny, way):
    loop = tiny.loop(1, **ONE_LEVEL)
    backend = CompileCounterWithBackend("aot_eager")
    way(loop, backend)
    before, plain = tiny.state(loop), loop(tiny.reference())
    graphs = backend.frame_count
    recorder = i2am.record(loop, layout=PATCHES)
    recorder.attach()
    assert torch.equal(loop(tiny.reference()), plain)
    del recorder
    gc.collect()
    assert tiny.state(loop) == before
    with i2am.record(loop, layout=PATCHES) as recorder:
        assert torch.equal(loop(tiny.reference()), plain)
    assert recorder.maps().n_samples == 1
    assert torch.equal(loop(tiny.reference()), plain)
    assert backend.frame_count == 2 * graphs


def test_watched_processors_break_the_graph_and_are_recorded(tiny):
    pipeline = tiny.ip_adapters(tiny.stable_diffusion(), "full")

    def images():
        return tiny.run(
            pipeline,
            **tiny.prompts(),
            ip_adapter_image=tiny.picture(),
            num_inference_steps=2,
            height=16,
            width=16,
        )

    plain = images()
    with i2am.record(pipeline, time_groups=1) as recorder:
        images()
    eager = recorder.maps()
    pipeline.unet.compile(backend="eager")
    with i2am.record(pipeline, time_groups=1) as recorder:
        compiled = images()
    torch.testing.assert_close(compiled, plain)
    assert_same_maps(recorder.maps(), eager)


def test_watched_processors_refuse_a_whole_graph(tiny):
    pipeline = tiny.ip_adapters(tiny.stable_diffusion(), "base")
    pipeline.unet.compile(backend="eager", fullgraph=True)
    with (
        i2am.record(pipeline, time_groups=1) as recorder,
        pytest.raises(torch._dynamo.exc.Unsupported, match=r"torch\.compiler\.disable"),
    ):
        tiny.run(
            pipeline,
            **tiny.prompts(),
            ip_adapter_image=tiny.picture(),
            num_inference_steps=2,
            height=16,
            width=16,
        )
    with pytest.raises(RuntimeError, match="no attribution was recorded"):
        recorder.maps()


def test_denoiser_compiled_while_recording(tiny):
    """The hooks are traced then, which breaks the graph around them; nothing is lost."""
    loop = tiny.loop(1, **ONE_LEVEL)
    with i2am.record(loop, layout=PATCHES) as recorder:
        loop(tiny.reference())
    eager = recorder.maps()
    with i2am.record(loop, layout=PATCHES) as recorder:
        loop.unet.compile(backend="eager")
        loop(tiny.reference())
    assert_same_maps(recorder.maps(), eager)
