"""``record()``: attribution maps of whatever a diffusers pipeline does inside a ``with`` block."""

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from i2am.adapters.attention.attending import attend_by
from i2am.adapters.clock import RunClock
from i2am.adapters.guidance import guidance_order
from i2am.adapters.inputs import find_denoisers, find_layout
from i2am.adapters.pictures import Pictures
from i2am.adapters.prompts.words import PromptWords
from i2am.adapters.recorder import Recorder, attached_to
from i2am.adapters.subject import Subject
from i2am.attribution.accumulator import Accumulator
from i2am.attribution.direction import Direction
from i2am.attribution.grid import Box, Patch, Region, as_regions, region_weights
from i2am.attribution.pair_sums import PairGrids
from i2am.kernels import Impl
from i2am.kernels.arguments import implementation
from i2am.layouts.token_layout import CONDITIONAL, UNCONDITIONAL, TokenLayout

BRANCHES = {
    CONDITIONAL: (CONDITIONAL,),
    UNCONDITIONAL: (UNCONDITIONAL,),
    "both": (CONDITIONAL, UNCONDITIONAL),
}


def record(
    pipe_or_denoiser: Any,
    *,
    layout: TokenLayout | None = None,
    words: bool | str | Sequence[str] | Mapping[str, Any] | None = None,
    directions: Collection[Direction | str] | Direction | str = tuple(Direction),
    time_groups: int = 5,
    branch: str = CONDITIONAL,
    regions: Mapping[str, Region] | Sequence[Patch | Box] | None = None,
    mask: Any = None,
    reference_mask: Any = None,
    stretch: bool = False,
    impl: Impl | str | None = None,
    scheduler: Any = None,
    num_inference_steps: int | None = None,
    keep_keys: bool = False,
    sums: str | None = None,
    pairs: PairGrids = False,
    flow: bool = False,
    values: str = "one",
    normalise: str = "full",
    attach: str = "beside",
) -> Recorder:
    """Record the attention of a pipeline's runs, without changing a bit of the images.

    Processors are installed on the layers the layout names, the scheduler is followed to count
    denoising steps, and everything is put back at the end of the block, also after an exception.
    A run that cannot be recorded still makes its image: the recording ends with a warning, and
    :meth:`Recorder.maps` raises what was wrong.
    Of several runs in one block the last one is kept; ``maps`` warns where others were not read.
    Calls of other threads and tasks are not recorded, see :class:`Recorder`. A compiled denoiser is
    recorded like any other; processors that are watched rather than replaced (IP-Adapter's,
    third-party ones) break its graph, which ``fullgraph=True`` refuses.

    Replays of a CUDA graph that was captured inside the block are recorded too, given a scheduler
    that steps outside of it: call the denoiser itself in the first two steps of every run (buffers
    are made, kernels compiled), capture the third and replay the rest of that run. Every guidance
    branch has to be met before. ``maps.provenance["calls"]`` does not count replays.

    Args:
        pipe_or_denoiser: A ``DiffusionPipeline``, or its UNet or transformer alone. The two
            denoisers of Wan 2.2 are recorded as one.
        layout: Which tokens are the generated image's, the references' and the prompt's; default
            what is known of the pipeline, see :func:`i2am.layouts.register_layout`.
        words: Words of the prompt to record beside the references: True for every word, some words
            or phrases, or token positions, ``{"shirt": [3, 4]}``, where the prompt is given as
            embeddings; see :class:`PromptWords`. Default none; of a pipeline without reference
            tokens all, with a warning. Of the conditional branch alone.
        directions: One or both of ``"reference_to_generated"``, ``"generated_to_reference"``.
        time_groups: Groups of denoising steps kept apart, group 0 the noisiest, also of an
            inversion, whose first steps are the cleanest; in a run of fewer steps each step is one,
            with a warning.
        branch: Half of classifier-free guidance, ``"conditional"``, ``"unconditional"`` or
            ``"both"``.
        regions: Regions of the generated image for specific-reference maps, by name: a
            :class:`Patch`, a :class:`Box` or weights ``[height, width]``; or a sequence of patches
            and boxes, which are their own names.
        mask: Inpainting mask over the generated image, 1 where it is made: PIL image, array or
            tensor as for :func:`i2am.data.arrays.masks`, one for all samples or one per sample. Its
            shape is that of the picture that is painted on or, where the pipeline does not show it,
            of what is generated, to within 1 %; a crop of the run (``padding_mask_crop``) is
            followed.
        reference_mask: Mask of the object in the reference image, likewise: adds R2G votes of its
            tokens alone. Its shape is that of the reference picture; where the image processor of
            an IP-Adapter keeps the middle of that alone, the mask is cut alike. ``"auto"`` makes it
            from the picture's alpha channel or plain background, with a warning, see
            :func:`i2am.data.object_mask`.
        stretch: Whether masks may have another shape: for pipelines that squeeze picture and mask
            into the size to generate.
        impl: Implementation of the statistics; default fused on CUDA (compute capability 8.0 or
            newer), streaming elsewhere.
        scheduler: The scheduler of a bare denoiser; default the pipeline's.
        num_inference_steps: Evaluations of a bare denoiser without any scheduler; then every row of
            its batch counts as a sample.
        keep_keys: Also keep R2G per key, for parity with published code; costs the memory that
            i2am otherwise avoids.
        sums: ``"native"`` keeps every layer on its own grid, so that every axis can be read;
            ``"resized"`` adds all layers up, bilinearly resized, on the finest grid, so that what
            is kept does not grow with the layers, for the same time-and-head maps. Default native,
            and resized for transformers whose native sums would take hundreds of MB per sample.
        pairs: Also record every patch against every patch, for ``maps.pairs``: True, the grid
            ``(height, width)`` over the generated image, or that and one over the reference image.
            What is not given is the finest grid of the layers, halved until it has at most 1024
            cells. Keeps ``8 * (time groups + heads) * cells * reference cells`` bytes per sample,
            up to a third more while it records, heads only where all layers have equally many, and
            takes (on a CPU) one to two times as long as the recorded attention calls.
        flow: Also record where on the reference each patch looks, for ``maps.flow()``.
        values: ``"norm"`` also records the share with every token counted by the norm of what it
            brings, behind the output projection of its head, for
            ``maps.reference_to_generated(values="norm")``; of the words too.
        normalise: ``"conditional"`` also records where patches look given that they look at the
            reference, for ``maps.generated_to_reference(normalise="conditional")``.
        attach: ``"beside"`` leaves the model's own attention calls as they are; ``"fused"`` lets
            recorded layers attend by the forward of ``impl``, which yields what recording needs:
            images are then the same to rounding, not to the bit. Layers that PyTorch runs by flash,
            cuDNN or memory-efficient attention yield it either way, but for bool masks.

    Returns:
        A :class:`Recorder`; after the run, ``recorder.maps()``. Entering it raises
        ``RuntimeError`` where the denoiser is being recorded in another block.

    Raises:
        TypeError: The argument has no UNet or transformer, or a mask is none.
        ValueError: No layout is known, the layout matches no layer or a layer that it does not
            describe, the layout contradicts the pipeline's order of guidance parts, the pipeline
            has no reference tokens that `directions` or `reference_mask` could be about, or an
            option is out of range.
        NotImplementedError: The pipeline has several denoisers of other kinds, or one that is
            sharded over devices; or ``values="norm"`` needs an output projection that is no plain
            matrix: quantised, offloaded layer by layer, or under a LoRA that is not fused.

    Example:
        >>> with i2am.record(pipe) as recorder:  # doctest: +SKIP
        ...     image = pipe(image=person, mask_image=mask, reference_image=garment).images[0]
        >>> recorder.maps().reference_to_generated(size=(512, 384))  # doctest: +SKIP
    """
    if branch not in BRANCHES:
        raise ValueError(f"branch must be one of {', '.join(BRANCHES)}, got {branch!r}")
    denoisers, found = find_denoisers(pipe_or_denoiser)
    scheduler = scheduler if scheduler is not None else found
    if scheduler is None and num_inference_steps is None and time_groups > 1:
        raise ValueError(
            "a denoiser alone does not tell its steps; pass scheduler= or num_inference_steps=, "
            "or time_groups=1"
        )
    if isinstance(directions, str):
        directions = (directions,)
    layout = layout or find_layout(pipe_or_denoiser, denoisers[0])
    order = guidance_order(pipe_or_denoiser, layout)
    if layout.no_reference and (reference_mask is not None or pairs is not False):
        what = "reference_mask" if reference_mask is not None else "pairs"
        raise ValueError(f"{what} needs reference tokens: {layout.no_reference}")
    if layout.no_reference and words is None:
        warnings.warn(f"{layout.no_reference}; recorded are the words of the prompt", stacklevel=2)
        words = True
    if words and branch != CONDITIONAL:
        raise ValueError(f"words need branch='conditional', got {branch!r}")
    prompts = PromptWords(pipe_or_denoiser, layout, words) if words else None
    sums = layout.sums if sums is None else sums
    pictures = Pictures(pipe_or_denoiser, layout, mask, reference_mask, stretch=stretch)

    def make(**options: Any) -> Accumulator:
        return Accumulator(
            time_groups=time_groups,
            directions=tuple(directions),
            regions=as_regions(regions),
            mask=pictures.mask,
            reference_mask=pictures.reference_mask,
            keep_keys=keep_keys,
            sums=sums,
            pairs=pairs,
            flow=flow,
            values=values,
            normalise=normalise,
            impl=impl,
            **options,
        )

    # options are judged here, not at the first attention call
    make()
    implementation(impl, torch.device("cpu"))
    for region in as_regions(regions).values():
        region_weights(region, (1, 1))
    clock = RunClock(scheduler, time_groups=time_groups, steps=num_inference_steps)
    subject = Subject.of(
        denoisers,
        layout,
        order=order,
        wanted=BRANCHES[branch],
        make=make,
        pictures=pictures,
        words=prompts,
        norms=values == "norm",
    )
    return Recorder(denoisers, subject, clock=clock, attend=attend_by(attach, impl))


def release(pipe_or_denoiser: Any) -> None:
    """Detach the recorder of a pipeline or a denoiser, whoever has it; it keeps what it recorded.

    Raises:
        TypeError: The argument has no UNet or transformer.
        NotImplementedError: The pipeline has several denoisers of other kinds.
    """
    recorder = attached_to(find_denoisers(pipe_or_denoiser)[0][0])
    if recorder is not None:
        recorder.detach()
