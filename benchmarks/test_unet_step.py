"""One evaluation of an SD-1.5-size UNet, recorded and not, on the custom model's shapes.

    pytest benchmarks/test_unet_step.py -s

860 M random weights, latent 64 x 48, 1037 keys, all 16 cross-attentions, both directions, fp32.
Recorded and plain evaluations alternate, so that a busy machine slows both; ``ratio`` is the median
of their quotients. ``materialised`` is a hook that forms both softmaxes in full, as published code
does, though without its repeated self-attention.
"""

import statistics
import time

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import i2am
from i2am.layouts import TokenLayout

GRID, PREFIX, ROUNDS = (37, 28), 1, 7


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    with torch.device("meta"):
        model = UNet2DConditionModel(in_channels=12, cross_attention_dim=768)
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        parameter.uniform_(-1, 1, generator=generator).mul_(fan_in**-0.5)
    return model


@pytest.mark.parametrize("guidance", [False, True], ids=["plain", "cfg"])
@pytest.mark.parametrize("way", ["recorded", "materialised"])
def test_step(benchmark, unet: UNet2DConditionModel, way: str, guidance: bool) -> None:
    rows = 2 if guidance else 1
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(rows, 12, 64, 48, generator=generator)
    context = torch.randn(rows, PREFIX + GRID[0] * GRID[1], 768, generator=generator)
    scheduler = DDIMScheduler()

    @torch.no_grad()
    def evaluate() -> Tensor:
        return unet(sample, 500, encoder_hidden_states=context).sample

    layout = TokenLayout.cross_attention(GRID, PREFIX)
    recorder = i2am.record(unet, scheduler=scheduler, layout=layout)
    recording = recorder if way == "recorded" else _Materialising(unet, rows)
    plain, quotients = [], []

    def timed_plain() -> None:
        start = time.perf_counter()
        evaluate()
        plain.append(time.perf_counter() - start)

    def recorded() -> None:
        start = time.perf_counter()
        with recording:
            evaluate()
        quotients.append((time.perf_counter() - start) / plain[-1])

    with recorder:
        # the first step of a run tells the samples from the guidance parts
        scheduler.set_timesteps(50)
        noise = evaluate()
        scheduler.step(noise[:1], scheduler.timesteps[0], noise[:1])
    benchmark.group = "step with guidance" if guidance else "step"
    benchmark.pedantic(recorded, setup=timed_plain, rounds=ROUNDS, warmup_rounds=1)
    ratio = statistics.median(quotients[1:])
    benchmark.extra_info.update(plain_s=statistics.median(plain[1:]), ratio=ratio)
    print(f"\n{benchmark.group}, {way}: {ratio:.3f} x the plain one, all {len(quotients) - 1}:")
    print(" ".join(f"{quotient:.3f}" for quotient in sorted(quotients[1:])))
    if way == "recorded":
        kept = sum(
            sums.nbytes
            for layer in recorder.maps().layer_sums
            for sums in (layer.reference_to_generated, layer.generated_to_reference)
        )
        benchmark.extra_info["kept_MiB_per_sample"] = kept / 2**20
        print(f"stays per sample: {kept / 2**20:.2f} MiB")


class _Materialising:
    """Hooks that form both softmaxes of the conditional row and keep their means."""

    def __init__(self, unet: nn.Module, rows: int) -> None:
        self.layers = [module for name, module in unet.named_modules() if name.endswith("attn2")]
        self.conditional = slice(rows - 1, rows)
        self.handles: list[RemovableHandle] = []

    def __enter__(self) -> None:
        self.handles = [
            layer.register_forward_hook(self._hook, with_kwargs=True) for layer in self.layers
        ]

    def __exit__(self, *exception: object) -> None:
        for handle in self.handles:
            handle.remove()

    @torch.no_grad()
    def _hook(self, attn: nn.Module, args: tuple[Tensor, ...], kwargs: dict, _: Tensor) -> None:
        states = args[0][self.conditional]
        context = kwargs["encoder_hidden_states"][self.conditional]
        query = attn.to_q(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        key = attn.to_k(context).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        scores = query @ key.mT * attn.scale
        scores.softmax(dim=-2).mean(dim=-1)
        scores.softmax(dim=-1).mean(dim=-2)
