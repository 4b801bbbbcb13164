"""Words of Stable Diffusion, and the images of its adapters."""

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
)

from i2am.layouts import AttentionCall, Encoder, Frame, Span
from i2am.layouts.registry import known_layout

PIPELINES = {
    StableDiffusionPipeline: "has no reference image",
    StableDiffusionImg2ImgPipeline: "its image is what the run starts from",
    StableDiffusionInpaintPipeline: "its image enters as latents and input channels",
    StableDiffusionInstructPix2PixPipeline: "its image enters as input channels, which attention",
    StableDiffusionControlNetPipeline: "its control image enters as features that are added",
    StableDiffusionAdapterPipeline: "its control image enters as features that are added",
}
LEVELS = {0: (12, 20), 1: (6, 10), 2: (3, 5)}


def level(layer):
    if layer.startswith("mid"):
        return 2
    number = int(layer.split(".")[1])
    return number if layer.startswith("down") else 2 - number


@pytest.mark.parametrize("cls", PIPELINES, ids=lambda cls: cls.__name__)
def test_words_of_a_pipeline(tiny, cls):
    pipe = tiny.stable_diffusion(cls)
    layout = known_layout(pipe, pipe.unet)
    assert layout.name == "text"
    assert layout.no_reference.startswith(f"{cls.__name__} has no reference ")
    assert PIPELINES[cls] in layout.no_reference
    assert layout.encoders == (Encoder("text_encoder", "tokenizer"),)
    arguments = tiny.stable_diffusion_arguments(cls)
    watched = tiny.watch(pipe.unet, layout, lambda: pipe(**arguments))
    assert len(watched.seen) == len(watched.frames) * 7
    for seen in watched.seen:
        grid = LEVELS[level(seen.call.layer)]
        query = (Span("generated", "generated", 0, grid),)
        assert seen.spans(layout) == (query, (Span("text", "text", 0, (77,)),))


def test_nobodys_call(tiny):
    """Without adapters a layer has one call; who makes another is not known."""
    pipe = tiny.stable_diffusion()
    call = AttentionCall("mid_block.attentions.0.transformer_blocks.0.attn2", 1, 48, 4)
    assert known_layout(pipe, pipe.unet).spans(call, Frame((6, 8))) is None


def test_odd_sizes(tiny):
    pipe = tiny.stable_diffusion()
    layout = known_layout(pipe, pipe.unet)
    arguments = {
        "sample": tiny.noise(2, 4, 13, 21),
        "timestep": torch.tensor(5),
        "encoder_hidden_states": tiny.noise(2, 154, tiny.CONTEXT),
    }
    watched = tiny.watch(pipe.unet, layout, tiny.again(pipe.unet, arguments))
    grids = {level(seen.call.layer): seen.spans(layout).generated.grid for seen in watched.seen}
    assert grids == {0: (13, 21), 1: (7, 11), 2: (4, 6)}
    assert {seen.spans(layout).key for seen in watched.seen} == {(Span("text", "text", 0, (154,)),)}


def test_a_word_moves_its_keys_alone(tiny):
    pipe = tiny.stable_diffusion()
    layout = known_layout(pipe, pipe.unet)
    text = tiny.noise(1, 77, tiny.CONTEXT)
    other = text.clone()
    other[:, 5] += 1
    before, after = (
        tiny.watch(
            pipe.unet,
            layout,
            tiny.again(
                pipe.unet,
                {"sample": tiny.noise(1, 4, 6, 8), "timestep": 5, "encoder_hidden_states": given},
            ),
        )
        for given in (text, other)
    )
    for one, two in zip(before.seen, after.seen, strict=True):
        assert tiny.moved(one, two) == {5} <= tiny.tokens(one.spans(layout).key, "text")


def test_sdxl_has_two_encoders_at_the_same_positions(tiny):
    pipe = tiny.sdxl()
    layout = known_layout(pipe, pipe.unet)
    second = Encoder("text_encoder_2", "tokenizer_2")
    assert layout.encoders == (Encoder("text_encoder", "tokenizer"), second)
    watched = tiny.watch(
        pipe.unet, layout, lambda: pipe(**tiny.stable_diffusion_arguments(StableDiffusionPipeline))
    )
    assert {seen.spans(layout).key for seen in watched.seen} == {(Span("text", "text", 0, (77,)),)}
    pipe.text_encoder = pipe.tokenizer = None  # the refiner
    assert known_layout(pipe, pipe.unet).encoders == (second,)
    pipe.text_encoder_2 = None
    assert known_layout(pipe, pipe.unet).encoders == ()


class OwnLoop(StableDiffusionPipeline):
    """Somebody's pipeline, by the name of its class a text pipeline."""


def test_subclass_is_called_by_its_own_name(tiny):
    pipe = tiny.stable_diffusion(OwnLoop)
    assert known_layout(pipe, pipe.unet).no_reference == "OwnLoop has no reference image"


class Unknown(DiffusionPipeline):
    def __init__(self, unet, image_encoder=None):
        super().__init__()
        self.register_modules(unet=unet, image_encoder=image_encoder)


def test_context_of_another_pipeline_is_not_known(tiny):
    """Not every context of such a UNet is a text."""
    unet = tiny.make_unet()
    assert known_layout(unet, unet) is None
    assert known_layout(Unknown(unet), unet) is None


class TestAdapters:
    TEXT = (Span("text", "text", 0, (77,)),)

    def seen(self, tiny, pipe, images, **more):
        layout = known_layout(pipe, pipe.unet)
        arguments = tiny.stable_diffusion_arguments(StableDiffusionPipeline)
        watched = tiny.watch(
            pipe.unet, layout, lambda: pipe(**arguments, ip_adapter_image=images, **more)
        )
        return layout, watched

    def keys(self, layout, watched):
        """Key spans by the index of the call, the same in every layer."""
        found = {}
        for seen in watched.seen:
            spans = seen.spans(layout)
            assert spans.generated.grid == LEVELS[level(seen.call.layer)]
            assert found.setdefault(seen.call.call_index, spans.key) == spans.key
        return found

    def test_text_and_image_in_one_layout(self, tiny):
        pipe = tiny.add_ip_adapters(tiny.stable_diffusion(), "base")
        layout, watched = self.seen(tiny, pipe, tiny.picture())
        assert (layout.name, layout.no_reference) == ("ip_adapter tokens", "")
        assert layout.encoders == (Encoder(),)
        assert layout.context_keys
        assert layout.through_processor
        assert self.keys(layout, watched) == {
            0: self.TEXT,
            1: (Span("reference", "reference", 0, (4,)),),
        }

    def test_patches(self, tiny):
        pipe = tiny.add_ip_adapters(tiny.stable_diffusion(), "full")
        layout, watched = self.seen(tiny, pipe, tiny.picture())
        assert layout.name == "ip_adapter 4x4"
        assert self.keys(layout, watched)[1] == (Span("reference", "reference", 1, (4, 4)),)

    def test_two_kinds_of_adapters(self, tiny):
        pipe = tiny.add_ip_adapters(tiny.stable_diffusion(), "base", "full")
        layout, watched = self.seen(tiny, pipe, [tiny.picture(), tiny.picture(seed=1)])
        assert layout.name == "ip_adapter tokens and 4x4"
        assert self.keys(layout, watched) == {
            0: self.TEXT,
            1: (Span("reference 1", "reference", 0, (4,)),),
            2: (Span("reference 2", "reference", 1, (4, 4)),),
        }

    def test_images_of_one_adapter_lie_one_after_the_other(self, tiny):
        pipe = tiny.add_ip_adapters(tiny.stable_diffusion(), "full", "base")
        images = [[tiny.picture(), tiny.picture(seed=1)], [tiny.picture(seed=2)]]
        layout, watched = self.seen(tiny, pipe, images)
        assert self.keys(layout, watched) == {
            0: self.TEXT,
            1: (
                Span("reference 1", "reference", 1, (4, 4)),
                Span("reference 2", "reference", 18, (4, 4)),
            ),
            2: (Span("reference 3", "reference", 0, (4,)),),
        }

    def test_images_with_masks_are_calls_of_their_own(self, tiny):
        pipe = tiny.add_ip_adapters(tiny.stable_diffusion(), "base", "full")
        images = [[tiny.picture(), tiny.picture(seed=1)], [tiny.picture(seed=2)]]
        masks = [torch.ones(1, 2, 24, 40), None]
        layout, watched = self.seen(
            tiny, pipe, images, cross_attention_kwargs={"ip_adapter_masks": masks}
        )
        assert self.keys(layout, watched) == {
            0: self.TEXT,
            1: (Span("reference 1", "reference", 0, (4,)),),
            2: (Span("reference 2", "reference", 0, (4,)),),
            3: (Span("reference 3", "reference", 1, (4, 4)),),
        }

    @pytest.mark.parametrize(("adapter", "image"), [(0, 0), (0, 1), (1, 0)])
    def test_an_image_moves_its_keys_alone(self, tiny, adapter, image):
        """Plain pipelines and those whose context is not known agree on the references."""
        pipe = tiny.add_ip_adapters(tiny.stable_diffusion(), "full", "base")
        embeds = [tiny.noise(1, 2, 17, 20), tiny.noise(1, 1, 12)]
        others = [each.clone() for each in embeds]
        others[adapter][:, image] += tiny.noise(*others[adapter][:, image].shape, seed=4)
        layout = known_layout(Unknown(pipe.unet, pipe.image_encoder), pipe.unet)
        before, after = (
            tiny.watch(
                pipe.unet,
                layout,
                tiny.again(
                    pipe.unet,
                    {
                        "sample": tiny.noise(1, 4, 6, 8),
                        "timestep": 5,
                        "encoder_hidden_states": tiny.noise(1, 7, tiny.CONTEXT),
                        "added_cond_kwargs": {"image_embeds": given},
                    },
                ),
            )
            for given in (embeds, others)
        )
        name = f"reference {1 + 2 * adapter + image}"
        for one, two in zip(before.seen, after.seen, strict=True):
            spans = one.spans(layout)
            if one.call.call_index == 0:
                assert spans is None
            elif one.call.call_index == 1 + adapter:
                own = tiny.tokens(spans.key, name)
                assert own <= tiny.moved(one, two)
                # the class token before the patches is of the same image
                assert tiny.moved(one, two) <= own | {min(own) - 1}
            else:
                assert not tiny.moved(one, two)

    def test_bare_unet(self, tiny):
        unet = tiny.add_ip_adapters(tiny.stable_diffusion(), "base").unet
        assert known_layout(unet, unet).name == "ip_adapter tokens"
        compiled = torch.compile(unet, backend="eager")
        assert known_layout(compiled, compiled).name == "ip_adapter tokens"

    def test_encoder_that_is_not_there(self, tiny):
        unet = tiny.add_ip_adapters(tiny.stable_diffusion(), "base", "full").unet
        message = (
            "layout must be given for UNet2DConditionModel, whose IP-Adapter reads the patches of "
            "an image encoder that is not there"
        )
        with pytest.raises(ValueError, match=message):
            known_layout(unet, unet)

    def test_other_tokens_than_the_encoder_has(self, tiny):
        pipe = tiny.add_ip_adapters(tiny.stable_diffusion(), "full")
        layout = known_layout(pipe, pipe.unet)
        frame = Frame((6, 8), {"added_cond_kwargs": {"image_embeds": [tiny.noise(1, 2, 17, 20)]}})
        layer = "mid_block.attentions.0.transformer_blocks.0.attn2"
        call = AttentionCall(layer, 1, 48, 33)
        with pytest.raises(
            ValueError, match=r"expects 1 \+ 4x4 tokens for each image, got 33 keys"
        ):
            layout.spans(call, frame)


def test_paint_by_example(tiny):
    pipe = tiny.paint_by_example()
    layout = known_layout(pipe, pipe.unet)
    assert layout.name == "single_token"
    image, example = tiny.picture(), tiny.picture(seed=1)
    arguments = {"image": image, "mask_image": image.convert("L"), "example_image": example}
    watched = tiny.watch(
        pipe.unet,
        layout,
        lambda: pipe(**arguments, height=24, width=40, num_inference_steps=2, output_type="latent"),
    )
    for seen in watched.seen:
        spans = seen.spans(layout)
        assert spans.generated.grid == LEVELS[level(seen.call.layer)]
        assert spans.key == (Span("reference", "reference", 0, (1,)),)
