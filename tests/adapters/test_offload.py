"""Models whose weights come and go: layers are called, never read."""

import pytest
import torch
from diffusers.hooks import apply_group_offloading

import i2am
from i2am.layouts import TokenLayout

PATCHES = TokenLayout.cross_attention((4, 3))


def sequentially(loop):
    from accelerate import cpu_offload

    cpu_offload(loop.unet, execution_device=torch.device("cpu"))
    assert {weight.device.type for weight in loop.unet.parameters()} == {"meta"}


def to_disk(loop, folder):
    from accelerate import disk_offload

    disk_offload(loop.unet, folder, execution_device=torch.device("cpu"))
    assert {weight.device.type for weight in loop.unet.parameters()} == {"meta"}


def by_leaf(loop):
    apply_group_offloading(
        loop.unet,
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
    )


@pytest.mark.parametrize("when", ["before", "inside"])
@pytest.mark.parametrize("way", [sequentially, by_leaf, to_disk], ids=lambda way: way.__name__)
def test_offloaded_denoiser(tiny, tmp_path, way, when):
    loop = tiny.loop()
    with i2am.record(loop, layout=PATCHES) as recorder:
        plain = loop(tiny.reference())
    expected = recorder.maps()
    arguments = (tmp_path,) if way is to_disk else ()
    if when == "before":
        way(loop, *arguments)
    with i2am.record(loop, layout=PATCHES) as recorder:
        if when == "inside":
            way(loop, *arguments)
        latents = loop(tiny.reference())
    assert torch.equal(latents, plain)
    maps = recorder.maps()
    assert maps.provenance == expected.provenance
    for one, other in zip(maps.layer_sums, expected.layer_sums, strict=True):
        assert one.reference_to_generated.device.type == "cpu"
        assert torch.equal(one.reference_to_generated, other.reference_to_generated)
        assert torch.equal(one.generated_to_reference, other.generated_to_reference)


def test_pipeline_offloaded_as_a_whole(tiny):
    """`enable_sequential_cpu_offload` needs an accelerator; its hooks are accelerate's."""
    from accelerate import cpu_offload

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
    for component in (pipeline.unet, pipeline.vae):
        cpu_offload(component, execution_device=torch.device("cpu"))
    with i2am.record(pipeline, time_groups=2) as recorder:
        assert torch.equal(images(), plain)
    assert len(recorder.maps().layers) == 4
