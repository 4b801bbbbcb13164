"""What a recording saw, and what it has to say about it."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from i2am.attribution.sums import LayerSums
from i2am.layouts.token_layout import TokenLayout


@dataclass
class Observations:
    """One run as its recorder saw it.

    Args:
        layout: The layout of the recording.
        processors: Class of the attention processor of each of its layers, by layer.
    """

    layout: TokenLayout
    processors: Mapping[str, str]
    denoiser_calls: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    """Recorded attention calls by layer."""

    def nothing(
        self, branch: str, *, met: Collection[str], lost: Mapping[str, str], elsewhere: int
    ) -> str:
        """Why there are no maps of a guidance branch, and what to do.

        Args:
            branch: The branch that was asked for.
            met: The branches that were met.
            lost: Layers whose processors were replaced, and by what.
            elsewhere: Calls of the denoiser from contexts that are not recorded.
        """
        if not self.denoiser_calls and elsewhere:
            return (
                f"no attribution was recorded: all {elsewhere} calls of the denoiser came from "
                "other threads or tasks than the one that entered record(); call it from there or "
                "by asyncio.to_thread, or start the thread with contextvars.copy_context().run"
            )
        if not self.denoiser_calls:
            return (
                "no attribution was recorded: the denoiser was not called; run the pipeline inside "
                "`with i2am.record(pipe) as recorder:`"
            )
        if met and branch not in met:
            return (
                f"no {branch} attention was recorded: the run had only {', '.join(sorted(met))} "
                "rows; is classifier-free guidance off?"
            )
        if self.calls:
            return (
                f"no attribution was recorded: the denoiser was called {self.denoiser_calls} "
                "times but the scheduler never stepped; pass the scheduler that the loop uses"
            )
        if lost:
            return f"no attribution was recorded: {_replaced(lost)}"
        return (
            f"no attribution was recorded: the denoiser was called {self.denoiser_calls} times, "
            f"but {self._unmatched(list(self.processors))}"
        )

    def remarks(
        self, sums: Sequence[LayerSums], *, lost: Mapping[str, str], over: bool
    ) -> list[str]:
        """What a reader of the maps has to know.

        Args:
            sums: The maps.
            lost: Layers whose processors were replaced, and by what.
            over: Whether the run is over, so that what is missing will not come.
        """
        remarks = []
        weightless = [
            layer.site.layer
            for layer in sums
            if layer.multiplier is not None and not layer.multiplier.any()
        ]
        idle = list(
            dict.fromkeys(
                layer.site.layer
                for layer in sums
                if not layer.site.informative and layer.site.layer not in weightless
            )
        )
        if idle:
            remarks.append(
                f"layers with a single reference token: {', '.join(idle)}; their query and key "
                "cannot have influenced the image, so their maps show no cause"
            )
        if weightless:
            remarks.append(
                f"layers that multiply their branch by 0: {', '.join(weightless)}; it did not "
                "influence the image, so their maps are 0"
            )
        if lost:
            remarks.append(_replaced(lost))
        silent = [name for name in self.processors if name not in self.calls and name not in lost]
        if silent:
            remarks.append(self._unmatched(silent))
        rare = [name for name, n in self.calls.items() if n < self.denoiser_calls]
        if rare and over:
            remarks.append(
                f"some layers attended in fewer than all {self.denoiser_calls} calls of the "
                f"denoiser: {_some(f'{name} in {self.calls[name]}' for name in rare)}"
            )
        return remarks

    def _unmatched(self, layers: list[str]) -> str:
        classes = sorted({self.processors[layer] for layer in layers})
        return (
            f"{len(layers)} of {len(self.processors)} layers made no attention call of layout "
            f"{self.layout.name!r} (a token count that fits no grid, an IP-Adapter scale of 0, or "
            f"a processor that does not use scaled_dot_product_attention): {_some(layers)} with "
            f"{', '.join(classes)}"
        )


def _replaced(lost: Mapping[str, str]) -> str:
    return (
        f"the processors of {len(lost)} layers were replaced during the recording (now "
        f"{', '.join(sorted(set(lost.values())))}); fuse projections, load adapters and switch "
        "attention before entering record()"
    )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join([*names[:4], *(["..."] if len(names) > 4 else [])])
