"""Nothing recorded, half recorded, or recorded but of no use: it says so, and what to do."""

import contextlib
import warnings

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import nn

import i2am
from i2am.layouts import TokenLayout
from i2am.layouts.spans import joint

PATCHES = TokenLayout.cross_attention((4, 3))
TOKENS = TokenLayout.ip_adapter()


@pytest.fixture
def loop(tiny):
    return tiny.loop()


@contextlib.contextmanager
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class TestNothingRecorded:
    def test_without_a_run(self, loop):
        with i2am.record(loop, layout=PATCHES) as recorder:
            pass
        with pytest.raises(RuntimeError, match="denoiser was not called; run the pipeline inside"):
            recorder.maps()

    def test_run_after_the_block(self, tiny, loop):
        with i2am.record(loop, layout=PATCHES) as recorder:
            pass
        loop(tiny.reference())
        with pytest.raises(RuntimeError, match="denoiser was not called"):
            recorder.maps()

    def test_scheduler_that_never_steps(self, tiny, loop):
        loop.scheduler.set_timesteps(5)
        with (
            i2am.record(loop.unet, scheduler=loop.scheduler, layout=PATCHES) as recorder,
            torch.no_grad(),
        ):
            for _ in range(3):
                loop.unet(torch.zeros(1, 4, 8, 6), 10, tiny.reference())
        with pytest.raises(RuntimeError, match="called 3 times but the scheduler never stepped"):
            recorder.maps()

    def test_scheduler_swapped_in_the_block(self, tiny, loop):
        with i2am.record(loop, layout=PATCHES) as recorder:
            loop.scheduler = type(loop.scheduler)(clip_sample=False)
            loop(tiny.reference())
        with pytest.raises(RuntimeError, match="pass the scheduler that the loop uses"):
            recorder.maps()

    def test_layout_of_another_family(self, tiny, loop):
        with i2am.record(loop, layout=TOKENS) as recorder:
            loop(tiny.reference())
        message = (
            "called 6 times, but 4 of 4 layers made no attention call of layout "
            "'ip_adapter tokens' .* with AttnProcessor2_0"
        )
        with pytest.raises(RuntimeError, match=message):
            recorder.maps()

    def test_processor_of_unknown_make(self, tiny, loop):
        class Elsewhere:
            def __call__(
                self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None
            ):
                return hidden_states

        loop.unet.set_attn_processor(Elsewhere())
        with i2am.record(loop, layout=PATCHES) as recorder:
            loop(tiny.reference())
        with pytest.raises(
            RuntimeError, match=r"does not use scaled_dot_product_attention.*Elsewhere"
        ):
            recorder.maps()

    def test_ip_adapter_scale_of_zero(self, tiny):
        pipeline = tiny.ip_adapters(tiny.stable_diffusion(), "base")
        pipeline.set_ip_adapter_scale(0.0)
        with i2am.record(pipeline, time_groups=1) as recorder:
            ip_adapter_run(tiny, pipeline)
        with pytest.raises(RuntimeError, match="an IP-Adapter scale of 0"):
            recorder.maps()

    @pytest.mark.parametrize("inside", [True, False], ids=["in the block", "after it"])
    @pytest.mark.parametrize(
        "replace",
        [
            lambda pipeline, tiny: pipeline.unet.fuse_qkv_projections(),
            lambda pipeline, tiny: pipeline.unet.set_attn_processor(AttnProcessor2_0()),
            lambda pipeline, tiny: pipeline.enable_attention_slicing(),
            lambda pipeline, tiny: tiny.load_ip_adapter(pipeline),
        ],
        ids=["fuse_qkv_projections", "set_attn_processor", "attention slicing", "load_ip_adapter"],
    )
    def test_processors_replaced_before_the_run(self, tiny, replace, inside):
        pipeline = tiny.stable_diffusion()
        layout = TokenLayout.cross_attention((2, 3))
        message = (
            r"no attribution was recorded: the processors of 4 layers were replaced .* "
            r"\(now \w+\); fuse projections, load adapters and switch attention before entering"
        )
        with i2am.record(pipeline, layout=layout, time_groups=1) as recorder:
            replace(pipeline, tiny)
            if hasattr(pipeline.unet.encoder_hid_proj, "image_projection_layers"):
                ip_adapter_run(tiny, pipeline)
            else:
                text_run(tiny, pipeline)
            if inside:
                with pytest.raises(RuntimeError, match=message):
                    recorder.maps()
        if not inside:
            with pytest.raises(RuntimeError, match=message):
                recorder.maps()

    def test_unloaded_ip_adapter(self, tiny):
        pipeline = tiny.ip_adapters(tiny.stable_diffusion(), "base")
        with i2am.record(pipeline, time_groups=1) as recorder:
            pipeline.unload_ip_adapter()
            text_run(tiny, pipeline)
        with pytest.raises(RuntimeError, match="processors of 4 layers were replaced"):
            recorder.maps()

    def test_branch_that_was_not_asked_for(self, tiny, loop):
        with i2am.record(loop, layout=PATCHES) as recorder:
            loop(tiny.reference())
        message = "must be one that record.. was asked for, conditional, got 'unconditional'"
        with pytest.raises(ValueError, match=message):
            recorder.maps("unconditional")

    def test_unconditional_half_of_a_run_without_guidance(self, tiny, loop):
        with i2am.record(loop, layout=PATCHES, branch="unconditional") as recorder:
            loop(tiny.reference(), guidance="off")
        message = "no unconditional attention was recorded: the run had only conditional rows"
        with pytest.raises(RuntimeError, match=message):
            recorder.maps()


def ip_adapter_run(tiny, pipeline, **options):
    settings = {"num_inference_steps": 3, "height": 16, "width": 16}
    return tiny.run(
        pipeline, **tiny.prompts(), ip_adapter_image=tiny.picture(), **{**settings, **options}
    )


def text_run(tiny, pipeline, **options):
    settings = {"num_inference_steps": 3, "height": 16, "width": 16}
    return tiny.run(pipeline, **tiny.prompts(), **{**settings, **options})


class TestPartlyRecorded:
    def test_scale_of_zero_in_some_layers(self, tiny):
        pipeline = tiny.ip_adapters(tiny.stable_diffusion(), "base")
        pipeline.set_ip_adapter_scale({"up": {"block_1": [0.0, 1.0]}})
        with i2am.record(pipeline, time_groups=1) as recorder:
            ip_adapter_run(tiny, pipeline)
        with pytest.warns(UserWarning, match="3 of 4 layers .* an IP-Adapter scale of 0"):
            maps = recorder.maps()
        assert maps.layers == ("up_blocks.1.attentions.1.transformer_blocks.0.attn2",)

    def test_scale_set_to_zero_in_the_middle(self, tiny):
        pipeline = tiny.ip_adapters(tiny.stable_diffusion(), "base")

        def switch_off(pipe, index, timestep, tensors):
            if index == 1:
                pipe.set_ip_adapter_scale(0.0)
            return tensors

        with i2am.record(pipeline, time_groups=3) as recorder:
            ip_adapter_run(tiny, pipeline, callback_on_step_end=switch_off)
        message = "attended in fewer than all 3 calls of the denoiser: down_blocks.* in 2"
        with pytest.warns(UserWarning, match=message):
            maps = recorder.maps()
        assert set(maps.provenance["calls"].values()) == {2}

    def test_processors_replaced_in_the_middle(self, tiny, loop):
        def replace(index):
            if index == 2:
                loop.unet.fuse_qkv_projections()

        with i2am.record(loop, layout=PATCHES, time_groups=3) as recorder:
            loop(tiny.reference(), on_step=replace)
        with pytest.warns(UserWarning, match="were replaced|fewer than all") as warned:
            maps = recorder.maps()
        messages = [str(warning.message) for warning in warned]
        assert len(messages) == 2
        assert "of 4 layers were replaced during the recording (now FusedAttn" in messages[0]
        assert "fewer than all 6 calls" in messages[1]
        assert set(maps.provenance["calls"].values()) == {3}


class TestSingleToken:
    @pytest.fixture
    def recorder(self, tiny, loop):
        with i2am.record(loop, layout=TokenLayout.single_token(), time_groups=2) as recorder:
            loop(tiny.reference(2, tokens=1))
        return recorder

    def test_one_warning_per_run_naming_the_layers(self, tiny, loop, recorder):
        with pytest.warns(UserWarning, match="layers with a single reference token") as warned:
            maps = recorder.maps()
        assert len(warned) == 1
        assert all(layer in str(warned[0].message) for layer in maps.layers)
        with no_warnings():
            recorder.maps()
        with recorder:
            loop(tiny.reference(2, tokens=1))
        with pytest.warns(UserWarning, match="layers with a single reference token"):
            recorder.maps()

    @pytest.mark.filterwarnings("ignore:layers with a single reference token")
    def test_maps_show_no_cause(self, recorder):
        maps = recorder.maps()
        assert not maps.informative
        assert {layer.site.informative for layer in maps.layer_sums} == {False}
        assert maps.directions == (i2am.Direction.REFERENCE_TO_GENERATED,)
        assert maps.reference_to_generated().shape == (2, 8, 6)
        with pytest.raises(ValueError, match="generated_to_reference does not exist"):
            maps.generated_to_reference()

    def test_the_missing_direction_alone_is_refused(self, tiny, oracle, loop):
        plain = loop(tiny.reference(tokens=1))
        recorder = i2am.record(
            loop, layout=TokenLayout.single_token(), directions="generated_to_reference"
        )
        message = ".*directions must include reference_to_generated"
        with oracle.gives_up(recorder, ValueError, message):
            image = loop(tiny.reference(tokens=1))
        assert torch.equal(image, plain)

    def test_several_tokens_are_causal(self, tiny, loop):
        with i2am.record(loop, layout=PATCHES) as recorder:
            loop(tiny.reference())
        with no_warnings():
            assert recorder.maps().informative


class TestKeyCounts:
    @pytest.mark.parametrize(
        ("layout", "message"),
        [
            (
                TokenLayout.cross_attention((4, 4)),
                r"expects 1 \+ 4x4 = 17 reference tokens, got 13",
            ),
            (TokenLayout.single_token(), "expects a single reference token, got 13 keys"),
            (TokenLayout.same_grid(), "expects as many keys as queries, got 13 and 48"),
        ],
        ids=["patches", "single token", "same grid"],
    )
    def test_cross_attention(self, tiny, oracle, loop, layout, message):
        plain = loop(tiny.reference())
        message = rf".*{message}.* in \w+.*\.attn2"
        with oracle.gives_up(i2am.record(loop, layout=layout), ValueError, message):
            image = loop(tiny.reference())
        assert torch.equal(image, plain)

    @pytest.mark.parametrize("options", [{"grid": (3, 3)}, {"grid": (4, 4), "image": 1}])
    def test_ip_adapter(self, tiny, oracle, options):
        pipeline = tiny.ip_adapters(tiny.stable_diffusion(), "full")
        plain = ip_adapter_run(tiny, pipeline)
        layout = TokenLayout.ip_adapter(prefix=1, **options)
        recorder = i2am.record(pipeline, layout=layout, time_groups=1)
        message = r".*layout expects images of 1 .* got 17 keys"
        with oracle.gives_up(recorder, ValueError, message):
            image = ip_adapter_run(tiny, pipeline)
        assert torch.equal(image, plain)

    def test_generated_tokens_without_a_grid(self, tiny, oracle, loop):
        row = joint(("generated", "generated", (48,)), ("reference", "reference", (1,)))
        layout = TokenLayout("odd", lambda call, frame: row)
        message = ".*layout 'odd' must give the generated tokens a grid"
        with oracle.gives_up(i2am.record(loop, layout=layout), ValueError, message):
            loop(tiny.reference())

    def test_causal_attention(self, tiny, oracle, loop):
        class Causal:
            def __call__(
                self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None
            ):
                states = hidden_states[:, None]
                return nn.functional.scaled_dot_product_attention(
                    states, states, states, is_causal=True
                )[:, 0]

        loop.unet.set_attn_processor(Causal())
        plain = loop(tiny.reference())
        recorder = i2am.record(loop, layout=PATCHES)
        message = ".*causal attention is not supported"
        with oracle.gives_up(recorder, NotImplementedError, message):
            image = loop(tiny.reference())
        assert torch.equal(image, plain)

    def test_frames_in_the_batch(self, tiny, oracle, loop):
        """A layer that folds an axis into its batch: whose rows these are nobody can tell."""

        class Frames(nn.Module):
            def __init__(self, attention):
                super().__init__()
                self.attention = attention

            def forward(self, states, encoder_hidden_states, **options):
                rows = len(states)
                context = encoder_hidden_states.repeat(3, 1, 1)
                return self.attention(states.repeat(3, 1, 1), context)[:rows]

        block = loop.unet.mid_block.attentions[0].transformer_blocks[0]
        block.attn2 = Frames(block.attn2)
        layout = TokenLayout.cross_attention((4, 3), layers=r"attention$")
        message = ".*over 6 rows in a denoiser call of 2"
        recorder = i2am.record(loop, layout=layout)
        with oracle.gives_up(recorder, NotImplementedError, message):
            loop(tiny.reference())

    def test_size_changed_during_the_run(self, tiny, oracle, loop):
        loop.scheduler.set_timesteps(5)

        @torch.no_grad()
        def evaluate(*size):
            latents = torch.zeros(1, 4, *size)
            noise = loop.unet(latents, 10, tiny.reference()).sample
            loop.scheduler.step(noise, loop.scheduler.timesteps[0], latents)

        recorder = i2am.record(loop, layout=PATCHES)
        with oracle.gives_up(recorder, ValueError, ".*changed during the run"):
            evaluate(8, 6)
            evaluate(4, 6)

    def test_masks_that_do_not_divide_the_samples(self, tiny, oracle, loop):
        recorder = i2am.record(loop, layout=PATCHES, mask=torch.ones(2, 8, 6))
        message = ".*masks must be one per sample or divide them, got 2 for 3"
        with oracle.gives_up(recorder, ValueError, message):
            loop(tiny.reference(3))

    @pytest.mark.parametrize("by_name", [False, True])
    def test_list_of_samples_and_a_layout_of_unets(self, oracle, by_name):
        """Z-Image takes a list of samples, which has no level of a UNet."""
        torch.manual_seed(0)
        net = ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=8,
            axes_dims=[4, 6, 6],
            axes_lens=[64, 16, 16],
        ).eval()
        samples = [torch.randn(4, 1, 4, 6) for _ in range(2)]
        rest = {"t": torch.tensor([0.5, 0.5]), "cap_feats": [torch.randn(3, 8)] * 2}

        @torch.no_grad()
        def call():
            given = net(x=samples, **rest) if by_name else net(samples, **rest)
            return torch.stack(given.sample)

        plain = call()
        layout = TokenLayout.same_grid(r"^layers\.\d+\.attention$")
        recorder = i2am.record(net, layout=layout, time_groups=1, num_inference_steps=1)
        message = ".*layout must give the grid of the generated tokens where .* is not"
        with oracle.gives_up(recorder, ValueError, message):
            image = call()
        assert torch.equal(image, plain)

    def test_denoiser_whose_input_is_no_list(self, tiny, oracle):
        class Wrapped(nn.Module):
            def __init__(self, unet):
                super().__init__()
                self.unet = unet

            def forward(self, inputs):
                return self.unet(inputs["latents"], 10, inputs["context"]).sample

        net = Wrapped(tiny.loop().unet)
        recorder = i2am.record(net, layout=PATCHES, time_groups=1, num_inference_steps=1)
        message = ".*recording Wrapped .* must be a tensor or a list of all samples, got dict"
        with oracle.gives_up(recorder, NotImplementedError, message), torch.no_grad():
            net({"latents": torch.zeros(1, 4, 8, 6), "context": tiny.reference()})


def test_ordinary_recording_is_silent(tiny, loop):
    with no_warnings():
        recorder = i2am.record(loop, layout=PATCHES)
        with recorder:
            loop(tiny.reference())
            recorder.maps()
        recorder.maps()
