"""Situations that people report of masks and pictures, each with the value that is right."""

import contextlib
import io
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

import i2am
from i2am.attribution.grid import mask_weights
from i2am.data import object_mask, render
from i2am.data.images import read_image, read_mask
from i2am.layouts import Sequences, Span, TokenLayout
from i2am.metrics import IMACS, imacs, imacs_scores
from i2am.models import load_pipeline
from i2am.viewer import page

CONTEXT, WIDTH, PROJECTED = 16, 16, 12


def noise(height, width, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def sideways(picture):
    """The picture as a camera stores it, with a tag that says how to turn it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    picture.transpose(Image.Transpose.ROTATE_90).save(file, "PNG", exif=exif.tobytes())
    return Image.open(io.BytesIO(file.getvalue()))


@pytest.fixture
def tiny_parts():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=CONTEXT,
            attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ).eval()
        vae = AutoencoderKL(
            block_out_channels=(8, 16),
            latent_channels=4,
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        ).eval()
        encoder = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=WIDTH,
                projection_dim=PROJECTED,
                intermediate_size=32,
                num_attention_heads=2,
                num_hidden_layers=2,
                image_size=32,
                patch_size=8,
            )
        ).eval()
    return {
        "vae": vae,
        "text_encoder": None,
        "tokenizer": None,
        "unet": unet,
        "scheduler": DDIMScheduler(clip_sample=False),
        "safety_checker": None,
        "requires_safety_checker": False,
        "feature_extractor": CLIPImageProcessorPil(
            crop_size={"height": 32, "width": 32}, size={"shortest_edge": 32}
        ),
        "image_encoder": encoder,
    }


@pytest.fixture
def full(tiny_parts):
    """A pipeline with an IP-Adapter whose tokens are the patches of a 4x4 grid."""
    pipe = StableDiffusionPipeline(**tiny_parts)
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    attention, number = {}, 1
    for name in pipe.unet.attn_processors:
        if name.endswith("attn2.processor"):
            module = pipe.unet.get_submodule(name.removesuffix(".processor"))
            for part in ("k", "v"):
                weight = random(module.to_q.out_features, CONTEXT)
                attention[f"{number}.to_{part}_ip.weight"] = weight
            number += 2
    projection = {
        "proj.0.weight": random(WIDTH, WIDTH),
        "proj.0.bias": torch.zeros(WIDTH),
        "proj.2.weight": random(CONTEXT, WIDTH),
        "proj.2.bias": torch.zeros(CONTEXT),
        "proj.3.weight": torch.ones(CONTEXT),
        "proj.3.bias": torch.zeros(CONTEXT),
    }
    state = {"image_proj": projection, "ip_adapter": attention}
    pipe.load_ip_adapter([state], subfolder=[""], weight_name=[""])
    pipe.unet.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_full(pipe, garment, **options):
    generator = torch.Generator().manual_seed(3)
    prompts = {
        name: torch.randn(1, 7, CONTEXT, generator=generator)
        for name in ("prompt_embeds", "negative_prompt_embeds")
    }
    options = {"ip_adapter_image": garment, "output_type": "latent", **options}
    generator = torch.Generator().manual_seed(0)
    settings = {"num_inference_steps": 2, "height": 32, "width": 24, "generator": generator}
    return pipe(**prompts, **settings, **options).images


def maps_of(pipe, run, **options):
    with i2am.record(pipe, **{"time_groups": 1, **options}) as recorder:
        run()
    return recorder.maps()


def votes(maps):
    return maps.reference_to_generated(votes="mask")


class TestReferenceThatIsCut:
    """The image processor keeps the middle of a reference: rows 8 to 40 of 48 here."""

    PIXELS = np.zeros((48, 32), np.uint8)
    PIXELS[4:20, 8:24] = 255

    @pytest.mark.parametrize("transposed", [False, True], ids=["tall", "wide"])
    def test_votes_are_those_of_the_part_that_the_encoder_saw(self, full, transposed):
        pixels = self.PIXELS.T if transposed else self.PIXELS
        garment = noise(*pixels.shape, seed=6)
        seen = pixels[:, 8:40] if transposed else pixels[8:40]
        plain = run_full(full, garment)
        with i2am.record(full, reference_mask=pixels, time_groups=1) as recorder:
            assert torch.equal(run_full(full, garment), plain)
        # a square picture is not cut, and the encoder sees the same pixels
        middle = Image.fromarray(
            np.asarray(garment)[:, 8:40] if transposed else np.asarray(garment)[8:40]
        )
        wanted = maps_of(full, lambda: run_full(full, middle), reference_mask=seen)
        assert torch.equal(votes(recorder.maps()), votes(wanted))

    def test_two_runs_with_references_of_other_shapes(self, full):
        square = np.zeros((32, 32), np.uint8)
        square[8:24, 8:24] = 255
        with i2am.record(full, reference_mask=square, time_groups=1) as recorder:
            run_full(full, noise(48, 32, seed=6))
            with pytest.raises(ValueError, match="reference_mask must have the shape of its pic"):
                recorder.maps()
        with i2am.record(full, reference_mask=square, time_groups=1) as recorder:
            for seed in (5, 6):
                run_full(full, noise(32, 32, seed=seed))
        wanted = maps_of(full, lambda: run_full(full, noise(32, 32, 6)), reference_mask=square)
        assert torch.equal(votes(recorder.maps()), votes(wanted))

    def test_mask_with_swapped_sides_keeps_the_image_and_is_refused(self, full):
        garment = noise(48, 32, seed=6)
        plain = run_full(full, garment)
        with (
            pytest.warns(UserWarning, match="the run goes on without"),
            i2am.record(full, reference_mask=self.PIXELS.T) as recorder,
        ):
            assert torch.equal(run_full(full, garment), plain)
        with pytest.raises(ValueError, match="got 32 x 48: height and width look swapped"):
            recorder.maps()

    def test_mask_outside_of_the_cut(self, full):
        pixels = np.zeros((48, 32), np.uint8)
        pixels[:6] = 255
        with (
            pytest.warns(UserWarning, match="the run goes on without"),
            i2am.record(full, reference_mask=pixels) as recorder,
        ):
            run_full(full, noise(48, 32, seed=6))
        with pytest.raises(ValueError, match="must cover some of what the encoder sees"):
            recorder.maps()

    def test_embeddings_made_before_are_taken_for_those_of_the_masks_shape(self, full):
        garment = noise(48, 32, seed=6)
        made = full.prepare_ip_adapter_image_embeds([garment], None, "cpu", 1, True)
        run = {"ip_adapter_image": None, "ip_adapter_image_embeds": made}
        found = maps_of(full, lambda: run_full(full, None, **run), reference_mask=self.PIXELS)
        wanted = maps_of(full, lambda: run_full(full, garment), reference_mask=self.PIXELS)
        assert torch.equal(votes(found), votes(wanted))

    def test_pixels_that_are_ready_are_not_cut(self, full):
        pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(5))
        mask = self.PIXELS[8:40]
        found = maps_of(full, lambda: run_full(full, pixels), reference_mask=mask)
        assert found.provenance["pictures"]["reference"] == {"size": [32, 32], "box": None}

    def test_scores_pages_and_figures_show_the_part_that_was_seen(self, full):
        garment = noise(48, 32, seed=6)
        inpainted = np.zeros((32, 24), np.uint8)
        inpainted[:16] = 255
        maps = maps_of(full, lambda: run_full(full, garment), mask=inpainted)
        found = imacs_scores(maps, reference_mask=self.PIXELS)["imacs_r"].values
        seen = torch.from_numpy(self.PIXELS[None, 8:40] > 0)
        g2r = maps.generated_to_reference(weights="mask")
        torch.testing.assert_close(found, imacs(g2r, seen), rtol=0, atol=0)
        html = page(maps, generated=noise(32, 24), reference=garment, reference_mask=self.PIXELS)
        assert html == page(
            maps_without_pictures(maps),
            generated=noise(32, 24),
            reference=Image.fromarray(np.asarray(garment)[8:40]),
            reference_mask=self.PIXELS[8:40],
        )
        pytest.importorskip("matplotlib")
        figure = maps.plot("reference_maps", reference=garment)
        shown = next(axes.images[0] for axes in figure.axes if axes.images)
        assert shown.get_array().shape[0] == shown.get_array().shape[1]

    def test_nothing_is_left_in_the_pipeline(self, full):
        before = dict(vars(full))
        recorder = i2am.record(full)
        recorder.attach()
        assert "encode_image" in vars(full)
        recorder.detach()
        assert dict(vars(full)) == before


def maps_without_pictures(maps):
    known = {name: value for name, value in maps.provenance.items() if name != "pictures"}
    return i2am.AttributionMaps(
        maps.layer_sums, votes=maps.votes, rows=maps.rows, provenance=known, pairs=maps.pairs
    )


class TestMaskOfAPicture:
    MASK = np.zeros((32, 24), np.float32)
    MASK[4:12, 6:20] = 1

    @pytest.mark.parametrize("scale", [1, 7])
    def test_in_any_size_of_the_right_shape(self, full, scale):
        run = partial(run_full, full, noise(32, 32))
        large = self.MASK.repeat(scale, 0).repeat(scale, 1)
        found, wanted = (maps_of(full, run, mask=one) for one in (large, self.MASK))
        read = [maps.generated_to_reference(weights="mask") for maps in (found, wanted)]
        torch.testing.assert_close(*read, rtol=1e-6, atol=0)

    @pytest.mark.parametrize(
        ("shape", "words"),
        [((24, 32), "height and width look swapped"), ((32, 32), "got 32 x 32"), ((63, 46), "63")],
        ids=["swapped", "square", "3 %"],
    )
    def test_in_another_shape_is_refused_after_the_image_was_made(self, full, shape, words):
        run = partial(run_full, full, noise(32, 32))
        plain, mask = run(), np.ones(shape, np.float32)
        with (
            pytest.warns(UserWarning, match="the run goes on without"),
            i2am.record(full, mask=mask) as recorder,
        ):
            assert torch.equal(run(), plain)
        with pytest.raises(ValueError, match=f"mask must have the shape of its picture.*{words}"):
            recorder.maps()
        stretched = maps_of(full, run, mask=mask, stretch=True)
        score = imacs_scores(stretched, mask=np.eye(*shape, dtype=np.float32))["imacs_g"]
        assert score.values.isfinite().all()

    def test_scores_refuse_it_too(self, full):
        maps = maps_of(full, lambda: run_full(full, noise(32, 32)))
        turned = self.MASK.T.copy()
        with pytest.raises(ValueError, match=r"mask must .* 24 x 32: height and width look"):
            imacs_scores(maps, mask=turned)
        with pytest.raises(ValueError, match="height and width look swapped"):
            IMACS().update(maps.reference_to_generated(), turned[None])
        with pytest.raises(ValueError, match="mask must have the shape of the generated image"):
            page(maps, generated=noise(32, 24), reference=noise(32, 32), mask=turned)

    def test_half_of_two_pictures_side_by_side(self, tiny_parts):
        """The generated image is the right half of the latents: a mask has the shape of that."""
        layout = TokenLayout.same_grid()
        unet = tiny_parts["unet"]

        def spans(call, frame):
            rows, columns = frame.level_grid(call.seqlen_q)
            half = ((0, rows), (columns // 2, columns))
            generated = Span("right half", "generated", 0, (rows, columns), half)
            reference = Span("reference", "reference", 0, (1, call.seqlen_k))
            return Sequences((generated,), (reference,))

        layout = replace(layout, spans=spans)
        for shape, fits in (((32, 24), True), ((32, 48), False)):
            with (
                contextlib.nullcontext()
                if fits
                else pytest.warns(UserWarning, match="the run goes on without"),
                i2am.record(
                    unet,
                    layout=layout,
                    mask=np.ones(shape),
                    num_inference_steps=1,
                    time_groups=1,
                ) as recorder,
                torch.no_grad(),
            ):
                unet(
                    torch.randn(1, 4, 16, 24),
                    1,
                    encoder_hidden_states=torch.randn(1, 7, CONTEXT),
                )
            with contextlib.nullcontext() if fits else pytest.raises(ValueError, match="16 x 12"):
                assert recorder.maps().rows == ("uniform", "mask")


class TestCropAroundTheMask:
    """`padding_mask_crop` inpaints a crop, which is laid into the picture afterwards."""

    @pytest.fixture
    def inpaint(self, tiny_parts):
        pipe = StableDiffusionInpaintPipeline(**tiny_parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def run(self, pipe, mask, **options):
        generator = torch.Generator().manual_seed(3)
        prompts = {
            name: torch.randn(1, 7, CONTEXT, generator=generator)
            for name in ("prompt_embeds", "negative_prompt_embeds")
        }
        return pipe(
            **prompts,
            image=noise(*mask.shape, seed=4),
            mask_image=Image.fromarray(mask),
            height=32,
            width=32,
            num_inference_steps=2,
            strength=1.0,
            generator=torch.Generator().manual_seed(0),
            **options,
        ).images[0]

    def test_the_mask_is_cut_alike(self, inpaint):
        mask = np.zeros((64, 96), np.uint8)
        mask[20:36, 40:56] = 255
        layout = TokenLayout.cross_attention((1, 7), prefix=0)
        plain = self.run(inpaint, mask, padding_mask_crop=8)
        with i2am.record(inpaint, layout=layout, mask=mask, time_groups=1) as recorder:
            same = self.run(inpaint, mask, padding_mask_crop=8)
        assert np.array_equal(np.asarray(same), np.asarray(plain))
        maps = recorder.maps()
        left, top, right, bottom = VaeImageProcessor.get_crop_region(
            Image.fromarray(mask), 32, 32, pad=8
        )
        assert (right - left, bottom - top) == (32, 32)
        box = [top / 64, left / 96, 32 / 64, 32 / 96]
        assert maps.provenance["pictures"]["generated"] == {"size": [64, 96], "box": box}
        cut = torch.from_numpy(mask[top:bottom, left:right] / 255)
        wanted = maps_of(
            inpaint,
            lambda: self.run(inpaint, mask, padding_mask_crop=8),
            layout=layout,
            regions={"cut": cut},
        )
        layer = maps.layers[0]
        sums = {
            name: one.select(layers=[layer]).specific_reference(region)
            if region
            else one.select(layers=[layer]).generated_to_reference(weights="mask")
            for name, one, region in (("found", maps, None), ("wanted", wanted, "cut"))
        }
        found, wanted_sum = (one / one.sum() for one in sums.values())
        torch.testing.assert_close(found, wanted_sum, rtol=1e-5, atol=1e-7)
        score = imacs_scores(maps, mask=mask)["imacs_g"].values
        assert torch.equal(score, imacs(maps.reference_to_generated(), cut[None]))

    def test_what_is_filled_up_beyond_the_crop_is_in_no_mask(self, inpaint):
        """A crop as wide as the picture is less high than asked for: the rest is made up."""
        mask = np.zeros((16, 64), np.uint8)
        mask[4:12, 8:56] = 255
        layout = TokenLayout.cross_attention((1, 7), prefix=0)
        maps = maps_of(
            inpaint,
            lambda: self.run(inpaint, mask, padding_mask_crop=4),
            layout=layout,
            mask=mask,
        )
        top, left, height, width = maps.provenance["pictures"]["generated"]["box"]
        # 56 x 16 pixels of the picture, made as 32 x 32
        assert [top * 16, left * 64, height * 16, width * 64] == [-20, 4, 56, 56]


class TestPocket:
    @pytest.fixture(scope="class")
    def pocket(self):
        pipe = load_pipeline("pocket")
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @pytest.fixture(scope="class")
    def scene(self):
        scene = render([3])
        return {
            "image": scene.image,
            "pose_image": scene.pose,
            "reference_image": scene.garment,
            "mask_image": (scene.mask[0] > 0.5).numpy(),
        }

    @staticmethod
    def run(pipe, inputs):
        return pipe(
            **inputs,
            num_inference_steps=1,
            output_type="pt",
            generator=torch.Generator().manual_seed(0),
        ).images

    @pytest.mark.parametrize("name", ["image", "pose_image", "reference_image"])
    @pytest.mark.parametrize("kind", ["sideways", "transparent", "rgba array"])
    def test_a_picture_means_what_its_file_means(self, pocket, scene, name, kind, tmp_path):
        pixels = (scene[name][0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        picture = Image.fromarray(pixels)
        if kind == "sideways":
            given = sideways(picture)
        else:
            alpha = np.full(pixels.shape[:2], 255, np.uint8)
            alpha[:20] = 0
            rgba = np.dstack([pixels, alpha])
            given = rgba if kind == "rgba array" else Image.fromarray(rgba)
        file = tmp_path / "picture.png"
        if kind == "sideways":
            exif = given.getexif()
            given.save(file, exif=exif)
        else:
            Image.fromarray(np.asarray(given)).save(file)
        found = self.run(pocket, {**scene, name: given})
        assert torch.equal(found, self.run(pocket, {**scene, name: read_image(file)}))

    def test_the_mask_belongs_to_the_person_whatever_is_generated(self, pocket, scene):
        """A person of another shape is squeezed into the size to generate, and so is its mask."""
        person = noise(64, 64, seed=2)
        mask = np.zeros((64, 64), bool)
        mask[16:48, 16:48] = True
        inputs = {**scene, "image": person, "mask_image": mask}
        maps = maps_of(pocket, lambda: self.run(pocket, inputs), mask=mask)
        assert maps.provenance["pictures"]["generated"]["size"] == [64, 64]
        assert imacs_scores(maps, mask=mask)["imacs_g"].values.isfinite().all()
        narrow = mask[:, 8:56]
        with (
            pytest.warns(UserWarning, match="the run goes on without"),
            i2am.record(pocket, mask=narrow) as recorder,
        ):
            self.run(pocket, inputs)
        with pytest.raises(ValueError, match=r"64 x 64 .* got 64 x 48"):
            recorder.maps()

    def test_pictures_are_not_kept(self, pocket, scene):
        self.run(pocket, scene)
        assert not pocket.shown


class TestAutomaticMask:
    SHAPE = np.zeros((32, 32), bool)
    SHAPE[8:24, 4:20] = True

    def pictures(self):
        pixels = np.full((32, 32, 3), 250, np.uint8)
        pixels[self.SHAPE] = np.asarray(noise(16, 16, seed=1)).reshape(-1, 3) // 2
        alpha = np.where(self.SHAPE, 255, 0).astype(np.uint8)
        yield "plain background", Image.fromarray(pixels)
        yield "alpha channel", Image.fromarray(np.dstack([np.asarray(noise(32, 32)), alpha]))

    def test_is_the_object_and_says_from_what(self, full):
        for source, garment in self.pictures():
            run = partial(run_full, full, garment.convert("RGB"))
            if "alpha" in source:
                with pytest.warns(UserWarning, match="made from the alpha channel: 25%"):
                    found = object_mask(garment)
                assert np.array_equal(found, self.SHAPE)
                continue
            with pytest.warns(UserWarning, match=f"made from the {source}: 25%"):
                found = maps_of(full, run, reference_mask="auto")
            wanted = maps_of(full, run, reference_mask=self.SHAPE)
            assert torch.equal(votes(found), votes(wanted))

    def test_refuses_where_there_is_none(self, full):
        plain = run_full(full, noise(32, 32))
        with (
            pytest.warns(UserWarning, match="the run goes on without"),
            i2am.record(full, reference_mask="auto") as recorder,
        ):
            assert torch.equal(run_full(full, noise(32, 32)), plain)
        with pytest.raises(ValueError, match="must have a transparent or a plain background"):
            recorder.maps()

    def test_of_a_picture_that_the_run_does_not_show(self, full):
        made = full.prepare_ip_adapter_image_embeds([noise(32, 32)], None, "cpu", 1, True)
        run = {"ip_adapter_image": None, "ip_adapter_image_embeds": made}
        with (
            pytest.warns(UserWarning, match="the run goes on without"),
            i2am.record(full, reference_mask="auto") as recorder,
        ):
            run_full(full, None, **run)
        with pytest.raises(ValueError, match="needs the run to show the reference picture"):
            recorder.maps()

    def test_another_word(self, full):
        with pytest.raises(ValueError, match="reference_mask must be a mask or 'auto', got 'cloth"):
            i2am.record(full, reference_mask="cloth.png")

    def test_pocket(self):
        pipe = load_pipeline("pocket")
        pipe.set_progress_bar_config(disable=True)
        scene = render([3])
        inputs = {
            "image": scene.image,
            "pose_image": scene.pose,
            "reference_image": scene.garment,
            "mask_image": (scene.mask[0] > 0.5).numpy(),
        }
        run = partial(TestPocket.run, pipe, inputs)
        with pytest.warns(UserWarning, match="made from the plain background"):
            found = maps_of(pipe, run, reference_mask="auto")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mask = object_mask(scene.garment)
        true = scene.garment_mask[0].numpy() > 0.5
        overlap = (mask & true).sum() / (mask | true).sum()
        assert overlap > 0.95
        assert torch.equal(votes(found), votes(maps_of(pipe, run, reference_mask=mask)))


def test_a_mask_file_of_zeros_and_ones_is_read_as_such(tmp_path):
    pixels = np.zeros((6, 5), np.uint8)
    pixels[2:4] = 1
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    assert np.array_equal(np.asarray(read_mask(tmp_path / "mask.png")), pixels * 255)
    weights = mask_weights(torch.from_numpy(pixels), (3, 5))
    assert weights.reshape(3, 5).tolist() == [[0] * 5, [1] * 5, [0] * 5]
