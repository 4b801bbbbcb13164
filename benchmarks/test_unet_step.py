"""One evaluation of an SD-1.5-size UNet, recorded and not, on the custom model's shapes.

    pytest benchmarks/test_unet_step.py -s

860 M random weights, latent 64 x 48, 1037 keys, all 16 cross-attentions, both directions, fp32.
Two UNets share the weights: one is plain, the other recorded all the time. Their evaluations
alternate, so that a busy machine slows both; ``ratio`` is the median quotient of neighbours, and
``recording_s`` the median time spent inside the recorder, which a noisy machine blurs less.
``materialised`` is a hook that forms both softmaxes in full, as published code does, though without
its repeated self-attention.
"""

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

import i2am
from i2am.adapters.sites import LISTENERS
from i2am.layouts import TokenLayout

GRID, PREFIX = (37, 28), 1
ROUNDS = {"recorded": 5, "materialised": 2}


@pytest.fixture(scope="module")
def unets() -> tuple[UNet2DConditionModel, UNet2DConditionModel]:
    with torch.device("meta"):
        pair = [UNet2DConditionModel(in_channels=12, cross_attention_dim=768) for _ in range(2)]
    plain = pair[0].to_empty(device="cpu").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in plain.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        parameter.uniform_(-1, 1, generator=generator).mul_(fan_in**-0.5)
    pair[1].load_state_dict(plain.state_dict(), assign=True)
    return plain, pair[1].eval().requires_grad_(False)


@pytest.mark.parametrize("guidance", [False, True], ids=["plain", "cfg"])
@pytest.mark.parametrize("way", ["recorded", "materialised"])
def test_step(benchmark, unets: tuple[nn.Module, nn.Module], way: str, guidance: bool) -> None:
    rows = 2 if guidance else 1
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(rows, 12, 64, 48, generator=generator)
    context = torch.randn(rows, PREFIX + GRID[0] * GRID[1], 768, generator=generator)
    scheduler = DDIMScheduler()

    @torch.no_grad()
    def evaluate(unet: nn.Module) -> Tensor:
        return unet(sample, 500, encoder_hidden_states=context).sample

    def seconds(unet: nn.Module) -> float:
        start = time.perf_counter()
        evaluate(unet)
        return time.perf_counter() - start

    plain, other = unets
    layout = TokenLayout.cross_attention(GRID, PREFIX)
    recorder = i2am.record(other, scheduler=scheduler, layout=layout)
    remove: Callable[[], None] = recorder.detach
    inside: list[float] = []
    if way == "recorded":
        recorder.attach()
        _time_listeners(inside)
        scheduler.set_timesteps(50)
        # recording does not change a bit; and the first step of a run, which the setup below makes,
        # tells the samples from the guidance parts
        assert torch.equal(evaluate(other), evaluate(plain))
    else:
        remove = _materialise(other, slice(rows - 1, rows))
    before: list[float] = []
    after: list[float] = []

    def plain_step() -> None:
        if way == "recorded":
            timestep = scheduler.timesteps[len(before)]
            scheduler.step(sample[-1:, :4], timestep, sample[-1:, :4])
        before.append(seconds(plain))
        inside.append(0.0)

    benchmark.group = f"step {'with' if guidance else 'without'} guidance"
    benchmark.pedantic(
        lambda: after.append(seconds(other)),
        setup=plain_step,
        rounds=ROUNDS[way],
        warmup_rounds=1,
    )
    quotients = [b / a for a, b in zip(before[1:], after[1:], strict=True)]
    ratio = statistics.median(quotients)
    benchmark.extra_info.update(plain_s=statistics.median(before[1:]), ratio=ratio)
    print(f"\n{benchmark.group}, {way}: {ratio:.3f} x the plain one; all of them:")
    print(" ".join(f"{quotient:.3f}" for quotient in sorted(quotients)))
    if way == "recorded":
        maps = recorder.maps()
        assert maps.n_samples == 1
        assert set(maps.provenance["calls"].values()) == {1 + len(after)}  # all were recorded
        kept = sum(
            sums.nbytes
            for layer in maps.layer_sums
            for sums in (layer.reference_to_generated, layer.generated_to_reference)
        )
        spent = statistics.median(inside[-len(quotients) :])
        benchmark.extra_info.update(kept_MiB_per_sample=kept / 2**20, recording_s=spent)
        print(f"stays per sample: {kept / 2**20:.2f} MiB; inside the recorder: {spent:.3f} s")
    remove()


def _time_listeners(inside: list[float]) -> None:
    """Add the time that the attached recorder takes to the last of ``inside``."""
    ((key, listener),) = LISTENERS.items()
    inside.append(0.0)

    def timed(*call: object) -> None:
        start = time.perf_counter()
        listener(*call)
        inside[-1] += time.perf_counter() - start

    LISTENERS[key] = timed


def _materialise(unet: nn.Module, conditional: slice) -> Callable[[], None]:
    """Hooks that form both softmaxes of the conditional row; returns what removes them."""

    @torch.no_grad()
    def hook(attn: nn.Module, args: tuple[Tensor, ...], kwargs: dict, output: Tensor) -> None:
        states, context = args[0][conditional], kwargs["encoder_hidden_states"][conditional]
        query = attn.to_q(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        key = attn.to_k(context).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        scores = query @ key.mT * attn.scale
        scores.softmax(dim=-2).mean(dim=-1)
        scores.softmax(dim=-1).mean(dim=-2)

    layers = [module for name, module in unet.named_modules() if name.endswith("attn2")]
    handles = [layer.register_forward_hook(hook, with_kwargs=True) for layer in layers]

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove
