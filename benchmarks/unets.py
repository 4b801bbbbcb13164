"""UNets of the sizes of SD 1.5 and SDXL with random weights, and the loop that drives them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from i2am.layouts import TokenLayout

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

STEPS = 50


@dataclass(frozen=True)
class UNetSize:
    """A UNet, what its latents are, and the reference tokens of its context."""

    get_config: Callable[[], Mapping[str, Any]]
    """Called where a UNet is built: benchmarks of single calls run without diffusers."""
    latent: tuple[int, int]
    grid: tuple[int, int]
    prefix: int = 1
    pooled: int = 0
    """Features of SDXL's second text embedding, which goes in beside six numbers."""

    @property
    def config(self) -> Mapping[str, Any]:
        return self.get_config()

    @property
    def layout(self) -> TokenLayout:
        return TokenLayout.cross_attention(self.grid, self.prefix)

    def build(self, device: torch.device, dtype: torch.dtype) -> "UNet2DConditionModel":
        """Random weights, made on the device itself."""
        from diffusers import UNet2DConditionModel

        with torch.device("meta"):
            unet = UNet2DConditionModel(**self.config)
        return fill(unet, device, dtype)

    def inputs(self, rows: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of one evaluation, but for the timestep."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(rows, *shape, generator=generator, device=device, dtype=dtype)

        tokens = self.prefix + self.grid[0] * self.grid[1]
        inputs: dict[str, Any] = {
            "sample": normal(self.config["in_channels"], *self.latent),
            "encoder_hidden_states": normal(tokens, self.config["cross_attention_dim"]),
        }
        if self.pooled:
            inputs["added_cond_kwargs"] = {
                "text_embeds": normal(self.pooled),
                "time_ids": normal(6),
            }
        return inputs


def _custom_model() -> Mapping[str, Any]:
    from i2am.models.configuration import FULL_SIZE

    return FULL_SIZE.unet


SIZES = {
    "sd15": UNetSize(_custom_model, latent=(64, 48), grid=(37, 28)),
    "sdxl": UNetSize(
        lambda: {
            "sample_size": 128,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),  # diffusers' old name for the number of heads
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        latent=(128, 96),
        grid=(37, 28),
        pooled=1280,
    ),
    "tiny": UNetSize(
        lambda: {
            "sample_size": (16, 12),
            "in_channels": 12,
            "out_channels": 4,
            "block_out_channels": (16, 32),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "cross_attention_dim": 24,
            "attention_head_dim": 4,
            "norm_num_groups": 8,
        },
        latent=(16, 12),
        grid=(4, 3),
    ),
}
DEFAULT_SIZES = {"cpu": ("sd15",), "cuda": ("sd15", "sdxl")}


class Loop:
    """A denoising loop, one step per call: an evaluation, after which the scheduler steps.

    Args:
        unet: Evaluated in full batches.
        size: What it takes.
        batch: Samples.
        guidance: Both halves in one batch, the conditional one last.
    """

    def __init__(self, unet: nn.Module, size: UNetSize, batch: int, *, guidance: bool) -> None:
        from diffusers import DDIMScheduler

        parameter = next(unet.parameters())
        self.unet = unet
        self._inputs = size.inputs((1 + guidance) * batch, parameter.device, parameter.dtype)
        self._latents = self._inputs["sample"][-batch:, :4]
        self._steps = 0
        self.scheduler = DDIMScheduler()
        self.conditional = slice(guidance * batch, None)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        if self._steps % STEPS == 0:
            self.scheduler.set_timesteps(STEPS)
        timestep = self.scheduler.timesteps[self._steps % STEPS]
        noise = self._evaluate(timestep)
        # thrown away: random weights would drive the latents out of range
        self.scheduler.step(noise[self.conditional], timestep, self._latents)
        self._steps += 1
        return noise

    def _evaluate(self, timestep: Tensor) -> Tensor:
        return self.unet(timestep=timestep, **self._inputs).sample


class GraphedLoop(Loop):
    """The same with a CUDA graph per run: captured in its third step, replayed in later ones."""

    CAPTURED = 2

    def _evaluate(self, timestep: Tensor) -> Tensor:
        step = self._steps % STEPS
        if step == 0:
            self._time = torch.zeros((), device=self._latents.device)
            self._graph = torch.cuda.CUDAGraph()
        self._time.fill_(timestep.item())
        if step < self.CAPTURED:
            return super()._evaluate(self._time)
        if step == self.CAPTURED:
            with torch.cuda.graph(self._graph):
                self._noise = super()._evaluate(self._time)
        self._graph.replay()
        return self._noise


def fill(module: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Give a module made on the meta device random weights of moderate size on ``device``.

    Raises:
        ValueError: It has buffers, whose values nobody would know.
    """
    if buffers := [name for name, _ in module.named_buffers()]:
        raise ValueError(f"module must have no buffers, got {', '.join(buffers)}")
    # diffusers' own `to` warns of casts, though there is nothing yet that could lose digits
    module = nn.Module.to(module, dtype).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in module.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        parameter.uniform_(-1, 1, generator=generator).mul_(fan_in**-0.5)
    return module


def twin(unet: "UNet2DConditionModel") -> "UNet2DConditionModel":
    """A second UNet with the very same weights, so that one can be recorded all the time."""
    with torch.device("meta"):
        other = type(unet).from_config(unet.config)
    other.load_state_dict(unet.state_dict(), assign=True)
    return other.eval().requires_grad_(False)
