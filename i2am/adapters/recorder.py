"""``record()``: attribution maps of whatever a diffusers pipeline does inside a ``with`` block."""

import functools
import itertools
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from i2am.adapters.branches import Branches
from i2am.adapters.clock import RunClock
from i2am.adapters.inputs import as_mask, find_denoiser, find_layout, versions
from i2am.attribution.accumulator import Accumulator, AttentionSite
from i2am.attribution.direction import Direction
from i2am.attribution.grid import Region
from i2am.attribution.maps import AttributionMaps
from i2am.kernels import Impl
from i2am.layouts.token_layout import CONDITIONAL, UNCONDITIONAL, AttentionCall, Frame, TokenLayout

GUIDANCE = {
    CONDITIONAL: (CONDITIONAL,),
    UNCONDITIONAL: (UNCONDITIONAL,),
    "both": (CONDITIONAL, UNCONDITIONAL),
}


def record(
    pipe_or_denoiser: Any,
    *,
    layout: TokenLayout | None = None,
    directions: Collection[Direction | str] | Direction | str = tuple(Direction),
    time_groups: int = 5,
    guidance: str = CONDITIONAL,
    regions: Mapping[str, Region] | None = None,
    mask: Any = None,
    reference_mask: Any = None,
    impl: Impl | str | None = None,
    scheduler: Any = None,
    num_inference_steps: int | None = None,
    keep_keys: bool = False,
) -> "Recorder":
    """Record the attention of a pipeline's runs, without changing a bit of the images.

    Processors are installed on the layers the layout names, the scheduler is followed to count
    denoising steps, and everything is put back at the end of the block, also after an exception.
    Of several runs in one block the last one is kept.

    Args:
        pipe_or_denoiser: A ``DiffusionPipeline``, or its UNet or transformer alone.
        layout: Which tokens are the generated and the reference image's; default what is known of
            the pipeline.
        directions: One or both of ``"reference_to_generated"``, ``"generated_to_reference"``.
        time_groups: Groups of denoising steps kept apart, group 0 the noisiest.
        guidance: Classifier-free guidance branch, ``"conditional"``, ``"unconditional"`` or
            ``"both"``.
        regions: Generated-image regions by name for specific-reference maps: a :class:`Patch` or
            weights ``[height, width]``.
        mask: Inpainting mask over the generated image, 1 where it is made: ``[height, width]`` or
            one per sample; tensor, array or PIL image.
        reference_mask: Mask of the object in the reference image, likewise: adds R2G votes of its
            tokens alone.
        impl: Implementation of the statistics; default fused on CUDA, streaming elsewhere.
        scheduler: The scheduler of a bare denoiser; default the pipeline's.
        num_inference_steps: Evaluations of a bare denoiser without any scheduler.
        keep_keys: Also keep R2G per key, for parity with published code; costs the memory that
            i2am otherwise avoids.

    Returns:
        A :class:`Recorder`; after the run, ``recorder.maps()``.

    Raises:
        TypeError: The argument has no UNet or transformer.
        ValueError: No layout is known, no layer matches it, or an option is out of range.
        RuntimeError: The denoiser is being recorded already.

    Example:
        >>> with i2am.record(pipe) as recorder:  # doctest: +SKIP
        ...     image = pipe(image=person, mask_image=mask, reference_image=garment).images[0]
        >>> recorder.maps().reference_to_generated(size=(512, 384))  # doctest: +SKIP
    """
    if guidance not in GUIDANCE:
        raise ValueError(f"guidance must be one of {', '.join(GUIDANCE)}, got {guidance!r}")
    denoiser, found = find_denoiser(pipe_or_denoiser)
    scheduler = scheduler if scheduler is not None else found
    if scheduler is None and num_inference_steps is None and time_groups > 1:
        raise ValueError(
            "a denoiser alone does not tell its steps; pass scheduler= or num_inference_steps=, "
            "or time_groups=1"
        )
    if isinstance(directions, str):
        directions = (directions,)
    layout = layout or find_layout(pipe_or_denoiser, denoiser)
    make = functools.partial(
        Accumulator,
        time_groups=time_groups,
        directions=tuple(directions),
        regions=dict(regions or {}),
        mask=as_mask("mask", mask),
        reference_mask=as_mask("reference_mask", reference_mask),
        keep_keys=keep_keys,
        impl=impl,
    )
    make()  # options are judged here, not at the first attention call
    clock = RunClock(scheduler, time_groups=time_groups, steps=num_inference_steps)
    return Recorder(
        denoiser,
        layout=layout,
        clock=clock,
        wanted=GUIDANCE[guidance],
        make=make,
    )


class Recorder:
    """What :func:`record` returns: records between ``attach`` and ``detach``, or in a ``with``."""

    def __init__(
        self,
        denoiser: nn.Module,
        *,
        layout: TokenLayout,
        clock: RunClock,
        wanted: tuple[str, ...],
        make: Callable[..., Accumulator],
    ) -> None:
        self.layout = layout
        self._denoiser = denoiser
        # torch.compile wraps the module; its layers are inside, its calls come from outside
        self._network = getattr(denoiser, "_orig_mod", denoiser)
        self._layers = {
            name: module
            for name, module in self._network.named_modules()
            if hasattr(module, "get_processor") and layout.matches(name)
        }
        if not self._layers:
            seen = [n for n, m in self._network.named_modules() if hasattr(m, "get_processor")]
            raise ValueError(
                f"layout {layout.name!r} must match an attention layer of "
                f"{type(self._network).__name__}, but {layout.layers!r} matches none of "
                f"{len(seen)}: {', '.join(seen[:4])}{', ...' if len(seen) > 4 else ''}"
            )
        self._names = list(self._layers)
        self._clock = clock
        clock.bind(on_run=self._begin_run, on_step=self._end_evaluation)
        self._wanted = wanted
        self._make = make
        self._restore: dict[str, Callable[[], bool]] = {}
        self._hooks: list[Any] = []
        self._lost: list[str] = []
        self._key = next(_KEYS)
        self._begin_run()

    def __enter__(self) -> Self:
        self.attach()
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def attach(self) -> None:
        """Start recording.

        Raises:
            RuntimeError: The denoiser is being recorded already.
        """
        from i2am.adapters.processors import install

        if self._network in _ATTACHED:
            raise RuntimeError(
                f"{type(self._network).__name__} is being recorded already; "
                "leave that record() block first"
            )
        _ATTACHED.add(self._network)
        _RECORDERS[self._key] = self
        self._lost = []
        try:
            token = torch.zeros(1)
            for index, (name, module) in enumerate(self._layers.items()):
                self._restore[name] = install(module, _Site(self._key, index, token))
            self._hooks = [
                self._denoiser.register_forward_pre_hook(self._open_frame, with_kwargs=True),
                self._denoiser.register_forward_hook(self._close_frame, always_call=True),
            ]
            self._clock.attach()
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Put processors, hooks and scheduler back as they were; does nothing the second time."""
        self._clock.detach()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._lost += [name for name, restore in self._restore.items() if not restore()]
        self._restore.clear()
        _ATTACHED.discard(self._network)
        _RECORDERS.pop(self._key, None)

    def maps(self, guidance: str | None = None) -> AttributionMaps:
        """The maps of the last run.

        Args:
            guidance: ``"conditional"`` or ``"unconditional"``; needed only if both were recorded.

        Returns:
            A copy of the sums: recording may go on.

        Raises:
            RuntimeError: Nothing was recorded, or not in that branch; says what was seen instead.
        """
        if self._clock.scheduler is None:
            self._branches.reveal(None)
        recorded = self._branches.recorded
        branch = guidance or self._wanted[0]
        accumulator = recorded.get(branch)
        if accumulator is None or not len(accumulator):
            raise RuntimeError(self._nothing(branch))
        sums = accumulator.layers()
        self._warn(sums)
        return AttributionMaps(
            [_copied(layer) for layer in sums],
            votes=accumulator.votes,
            rows=accumulator.rows,
            provenance=self._provenance(branch),
        )

    def _begin_run(self) -> None:
        self._branches = Branches(self._make, order=self.layout.guidance_order, wanted=self._wanted)
        self._denoiser_calls = 0
        self._call = 0
        self._frame: Frame | None = None
        self._counts: Counter[str] = Counter()
        self._skipped: set[str] = set()
        self._resolved: dict[tuple[Any, ...], Any] = {}
        self._warned = False

    def _end_evaluation(self, samples: int | None) -> None:
        self._branches.reveal(samples)
        self._call = 0

    def _open_frame(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        sample = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        height, width = sample.shape[-2:] if sample.ndim == 4 else (1, sample.shape[1])
        self._frame = Frame((height, width), kwargs)
        self._targets = self._branches.targets(self._call, len(sample))
        self._denoiser_calls += 1

    def _close_frame(self, module: nn.Module, args: Any, output: Any) -> None:
        self._frame = None
        self._call += 1
        if self._clock.scheduler is None:
            self._clock.advance()

    def _add(
        self,
        index: int,
        call_index: int,
        query: Tensor,
        key: Tensor,
        bias: Tensor | None,
        scale: float | None,
        query_lse: Tensor | None,
    ) -> None:
        if self._frame is None:
            return  # gradient checkpointing runs layers again outside of the denoiser's forward
        name = self._names[index]
        call = AttentionCall(name, call_index, query.shape[2], key.shape[2])
        resolved = self._resolved.get((call, self._frame.size), self)
        if resolved is self:
            resolved = self.layout.resolve(call, self._frame)
            self._resolved[call, self._frame.size] = resolved
        if resolved is None:
            self._skipped.add(name)
            return
        generated, reference = resolved
        site = AttentionSite(
            name,
            heads=query.shape[1],
            generated_grid=generated.size,
            reference_grid=reference.size,
            reference_tokens=reference.count,
            causal=key.shape[2] > 1,
        )
        for rows, accumulator in self._targets:
            accumulator.add(
                site,
                query[rows, :, generated.index],
                key[rows],
                group=self._clock.group,
                reference=reference.index,
                voters=slice(None) if self.layout.prefix_votes else None,
                scale=scale,
                bias=_rows_of_bias(bias, rows, generated.index),
                query_lse=None if query_lse is None else query_lse[rows, :, generated.index],
            )
        self._counts[name] += 1

    def _provenance(self, branch: str) -> dict[str, Any]:
        clock = self._clock
        return {
            "denoiser": type(self._network).__name__,
            "scheduler": None if clock.scheduler is None else type(clock.scheduler).__name__,
            "layout": self.layout.name,
            "guidance": branch,
            "steps": clock.steps,
            "evaluations": clock.evaluation,
            "timesteps": [float(t) for t in clock.timesteps if t is not None],
            "calls": dict(self._counts),
            "versions": versions(),
        }

    def _nothing(self, branch: str) -> str:
        if self._branches.recorded:
            return (
                f"no {branch} attention was recorded, only {', '.join(self._branches.recorded)}: "
                "classifier-free guidance was off or another branch was asked for"
            )
        if not self._denoiser_calls:
            return (
                "no attribution was recorded: the denoiser was not called; run the pipeline inside "
                "`with i2am.record(pipe) as recorder:`"
            )
        if self._lost:
            return f"no attribution was recorded: {self._lost_sentence()}"
        if self._counts:
            return (
                f"no attribution was recorded: the denoiser was called {self._denoiser_calls} "
                "times but the scheduler never stepped; pass the scheduler that the loop uses"
            )
        return (
            f"no attribution was recorded: the denoiser was called {self._denoiser_calls} times, "
            f"but none of its {len(self._layers)} layers that match {self.layout.layers!r} had "
            f"attention of layout {self.layout.name!r}"
        )

    def _lost_sentence(self) -> str:
        found = {type(self._layers[name].processor).__name__ for name in self._lost}
        return (
            f"the processors of {len(self._lost)} layers were replaced during the recording (now "
            f"{', '.join(sorted(found))}); fuse projections, load adapters and switch attention "
            "before entering record()"
        )

    def _warn(self, sums: list[Any]) -> None:
        if self._warned:
            return
        self._warned = True
        idle = [layer.site.layer for layer in sums if not layer.site.causal]
        messages = []
        if idle:
            messages.append(
                f"{len(idle)} layers have a single reference token ({idle[0]}, ...): their query "
                "and key cannot have influenced the image, so their maps show no cause"
            )
        if self._lost:
            messages.append(self._lost_sentence())
        if self._skipped:
            skipped = sorted(self._skipped - set(self._counts))
            if skipped:
                messages.append(f"layers without a matching token grid were left out: {skipped}")
        if self._clock.evaluation != self._clock.evaluations and not self._hooks:
            messages.append(
                f"the run made {self._clock.evaluation} of {self._clock.evaluations} announced "
                "evaluations: its time groups are not equally long"
            )
        for message in messages:
            warnings.warn(message, stacklevel=3)


class _Site:
    """The ``record`` callable of one layer; an operator call, so compiled graphs keep it."""

    def __init__(self, recorder: int, layer: int, token: Tensor) -> None:
        self.recorder, self.layer, self.token = recorder, layer, token

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        *,
        bias: Tensor | None = None,
        scale: float | None = None,
        query_lse: Tensor | None = None,
        call_index: int = 0,
    ) -> None:
        torch.ops.i2am.record_attention(
            self.token,
            query.detach(),
            key.detach(),
            bias,
            query_lse,
            scale,
            self.recorder,
            self.layer,
            call_index,
        )


# token: a write that nobody reads, so that no compiler drops or reorders the call
@torch.library.custom_op("i2am::record_attention", mutates_args=("token",))
def _record_attention(
    token: Tensor,
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    query_lse: Tensor | None,
    scale: float | None,
    recorder: int,
    layer: int,
    call_index: int,
) -> None:
    recording = _RECORDERS.get(recorder)
    if recording is not None:
        recording._add(layer, call_index, query, key, bias, scale, query_lse)


@_record_attention.register_fake
def _(token, query, key, bias, query_lse, scale, recorder, layer, call_index):  # type: ignore[no-untyped-def]
    return None


_KEYS = itertools.count()
_RECORDERS: dict[int, Recorder] = {}
_ATTACHED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _rows_of_bias(bias: Tensor | None, rows: slice, queries: Any) -> Tensor | None:
    if bias is None:
        return None
    if bias.ndim == 4 and bias.shape[0] > 1:
        bias = bias[rows]
    return bias[..., queries, :] if bias.ndim > 1 and bias.shape[-2] > 1 else bias


def _copied(layer: Any) -> Any:
    from i2am.attribution.layers import apply

    return apply(lambda sums: sums.clone(), [layer])[0]
