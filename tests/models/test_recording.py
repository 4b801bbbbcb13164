"""Both pipelines know their token layout: recording needs no help and changes nothing."""

import pytest
import torch

import i2am


def test_custom_maps_lie_on_both_grids(custom, inputs, run) -> None:
    plain = run(custom, **inputs)
    with i2am.record(custom, time_groups=3) as recorder:
        recorded = run(custom, **inputs)
    assert torch.equal(recorded, plain)
    maps = recorder.maps()
    assert maps.informative
    assert len(maps.layers) == 4
    assert maps.reference_to_generated(per=("time", "layer")).shape[:3] == (1, 3, 4)
    assert maps.generated_to_reference().shape == (1, *custom.reference_grid)


@pytest.mark.filterwarnings("ignore:layers with a single reference token")
@pytest.mark.parametrize("name", ["custom", "paint_by_example"])
def test_the_conditional_half_is_recorded(request, name, inputs, run) -> None:
    # at guidance scale 1 only the conditional half is there: one step shows the same attention
    pipeline = request.getfixturevalue(name)
    maps = {}
    for scale in (1.0, 5.0):
        with i2am.record(pipeline, time_groups=1, directions="reference_to_generated") as recorder:
            run(pipeline, **inputs, guidance_scale=scale, num_inference_steps=1)
        maps[scale] = recorder.maps().reference_to_generated(per="layer")
    torch.testing.assert_close(maps[5.0], maps[1.0], rtol=1e-4, atol=1e-6)
    with i2am.record(
        pipeline, time_groups=1, directions="reference_to_generated", branch="unconditional"
    ) as recorder:
        run(pipeline, **inputs, guidance_scale=5.0, num_inference_steps=1)
    other = recorder.maps().reference_to_generated(per="layer")
    assert not torch.allclose(other, maps[1.0], rtol=1e-3)


def test_a_painted_reference_patch_moves_its_own_weight(custom, inputs, run) -> None:
    # the map's cell order: a patch that is changed alone changes its own cell the most, since
    # every other cell feels it only through self-attention and the common normalisation
    reference = torch.zeros(3, 16, 12)
    cells = {}
    for name in ("plain", "painted"):
        with i2am.record(custom, time_groups=1) as recorder:
            run(custom, **{**inputs, "reference_image": reference}, num_inference_steps=1)
        cells[name] = recorder.maps().generated_to_reference()[0]
        reference = reference.clone()
        reference[:, 8:12, 4:8] = 1.0  # patch row 2, column 1
    change = (cells["painted"] - cells["plain"]).abs()
    assert divmod(int(change.argmax()), 3) == (2, 1)


def test_paint_by_example_has_one_direction_that_is_not_causal(
    paint_by_example, inputs, run
) -> None:
    plain = run(paint_by_example, **inputs)
    with i2am.record(paint_by_example, time_groups=1) as recorder:
        recorded = run(paint_by_example, **inputs)
    assert torch.equal(recorded, plain)
    with pytest.warns(UserWarning, match="single reference token"):
        maps = recorder.maps()
    assert not maps.informative
    assert maps.reference_to_generated(size=(32, 24)).shape == (1, 32, 24)
    with pytest.raises(ValueError, match="generated_to_reference"):
        maps.generated_to_reference()


@pytest.mark.filterwarnings("ignore:layers with a single reference token")
@pytest.mark.parametrize("name", ["custom", "paint_by_example"])
def test_samples_of_a_batch_have_their_own_maps(request, name, batch_inputs, run) -> None:
    pipeline = request.getfixturevalue(name)
    two = {key: values[:2] for key, values in batch_inputs.items()}

    def maps_of(seeds, **inputs):
        with i2am.record(pipeline, time_groups=1, directions="reference_to_generated") as recorder:
            run(pipeline, **inputs, seeds=seeds)
        return recorder.maps().reference_to_generated()

    together = maps_of((1, 2, 3, 4), **two, num_images_per_prompt=2)
    assert len(together) == 4
    for sample in range(4):
        one = {key: values[sample // 2] for key, values in two.items()}
        alone = maps_of((sample + 1,), **one)
        torch.testing.assert_close(together[sample], alone[0], rtol=1e-3, atol=1e-6)
