"""`i2am record` end to end on the real pipelines, with few steps."""

import json
from hashlib import sha256

import numpy as np
import pytest
import torch
from PIL import Image

import i2am
from i2am.attribution import Box, picture
from i2am.attribution.layers import tensors
from i2am.cli.errors import ExitCode
from i2am.data import images
from i2am.metrics.names import IMACS_NAMES
from i2am.models import load_pipeline


def strict_json(path):
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def test_every_file_is_written_and_listed(run_here, record_line, files, out):
    done = run_here(
        record_line(
            reference_mask=files / "reference_mask.png",
            pose=files / "pose.png",
            region=["left=10,5,40,30", "right=10,60,40,30"],
        )
    )
    assert done.code == ExitCode.DONE, done.err
    run = strict_json(out / "run.json")
    assert names(out) == sorted([*run["files"], "run.json"])
    for name, entry in run["files"].items():
        content = (out / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": sha256(content).hexdigest()}
    assert names(out) == [
        "g2r.png",
        "heads.png",
        "image.png",
        "maps.safetensors",
        "overlay_g2r.png",
        "overlay_g2r_mask.png",
        "overlay_r2g.png",
        "overlay_r2g_mask_votes.png",
        "overlay_share.png",
        "overview.png",
        "r2g.png",
        "region_left.png",
        "region_right.png",
        "report.html",
        "run.json",
        "scores.json",
        "time_groups.png",
    ]
    for name in run["files"]:
        assert name in done.out
        if name.endswith(".png"):
            assert Image.open(out / name).convert("RGB").getextrema() != ((255, 255),) * 3
    assert Image.open(out / "image.png").size == (96, 128)
    assert Image.open(out / "overlay_r2g.png").size == (96, 128)
    for row in ("", "_mask"):
        assert Image.open(out / f"overlay_g2r{row}.png").size == (80, 80)
    for name, given in run["inputs"].items():
        assert (out / given["file"]).resolve() == files / f"{name}.png"
        assert given["sha256"] == sha256((files / f"{name}.png").read_bytes()).hexdigest()
    assert run["settings"]["seed"] == 0
    assert run["versions"]["torch"] == torch.__version__

    maps = i2am.load_maps(out / "maps.safetensors")
    assert (maps.n_samples, maps.time_groups) == (1, 2)
    assert maps.votes == ("uniform", "mask")
    assert maps.rows == ("uniform", "mask", "left", "right")
    scores = strict_json(out / "scores.json")
    assert set(scores) == {*IMACS_NAMES}
    for entry in scores.values():
        assert entry["reason"] is None
        assert -3 <= entry["value"] <= 1


def test_image_is_the_one_of_an_unrecorded_run_and_a_second_run_writes_equal_bytes(
    run_here, record_line, files, out
):
    assert run_here(record_line(seed=7)).code == ExitCode.DONE
    pipe = load_pipeline("pocket")
    pipe.set_progress_bar_config(disable=True)
    (expected,) = pipe(
        image=Image.open(files / "person.png"),
        mask_image=Image.open(files / "mask.png"),
        reference_image=Image.open(files / "reference.png"),
        num_inference_steps=4,
        guidance_scale=5,
        generator=torch.Generator().manual_seed(7),
    ).images
    assert np.array_equal(np.asarray(Image.open(out / "image.png")), np.asarray(expected))

    first = {name: (out / name).read_bytes() for name in names(out) if name != "run.json"}
    assert run_here(record_line("--overwrite", seed=7)).code == ExitCode.DONE
    assert {name: (out / name).read_bytes() for name in first} == first


def test_scores_are_those_of_the_saved_maps(run_here, record_line, files, out):
    run_here(record_line(reference_mask=files / "reference_mask.png"))
    maps = i2am.load_maps(out / "maps.safetensors")
    mask = torch.from_numpy(np.asarray(Image.open(files / "mask.png")) / 255)
    reference_mask = torch.from_numpy(np.asarray(Image.open(files / "reference_mask.png")) / 255)
    scores = strict_json(out / "scores.json")
    # eq 18 spelled out, on pictures made from the file
    for name, map_, x in (
        ("imacs_g", maps.reference_to_generated(), mask),
        ("imacs_r", maps.generated_to_reference(weights="mask"), reference_mask),
    ):
        m = picture(map_.double(), x.shape)[0]
        expected = m[x == 1].mean() - 3 * m[x == 0].mean()
        assert scores[name]["value"] == pytest.approx(expected.item(), abs=1e-6)


def test_region_is_a_rectangle_of_the_person(run_here, record_line, out):
    # cells of the 16 x 12 layers are 8 pixels wide: this is exactly the cell in row 3, column 5
    run_here(record_line(region="cell=24,40,8,8"))
    maps = i2am.load_maps(out / "maps.safetensors").select(layers="up_blocks.1.*")
    assert {layer.site.generated_grid for layer in maps.layer_sums} == {(16, 12)}
    asked = maps.specific_reference("cell")
    per_step = asked.sum().item() / 4
    assert 0.9 < per_step <= 1  # what is missing looks at the class token
    assert not torch.allclose(asked, maps.generated_to_reference())


def test_both_halves_of_guidance_are_kept_apart(run_here, record_line, out):
    done = run_here(record_line(guidance_branch="both"))
    assert done.code == ExitCode.DONE, done.err
    first = i2am.load_maps(out / "maps.safetensors")
    second = i2am.load_maps(out / "maps_unconditional.safetensors")
    assert first.provenance["branch"] == "conditional"
    assert second.provenance["branch"] == "unconditional"
    difference = first.generated_to_reference() - second.generated_to_reference()
    assert difference.abs().max() > 0
    assert (out / "g2r_unconditional.png").is_file()
    assert "imacs_g_unconditional" in strict_json(out / "scores.json")


def test_unconditional_half_alone(run_here, record_line, out):
    assert run_here(record_line(guidance_branch="unconditional")).code == ExitCode.DONE
    maps = i2am.load_maps(out / "maps.safetensors")
    assert maps.provenance["branch"] == "unconditional"


def test_json_goes_to_stdout_and_everything_else_to_stderr(run_here, record_line, out):
    done = run_here(record_line("--json"))
    result = json.loads(done.out)
    assert result["out"] == str(out)
    assert sorted(result["files"]) == names(out)
    assert result["scores"] == strict_json(out / "scores.json")
    assert result["scores"]["imacs_r"] == {"value": None, "reason": "no reference mask was given"}


def test_random_weights_are_said_everywhere(run_here, record_line, out):
    done = run_here(record_line("--json"))
    trained = load_pipeline("pocket").trained
    assert ("the weights of pocket are random" in done.err) is not trained
    assert json.loads(done.out)["trained"] is trained
    run = strict_json(out / "run.json")
    assert run["model"]["trained"] is trained
    assert ("the weights are random, not trained" in run["notes"]) is not trained


def test_stretching_is_said(run_here, record_line, files):
    done = run_here(record_line(size="64x96"))
    assert "the person, 96 x 128 pixels, is stretched to the generated 96 x 64" in done.err


def test_size_is_honoured(run_here, record_line, out):
    assert run_here(record_line(size="160x120")).code == ExitCode.DONE
    assert Image.open(out / "image.png").size == (120, 160)
    maps = i2am.load_maps(out / "maps.safetensors")
    assert {layer.site.generated_grid for layer in maps.layer_sums} == {(20, 15)}


def test_the_page_is_that_of_i2am_report(run_here, record_line, out, tmp_path):
    done = run_here(record_line(region=["left=10,5,40,30"], guidance_branch="both"))
    assert done.code == ExitCode.DONE, done.err
    assert f"to point at: {out / 'report.html'}" in done.out
    page = tmp_path / "page.html"
    assert run_here(["report", str(out), "-o", str(page)]).code == ExitCode.DONE
    assert page.read_bytes() == (out / "report.html").read_bytes()


def test_no_page_is_no_pair_maps(run_here, record_line, out):
    done = run_here(record_line("--no-report"))
    assert done.code == ExitCode.DONE, done.err
    assert "to point at" not in done.out
    assert not (out / "report.html").exists()
    assert i2am.load_maps(out / "maps.safetensors").pairs is None


def test_every_input_is_read_once_so_that_its_hash_is_that_of_what_was_used(
    run_here, record_line, files, out, monkeypatch
):
    read = []
    read_bytes = images.read_bytes

    def watch(path, **options):
        content = read_bytes(path, **options)
        if path.parent == files:
            read.append(path.stem)
            path.unlink()
        return content

    expected = {path.stem: sha256(path.read_bytes()).hexdigest() for path in files.iterdir()}
    monkeypatch.setattr(images, "read_bytes", watch)
    given = {name: files / f"{name}.png" for name in ("pose", "reference_mask")}
    assert run_here(record_line(**given)).code == ExitCode.DONE
    assert sorted(read) == sorted(expected)
    inputs = strict_json(out / "run.json")["inputs"]
    assert {name: entry["sha256"] for name, entry in inputs.items()} == expected


def test_official_preset_lets_the_class_token_vote_and_keeps_the_keys_apart(
    run_here, record_line, out
):
    run_here(record_line())
    paper = i2am.load_maps(out / "maps.safetensors")
    done = run_here(record_line("--overwrite", preset="official"))
    assert done.code == ExitCode.DONE, done.err
    assert "approximate" not in done.err
    official = i2am.load_maps(out / "maps.safetensors")
    for layer in official.layer_sums:
        by_key = layer.reference_to_generated_by_key
        # the class token is one of the voters
        assert by_key.shape[3] == layer.site.reference_tokens + 1
        assert torch.allclose(by_key.mean(3), layer.reference_to_generated[:, :, :, 0], rtol=1e-4)
    assert all(layer.reference_to_generated_by_key is None for layer in paper.layer_sums)
    assert torch.equal(paper.generated_to_reference(), official.generated_to_reference())
    assert not torch.equal(paper.reference_to_generated(), official.reference_to_generated())


def test_official_preset_keeps_no_keys_of_a_single_token(
    run_here, record_line, out, paint_by_example_folder
):
    done = run_here(record_line(model=paint_by_example_folder, preset="official"))
    assert done.code == ExitCode.DONE, done.err
    maps = i2am.load_maps(out / "maps.safetensors")
    assert all(layer.reference_to_generated_by_key is None for layer in maps.layer_sums)


def test_single_token_model_has_one_direction_and_says_why(
    run_here, record_line, files, out, paint_by_example_folder
):
    done = run_here(
        record_line(
            model=paint_by_example_folder,
            reference_mask=files / "reference_mask.png",
        )
    )
    assert done.code == ExitCode.DONE, done.err
    assert "single reference token" in done.err
    assert Image.open(out / "image.png").size == (96, 128)
    assert "g2r.png" not in names(out)
    scores = strict_json(out / "scores.json")
    assert scores["imacs_g"]["value"] is not None
    assert "overlay_r2g_mask_votes.png" not in names(out)
    for name in ("imacs_r", "imacs_g_mask_votes", "imacs_g_share"):
        assert scores[name]["value"] is None
        assert "no reference grid" in scores[name]["reason"]


# --dry-run


@pytest.mark.parametrize("preset", ["paper", "official"])
def test_dry_run_writes_nothing_and_estimates_what_stays_exactly(
    preset, run_here, record_line, files, out, tmp_path
):
    options = {
        "preset": preset,
        "reference_mask": files / "reference_mask.png",
        "region": ["a=0,0,20,20", "b=0,30,50,50"],
        "guidance_branch": "both",
    }
    before = names(tmp_path)
    done = run_here(record_line("--dry-run", "--json", **options))
    assert done.code == ExitCode.DONE, done.err
    assert names(tmp_path) == before
    estimate = json.loads(done.out)

    assert run_here(record_line(**options)).code == ExitCode.DONE
    stays = sum(
        sums.nbytes
        for name in ("maps", "maps_unconditional")
        for maps in [i2am.load_maps(out / f"{name}.safetensors")]
        for sums in [
            maps.pairs,
            *(of for layer in maps.layer_sums for of in tensors(layer).values()),
        ]
    )
    assert estimate["stays"] == stays
    assert estimate["layers"] == 3
    assert estimate["transient"] >= estimate["stays"]
    assert estimate["available"] > 0
    # every image as fp32: generated, person, mask, reference and its mask
    assert estimate["images"] == 12 * (3 * 96 * 128 + 2 * 80 * 80)


def test_the_estimate_costs_one_call_of_the_denoiser(run_here, record_line, monkeypatch):
    from diffusers import AutoencoderKL, UNet2DConditionModel

    calls = []
    forward = UNet2DConditionModel.forward

    def count(self, sample, *arguments, **options):
        calls.append(len(sample))
        return forward(self, sample, *arguments, **options)

    monkeypatch.setattr(UNet2DConditionModel, "forward", count)
    monkeypatch.setattr(AutoencoderKL, "decode", lambda *_, **__: pytest.fail("decoded"))
    done = run_here(record_line("--dry-run", region="a=0,0,20,20", steps=50))
    assert done.code == ExitCode.DONE, done.err
    assert calls == [1]


def test_a_region_is_as_small_as_its_numbers(run_here, record_line, monkeypatch):
    seen = {}
    record = i2am.record

    def watch(*arguments, **options):
        seen.update(options)
        return record(*arguments, **options)

    monkeypatch.setattr(i2am, "record", watch)
    assert run_here(record_line(region="a=10,5,40,30")).code == ExitCode.DONE
    assert seen["regions"] == {"a": Box(10, 5, 40, 30, (128, 96))}


def test_dry_run_speaks_in_sentences(run_here, record_line):
    done = run_here(record_line("--dry-run"))
    assert "maps that stay" in done.out
    assert "MiB in 3 layers" in done.out
    assert done.out.rstrip().endswith("nothing was written")


def test_more_regions_need_more_memory(run_here, record_line):
    def stays(count):
        regions = [f"r{number}=0,0,20,20" for number in range(count)]
        return json.loads(run_here(record_line("--dry-run", "--json", region=regions)).out)["stays"]

    none, ten, twenty = stays(0), stays(10), stays(20)
    assert none < ten
    assert twenty - ten == ten - none


def test_too_little_memory_is_refused_with_the_estimate(
    run_here, record_line, tmp_path, monkeypatch
):
    monkeypatch.setattr("i2am.cli.estimate.available_memory", lambda device: 100_000)
    before = names(tmp_path)
    done = run_here(record_line(region="a=0,0,20,20"))
    assert done.code == ExitCode.REJECTED
    assert "not enough memory: the maps need about" in done.err
    assert "97.7 KiB are available; ask for fewer regions" in done.err
    assert names(tmp_path) == before


def test_paste_back_keeps_the_person_outside_the_mask(run_here, record_line, files, out):
    done = run_here(record_line("--paste-back", region=["left=10,5,40,30"]))
    assert done.code == ExitCode.DONE, done.err
    assert strict_json(out / "run.json")["settings"]["paste_back"] is True
    size = (96, 128)
    generated = np.asarray(Image.open(out / "image.png")).astype(int)
    person = np.asarray(Image.open(files / "person.png").convert("RGB").resize(size)).astype(int)
    mask = np.asarray(Image.open(files / "mask.png").convert("L").resize(size))
    outside = np.abs(generated - person)[mask == 0].mean()
    assert outside < 3 < np.abs(generated - person)[mask == 255].mean()


def warned(done):
    return [line for line in done.err.splitlines() if line.startswith("warning: ")]


def test_a_short_run_has_fewer_time_groups(run_here, record_line, files, out):
    pose = files / "pose.png"
    done = run_here(record_line("--no-report", steps=1, time_groups=5, pose=pose))
    assert done.code == ExitCode.DONE
    assert warned(done) == [
        "warning: 5 time groups were asked for and the run has 1 step: its maps have 1 time group"
    ]
    assert "recording 1 step, " in done.err
    assert i2am.load_maps(out / "maps.safetensors").time_groups == 1
    assert strict_json(out / "run.json")["settings"]["time_groups"] == 1


def test_suspicious_input_is_told_and_taken(run_here, record_line, files, out):
    photo = files / "photo.png"
    shades = np.linspace(0, 255, 128, dtype=np.uint8)[:, None, None]
    Image.fromarray(np.broadcast_to(shades, (128, 96, 3)).copy()).save(photo)
    plain = {"steps": 1, "time_groups": 1}
    done = run_here(record_line("--no-report", mask=photo, **plain))
    assert done.code == ExitCode.DONE
    assert warned(done) == [
        f"warning: mask {photo} looks like a picture rather than a mask: its pixels of half "
        "brightness and more count as white",
        "warning: model pocket takes a pose and --pose is not given: it gets an all-black one",
    ]
    image = np.asarray(Image.open(out / "image.png"))
    # the same image as with what the warnings say that they became
    halves, black = files / "halves.png", files / "black.png"
    Image.open(photo).convert("L").point([0] * 128 + [255] * 128).save(halves)
    Image.new("RGB", (96, 128)).save(black)
    done = run_here(record_line("--no-report", "--overwrite", mask=halves, pose=black, **plain))
    assert warned(done) == []
    assert np.array_equal(np.asarray(Image.open(out / "image.png")), image)


def test_a_size_that_the_model_was_not_made_for_is_told(run_here, record_line, files, out):
    for name in ("person", "mask", "pose"):
        Image.open(files / f"{name}.png").resize((100, 100)).save(files / f"square_{name}.png")
    square = {name: files / f"square_{name}.png" for name in ("person", "mask", "pose")}
    done = run_here(record_line("--no-report", size="100x100", steps=1, time_groups=1, **square))
    assert done.code == ExitCode.DONE
    assert warned(done) == [
        "warning: model pocket was made for images of 128x96 pixels, height by width, and is asked "
        "for 100x100: images and maps may be worse"
    ]
    assert Image.open(out / "image.png").size == (100, 100)
    line = record_line("--no-report", "--overwrite", size="128x96", steps=1, time_groups=1)
    assert not any("was made for" in line for line in warned(run_here(line)))


@pytest.mark.parametrize("source", ["alpha channel", "plain background"])
def test_reference_mask_auto_is_that_of_the_object(run_here, record_line, files, out, source):
    pixels = np.full((80, 80, 4), 255, np.uint8)
    pixels[20:60, 10:50, :3] = np.random.default_rng(1).integers(0, 200, (40, 40, 3))
    if source == "alpha channel":
        pixels[..., 3] = 0
        pixels[20:60, 10:50, 3] = 255
    Image.fromarray(pixels).save(files / "reference.png")
    done = run_here(record_line(reference_mask="auto"))
    assert done.code == ExitCode.DONE, done.err
    assert f"the reference mask was made from the {source}: 25% of the picture" in done.err
    made = (out / "reference_mask.png").read_bytes()
    assert np.array_equal(
        np.asarray(Image.open(out / "reference_mask.png")),
        np.asarray(Image.open(files / "reference_mask.png")),
    )
    run = strict_json(out / "run.json")
    assert run["inputs"]["reference_mask"]["file"] == "reference_mask.png"
    assert run["inputs"]["reference_mask"]["sha256"] == sha256(made).hexdigest()
    assert "reference_mask.png" in run["files"]
    maps = i2am.load_maps(out / "maps.safetensors")
    assert maps.votes == ("uniform", "mask")
    given = record_line("--overwrite", reference_mask=files / "reference_mask.png")
    assert run_here(given).code == ExitCode.DONE
    wanted = i2am.load_maps(out / "maps.safetensors")
    assert torch.equal(
        maps.reference_to_generated(votes="mask"), wanted.reference_to_generated(votes="mask")
    )


def test_reference_mask_auto_of_a_picture_without_background(run_here, record_line, out):
    done = run_here(record_line(reference_mask="auto"))
    assert done.code == ExitCode.REJECTED
    assert "must have a transparent or a plain background" in done.err
    assert not out.exists()
