"""IMACS as a function: eq 18, its switches, and what has no score."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import i2am.metrics
from i2am.attribution import OFFICIAL, PAPER, AttributionMaps, normalize, picture, resize
from i2am.attribution.postprocess import mask_product
from i2am.metrics import imacs, imacs_scores
from i2am.testing import make_maps, make_site

SIDE = st.integers(2, 7)
few = settings(max_examples=40)


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def half(*shape):
    """A mask of the right half."""
    mask = torch.zeros(*shape)
    mask[..., shape[-1] // 2 :] = 1
    return mask


def eq_18(picture, mask, penalty=3.0):
    """One sample, written as the paper does."""
    picture, mask = picture.double(), mask.double()
    inside = (picture * mask).sum() / mask.sum()
    outside = (picture * (1 - mask)).sum() / (1 - mask).sum()
    return inside - penalty * outside


def test_all_attribution_inside_is_one_and_all_outside_is_minus_the_penalty():
    mask = half(1, 4, 6)
    assert imacs(mask, mask).tolist() == [1]
    assert imacs(1 - mask, mask).tolist() == [-3]
    assert imacs(1 - mask, mask, penalty=0.5).tolist() == [-0.5]


@pytest.mark.parametrize("preset", ["paper", "official"])
def test_raw_maps_are_drawn_at_the_masks_size_first(preset):
    maps, masks = rand(3, 5, 4), (rand(3, 20, 12, seed=1) > 0.5).float()
    for switches in ({}, {"threshold": 0.2}, {"penalty": 1.0}, {"invert": True}):
        scores = imacs(maps, masks, preset=preset, **{"invert": False, **switches})
        assert scores.dtype == torch.float64
        drawn = picture(
            maps.double(),
            (20, 12),
            preset=preset,
            threshold=switches.get("threshold", 0.4),
            invert=switches.get("invert", False),
        )
        wanted = [
            eq_18(*pair, switches.get("penalty", 3.0)) for pair in zip(drawn, masks, strict=True)
        ]
        torch.testing.assert_close(scores, torch.stack(wanted))


def test_processed_maps_are_taken_as_they_are():
    drawn = rand(2, 6, 6)
    wanted = torch.stack([eq_18(one, half(6, 6)) for one in drawn])
    torch.testing.assert_close(imacs(drawn, half(2, 6, 6), processed=True), wanted)
    raw = rand(2, 3, 3)
    ready = picture(raw.double(), (6, 6))
    torch.testing.assert_close(
        imacs(ready, half(2, 6, 6), processed=True), imacs(raw, half(2, 6, 6))
    )


def test_official_g2r_is_multiplied_by_the_mask_first():
    maps, masks = rand(2, 4, 3), (rand(2, 16, 12, seed=1) > 0.5).float()
    product = mask_product(maps.double(), masks.double())
    scores = imacs(maps, masks, preset="official", direction="generated_to_reference")
    plain = replace(OFFICIAL, reference_mask_product=False)
    torch.testing.assert_close(
        scores, imacs(product, masks, preset=plain, direction="generated_to_reference")
    )
    # and not inverted, while R2G is
    twice = normalize(resize(normalize(product), (16, 12), mode="bicubic"))
    kept = twice.where(twice > 0.4, 0)
    torch.testing.assert_close(scores[0], eq_18(kept[0], masks[0]), atol=1e-6, rtol=0)
    r2g = imacs(maps, masks, preset="official")
    torch.testing.assert_close(r2g, imacs(maps, masks, preset="official", invert=True))
    assert not torch.allclose(r2g, imacs(maps, masks, preset="official", invert=False))


def test_the_paper_scores_both_directions_alike():
    maps, masks = rand(2, 4, 3), half(2, 8, 6)
    assert torch.equal(imacs(maps, masks), imacs(maps, masks, direction="generated_to_reference"))


@given(
    grid=st.tuples(SIDE, SIDE),
    size=st.tuples(SIDE, SIDE),
    seed=st.integers(0, 999),
    penalty=st.floats(0, 5),
)
@few
def test_scores_stay_in_range_and_ignore_scale_offset_and_neighbours(grid, size, seed, penalty):
    maps = rand(3, *grid, seed=seed).double()
    masks = rand(3, *size, seed=seed + 1)  # soft ones are scored by the formula as well
    scores = imacs(maps, masks, penalty=penalty, stretch=True)
    assert ((scores >= -penalty - 1e-9) & (scores <= 1 + 1e-9)).all()
    order = [2, 0, 1]
    options = {"penalty": penalty, "stretch": True}
    torch.testing.assert_close(imacs(maps[order], masks[order], **options), scores[order])
    torch.testing.assert_close(imacs(maps[:1], masks[:1], **options), scores[:1])
    processed = picture(maps, size)
    rescaled = picture(3 * maps + 1, size)
    # away from the threshold, where rounding could flip a pixel
    if ((processed - 0.4).abs() > 1e-9).all():
        torch.testing.assert_close(rescaled, processed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_any_dtype_is_scored_in_fp64(dtype):
    maps = rand(2, 4, 4).to(dtype)
    scores = imacs(maps, half(2, 8, 8).bool())
    assert torch.equal(scores, imacs(maps.double(), half(2, 8, 8)))


def test_inputs_are_left_alone():
    maps, masks = rand(2, 4, 4), half(2, 8, 8)
    before = maps.clone(), masks.clone()
    imacs(maps, masks, preset="official", direction="generated_to_reference")
    assert torch.equal(maps, before[0])
    assert torch.equal(masks, before[1])


def test_an_empty_batch_has_no_scores():
    assert imacs(torch.zeros(0, 3, 3), torch.zeros(0, 6, 6)).shape == (0,)


DEGENERATE = [
    ("empty", rand(1, 4, 4), torch.zeros(1, 8, 8), {}, "its mask is empty"),
    ("full", rand(1, 4, 4), torch.ones(1, 8, 8), {}, "its mask is full"),
    ("constant", torch.full((1, 4, 4), 0.3), half(1, 8, 8), {}, "its map is constant"),
    ("empty, drawn", rand(1, 8, 8), torch.zeros(1, 8, 8), {"processed": True}, "mask is empty"),
    (
        "full, official",
        rand(1, 4, 4),
        torch.ones(1, 8, 8),
        {"preset": "official", "direction": "generated_to_reference"},
        "its mask is full",
    ),
]


@pytest.mark.parametrize(
    ("maps", "masks", "options", "reason"),
    [case[1:] for case in DEGENERATE],
    ids=[case[0] for case in DEGENERATE],
)
def test_a_sample_without_a_score_raises_or_is_nan(maps, masks, options, reason):
    size = maps.shape[1:]
    maps = torch.cat([rand(1, *size, seed=5), maps])
    masks = torch.cat([half(1, 8, 8), masks])
    with pytest.raises(ValueError, match=f"sample 1 has no score because .*{reason}"):
        imacs(maps, masks, **options)
    scores = imacs(maps, masks, undefined="nan", **options)
    assert scores.isnan().tolist() == [False, True]
    assert torch.equal(scores[:1], imacs(maps[:1], masks[:1], **options))


NAN = torch.full((1, 4, 4), torch.nan)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: imacs(rand(4, 4), half(1, 8, 8)), r"attribution must be \[batch, .*\[4, 4\]"),
        (lambda: imacs(rand(1, 4, 0), half(1, 8, 8)), r"attribution must be .*\[1, 4, 0\]"),
        (lambda: imacs(rand(1, 4, 4), half(8)), r"mask must have shape \[height, .*\[8\]"),
        (lambda: imacs(rand(1, 8, 4), half(1, 8, 16)), "8 x 4 .* got 8 x 16.*; stretch=True"),
        (lambda: imacs(rand(1, 8, 4), half(1, 16, 32)), "height and width look swapped"),
        (lambda: imacs(rand(2, 4, 4), half(1, 8, 8)), "same batch, got 2 and 1"),
        (lambda: imacs(NAN, half(1, 8, 8)), "maps must be finite, got NaN or Inf in 1 of 1"),
        (lambda: imacs(NAN, half(1, 8, 8), undefined="nan"), "maps must be finite"),
        (lambda: imacs(NAN * 0 + torch.inf, half(1, 8, 8)), "maps must be finite"),
        (lambda: imacs(NAN, half(1, 4, 4), processed=True), r"processed .* values in \[0, 1\]"),
        (lambda: imacs(rand(1, 4, 4), 2 * half(1, 8, 8)), r"mask must hold values in \[0, 1\]"),
        (lambda: imacs(rand(1, 8, 8), NAN), r"mask must hold values in \[0, 1\]"),
        (lambda: imacs(rand(1, 4, 4), half(1, 8, 8), processed=True), "must have the mask's size"),
        (lambda: imacs(2 * half(1, 8, 8), half(1, 8, 8), processed=True), "processed attribution"),
        (lambda: imacs(rand(1, 4, 4), half(1, 8, 8), preset="v2"), "preset must be"),
        (lambda: imacs(rand(1, 4, 4), half(1, 8, 8), direction="up"), "'up' is not a valid Dir"),
        (lambda: imacs(rand(1, 4, 4), half(1, 8, 8), undefined="inf"), "undefined must be"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Scores of a result

SITES = (make_site("down.0", (8, 6), (5, 4)), make_site("up.0", (4, 3), (5, 4)))
SINGLE = make_site("mid.0", (4, 3), None)
MASK, SUBJECT = half(32, 24), half(20, 16).flip(-1)


def test_every_score_of_a_full_recording():
    maps = make_maps(SITES, mask=MASK, reference_mask=SUBJECT)
    scores = imacs_scores(maps, mask=MASK, reference_mask=SUBJECT, layer_weighting="area")
    masks, subjects = MASK.expand(2, -1, -1), SUBJECT.expand(2, -1, -1)
    area = {"layer_weighting": "area"}
    wanted = {
        "imacs_g": imacs(maps.reference_to_generated(**area), masks),
        "imacs_g_share": imacs(
            maps.reference_to_generated(measure="share", votes="mask", **area), masks
        ),
        "imacs_g_mask_votes": imacs(maps.reference_to_generated(votes="mask", **area), masks),
        "imacs_r": imacs(maps.generated_to_reference(weights="mask", **area), subjects),
    }
    assert [*scores] == [*wanted]
    for name, values in wanted.items():
        assert scores[name].reason is None
        assert torch.equal(scores[name].values, values)


def test_official_scores_are_not_weighted_and_inverted_for_single_tokens_only():
    maps = make_maps(SITES)
    subjects = SUBJECT.expand(2, -1, -1)
    masks = MASK.expand(2, -1, -1)
    with pytest.warns(UserWarning, match="approximate here.*keep_keys=True"):
        scores = imacs_scores(maps, mask=MASK, reference_mask=SUBJECT, preset="official")
    r2g = maps.reference_to_generated(preset="official")
    assert torch.equal(scores["imacs_g"].values, imacs(r2g, masks, preset="official", invert=False))
    g2r = maps.generated_to_reference(preset="official")
    wanted = imacs(g2r, subjects, preset="official", direction="generated_to_reference")
    assert torch.equal(scores["imacs_r"].values, wanted)

    single = make_maps([SINGLE])
    r2g = single.reference_to_generated(preset="official")
    values = imacs_scores(single, mask=MASK, preset="official")["imacs_g"].values
    assert torch.equal(values, imacs(r2g, masks, preset="official", invert=True))


@pytest.mark.parametrize(
    ("recording", "sites", "given", "name", "reason"),
    [
        ({}, SITES, {}, "imacs_g", "no inpainting mask was given"),
        ({}, SITES, {"mask": MASK}, "imacs_g_mask_votes", "no reference mask .* recording"),
        (
            {"reference_mask": SUBJECT},
            [*SITES, SINGLE],
            {"mask": MASK},
            "imacs_g_mask_votes",
            "no reference grid in mid.0",
        ),
        ({"directions": ["generated_to_reference"]}, SITES, {"mask": MASK}, "imacs_g", "was not"),
        ({"mask": MASK}, SITES, {}, "imacs_r", "no reference mask was given"),
        ({}, SITES, {"reference_mask": SUBJECT}, "imacs_r", "no inpainting mask .* recording"),
        ({}, [SINGLE], {"reference_mask": SUBJECT}, "imacs_r", "no reference grid in mid.0"),
        (
            {"mask": MASK, "directions": ["reference_to_generated"]},
            SITES,
            {"reference_mask": SUBJECT},
            "imacs_r",
            "generated_to_reference was not recorded",
        ),
    ],
)
def test_a_score_that_is_not_defined_has_a_reason(recording, sites, given, name, reason):
    scores = imacs_scores(make_maps(sites, **recording), **given)
    assert scores[name].values is None
    assert re.search(reason, scores[name].reason)


def test_one_sample_without_a_score_is_nan_on_request():
    masks = torch.stack([MASK, torch.zeros_like(MASK)])
    maps = make_maps(SITES)
    with pytest.raises(ValueError, match="sample 1 has no score because its mask is empty"):
        imacs_scores(maps, mask=masks)
    values = imacs_scores(maps, mask=masks, undefined="nan")["imacs_g"].values
    assert values.isnan().tolist() == [False, True]


def test_scores_of_broken_sums_name_the_layer_and_head():
    maps = make_maps(SITES)
    sums = maps.layer_sums[1].reference_to_generated.clone()
    sums[0, 1, 1, 0, 2, 2] = torch.nan
    layers = [maps.layer_sums[0], replace(maps.layer_sums[1], reference_to_generated=sums)]
    broken = AttributionMaps(layers, votes=maps.votes, rows=maps.rows, provenance={})
    with pytest.raises(ValueError, match=r"reference_to_generated of up\.0 .*group 1, head 1"):
        imacs_scores(broken, mask=MASK)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (MASK[0], r"mask must have shape \[height, width\]"),
        (MASK.expand(3, -1, -1), "mask must be one mask or one for each of 2 samples, got 3"),
    ],
    ids=["1-D", "three samples"],
)
def test_masks_must_fit_the_samples(mask, message):
    with pytest.raises(ValueError, match=message):
        imacs_scores(make_maps(SITES), mask=mask)


def test_a_preset_of_ones_own_decides_about_eq_17():
    maps = make_maps(SITES)
    own = replace(PAPER, query_mask=False)
    score = imacs_scores(maps, reference_mask=SUBJECT, preset=own)["imacs_r"]
    assert torch.equal(
        score.values, imacs(maps.generated_to_reference(), SUBJECT.expand(2, -1, -1))
    )


# Imports


def test_the_room_imports_no_torchmetrics():
    code = "import sys, i2am.metrics; sys.exit('torchmetrics' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_public_names():
    assert i2am.metrics.__all__ == sorted(i2am.metrics.__all__)
    assert {"IMACS", "imacs", "imacs_scores"} <= set(dir(i2am.metrics))
    with pytest.raises(AttributeError, match="no attribute 'FID'"):
        _ = i2am.metrics.FID


def test_without_torchmetrics_all_can_be_imported_and_read(tmp_path):
    faults = ("ImportError('none here')", "RuntimeError('operator torchvision::nms is not there')")
    code = f"""if True:
        import pydoc, sys
        from pathlib import Path
        sys.path.insert(0, {str(tmp_path)!r})
        for fault in {faults}:
            Path({str(tmp_path)!r}, "torchmetrics.py").write_text(f"raise {{fault}}")
            names = {{}}
            exec("from i2am import *", names)
            import i2am
            assert set(i2am.__all__) <= set(names)
            try:
                names["IMACS"](penalty=3)
            except ImportError as error:
                print(error)
            del i2am.IMACS, i2am.metrics.IMACS, sys.modules["i2am.metrics.metric"]
        assert "i2am - Image-to-image attribution maps" in pydoc.plain(pydoc.render_doc(i2am))
        assert "Mean :func:`imacs` over all" in pydoc.plain(pydoc.render_doc(i2am.IMACS))
    """
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    start = "i2am.IMACS needs torchmetrics, which could not be imported"
    assert done.stdout.splitlines() == [
        f'{start} (none here); install it with: pip install "i2am[metrics]"',
        f"{start} (operator torchvision::nms is not there); "
        f"install the torchvision that was built for torch {torch.__version__}",
    ]


NO_REFERENCE = "no reference was recorded, only words of the prompt: cat, hat"
SEVERAL = (
    "a score is of one reference, and 2 were recorded: reference 1, reference 2; "
    "choose one with select(source=...)"
)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("words", NO_REFERENCE), ("two references", SEVERAL), ("everything", SEVERAL)],
)
def test_a_score_is_of_one_reference(record, kind, reason):
    found = imacs_scores(record(kind), mask=half(48, 36), reference_mask=half(50, 40))
    assert {(score.values, score.reason) for score in found.values()} == {(None, reason)}


@pytest.mark.parametrize("kind", ["reference and words", "frames", "head counts", "resized"])
def test_one_reference_has_every_score_whatever_is_beside_it(record, kind):
    maps = record(kind)
    given = {"mask": half(48, 36), "reference_mask": half(50, 40)}
    found = imacs_scores(maps, **given)
    assert [score.reason for score in found.values()] == [None] * 4
    spread = {"source": "reference", "measure": "spread"}
    wanted = imacs(maps.reference_to_generated(**spread), half(1, 48, 36), invert=False)
    assert torch.equal(found["imacs_g"].values, wanted)
    alone = imacs_scores(maps.select(source="reference"), **given)
    assert all(torch.equal(found[name].values, alone[name].values) for name in found)


def test_one_of_several_references_is_scored_where_it_is_chosen(record):
    maps = record("two references").select(source="reference 2")
    found = imacs_scores(maps, mask=half(48, 36), reference_mask=half(50, 40))
    assert [score.reason for score in found.values()] == [None] * 4


def test_a_layer_without_a_place_is_named(record):
    found = imacs_scores(record("gridless"), mask=half(48, 36), reference_mask=half(50, 40))
    assert found["imacs_g"].reason is None
    assert found["imacs_r"].reason == "no reference grid in down.attn"
