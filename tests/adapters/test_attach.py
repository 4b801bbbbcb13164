"""The two ways to attach: beside the model's own attention calls, and fused with them."""

import pytest
import torch
import torch.nn.functional as F

import i2am
from i2am.adapters.attention import attending
from i2am.layouts import TokenLayout

PATCHES = TokenLayout.cross_attention((4, 3))


@pytest.fixture
def calls(monkeypatch):
    """How recorded layers attended, in order."""
    seen = []

    def watch(module, name):
        original = getattr(module, name)

        def spy(*args, **kwargs):
            seen.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, spy)

    watch(attending, "attention_with_lse")
    watch(attending, "kernel_attention")
    return seen


@pytest.mark.parametrize(
    ("impl", "masked"),
    # the interpreter is slow, and masks are the kernels' own tests' business
    [("fused", False), ("reference", False), ("reference", True)],
)
def test_fused_makes_the_same_picture_and_maps_to_rounding(tiny, calls, impl, masked):
    loop = tiny.loop()
    options = {"steps": 2}
    if masked:
        options["context_mask"] = torch.ones(1, 13)
        options["context_mask"][:, 9:] = 0
    plain = loop(tiny.reference(), **options)
    results = {}
    for attach in ("beside", "fused"):
        calls.clear()
        with i2am.record(loop, layout=PATCHES, time_groups=2, attach=attach, impl=impl) as recorder:
            image = loop(tiny.reference(), **options)
        results[attach] = image, recorder.maps()
        wanted = "kernel_attention" if attach == "fused" else "attention_with_lse"
        assert set(calls) == {wanted}
        assert len(calls) == sum(recorder.maps().provenance["calls"].values())
        assert recorder.maps().provenance["attach"] == attach
    (beside, maps), (fused, fused_maps) = results["beside"], results["fused"]
    assert torch.equal(beside, plain)
    torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-4)
    for one, other in zip(maps.layer_sums, fused_maps.layer_sums, strict=True):
        for name in ("reference_to_generated", "generated_to_reference"):
            expected = getattr(one, name)
            atol = 1e-4 * expected.abs().max().item()
            torch.testing.assert_close(getattr(other, name), expected, rtol=0, atol=atol)
    assert torch.equal(loop(tiny.reference(), **options), plain)


@pytest.mark.parametrize("attach", ["beside", "fused"])
def test_watched_processors_attach_alike(tiny, calls, attach):
    pipeline = tiny.ip_adapters(tiny.stable_diffusion(), "full")

    def images():
        return tiny.run(
            pipeline,
            **tiny.prompts(),
            ip_adapter_image=tiny.picture(),
            num_inference_steps=2,
            height=24,
            width=24,
        )

    plain = torch.as_tensor(images())
    with i2am.record(pipeline, time_groups=2, attach=attach, impl="reference") as recorder:
        recorded = torch.as_tensor(images())
    assert torch.equal(recorded, plain) == (attach == "beside")
    torch.testing.assert_close(recorded, plain, rtol=1e-3, atol=1e-3)
    assert set(calls) == {"kernel_attention" if attach == "fused" else "attention_with_lse"}
    assert recorder.maps().n_samples == 1


def test_what_pytorch_hands_over_saves_a_sweep(tiny, monkeypatch):
    """Both ways in give the log-sum-exp of all keys of the call to the statistics."""
    from i2am.attribution import Accumulator, calls

    given = []
    add, accumulate = Accumulator.add, calls.accumulate

    def spy(self, site, query, key, *, query_lse, **rest):
        exact = (query.double() @ key.double().mT * query.shape[-1] ** -0.5).logsumexp(-1)
        torch.testing.assert_close(query_lse.double(), exact, rtol=1e-5, atol=1e-5)
        given.append(query_lse)
        return add(self, site, query, key, query_lse=query_lse, **rest)

    def no_sweep_for_it(query, key, probes, **rest):
        assert probes
        return accumulate(query, key, probes, **rest)

    monkeypatch.setattr(Accumulator, "add", spy)
    monkeypatch.setattr(calls, "accumulate", no_sweep_for_it)
    loop = tiny.loop()
    pipeline = tiny.ip_adapters(tiny.stable_diffusion(), "full")
    for attach in ("beside", "fused"):
        with i2am.record(loop, layout=PATCHES, time_groups=2, attach=attach, impl="streaming"):
            loop(tiny.reference(), steps=2)
        with i2am.record(pipeline, time_groups=2, attach=attach, impl="streaming"):
            tiny.run(
                pipeline,
                **tiny.prompts(),
                ip_adapter_image=tiny.picture(),
                num_inference_steps=2,
                height=24,
                width=24,
            )
    assert given


def test_grouped_heads_are_left_to_pytorch(monkeypatch):
    """A call that only PyTorch's function can make is made by it, and recorded all the same."""
    from i2am.adapters.attention.watching import _WatchAttention
    from i2am.adapters.guard import UNGUARDED

    query, key = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 5, 8)
    seen = []

    def never(*args, **kwargs):
        raise AssertionError("attended by itself")

    def record(query, key, **rest):
        seen.append((query.shape, key.shape, rest["query_lse"]))

    expected = F.scaled_dot_product_attention(query, key, key, enable_gqa=True)
    with _WatchAttention(record, never, UNGUARDED, iter([(0, None)])):
        output = F.scaled_dot_product_attention(query, key, key, enable_gqa=True)
    assert torch.equal(output, expected)
    assert seen == [(query.shape, torch.Size([1, 4, 5, 8]), None)]


def test_an_unknown_way_is_refused(tiny):
    with pytest.raises(ValueError, match="attach must be one of beside, fused, got 'aside'"):
        i2am.record(tiny.loop(), layout=PATCHES, attach="aside")
