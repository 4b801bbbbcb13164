"""Whatever happens in the block, model and scheduler come back as they were."""

import gc
import warnings
import weakref

import pytest
import torch
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
)

import i2am
from i2am.adapters.attention import attending
from i2am.adapters.attention.processors import RecordingAttnProcessor
from i2am.adapters.attention.sites import LISTENERS
from i2am.attribution.accumulator import Accumulator
from i2am.layouts import TokenLayout

PATCHES = TokenLayout.cross_attention((4, 3))
SELF_ATTENTION = TokenLayout.same_grid(r"attn1$")


class Stop(Exception):
    pass


def stopping(error):
    def on_step(index):
        if index == 1:
            raise error

    return on_step


@pytest.fixture(params=["replaced", "fused", "watched", "shared", "ip adapter"])
def pipeline(request, tiny):
    """Pipelines whose processors are recorded in every way there is, and a run for each."""
    if request.param == "ip adapter":
        made = tiny.ip_adapters(tiny.stable_diffusion(), "full")

        def run(on_step=lambda index: None):
            def callback(pipe, index, timestep, tensors):
                on_step(index)
                return tensors

            return tiny.run(
                made,
                **tiny.prompts(),
                ip_adapter_image=tiny.picture(),
                num_inference_steps=5,
                height=16,
                width=16,
                callback_on_step_end=callback,
            )

        return made, run, None
    made = tiny.loop()
    if request.param == "fused":
        made.unet.fuse_qkv_projections()
    elif request.param == "watched":
        made.unet.set_attn_processor({n: AttnProcessor() for n in made.unet.attn_processors})
    elif request.param == "shared":
        made.unet.set_attn_processor(AttnProcessor())
    return made, lambda **options: made(tiny.reference(), **options), PATCHES


def test_after_a_run(tiny, pipeline):
    made, run, layout = pipeline
    before = tiny.state(made)
    with i2am.record(made, layout=layout):
        assert tiny.state(made) != before
        inside = list(made.unet.state_dict())
        run()
    assert tiny.state(made) == before
    assert inside == before["keys"]


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_after_an_error_in_the_pipeline(tiny, pipeline, error):
    made, run, layout = pipeline
    before = tiny.state(made)
    recorder = i2am.record(made, layout=layout, time_groups=1)
    with pytest.raises(error), recorder:
        run(on_step=stopping(error()))
    assert tiny.state(made) == before
    with pytest.warns(UserWarning, match="of .* announced evaluations"):
        assert recorder.maps().provenance["evaluations"] >= 1


def test_after_an_error_inside_a_layer(tiny, pipeline):
    made, run, layout = pipeline
    before = tiny.state(made)

    def fail(module, arguments):
        raise Stop

    layer = made.unet.up_blocks[1].attentions[0].transformer_blocks[0].attn2.to_out[0]
    hook = layer.register_forward_pre_hook(fail)
    with pytest.raises(Stop), i2am.record(made, layout=layout):
        run()
    hook.remove()
    assert tiny.state(made) == before


def test_after_a_layout_that_does_not_fit(tiny, oracle, pipeline):
    made, run, _ = pipeline
    plain, before = run(), tiny.state(made)
    layout = TokenLayout.cross_attention((9, 9))
    recorder = i2am.record(made, layout=layout)
    with oracle.gives_up(recorder, ValueError, r".*layout expects 1 \+ 9x9"):
        image = run()
        assert tiny.state(made) == before  # at once
    assert torch.equal(image, plain)
    assert tiny.state(made) == before


def test_after_attaching_failed_half_way(tiny, monkeypatch):
    loop = tiny.loop()
    before = tiny.state(loop)
    recorder = i2am.record(loop, layout=PATCHES)
    broken = loop.unet.up_blocks[1].attentions[1].transformer_blocks[0].attn2

    def refuse(processor):
        raise Stop

    monkeypatch.setattr(broken, "set_processor", refuse, raising=True)
    with pytest.raises(Stop):
        recorder.attach()
    monkeypatch.undo()
    assert tiny.state(loop) == before
    with recorder:  # not taken for recorded
        loop(tiny.reference())
    assert recorder.maps().n_samples == 1


def test_images_after_recording_are_the_same(pipeline):
    made, run, layout = pipeline
    plain = run()
    with i2am.record(made, layout=layout):
        run()
    assert torch.equal(run(), plain)


def test_detaching_twice_does_nothing(tiny):
    loop = tiny.loop()
    before = tiny.state(loop)
    recorder = i2am.record(loop, layout=PATCHES)
    recorder.detach()  # never attached
    recorder.attach()
    loop(tiny.reference())
    recorder.detach()
    recorder.detach()
    assert tiny.state(loop) == before
    assert recorder.maps().n_samples == 1


def test_second_recorder_is_refused_and_harms_nothing(tiny):
    loop = tiny.loop()
    with i2am.record(loop, layout=PATCHES) as first:
        installed = tiny.state(loop)
        second = i2am.record(loop.unet, layout=PATCHES, time_groups=1, num_inference_steps=6)
        with pytest.raises(RuntimeError, match="UNet2DConditionModel is being recorded already"):
            second.attach()
        second.detach()
        with pytest.raises(RuntimeError, match="is being recorded already"):
            i2am.record(loop, layout=PATCHES).attach()
        assert tiny.state(loop) == installed
        loop(tiny.reference())
    assert first.maps().n_samples == 1
    with i2am.record(loop, layout=PATCHES):
        pass  # free again


def test_a_cell_that_attaches_can_be_run_again(tiny):
    """Its earlier recorder has no name any more; it gives way, also in the middle of a run."""
    loop = tiny.loop()
    before = tiny.state(loop)
    first = i2am.record(loop, layout=PATCHES)
    first.attach()
    with pytest.raises(Stop):
        loop(tiny.reference(), on_step=stopping(Stop()))
    second = i2am.record(loop, layout=PATCHES)
    with pytest.warns(UserWarning, match="UNet2DConditionModel was still being recorded by an ea"):
        second.attach()
    loop(tiny.reference(2))
    with pytest.warns(UserWarning, match="made 2 of 6"):
        assert first.maps().provenance["evaluations"] == 2  # what it saw is kept
    assert second.maps().n_samples == 2
    with pytest.warns(UserWarning, match="was still being recorded"):
        second.attach()  # itself
    loop(tiny.reference(3))
    assert second.maps().n_samples == 3
    second.detach()
    first.detach()
    assert tiny.state(loop) == before


def test_a_block_takes_the_place_of_a_recorder_without_one(tiny):
    loop = tiny.loop()
    forgotten = i2am.record(loop, layout=PATCHES)
    forgotten.attach()
    with pytest.warns(UserWarning, match="was still being recorded"):
        recorder = i2am.record(loop, layout=PATCHES).__enter__()
    with pytest.raises(RuntimeError, match=r"leave that record\(\) block first"):
        forgotten.attach()
    loop(tiny.reference())
    recorder.__exit__()
    assert recorder.maps().n_samples == 1


def test_two_blocks_and_a_recorder_used_twice(tiny):
    loop = tiny.loop()
    before = tiny.state(loop)
    results = []
    for _ in range(2):
        with i2am.record(loop, layout=PATCHES) as recorder:
            loop(tiny.reference())
        results.append(recorder.maps())
    for _ in range(2):
        with recorder:
            loop(tiny.reference())
        results.append(recorder.maps())
    assert tiny.state(loop) == before
    for maps in results[1:]:
        assert maps.provenance == results[0].provenance
        for one, other in zip(maps.layer_sums, results[0].layer_sums, strict=True):
            assert torch.equal(one.reference_to_generated, other.reference_to_generated)
            assert torch.equal(one.generated_to_reference, other.generated_to_reference)


def test_two_pipelines_at_once(tiny):
    """Each with its own denoiser; their processors and their class may be shared."""
    one, other = tiny.loop(), tiny.loop()
    shared = AttnProcessor()
    for loop in (one, other):
        loop.unet.set_attn_processor(shared)
    with i2am.record(one, layout=PATCHES) as first:
        with i2am.record(other, layout=PATCHES) as second:
            one(tiny.reference(seed=3))
            other(tiny.reference(seed=4))
        assert type(shared) is not AttnProcessor
    assert type(shared) is AttnProcessor
    assert vars(shared) == {}
    assert not torch.equal(
        first.maps().reference_to_generated(), second.maps().reference_to_generated()
    )


def test_pipeline_that_shares_the_denoiser(tiny):
    """As `from_pipe` makes them: the same UNet and the same scheduler."""
    loop = tiny.loop()
    sibling = tiny.Loop(loop.unet, loop.scheduler)
    with i2am.record(loop, layout=PATCHES) as recorder:
        sibling(tiny.reference())
    assert recorder.maps().n_samples == 1


def test_processor_installed_meanwhile_is_left_alone(tiny):
    loop = tiny.loop()
    theirs = AttnProcessor2_0()
    with (
        i2am.record(loop, layout=PATCHES) as recorder,
    ):
        loop(tiny.reference())
        loop.unet.set_attn_processor(theirs)
    assert set(map(id, loop.unet.attn_processors.values())) == {id(theirs)}
    with pytest.warns(UserWarning, match="processors of 4 layers were replaced"):
        recorder.maps()


def test_projections_fused_while_recording(tiny):
    """diffusers keeps our processors and brings them back after the recording: they only attend."""
    loop = tiny.loop()
    plain = loop(tiny.reference())
    with i2am.record(loop, layout=PATCHES):
        loop.unet.fuse_qkv_projections()
    assert {type(p) for p in loop.unet.attn_processors.values()} == {FusedAttnProcessor2_0}
    loop.unet.unfuse_qkv_projections()
    assert torch.equal(loop(tiny.reference()), plain)
    stale = [p for p in loop.unet.attn_processors.values() if type(p) is RecordingAttnProcessor]
    assert len(stale) == 4
    assert all(processor.record is None for processor in stale)
    # and are recorded like the ones they stand for
    with i2am.record(loop, layout=PATCHES) as recorder:
        assert torch.equal(loop(tiny.reference()), plain)
    assert len(recorder.maps().layers) == 4


def test_adapter_loaded_while_recording(tiny):
    """`load_ip_adapter` makes new processors of the classes that it finds: none of ours stays."""
    pipeline = tiny.stable_diffusion()
    with i2am.record(pipeline, layout=SELF_ATTENTION):
        tiny.load_ip_adapter(pipeline)
    kinds = {type(processor) for processor in pipeline.unet.attn_processors.values()}
    assert kinds == {AttnProcessor2_0, IPAdapterAttnProcessor2_0}


def test_adapter_unloaded_while_recording(tiny):
    pipeline = tiny.ip_adapters(tiny.stable_diffusion(), "base")
    for name, module in pipeline.unet.named_modules():
        if name.endswith("attn1"):
            module.set_processor(AttnProcessor())
    adapters = [p for p in pipeline.unet.attn_processors.values() if hasattr(p, "to_k_ip")]
    layout = TokenLayout("both", SELF_ATTENTION.spans, layers=r"attn[12]$")
    with i2am.record(pipeline, layout=layout):
        pipeline.unload_ip_adapter()
    kinds = {type(processor) for processor in pipeline.unet.attn_processors.values()}
    assert kinds == {AttnProcessor, AttnProcessor2_0}
    assert {type(processor) for processor in adapters} == {IPAdapterAttnProcessor2_0}


def test_adapter_keeps_its_identity_while_recording(tiny):
    """Weights, state dict and `isinstance` tests of diffusers go on working."""
    pipeline = tiny.ip_adapters(tiny.stable_diffusion(), "base")
    unet = pipeline.unet
    weights = {name: id(weight) for name, weight in unet.named_parameters()}
    with i2am.record(pipeline, time_groups=1) as recorder:
        assert {name: id(weight) for name, weight in unet.named_parameters()} == weights
        assert any("to_k_ip" in name for name in unet.state_dict())
        pipeline.set_ip_adapter_scale(0.25)
        scales = [p.scale for p in unet.attn_processors.values() if hasattr(p, "to_k_ip")]
        assert scales == [[0.25]] * 4
        tiny.run(
            pipeline,
            **tiny.prompts(),
            ip_adapter_image=tiny.picture(),
            num_inference_steps=2,
            height=16,
            width=16,
        )
    assert len(recorder.maps().layers) == 4


def test_a_recorder_and_its_model_can_be_forgotten(tiny):
    loop = tiny.loop()
    unet = weakref.ref(loop.unet)
    with i2am.record(loop, layout=PATCHES) as recorder:
        loop(tiny.reference())
    maps = recorder.maps()
    del loop, recorder
    gc.collect()
    assert unet() is None
    assert maps.n_samples == 1


@pytest.mark.parametrize("collector", [False, True], ids=["references", "collector"])
def test_a_lost_recorder_frees_its_model(tiny, pipeline, collector):
    """Nobody can detach it any more, or ask it for maps."""
    made, run, layout = pipeline
    plain, before, listeners = run(), tiny.state(made), dict(LISTENERS)
    recorder = i2am.record(made, layout=layout)
    recorder.attach()
    assert torch.equal(torch.as_tensor(run()), torch.as_tensor(plain))
    assert tiny.state(made) != before
    if collector:
        recorder.itself = recorder
    gc.disable()
    try:
        del recorder
        assert (tiny.state(made) == before) != collector
    finally:
        gc.enable()
    gc.collect()
    assert tiny.state(made) == before
    assert listeners == LISTENERS
    assert torch.equal(torch.as_tensor(run()), torch.as_tensor(plain))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with i2am.record(made, layout=layout) as second:
            assert torch.equal(torch.as_tensor(run()), torch.as_tensor(plain))
    assert second.maps().n_samples == 1
    assert tiny.state(made) == before


def test_a_lost_block_frees_its_model(tiny):
    """As a notebook loses one that it entered by hand."""
    loop = tiny.loop()
    before = tiny.state(loop)
    i2am.record(loop, layout=PATCHES).__enter__()
    gc.collect()
    assert tiny.state(loop) == before
    with i2am.record(loop, layout=PATCHES) as recorder:
        loop(tiny.reference())
    assert recorder.maps().n_samples == 1


def test_a_block_without_a_name_records_to_its_end(tiny):
    loop = tiny.loop()
    before = tiny.state(loop)
    with i2am.record(loop, layout=PATCHES):
        gc.collect()
        assert tiny.state(loop) != before


@pytest.mark.parametrize("step", [0, 2])
def test_a_recorder_lost_in_the_middle_of_a_run(tiny, pipeline, step):
    made, run, layout = pipeline
    plain, before = run(), tiny.state(made)
    held = [i2am.record(made, layout=layout)]
    held[0].attach()

    def lose(index):
        if index == step:
            held.clear()
            gc.collect()
            assert tiny.state(made) == before

    assert torch.equal(torch.as_tensor(run(on_step=lose)), torch.as_tensor(plain))
    assert held == []
    assert tiny.state(made) == before


@pytest.mark.parametrize("place", ["attending", "recording"])
def test_a_recorder_lost_in_the_middle_of_a_call(tiny, monkeypatch, place):
    """As the garbage collector does it: between any two lines of ours."""
    loop = tiny.loop()
    plain, before = loop(tiny.reference()), tiny.state(loop)
    held = []

    def lose(*args, **kwargs):
        held.clear()
        return original(*args, **kwargs)

    owner, name = {
        "attending": (attending, "attention_with_lse"),
        "recording": (Accumulator, "add"),
    }[place]
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lose)
    held.append(i2am.record(loop, layout=PATCHES))
    held[0].attach()
    assert torch.equal(loop(tiny.reference()), plain)
    assert tiny.state(loop) == before
