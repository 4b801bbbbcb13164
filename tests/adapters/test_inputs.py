"""What `record()` is given: pipelines, layouts, options and masks."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from PIL import Image
from torch import nn

import i2am
from i2am.adapters.inputs import find_denoisers, find_layout
from i2am.layouts import TokenLayout

PATCHES = TokenLayout.cross_attention((4, 3))
TOKENS = TokenLayout.ip_adapter()


@pytest.fixture
def loop(tiny):
    return tiny.loop()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"branch": "positive"}, ValueError, "branch must be one of .* got 'positive'"),
        ({"time_groups": 0}, ValueError, "time_groups must be at least 1, got 0"),
        ({"directions": ()}, ValueError, "directions must name at least one"),
        ({"directions": "sideways"}, ValueError, "'sideways' is not a valid Direction"),
        ({"impl": "magic"}, ValueError, "impl must be one of .* got 'magic'"),
        ({"regions": {"mask": i2am.Patch(0, 0, (1, 1))}}, ValueError, "must not be called 'mask'"),
        ({"regions": {"a": torch.zeros(4, 4)}}, ValueError, "region must hold at least one weight"),
        ({"mask": torch.zeros(4, 4)}, ValueError, "mask must cover something"),
        (
            {"reference_mask": torch.full((4, 4), 2.0)},
            ValueError,
            "reference_mask must hold values",
        ),
        (
            {"layout": TokenLayout.cross_attention((4, 3), layers="nowhere")},
            ValueError,
            "layout 'cross_attention 4x3' must match .* UNet2DConditionModel, but 'nowhere' "
            "matches none of 8: down_blocks",
        ),
        ({"layout": None}, ValueError, "layout must be given for ReferenceLoop"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused_before_anything_runs(tiny, loop, options, error, message):
    before = tiny.state(loop)
    with pytest.raises(error, match=message):
        i2am.record(loop, **{"layout": PATCHES, **options})
    assert tiny.state(loop) == before


@pytest.mark.parametrize(
    ("candidate", "error", "message"),
    [
        (object(), TypeError, "with a unet or transformer, or that module itself, got object"),
        (SimpleNamespace(components={"vae": nn.Linear(1, 1)}), TypeError, "got SimpleNamespace"),
        (None, TypeError, "got NoneType"),
    ],
    ids=["object", "no denoiser", "none"],
)
def test_what_is_no_pipeline(candidate, error, message):
    with pytest.raises(error, match=message):
        i2am.record(candidate, layout=PATCHES)


def test_sharded_denoiser_is_refused(loop):
    loop.unet._parallel_config = object()
    with pytest.raises(NotImplementedError, match="context or tensor parallelism"):
        i2am.record(loop, layout=PATCHES)


def test_denoiser_that_does_not_tell_its_steps(tiny, loop):
    with pytest.raises(
        ValueError, match="pass scheduler= or num_inference_steps=, or time_groups=1"
    ):
        i2am.record(loop.unet, layout=PATCHES)
    with i2am.record(loop.unet, layout=PATCHES, num_inference_steps=3) as recorder:
        loop(tiny.reference(), steps=3)
    with pytest.warns(UserWarning, match="5 time groups were asked for and the run has 3 steps"):
        assert recorder.maps().time_groups == 3


def test_transformer_and_scheduler_of_a_pipeline_are_found():
    transformer, scheduler = nn.Linear(1, 1), object()
    pipe = SimpleNamespace(components={"transformer": transformer, "scheduler": scheduler})
    assert find_denoisers(pipe) == ((transformer,), scheduler)
    assert find_denoisers(transformer) == ((transformer,), None)


def test_modules_of_an_object_that_is_no_pipeline():
    """Published code has classes of its own; CatVTON's calls its scheduler so."""
    unet, scheduler = nn.Linear(1, 1), object()
    pipe = SimpleNamespace(unet=unet, vae=nn.Linear(1, 1), noise_scheduler=scheduler)
    assert find_denoisers(pipe) == ((unet,), scheduler)


class TinyUNet(nn.Linear):
    pass


@pytest.mark.parametrize("name", ["prior", "decoder"])
def test_stages_are_called_by_what_they_make(name):
    stage, scheduler = TinyUNet(1, 1), object()
    pipe = SimpleNamespace(components={name: stage, "scheduler": scheduler})
    assert find_denoisers(pipe) == ((stage,), scheduler)
    with pytest.raises(TypeError, match="with a unet or transformer"):
        find_denoisers(SimpleNamespace(components={name: nn.Linear(1, 1)}))
    # beside a UNet it is something else
    unet = nn.Linear(1, 1)
    assert find_denoisers(SimpleNamespace(components={name: stage, "unet": unet})) == (
        (unet,),
        None,
    )


@pytest.mark.parametrize(
    ("denoiser", "beside"), [("unet_vton", "unet_garm"), ("unet", "unet_encoder")]
)
def test_second_unet_that_denoises_nothing(denoiser, beside):
    components = {beside: nn.Linear(1, 1), denoiser: nn.Linear(1, 1)}
    found, scheduler = find_denoisers(SimpleNamespace(components=components))
    assert (found, scheduler) == ((components[denoiser],), None)


class WanTransformer3DModel(nn.Linear):
    pass


class TestTwoHalvesOfASchedule:
    @pytest.mark.parametrize("reverse", [False, True])
    def test_are_found_in_order(self, reverse):
        names = ["transformer", "transformer_2"]
        parts = {name: WanTransformer3DModel(1, 1) for name in sorted(names, reverse=reverse)}
        scheduler = object()
        pipe = SimpleNamespace(components=parts | {"scheduler": scheduler})
        assert find_denoisers(pipe) == (tuple(parts[name] for name in names), scheduler)

    def test_one_of_them_may_be_sharded(self):
        parts = {name: WanTransformer3DModel(1, 1) for name in ("transformer", "transformer_2")}
        parts["transformer_2"]._parallel_config = object()
        with pytest.raises(NotImplementedError, match="context or tensor parallelism"):
            find_denoisers(SimpleNamespace(components=parts))

    def test_others_of_these_names_are_refused(self):
        for kinds in ((nn.Linear, nn.Linear), (WanTransformer3DModel, nn.Linear)):
            names = ("transformer", "transformer_2")
            parts = {name: kind(1, 1) for name, kind in zip(names, kinds, strict=True)}
            with pytest.raises(NotImplementedError, match="got transformer and transformer_2"):
                find_denoisers(SimpleNamespace(components=parts))


class TwoDenoisers(DiffusionPipeline):
    """As Wan 2.2: one for the noisier steps, another for the rest, one scheduler."""

    def __init__(self, unet, unet_2, scheduler):
        super().__init__()
        self.register_modules(unet=unet, unet_2=unet_2, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, reference, steps=6, first=4):
        self.scheduler.set_timesteps(steps)
        latents = torch.randn(1, 4, 8, 6, generator=torch.Generator().manual_seed(0))
        for index, timestep in enumerate(self.scheduler.timesteps):
            unet = self.unet if index < first else self.unet_2
            noise = unet(latents, timestep, encoder_hidden_states=reference).sample
            latents = self.scheduler.step(noise, timestep, latents).prev_sample
        return latents


class TestSeveralDenoisers:
    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (("transformer", "transformer_2"), "got transformer and transformer_2"),
            (("unet", "unet_vton"), "got unet and unet_vton"),
            (("transformer", "unconditional_transformer"), "got transformer and uncond"),
            (("text_unet", "image_unet", "vae"), "got text_unet and image_unet;"),
        ],
    )
    def test_are_refused_before_a_run(self, names, message):
        components = {name: nn.Linear(1, 1) for name in names}
        pipe = SimpleNamespace(components=components | {"scheduler": object()})
        message = "recording SimpleNamespace as a whole .* must have one denoiser, " + message
        with pytest.raises(NotImplementedError, match=message):
            i2am.record(pipe, layout=PATCHES)

    @pytest.mark.parametrize("name", ["unet", "transformer", "transformer_2", "unet_vton"])
    def test_one_of_them_may_be_there_alone(self, name):
        denoiser, scheduler = nn.Linear(1, 1), object()
        components = dict.fromkeys(("unet", "transformer", "transformer_2", "unet_vton"))
        components |= {name: denoiser, "scheduler": scheduler, "transformers_version": "5"}
        pipe = SimpleNamespace(components=components)
        assert find_denoisers(pipe) == ((denoiser,), scheduler)

    def test_one_is_recorded_on_request_and_the_rest_is_told(self, tiny, oracle, loop):
        pipe = TwoDenoisers(loop.unet, tiny.unet(), loop.scheduler)
        with pytest.raises(NotImplementedError, match="got unet and unet_2; pass the one"):
            i2am.record(pipe, layout=PATCHES)
        with oracle.spy(pipe.unet, pipe.scheduler) as calls:
            plain = pipe(tiny.reference())
        options = {"scheduler": pipe.scheduler, "layout": PATCHES, "time_groups": 3}
        with i2am.record(pipe.unet, **options) as recorder:
            assert torch.equal(pipe(tiny.reference()), plain)
        with pytest.warns(UserWarning, match="denoiser was not called in 2 of 6 evaluations"):
            maps = recorder.maps()
        assert len({call.evaluation for call in calls}) == 4
        for layer in maps.layer_sums:
            wanted = torch.zeros(3, 4, 48 if layer.site.generated_grid == (8, 6) else 12).double()
            for call in calls:
                if call.layer == layer.site.layer:
                    votes = call.logits()[0].softmax(-2)[..., 1:].mean(-1)
                    wanted[call.evaluation // 2] += votes
            found = layer.reference_to_generated[0, :, :, 0].flatten(-2).double()
            torch.testing.assert_close(found, wanted, rtol=2e-5, atol=1e-7)
            assert not found[2].any()


class TestLayoutOfAPipeline:
    def test_declared(self, loop):
        loop.attribution_layout = lambda: TOKENS
        assert find_layout(loop, loop.unet) is TOKENS

    @pytest.mark.parametrize(
        ("kind", "name"),
        [("base", "ip_adapter tokens"), ("plus", "ip_adapter tokens"), ("full", "ip_adapter 4x4")],
    )
    def test_ip_adapter(self, tiny, kind, name):
        pipeline = tiny.ip_adapters(tiny.stable_diffusion(), kind)
        assert find_layout(pipeline, pipeline.unet).name == name

    def test_patches_of_an_encoder_that_is_not_there(self, tiny):
        unet = tiny.ip_adapters(tiny.stable_diffusion(), "full").unet
        with pytest.raises(ValueError, match="layout must be given for UNet2DConditionModel"):
            find_layout(unet, unet)

    def test_known_by_its_class(self, tiny):
        pipeline = tiny.stable_diffusion()
        assert find_layout(pipeline, pipeline.unet).name == "text"

    def test_unknown(self, loop):
        message = (
            "layout must be given for ReferenceLoop, whose tokens are not known: pass layout=, .* "
            r"i2am.layouts.register_layout\('ReferenceLoop', ...\)"
        )
        with pytest.raises(ValueError, match=message):
            find_layout(loop, loop.unet)


class TestMasks:
    BOX = np.zeros((8, 6), np.uint8)
    BOX[2:4, 1:] = 255

    def test_pictures_reach_the_maps(self, tiny, loop):
        """A PIL mask weighs as the tensor it shows."""
        results = []
        for mask in (Image.fromarray(self.BOX), torch.from_numpy(self.BOX > 0)):
            with i2am.record(loop, layout=PATCHES, mask=mask, reference_mask=mask) as recorder:
                loop(tiny.reference())
            results.append(recorder.maps())
        for read in (
            lambda maps: maps.generated_to_reference(weights="mask"),
            lambda maps: maps.reference_to_generated(votes="mask"),
        ):
            assert torch.equal(read(results[0]), read(results[1]))
            assert not torch.equal(read(results[0]), torch.zeros_like(read(results[0])))


def test_layers_of_a_compiled_denoiser_are_found(tiny):
    unet = tiny.unet()
    compiled = torch.compile(unet, backend="eager")
    assert not isinstance(compiled, UNet2DConditionModel)
    recorder = i2am.record(compiled, layout=PATCHES, num_inference_steps=5)
    with recorder:
        assert type(unet.mid_block.attentions[0].transformer_blocks[0].attn2.processor) is not (
            AttnProcessor2_0
        )
