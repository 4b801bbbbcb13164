"""What a recorder records: which networks, layers and tokens, and how their sums are kept."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from i2am.adapters.attention.tap import attention_layers, inside
from i2am.adapters.guidance import GuidanceOrder
from i2am.adapters.pictures import Pictures
from i2am.adapters.prompts.words import PromptWords
from i2am.adapters.value_norms import ValueNorms
from i2am.attribution.accumulator import Accumulator
from i2am.layouts.token_layout import Frame, TokenLayout


@dataclass(frozen=True)
class Network:
    """What is known of a denoiser before it is called.

    Attributes:
        name: Its class name.
        signature: Of its ``forward``.
        config: Its configuration.
    """

    name: str
    signature: inspect.Signature
    config: Mapping[str, Any]

    @classmethod
    def of(cls, module: nn.Module) -> "Network":
        """What is known of a module."""
        config = getattr(module, "config", None)
        known = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
        return cls(type(module).__name__, inspect.signature(module.forward), known)

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by the names of ``forward``."""
        bound = self.signature.bind_partial(*args, **kwargs).arguments
        for parameter in self.signature.parameters.values():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                bound |= bound.pop(parameter.name, {})
        return bound

    def frame(self, arguments: Mapping[str, Any], sample: Any, run: dict[Any, Any]) -> Frame:
        """What a layout is told of a call."""
        size = None
        if isinstance(sample, Tensor) and sample.ndim == 4:
            size = (sample.shape[2], sample.shape[3])
        return Frame(
            size,
            arguments,
            self.config,
            run=run,
            rounds_up=self.config.get("downsample_padding", 1) != 0,
            levels=len(self.config.get("down_block_types") or ()) or None,
        )


@dataclass(frozen=True)
class Subject:
    """What is recorded, the same in every run.

    Attributes:
        networks: The denoisers; several are halves of one schedule.
        layers: Paths of the recorded layers; calls refer to them by their index.
        layout: Which tokens.
        order: Which guidance part is which.
        wanted: Guidance branches to keep.
        make: Makes an accumulator, given ``unresolved=``.
        pictures: Lays the masks that `make` uses over the pictures of each run.
        words: Finds the words of the prompts, ``None`` where none are wanted.
        norms: Of what tokens bring, ``None`` where they are not wanted.
    """

    networks: tuple[Network, ...]
    layers: tuple[str, ...]
    layout: TokenLayout
    order: GuidanceOrder
    wanted: tuple[str, ...]
    make: Callable[..., Accumulator]
    pictures: Pictures
    words: PromptWords | None = None
    norms: ValueNorms | None = None

    @classmethod
    def of(
        cls, denoisers: Sequence[nn.Module], layout: TokenLayout, *, norms: bool, **known: Any
    ) -> "Subject":
        """What is recorded of some denoisers.

        Raises:
            ValueError: As :func:`recorded_layers` does.
            NotImplementedError: As :class:`ValueNorms` does.
        """
        networks = [*map(inside, denoisers)]
        # of several networks the layers of one path are recorded as one
        layers = [
            (network, path) for network in networks for path in recorded_layers(network, layout)
        ]
        if norms:
            known["norms"] = ValueNorms(layers)
        paths = tuple(path for _, path in layers)
        return cls(tuple(map(Network.of, networks)), paths, layout, **known)

    def begin_run(self) -> None:
        """What was known of the last run is forgotten."""
        self.pictures.begin_run()
        if self.words is not None:
            self.words.begin_run()
        if self.norms is not None:
            self.norms.begin_run()

    @property
    def denoiser(self) -> str:
        """Class name of the denoisers."""
        return self.networks[0].name


def recorded_layers(network: nn.Module, layout: TokenLayout) -> dict[str, Any]:
    """The attention modules of a denoiser that a layout matches, by path.

    Raises:
        ValueError: There is none, or one that the layout does not describe.
    """
    attention = attention_layers(network)
    layers = {name: module for name, module in attention.items() if layout.matches(name)}
    if not layers:
        raise ValueError(
            f"layout {layout.name!r} must match an attention layer of "
            f"{type(network).__name__}, but {layout.layers!r} matches none of "
            f"{len(attention)}: {', '.join([*attention][:4])}, ..."
        )
    if layout.context_keys:
        for name, module in layers.items():
            if not getattr(module, "is_cross_attention", False):
                raise ValueError(
                    f"layout {layout.name!r} must match cross-attention layers alone, whose "
                    f"keys are a context, got the {type(module).__name__} {name} of "
                    f"{type(network).__name__}, whose keys are also the image's own"
                )
    return layers
