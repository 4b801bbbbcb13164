"""Requests that share a denoiser: a recorder takes the calls of its own context, and no others."""

import asyncio
import contextvars
import copy
import gc
import threading

import pytest
import torch

import i2am
from i2am.adapters.attention.sites import LISTENERS
from i2am.layouts import TokenLayout

PATCHES = TokenLayout.cross_attention((4, 3))
REFERENCE = slice(1, 13)
GROUPS = [0, 0, 1, 1]


def second_of(tiny, loop):
    """A pipeline over the same denoiser, with a scheduler of its own."""
    return tiny.Loop(loop.unet, copy.deepcopy(loop.scheduler))


class Turns:
    """Two runs in two threads, one step each in turn."""

    def __init__(self):
        self.may = [threading.Semaphore(1), threading.Semaphore(0)]
        self.over = [False, False]

    def run(self, number, function):
        try:
            self.may[number].acquire(timeout=20)
            return function(lambda index: self.next(number))
        finally:
            self.over[number] = True
            self.may[1 - number].release()

    def next(self, number):
        if not self.over[1 - number]:
            self.may[1 - number].release()
            self.may[number].acquire(timeout=20)


def in_thread(function):
    """Starts a plain thread; its result, or what it raised, is in the list when it ends."""
    left = []

    def target():
        try:
            left.append(function())
        except BaseException as error:
            left.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    return thread, left


def assert_own(oracle, maps, calls):
    oracle.assert_maps(maps, calls, groups=GROUPS, rows=oracle.last(2), reference=REFERENCE)


@pytest.fixture
def shared(tiny, oracle):
    """Two pipelines, their runs, what each makes alone, and the calls of the first."""
    first = tiny.loop()
    second = second_of(tiny, first)
    runs = [
        lambda on_step=lambda index: None: first(
            tiny.reference(2, seed=1), steps=4, on_step=on_step
        ),
        lambda on_step=lambda index: None: second(
            tiny.reference(2, seed=2), steps=4, on_step=on_step
        ),
    ]
    with oracle.spy(first.unet, first.scheduler) as calls:
        plain = [runs[0]()]
    with oracle.spy(second.unet, second.scheduler) as others:
        plain.append(runs[1]())
    return first, second, runs, plain, calls, others


@pytest.mark.parametrize("attach", ["beside", "fused"])
@pytest.mark.parametrize("turns", [True, False], ids=["in turn", "at once"])
def test_only_the_request_that_is_recorded(oracle, shared, turns, attach):
    first, _, runs, plain, calls, _ = shared
    order = Turns() if turns else None
    take = (lambda n: order.run(n, runs[n])) if turns else (lambda n: runs[n]())
    options = {"attach": attach, "impl": "reference"}
    with i2am.record(first, layout=PATCHES, time_groups=2, **options) as recorder:
        thread, left = in_thread(lambda: take(1))
        mine = take(0)
        # before recording ends, so that all its calls are counted
        thread.join(20)
    # the other request is to the bit what it is alone, however the recorded one attends
    assert torch.equal(left[0], plain[1])
    with pytest.warns(UserWarning, match="4 calls of the denoiser came from other threads"):
        maps = recorder.maps()
    assert maps.provenance["other_calls"] == {"other threads or tasks": 4}
    if attach == "beside":
        assert torch.equal(mine, plain[0])
        assert_own(oracle, maps, calls)


def test_two_recorders_at_once(oracle, shared):
    """The second is refused in a sentence, and the first one's maps stay its own."""
    first, second, runs, plain, calls, others = shared
    with i2am.record(first, layout=PATCHES, time_groups=2) as recorder:
        thread, left = in_thread(lambda: i2am.record(second, layout=PATCHES).__enter__())
        thread.join(20)
        assert torch.equal(runs[0](), plain[0])
    assert isinstance(left[0], RuntimeError)
    assert "leave that record() block first, or drop" in str(left[0])
    assert_own(oracle, recorder.maps(), calls)

    # afterwards it is its turn, in its thread
    def recorded():
        with i2am.record(second, layout=PATCHES, time_groups=2) as recorder:
            runs[1]()
        return recorder.maps()

    thread, left = in_thread(recorded)
    thread.join(20)
    assert_own(oracle, left[0], others)


def test_recorders_of_two_denoisers_do_not_mix(tiny, oracle, shared):
    first, _, runs, plain, calls, _ = shared
    other = tiny.loop()
    with (
        i2am.record(first, layout=PATCHES, time_groups=2) as recorder,
        i2am.record(other, layout=PATCHES, time_groups=2) as another,
    ):
        assert torch.equal(runs[0](), plain[0])
        other(tiny.reference(2, seed=1), steps=4)
    for each in (recorder, another):
        assert_own(oracle, each.maps(), calls)


@pytest.mark.parametrize("way", ["to_thread", "task", "executor with the context", "per call"])
def test_contexts_that_are_inherited(oracle, tiny, shared, way):
    first, _, runs, plain, calls, _ = shared

    async def cell():
        with i2am.record(first, layout=PATCHES, time_groups=2) as recorder:
            if way == "to_thread":
                image = await asyncio.to_thread(runs[0])
            elif way == "task":

                async def request():
                    await asyncio.sleep(0)
                    return runs[0]()

                image = await asyncio.create_task(request())
            elif way == "per call":
                image = await loop_of_threads(tiny, first)
            else:
                context = contextvars.copy_context()
                loop = asyncio.get_running_loop()
                image = await loop.run_in_executor(None, context.run, runs[0])
        return image, recorder.maps()

    image, maps = asyncio.run(cell())
    assert torch.equal(image, plain[0])
    assert_own(oracle, maps, calls)


async def loop_of_threads(tiny, pipeline):
    """The same loop, whose every call is made by some thread of a pool."""
    unet, scheduler = pipeline.unet, pipeline.scheduler
    reference = tiny.reference(2, seed=1)
    contexts = torch.cat([torch.zeros_like(reference), reference])

    @torch.no_grad()
    def call(latents, timestep):
        return unet(torch.cat([latents] * 2), timestep, encoder_hidden_states=contexts).sample

    scheduler.set_timesteps(4)
    latents = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(0))
    for timestep in scheduler.timesteps:
        nothing, given = (await asyncio.to_thread(call, latents, timestep)).chunk(2)
        noise = given + 0.5 * (given - nothing)
        latents = scheduler.step(noise, timestep, latents).prev_sample
    return latents


def test_tasks_of_one_thread(oracle, tiny, shared):
    """Two requests of one event loop, one step each in turn; the second is not recorded."""
    first, second, _, plain, calls, _ = shared

    async def request(pipeline, seed, recorded):
        reference = tiny.reference(2, seed=seed)
        contexts = torch.cat([torch.zeros_like(reference), reference])
        recorder = i2am.record(first, layout=PATCHES, time_groups=2) if recorded else None
        if recorder:
            recorder.__enter__()
        pipeline.scheduler.set_timesteps(4)
        latents = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(0))
        for timestep in pipeline.scheduler.timesteps:
            with torch.no_grad():
                nothing, given = pipeline.unet(
                    torch.cat([latents] * 2), timestep, encoder_hidden_states=contexts
                ).sample.chunk(2)
            await asyncio.sleep(0)
            noise = given + 0.5 * (given - nothing)
            latents = pipeline.scheduler.step(noise, timestep, latents).prev_sample
        if recorder:
            recorder.__exit__()
        return latents, recorder

    async def both():
        return await asyncio.gather(request(first, 1, True), request(second, 2, False))

    (mine, recorder), (theirs, _) = asyncio.run(both())
    assert torch.equal(mine, plain[0])
    assert torch.equal(theirs, plain[1])
    with pytest.warns(UserWarning, match="calls of the denoiser came from other threads or tasks"):
        assert_own(oracle, recorder.maps(), calls)


def test_a_plain_thread_inside_the_block(shared):
    first, _, runs, plain, _, _ = shared
    with i2am.record(first, layout=PATCHES, time_groups=2) as recorder:
        thread, left = in_thread(runs[0])
        thread.join(20)
    assert torch.equal(left[0], plain[0])
    with pytest.raises(RuntimeError, match=r"all 4 calls .* other threads .* asyncio\.to_thread"):
        recorder.maps()


def test_attached_without_a_block(oracle, shared):
    """A notebook's next cell has a context of its own, and is of the same thread."""
    first, _, runs, plain, calls, _ = shared
    recorder = i2am.record(first, layout=PATCHES, time_groups=2)
    contextvars.Context().run(recorder.attach)
    assert torch.equal(contextvars.Context().run(runs[0]), plain[0])
    assert_own(oracle, recorder.maps(), calls)
    # another thread neither mixes nor takes over
    thread, left = in_thread(lambda: (runs[1](), i2am.record(first, layout=PATCHES).attach()))
    thread.join(20)
    assert isinstance(left[0], RuntimeError)
    assert "detach that recorder first, or drop" in str(left[0])
    assert_own(oracle, recorder.maps(), calls)
    recorder.detach()


def test_two_calls_at_once_in_one_block(oracle, shared):
    """Both inherit the context: whose maps these would be, nobody can tell."""
    first, _, runs, plain, _, _ = shared
    inside, go_on = threading.Event(), threading.Event()

    def wait(module, args):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            go_on.wait(20)

    hook = first.unet.mid_block.register_forward_pre_hook(wait)
    recorder = i2am.record(first, layout=PATCHES, time_groups=2)
    with oracle.gives_up(recorder, NotImplementedError, ".*recording two calls of UNet"):
        context = contextvars.copy_context()
        thread, left = in_thread(lambda: context.run(runs[1]))
        inside.wait(20)
        mine = runs[0]()
        go_on.set()
        thread.join(20)
    hook.remove()
    assert torch.equal(mine, plain[0])
    assert torch.equal(left[0], plain[1])


def test_a_recording_that_nobody_can_leave_is_dropped(tiny, shared):
    """A block in a generator that is kept and never goes on."""
    first, _, runs, plain, _, _ = shared
    before, listeners = tiny.state(first), dict(LISTENERS)

    def suspended():
        with i2am.record(first, layout=PATCHES):
            yield

    kept = suspended()
    next(kept)
    gc.collect()
    with pytest.raises(RuntimeError, match=r"drop that recording by i2am.release\(pipe\)"):
        i2am.record(first, layout=PATCHES).attach()
    i2am.release(first)
    i2am.release(first)  # nothing any more
    assert tiny.state(first) == before
    assert listeners == LISTENERS
    with i2am.record(first, layout=PATCHES, time_groups=2) as recorder:
        assert torch.equal(runs[0](), plain[0])
    assert recorder.maps().n_samples == 2
    kept.close()  # leaves its block: harmless
    with pytest.raises(TypeError, match="pipe_or_denoiser must be"):
        i2am.release("pipe")


def test_nested_blocks_are_refused(shared):
    first, _, runs, plain, _, _ = shared
    with i2am.record(first, layout=PATCHES, time_groups=2) as recorder:
        with pytest.raises(RuntimeError, match=r"leave that record\(\) block first"):
            with i2am.record(first, layout=PATCHES):
                raise AssertionError
        assert torch.equal(runs[0](), plain[0])
    assert recorder.maps().n_samples == 2
