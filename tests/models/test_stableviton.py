"""StableVITON as a pipeline: what its networks see, its two calls, and what is recorded."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import PNDMScheduler
from PIL import Image

import i2am
from i2am.models import StableVITONPipeline, load_pipeline
from i2am.models.single_token import CLIP_MEAN, CLIP_STD

WARPS = tuple(f"warp_blocks.{number}.transformer_blocks.0.attn2" for number in range(6))
COARSE, FINE = (8, 6), (16, 12)
ONE_TOKEN = pytest.mark.filterwarnings("ignore:layers with a single reference token")


@pytest.fixture
def inputs(inputs, picture):
    return {**inputs, "pose_image": picture(7), "reference_image": picture(2, 40, 20)}


@pytest.fixture
def batch_inputs(batch_inputs, picture):
    return {**batch_inputs, "pose_image": [picture(seed) for seed in (7, 8, 9)]}


@pytest.fixture
def calls(stableviton):
    """(sample, timestep, context, hint) of every UNet call."""
    seen = []

    def note(module, args, kwargs):
        sample, timestep = args
        seen.append((sample, int(timestep), kwargs["encoder_hidden_states"], kwargs["hint"]))

    stableviton.unet.register_forward_pre_hook(note, with_kwargs=True)
    return seen


def pixels(image, size=(32, 24)):
    """A picture in [-1, 1], at the generated size as an antialiased resize makes it."""
    values = torch.from_numpy(np.array(image)).movedim(-1, 0)[None] / 127.5 - 1
    if values.shape[-2:] == size:
        return values
    return F.interpolate(values, size=size, mode="bilinear", align_corners=False, antialias=True)


def latents_of(pipe, image):
    with torch.no_grad():
        return pipe.vae.encode(pixels(image)).latent_dist.mode() * 0.18215


def recorded(pipe, run, inputs, settings=None, **options):
    """A recorder that has left its block, and the latents of the run inside."""
    with i2am.record(pipe, **{"time_groups": 1, **options}) as recorder:
        latents = run(pipe, **inputs, **(settings or {}))
    return recorder, latents


def test_the_unet_sees_agnostic_keep_mask_and_pose_behind_the_noise(
    stableviton, inputs, run, calls
) -> None:
    noise = torch.randn(1, 4, *FINE, generator=torch.Generator().manual_seed(1))
    run(stableviton, **inputs, latents=noise, vae_posterior="mode", guidance_scale=1.0)
    sample, timestep, context, hint = calls[0]
    assert sample.shape == (1, 13, *FINE)
    assert timestep == 667
    # the person, noised for the last training timestep whatever the first timestep is
    signal = stableviton.scheduler.alphas_cumprod[999]
    person = latents_of(stableviton, inputs["image"])
    expected = signal.sqrt() * person + (1 - signal).sqrt() * noise
    torch.testing.assert_close(sample[:, :4], expected, rtol=0, atol=1e-5)

    keep = np.array(inputs["mask_image"]) == 0
    # grey is 0 in [-1, 1], as the white of a mask is cut out of the person
    with torch.no_grad():
        grey = pixels(inputs["image"]) * torch.from_numpy(keep).float()
        agnostic = stableviton.vae.encode(grey).latent_dist.mode() * 0.18215
    torch.testing.assert_close(sample[:, 4:8], agnostic, rtol=0, atol=1e-5)
    assert torch.equal(sample[0, 8], torch.from_numpy(keep[::2, ::2]).float())
    pose = latents_of(stableviton, inputs["pose_image"])
    torch.testing.assert_close(sample[:, 9:], pose, rtol=0, atol=1e-5)
    garment = latents_of(stableviton, inputs["reference_image"])
    torch.testing.assert_close(hint, garment, rtol=0, atol=1e-5)
    assert context.shape == (1, 1, 24)
    for later in calls[1:]:
        assert torch.equal(later[0][:, 4:], sample[:, 4:])
        assert torch.equal(later[3], hint)


def test_a_ready_agnostic_image_takes_the_place_of_the_painted_one(
    stableviton, inputs, picture, run, calls
) -> None:
    ready = picture(11)
    for settings in ({}, {"agnostic_image": ready}):
        run(stableviton, **inputs, **settings, vae_posterior="mode", num_inference_steps=1)
    (plain, *_), _, (sample, *_), _ = calls
    agnostic = latents_of(stableviton, ready)
    torch.testing.assert_close(sample[:, 4:8], agnostic, rtol=0, atol=1e-5)
    others = [0, 1, 2, 3, 8, 9, 10, 11, 12]
    assert torch.equal(sample[:, others], plain[:, others])


def test_without_a_pose_it_is_black(stableviton, inputs, run) -> None:
    black = {**inputs, "pose_image": Image.new("RGB", (24, 32))}
    expected = run(stableviton, **black)
    del inputs["pose_image"]
    assert torch.equal(run(stableviton, **inputs), expected)


def test_a_mask_of_another_size_is_cut_first_and_has_a_soft_rim(
    stableviton, inputs, picture, run, calls
) -> None:
    # twice the generated size: the rim lies in the middle of a pixel, and then of a latent cell
    mask = torch.zeros(64, 48)
    mask[18:, :] = 0.51
    large = {**inputs, "image": picture(1, 64, 48), "mask_image": mask}
    run(stableviton, **large, height=32, width=24, num_inference_steps=1)
    assert calls[0][0][0, 8, :, 0].tolist() == [1.0] * 4 + [0.5] + [0.0] * 11
    mask[17] = 0.51
    calls.clear()
    run(stableviton, **large, height=32, width=24, num_inference_steps=1)
    # half of one of the two pixels whose mean a cell takes
    assert calls[0][0][0, 8, :, 0].tolist() == [1.0] * 4 + [0.25] + [0.0] * 11


def test_the_garment_is_squashed_without_antialiasing(stableviton, inputs) -> None:
    garment = pixels(inputs["reference_image"])
    squares = F.interpolate(garment, size=(16, 16), mode="bilinear", align_corners=False)
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    expected = ((squares + 1) / 2 - mean) / std
    result = stableviton.reference_pixels(inputs["reference_image"])
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
    other = stableviton.reference_pixels(inputs["reference_image"], (64, 48))
    assert not torch.allclose(other, expected, rtol=0, atol=0.1)


def test_guidance_is_two_calls_that_differ_in_the_token_alone(
    stableviton, inputs, run, calls
) -> None:
    run(stableviton, **inputs, guidance_scale=5.0)
    assert len(calls) == 6
    for conditional, unconditional in zip(calls[::2], calls[1::2], strict=True):
        for number in (0, 3):
            assert torch.equal(conditional[number], unconditional[number])
        assert conditional[1] == unconditional[1]
        token = stableviton.image_encoder.uncond_vector.detach()
        torch.testing.assert_close(unconditional[2], token, rtol=0, atol=0)
        assert not torch.allclose(conditional[2], token, rtol=0, atol=1e-2)
    calls.clear()
    run(stableviton, **inputs, guidance_scale=1.0)
    assert len(calls) == 3


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_every_image_is_encoded_once_per_run(
    stableviton, inputs, run, monkeypatch, guidance_scale
) -> None:
    encode, counts = stableviton.vae.encode, []

    def note(images, *args, **kwargs):
        counts.append(len(images))
        return encode(images, *args, **kwargs)

    monkeypatch.setattr(stableviton.vae, "encode", note)
    run(stableviton, **inputs, guidance_scale=guidance_scale, num_images_per_prompt=2)
    assert counts == [1] * 4  # person, agnostic, pose, garment


def test_plms_evaluates_once_more(stableviton, inputs, run, calls) -> None:
    stableviton.scheduler = PNDMScheduler.from_config(
        stableviton.scheduler.config, skip_prk_steps=True
    )
    recorder, _ = recorded(stableviton, run, inputs, {"num_inference_steps": 6}, time_groups=3)
    maps = recorder.maps()
    assert len(calls) == 2 * 7
    assert (maps.provenance["evaluations"], maps.provenance["steps"]) == (7, 6)
    # the step that is evaluated twice counts twice; the maps of a group sum to its evaluations
    sums = maps.generated_to_reference("time").sum((-2, -1))[0]
    torch.testing.assert_close(sums / sums[-1], torch.tensor([1.5, 1.0, 1.0]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("unet_layers", [False, True])
@ONE_TOKEN
def test_recording_changes_nothing(stableviton, inputs, run, guidance_scale, unet_layers) -> None:
    settings = {"guidance_scale": guidance_scale}
    layout = stableviton.attribution_layout(unet_layers=unet_layers)
    plain = run(stableviton, **inputs, **settings)
    recorder, latents = recorded(stableviton, run, inputs, settings, layout=layout, time_groups=3)
    assert torch.equal(latents, plain)
    assert recorder.maps().n_samples == 1


def test_warp_blocks_are_recorded_in_both_directions(stableviton, inputs, run) -> None:
    maps = recorded(stableviton, run, inputs)[0].maps()
    assert maps.layers == WARPS
    assert maps.informative
    for number, layer in enumerate(maps.layer_sums):
        grid = COARSE if number < 3 else FINE
        assert layer.site.generated_grid == layer.site.reference_grid == grid
        assert layer.site.reference_tokens == grid[0] * grid[1]
    assert maps.reference_to_generated().shape == maps.generated_to_reference().shape == (1, *FINE)
    assert "mix garment and person" in maps.provenance["note"]
    assert "\n  note: the warp blocks' reference keys mix garment and person" in repr(maps)


@ONE_TOKEN
def test_single_token_layers_on_request(stableviton, inputs, run) -> None:
    layout = stableviton.attribution_layout(unet_layers=True)
    maps = recorded(stableviton, run, inputs, layout=layout)[0].maps()
    plain = recorded(stableviton, run, inputs)[0].maps()
    others = [layer for layer in maps.layer_sums if layer.site.layer not in WARPS]
    # two per level on the way down, three on the way up, one between
    assert [layer.site.layer.split(".")[0] for layer in others] == [
        *["down_blocks"] * 4,
        "mid_block",
        *["up_blocks"] * 6,
    ]
    assert not any(layer.site.informative or layer.site.reference_grid for layer in others)
    assert not maps.informative
    with pytest.raises(ValueError, match="does not exist for layers without a reference grid"):
        maps.generated_to_reference()
    warps = maps.select(layers="warp_blocks.*")
    for name in ("reference_to_generated", "generated_to_reference"):
        assert torch.equal(getattr(warps, name)("layer"), getattr(plain, name)("layer"))


def test_the_official_preset_is_warp_block_four(stableviton, inputs, run) -> None:
    maps = recorded(stableviton, run, inputs)[0].maps()
    four = maps.select(layers="warp_blocks.4.*")
    assert four.layers == (WARPS[4],)
    official = maps.generated_to_reference(preset="official")
    assert torch.equal(official, four.generated_to_reference(preset="official"))
    torch.testing.assert_close(official, four.generated_to_reference(), rtol=0, atol=1e-6)
    assert not torch.allclose(official, maps.generated_to_reference(), rtol=1e-2)


def test_the_halves_of_guidance_are_told_apart(stableviton, inputs, run) -> None:
    one = {"num_inference_steps": 1}
    # at scale 1 the conditional call is alone: one step shows the same attention
    alone = recorded(stableviton, run, inputs, {**one, "guidance_scale": 1.0})[0].maps()
    both = recorded(stableviton, run, inputs, {**one, "guidance_scale": 5.0}, branch="both")[0]
    other = recorded(
        stableviton, run, inputs, {**one, "guidance_scale": 5.0}, branch="unconditional"
    )[0].maps()
    for name in ("reference_to_generated", "generated_to_reference"):
        read = {
            "alone": getattr(alone, name)("layer"),
            "conditional": getattr(both.maps("conditional"), name)("layer"),
            "unconditional": getattr(both.maps("unconditional"), name)("layer"),
            "other": getattr(other, name)("layer"),
        }
        assert torch.equal(read["conditional"], read["alone"])
        assert torch.equal(read["unconditional"], read["other"])
        assert not torch.allclose(read["conditional"], read["other"], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("branch", ["conditional", "unconditional"])
def test_samples_have_their_own_maps(stableviton, batch_inputs, run, branch) -> None:
    def maps_of(inputs, **settings):
        recorder, latents = recorded(stableviton, run, inputs, settings, branch=branch)
        maps = recorder.maps()
        return latents, maps.reference_to_generated(), maps.generated_to_reference()

    settings = {"eta": 0.5, "num_inference_steps": 2}
    together = maps_of(batch_inputs, num_images_per_prompt=2, seeds=range(6), **settings)
    assert len(together[0]) == len(together[1]) == 6
    for sample in (1, 4):
        one = {key: values[sample // 2] for key, values in batch_inputs.items()}
        alone = maps_of(one, seeds=(sample,), **settings)
        for many, single in zip(together, alone, strict=True):
            torch.testing.assert_close(many[sample], single[0], rtol=1e-3, atol=1e-5)
    assert not torch.allclose(together[2][0], together[2][2], rtol=1e-2)


@torch.no_grad()
def test_a_cell_of_the_hint_is_a_cell_of_the_map(stableviton_unet) -> None:
    # the keys of the last warp block are made of the two first convolutions: they reach one cell
    generator = torch.Generator().manual_seed(0)
    sample, hint = (torch.randn(1, n, *FINE, generator=generator) for n in (13, 4))
    context = torch.randn(1, 1, 24, generator=generator)
    changed = hint.clone()
    changed[:, :, 11, 2] += 20
    maps = []
    for values in (hint, changed):
        layout = i2am.TokenLayout.stableviton()
        with i2am.record(
            stableviton_unet, layout=layout, time_groups=1, num_inference_steps=1
        ) as recorder:
            stableviton_unet(sample, 500, context, values)
        maps.append(recorder.maps().select(layers=WARPS[5]).generated_to_reference()[0])
    row, column = divmod(int((maps[1] - maps[0]).abs().argmax()), FINE[1])
    assert abs(row - 11) <= 1
    assert abs(column - 2) <= 1


def test_round_trip(stableviton, inputs, run, tmp_path) -> None:
    stableviton.save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path)
    assert type(loaded) is StableVITONPipeline
    loaded.set_progress_bar_config(disable=True)
    # rounding depends on where in memory a weight begins
    torch.testing.assert_close(
        run(loaded, **inputs), run(stableviton, **inputs), rtol=1e-4, atol=1e-4
    )


def test_another_unet_is_refused(stableviton, paint_by_example, tmp_path) -> None:
    paint_by_example.save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(index.read_text().replace("PaintByExamplePipeline", "StableVITONPipeline"))
    with pytest.raises(
        ValueError, match=r"unet of a StableVITONPipeline must be a StableVITONUNet, .* declares a"
    ):
        StableVITONPipeline.from_pretrained(tmp_path)


def test_the_configured_size_is_run(stableviton, inputs, run, picture, hole) -> None:
    assert stableviton.default_size() == (32, 24)
    large = {**inputs, "image": picture(1, 64, 48), "mask_image": hole(64, 48)}
    assert run(stableviton, **large).shape == (1, 4, *FINE)


GREY = Image.new("RGB", (24, 32))
WRONG = {
    "several missing": (
        {"mask_image": None, "reference_image": None},
        "^mask_image, reference_image must be given, got None",
    ),
    "pose count": (
        {"image": [GREY] * 3, "pose_image": [GREY] * 2},
        "pose_image must hold 1 image or 3, as many as image, got 2",
    ),
    "agnostic count": (
        {"pose_image": [GREY] * 3, "agnostic_image": [GREY] * 2},
        "agnostic_image must hold 1 image or 3, as many as pose_image, got 2",
    ),
    "pose range": (
        {"pose_image": torch.full((3, 32, 24), 2.0)},
        r"pose_image must have values in \[0, 1\], got 2 to 2",
    ),
    "agnostic shape": (
        {"agnostic_image": torch.zeros(2, 32, 24)},
        r"agnostic_image must have shape .*, got \[2, 32, 24\]",
    ),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG.keys())
def test_bad_input(stableviton, inputs, calls, change, message) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        stableviton(**{**inputs, "num_inference_steps": 1, **change})
    assert "\n" not in str(caught.value)
    assert not calls
