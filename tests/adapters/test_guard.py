"""An error in the recording leaves the image as it is without recording, and a warning tells it."""

import contextlib
import dataclasses
import gc
import inspect
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

import i2am
from i2am.adapters.attention import attending, watching
from i2am.adapters.attention.sites import LISTENERS
from i2am.adapters.branches import Branches
from i2am.adapters.clock import RunClock
from i2am.adapters.guard import Guard
from i2am.attribution.accumulator import Accumulator
from i2am.layouts import TokenLayout

PATCHES = TokenLayout.cross_attention((4, 3))
ADAPTER = TokenLayout.ip_adapter((4, 4), prefix=1)


class Fault(Exception):
    """Of a kind that nobody foresaw."""


class TestGuard:
    @pytest.mark.parametrize("error", [Fault("a"), ValueError("b"), torch.OutOfMemoryError("c")])
    def test_keeps_faults_to_itself(self, error):
        told = []
        guard = Guard(told.append)
        with guard:
            raise error
        guard.around(lambda: None)()
        assert told == [error]

        def fail(number):
            raise Fault(number)

        guard.around(fail)(5)
        assert told[1].args == (5,)

    @pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
    def test_lets_what_is_no_fault_pass(self, error):
        told = []
        with pytest.raises(error), Guard(told.append):
            raise error
        assert told == []

    def test_keeps_the_lines_and_frees_the_tensors(self):
        told, held = [], []

        def innermost(given):
            kept = torch.zeros(3)
            held.append(weakref.ref(kept))
            raise Fault

        def chained(given):
            kept = torch.zeros(3)
            held.append(weakref.ref(kept))
            try:
                innermost(given + 1)
            except Fault as error:
                raise ValueError("no") from error

        def run():
            given = torch.ones(2)
            held.append(weakref.ref(given))
            guard.around(chained)(given)

        guard = Guard(told.append)
        run()
        gc.collect()
        assert [ref() for ref in held] == [None] * 3
        [error] = told
        lines = "".join(error.__notes__)
        assert 'raise ValueError("no") from error' in lines
        assert "raise Fault" in lines


PLACES = {
    "layout": (TokenLayout, "spans"),
    "sums": (Accumulator, "add"),
    "run begins": (RunClock, "arrive"),
    "step": (RunClock, "advance"),
    "samples": (Branches, "end"),
    "rows": (Branches, "targets"),
    "group": (Branches, "begin"),
    "log-sum-exp": (attending, "attention_with_lse"),
    "attending": (attending, "kernel_attention"),
    "projections": (watching, "key_states"),
    "calls of an adapter": (watching, "_calls"),
}
EVERYWHERE = ["layout", "sums", "run begins", "step", "samples", "rows", "group"]
# processors are recorded in these ways, and each comes to some places of its own
OWN_PLACES = {
    "replaced": ["log-sum-exp", "attending"],
    "fused projections": ["log-sum-exp", "attending"],
    "projected again": ["projections"],
    "ip adapter": ["log-sum-exp", "attending", "calls of an adapter"],
}


def make(tiny, kind):
    """A pipeline, its run, and its layout."""
    if kind == "ip adapter":
        made = tiny.ip_adapters(tiny.stable_diffusion(), "full")

        def run():
            return tiny.run(
                made,
                **tiny.prompts(),
                ip_adapter_image=tiny.picture(),
                num_inference_steps=3,
                height=16,
                width=16,
            )

        return made, run, ADAPTER
    made = tiny.loop()
    if kind == "fused projections":
        made.unet.fuse_qkv_projections()
    elif kind == "projected again":
        made.unet.set_attn_processor(AttnProcessor())
    return made, lambda: made(tiny.reference(2), steps=3), PATCHES


@pytest.mark.parametrize("calls", [0, 2], ids=["at once", "later"])
@pytest.mark.parametrize(
    ("kind", "place"),
    [(kind, place) for kind, own in OWN_PLACES.items() for place in EVERYWHERE + own],
)
def test_a_fault_ends_the_recording_alone(monkeypatch, tiny, kind, place, calls):
    made, run, layout = make(tiny, kind)
    plain, before, listeners = run(), tiny.state(made), dict(LISTENERS)
    left = [calls]
    owner, name = PLACES[place]

    def fail():
        left[0] -= 1
        if left[0] < 0:
            raise Fault("out of order")

    def failing(original):
        def function(*args, **kwargs):
            fail()
            return original(*args, **kwargs)

        def generator(*args, **kwargs):
            fail()
            yield from original(*args, **kwargs)

        return generator if inspect.isgeneratorfunction(original) else function

    options = {"layout": layout, "time_groups": 1, "impl": "reference"}
    if place == "layout":
        options["layout"] = dataclasses.replace(layout, spans=failing(layout.spans))
    else:
        monkeypatch.setattr(owner, name, failing(getattr(owner, name)))
    if place == "attending":
        options["attach"] = "fused"
    with i2am.record(made, **options) as recorder:
        with pytest.warns(UserWarning, match=r"recording ended at call \d of .*: Fault: out of"):
            image = run()
        # put back at once, not at the end of the block
        assert tiny.state(made) == before
        assert listeners == LISTENERS
    if calls and place == "attending":
        # the calls before were made by the kernel, as asked
        torch.testing.assert_close(image, plain, rtol=1e-3, atol=1e-3)
    else:
        assert torch.equal(image, plain)
    for _ in range(2):
        with pytest.raises(Fault, match="out of order") as raised:
            recorder.maps()
    assert "the run went on without" in raised.value.__notes__[-1]
    monkeypatch.undo()
    # it is of that run alone
    with i2am.record(made, layout=layout, time_groups=1, impl="reference") as recorder:
        assert torch.equal(run(), plain)
    assert len(recorder.maps().layers) == 4


def test_a_recorder_that_gave_up_can_be_used_again(tiny):
    loop = tiny.loop()
    recorder = i2am.record(loop, layout=PATCHES)
    with pytest.warns(UserWarning, match="recording ended at call 1"), recorder:
        loop(tiny.reference(tokens=14))
    with pytest.raises(ValueError, match="got 14 keys"):
        recorder.maps()
    with recorder:
        loop(tiny.reference(2))
    assert recorder.maps().n_samples == 2


def test_memory_is_free_again_when_there_was_too_little(monkeypatch, tiny):
    """Sums and what the failed call made are gone while the run still goes on."""
    made, seen = [], []
    begin, add = Accumulator.__init__, Accumulator.add

    def watched(self, **options):
        begin(self, **options)
        made.append(weakref.ref(self))

    def full(self, site, query, key, **options):
        add(self, site, query, key, **options)
        if len(seen) == 2:
            made.append(weakref.ref(query))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def on_step(index):
        seen.append([ref() is not None for ref in made])

    monkeypatch.setattr(Accumulator, "__init__", watched)
    monkeypatch.setattr(Accumulator, "add", full)
    loop = tiny.loop()
    plain = loop(tiny.reference(2))
    recorder = i2am.record(loop, layout=PATCHES)
    gc.disable()  # nothing may wait for it
    try:
        with pytest.warns(UserWarning, match="at call 3 .*: OutOfMemoryError: CUDA"), recorder:
            image = loop(tiny.reference(2), on_step=on_step)
    finally:
        gc.enable()
    assert torch.equal(image, plain)
    assert [any(alive) for alive in seen] == [True, True, False, False, False, False]
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        recorder.maps()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_the_user_can_interrupt_our_code(monkeypatch, tiny, error):
    def interrupted(*args, **kwargs):
        raise error

    loop = tiny.loop()
    before = tiny.state(loop)
    monkeypatch.setattr(Accumulator, "add", interrupted)
    with pytest.raises(error), i2am.record(loop, layout=PATCHES):
        loop(tiny.reference())
    assert tiny.state(loop) == before


class Theirs(AttnProcessor2_0):
    """Not one of those that are replaced."""


class Double(torch.nn.Module):
    """Values of another dtype than queries and keys."""

    def forward(self, states):
        return torch.zeros(len(states), states.shape[1], 32, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:recording ended")
@pytest.mark.parametrize("processor", [AttnProcessor2_0, Theirs], ids=["replaced", "watched"])
def test_the_models_own_errors_pass(tiny, processor):
    """Its attention call fails: the error is the one without a recording."""
    loop = tiny.loop()
    attention = loop.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    attention.set_processor(processor())
    attention.to_v = Double()
    messages = []
    for block in (contextlib.nullcontext(), i2am.record(loop, layout=PATCHES)):
        with pytest.raises(RuntimeError, match="same dtype") as raised, block:
            loop(tiny.reference())
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


def test_warnings_that_the_user_made_errors_do_not_kill_the_run(tiny):
    loop = tiny.loop()
    plain = loop(tiny.reference())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with i2am.record(loop, layout=TokenLayout.single_token()) as recorder:
            assert torch.equal(loop(tiny.reference()), plain)
    with pytest.raises(ValueError, match="single reference token, got 13 keys"):
        recorder.maps()


def test_attention_that_cannot_be_fused_is_the_models_own(monkeypatch, tiny):
    """From the layer on that failed, to the bit what the model computes without a recording."""
    loop = tiny.loop()
    plain = loop(tiny.reference())
    monkeypatch.setattr(attending, "kernel_attention", lambda *args, **kwargs: 1 / 0)
    seen = []
    original = F.scaled_dot_product_attention

    def spy(*args, **kwargs):
        seen.append(len(args))
        return original(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    with (
        pytest.warns(UserWarning, match="ZeroDivisionError"),
        i2am.record(loop, layout=PATCHES, attach="fused") as recorder,
    ):
        assert torch.equal(loop(tiny.reference()), plain)
    assert len(seen) == 6 * 8
    with pytest.raises(ZeroDivisionError):
        recorder.maps()


@pytest.mark.slow
@pytest.mark.parametrize("place", ["layout", "sums"])
def test_in_compiled_code(monkeypatch, tiny, place):
    torch._dynamo.reset()
    one_level = {
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
    }
    loop = tiny.loop(1, **one_level)
    loop.unet.compile(backend="aot_eager", fullgraph=True)
    plain, before = loop(tiny.reference()), tiny.state(loop)
    layout = PATCHES
    if place == "layout":
        layout = TokenLayout.cross_attention((9, 9))
    else:
        monkeypatch.setattr(Accumulator, "add", lambda *args, **kwargs: 1 / 0)
    with i2am.record(loop, layout=layout) as recorder:
        with pytest.warns(UserWarning, match="recording ended at call 1"):
            image = loop(tiny.reference())
        assert tiny.state(loop) == before
    assert torch.equal(image, plain)
    with pytest.raises(ValueError if place == "layout" else ZeroDivisionError):
        recorder.maps()
    torch._dynamo.reset()
