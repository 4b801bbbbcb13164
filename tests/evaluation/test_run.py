"""Runs in this process: the same bytes however they are split, exact scores, isolated failures."""

import gc
import math
import shutil
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import i2am
from i2am.evaluation import generating, kept, worker
from i2am.evaluation.engines import Share, open_jobs, run_here
from i2am.evaluation.errors import OutOfMemory
from i2am.evaluation.memory import Need, need
from i2am.evaluation.plan import seed_of
from i2am.evaluation.store import Store
from i2am.evaluation.worker import Worker
from i2am.metrics import imacs_scores

pytestmark = pytest.mark.usefixtures("one_thread")


def compute(out, opened, *, world=1, order=1) -> Store:
    """A run in `world` shares, one after the other."""
    for rank in range(world)[::order]:
        store = Store.create(out, opened.plan)
        jobs = open_jobs(store, share=Share(rank, world, 0))[::order]
        outcome = run_here(
            Worker(store, opened.pipe, opened.data, opened.settings), jobs, lambda _: None
        )
        assert outcome.samples == sum(len(store.positions(*job)) for job in jobs)
    assert not open_jobs(store, share=Share(0, 1, 0))
    return store


@pytest.fixture(scope="module")
def whole(tmp_path_factory, dolls, open_dolls):
    """A run in one process, with how it was opened."""
    threads = torch.get_num_threads()
    opened, _ = open_dolls(dolls)
    store = compute(tmp_path_factory.mktemp("whole") / "run", opened)
    torch.set_num_threads(threads)
    return store, opened


def test_any_split_gives_the_same_bytes(whole, tmp_path, digest):
    store, opened = whole
    for world in (2, 3):
        other = compute(tmp_path / str(world), opened, world=world, order=-1)
        assert digest(other.folder) == digest(store.folder)
    assert not store.verify()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_worker_has_the_threads_of_its_plan(whole, device):
    """On a GPU too: scores are computed on the CPU."""
    store, opened = whole
    Worker(store, opened.pipe, opened.data, replace(opened.settings, device=device, threads=3))
    assert torch.get_num_threads() == 3


def test_scores_and_maps_are_those_of_a_recording(whole):
    store, opened = whole
    pipe, settings = opened.pipe, opened.settings
    for setting in store.settings():
        data = opened.data[setting]
        for shard in store.shards(setting, tensors=None):
            # the last shard holds one sample, computed beside a copy of itself
            places = [*shard.index.tolist(), shard.index.tolist()[0]][:2]
            items = [data[place] for place in places]
            stack = {name: torch.stack([item[name] for item in items]) for name in items[0]}
            with i2am.record(
                pipe,
                time_groups=settings.time_groups,
                mask=stack["mask"],
                reference_mask=stack["garment_mask"],
            ) as recorder:
                images = pipe(
                    agnostic_image=stack["agnostic"],
                    pose_image=stack["pose"],
                    reference_image=stack["garment"],
                    num_inference_steps=settings.steps,
                    guidance_scale=settings.guidance,
                    generator=[
                        torch.Generator().manual_seed(seed_of(0, data.pairs[place].id))
                        for place in places
                    ],
                    output_type="pt",
                ).images
            maps = recorder.maps()
            direct = imacs_scores(
                maps, mask=stack["mask"], reference_mask=stack["garment_mask"], undefined="nan"
            )
            count = len(shard.ids)
            for name, (values, _) in direct.items():
                stored = shard.scores[:, shard.score_names.index(name)]
                torch.testing.assert_close(
                    stored, values[:count], rtol=0, atol=1e-12, equal_nan=True
                )
            per = maps.generated_to_reference(per=("time", "head"), weights="mask")[:count]
            kept = shard.maps["g2r_mask"].float() * shard.maps["g2r_mask_scale"][..., None, None]
            assert shard.maps["g2r_mask"].dtype == torch.float16
            torch.testing.assert_close(kept, per, rtol=2**-11, atol=float(per.max()) * 2**-24)
            for id, image in zip(shard.ids, images, strict=False):
                pixels = np.asarray(Image.open(store.image_path(setting, id)))
                wanted = (image * 255).round().byte().movedim(0, -1).numpy()
                assert (pixels == wanted).all()


def test_official_scores_say_what_they_need(whole, tmp_path, dolls, open_dolls):
    store, _ = whole
    column = store.read("paired", 0).score_names.index("imacs_g_official")
    for shard in store.shards("paired"):
        assert shard.scores[:, column].isnan().all()
        for id in shard.ids:
            code, message = shard.reasons[id]["imacs_g_official"]
            assert code == "not_defined"
            assert "--preset official" in message
    opened, _ = open_dolls(dolls, preset="official", pairs=("paired",))
    official = compute(tmp_path / "official", opened).read("paired", 0)
    assert official.scores[:, column].isfinite().all()
    assert "prefix tokens" in official.reasons[official.ids[0]]["imacs_g"].message
    # G2R does not depend on who votes
    column = official.score_names.index("imacs_r")
    paper = store.read("paired", 0)
    torch.testing.assert_close(official.scores[:, column], paper.scores[:, column])


def test_a_bad_picture_fails_alone(whole, tmp_path, dolls, open_dolls):
    store, _ = whole
    broken = tmp_path / "set"
    shutil.copytree(dolls, broken)
    path = broken / "test" / "image-densepose" / "00001_00.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    (broken / "test" / "cloth" / "00004_00.jpg").write_text("no picture")
    opened, _ = open_dolls(broken, pairs=("paired",))
    other = compute(tmp_path / "run", opened)
    failures = {}
    for shard, good in zip(other.shards("paired"), store.shards("paired"), strict=True):
        for row, id in enumerate(shard.ids):
            if shard.status[row]:
                failures[id] = shard.reasons[id]["sample"]
                assert shard.scores[row].isnan().all()
                assert not other.image_path("paired", id).exists()
                continue
            # neighbours do not depend on it to the bit
            torch.testing.assert_close(
                shard.scores[row], good.scores[row], rtol=0, atol=0, equal_nan=True
            )
            paths = [run.image_path("paired", id) for run in (other, store)]
            assert paths[0].read_bytes() == paths[1].read_bytes()
    codes = {id: reason.code for id, reason in failures.items()}
    assert codes == {"00001_00": "truncated", "00004_00": "unidentified_image"}
    assert "line 2 of test_pairs.txt" in failures["00001_00"].message
    # the pictures are mended: only shards with failures are computed again
    share = Share(0, 1, 0)
    assert not open_jobs(other, share=share)
    retried = open_jobs(other, share=share, retry_failed=True)
    assert retried == [("paired", 0), ("paired", 2)]


def test_missing_files_may_be_skipped(tmp_path, dolls, open_dolls):
    partial = tmp_path / "set"
    shutil.copytree(dolls, partial)
    (partial / "test" / "agnostic-mask" / "00002_00_mask.png").unlink()
    with pytest.raises(ValueError, match="00002_00_mask"):
        open_dolls(partial, pairs=("paired",))
    opened, _ = open_dolls(partial, missing="keep", pairs=("paired",))
    store = compute(tmp_path / "run", opened)
    shard = store.read("paired", 1)
    assert shard.status.tolist() == [1, 0]
    assert shard.reasons["00002_00"]["sample"].code == "missing"


@pytest.mark.parametrize(
    ("name", "value", "score", "code"),
    [
        ("agnostic-mask/00000_00_mask.png", 0, "imacs_g", "empty_mask"),
        ("agnostic-mask/00000_00_mask.png", 255, "imacs_g", "full_mask"),
        ("cloth-mask/00000_00.jpg", 0, "imacs_r", "empty_mask"),
        ("cloth-mask/00000_00.jpg", 255, "imacs_r", "full_mask"),
    ],
)
def test_masks_without_a_score(tmp_path, dolls, open_dolls, name, value, score, code):
    changed = tmp_path / "set"
    shutil.copytree(dolls, changed)
    Image.new("L", (96, 128), value).save(changed / "test" / name)
    opened, _ = open_dolls(changed, pairs=("paired",))
    store = Store.create(tmp_path / "run", opened.plan)
    Worker(store, opened.pipe, opened.data, opened.settings).run("paired", 0)
    shard = store.read("paired", 0)
    assert shard.status.tolist() == [0, 0]
    column = shard.score_names.index(score)
    assert math.isnan(shard.scores[0, column])
    assert math.isfinite(shard.scores[1, column])
    assert shard.reasons["00000_00"][score].code == code


def changed_maps(monkeypatch, change):
    """Lets `change` alter the maps of every batch."""
    real = generating.generate

    def altered(*arguments):
        images, maps = real(*arguments)
        change(maps)
        return images, maps

    monkeypatch.setattr(worker, "generate", altered)


def first_shard(tmp_path, opened):
    store = Store.create(tmp_path / "run", opened.plan)
    Worker(store, opened.pipe, opened.data, opened.settings).run("paired", 0)
    assert not store.verify()
    return store.read("paired", 0)


def test_a_map_with_nan_fails_its_sample(monkeypatch, tmp_path, dolls, open_dolls):
    def spoil(maps):
        maps.layer_sums[1].reference_to_generated[1, 1, 3] = math.nan

    changed_maps(monkeypatch, spoil)
    opened, _ = open_dolls(dolls)
    shard = first_shard(tmp_path, opened)
    assert shard.status.tolist() == [0, 1]
    reason = shard.reasons["00001_00"]["sample"]
    assert reason.code == "nonfinite_map"
    layer = shard_layer(opened)
    assert layer in reason.message
    assert "time group 1, head 3" in reason.message
    assert not any(tensor[1].any() for tensor in shard.maps.values())


def shard_layer(opened) -> str:
    """Path of the second recorded layer."""
    layers = [name for name, module in opened.pipe.unet.named_modules() if name.endswith("attn2")]
    return layers[1]


def test_a_constant_map_has_no_score(monkeypatch, tmp_path, dolls, open_dolls):
    def flatten(maps):
        for layer in maps.layer_sums:
            layer.generated_to_reference[0] = 1

    changed_maps(monkeypatch, flatten)
    shard = first_shard(tmp_path, open_dolls(dolls)[0])
    assert shard.status.tolist() == [0, 0]
    assert shard.reasons["00000_00"]["imacs_r"].code == "degenerate_map"


def test_lost_steps_fail_the_batch(monkeypatch, tmp_path, dolls, open_dolls):
    changed_maps(monkeypatch, lambda maps: maps.provenance.update(steps=1))
    shard = first_shard(tmp_path, open_dolls(dolls)[0])
    assert shard.status.tolist() == [1, 1]
    code, message = shard.reasons["00000_00"]["sample"]
    assert code == "steps_mismatch"
    assert "1 denoising steps were recorded, the plan has 2" in message


def test_an_image_with_nan_fails_its_sample(monkeypatch, tmp_path, dolls, open_dolls):
    real = generating.generate

    def altered(*arguments):
        images, maps = real(*arguments)
        images[0, 0, 0, 0] = math.nan
        return images, maps

    monkeypatch.setattr(worker, "generate", altered)
    shard = first_shard(tmp_path, open_dolls(dolls)[0])
    assert shard.status.tolist() == [1, 0]
    assert shard.reasons["00000_00"]["sample"].code == "nonfinite_image"


def test_logits_beyond_fp16_stay_finite(monkeypatch, tmp_path, dolls, open_dolls):
    # running sums are fp32 and stored maps are scaled: nothing overflows at 60000
    def grow(maps):
        for layer in maps.layer_sums:
            layer.generated_to_reference.mul_(6e6)

    changed_maps(monkeypatch, grow)
    shard = first_shard(tmp_path, open_dolls(dolls)[0])
    assert shard.status.tolist() == [0, 0]
    assert shard.maps["g2r_mask"].isfinite().all()
    assert shard.maps["g2r_mask_scale"].max() > 65504


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
    ],
)
def test_memory_that_runs_out_says_what_to_change(monkeypatch, tmp_path, dolls, open_dolls, error):
    opened, _ = open_dolls(dolls)
    store = Store.create(tmp_path / "run", opened.plan)
    computing = Worker(store, opened.pipe, opened.data, opened.settings)
    computing.run("paired", 0)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(opened.pipe, "denoise", fail)
    with pytest.raises(OutOfMemory, match=r"a batch of 2 does not fit into memory.*--batch"):
        computing.run("paired", 1)
    assert store.committed("paired") == {0}
    assert not store.verify()


def test_other_errors_are_not_hidden(monkeypatch, tmp_path, dolls, open_dolls):
    opened, _ = open_dolls(dolls)
    store = Store.create(tmp_path / "run", opened.plan)

    def fail(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(opened.pipe, "denoise", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        Worker(store, opened.pipe, opened.data, opened.settings).run("paired", 0)
    assert not store.committed("paired")


def test_memory_is_a_line_over_the_batch(dolls, open_dolls):
    opened, _ = open_dolls(dolls)
    found = need(opened)
    weights = sum(
        tensor.nbytes
        for part in (opened.pipe.unet, opened.pipe.vae, opened.pipe.image_encoder)
        for tensor in part.state_dict().values()
    )
    assert found.fixed > weights
    assert found.per_sample > 0
    line = Need(fixed=100, per_sample=10)
    assert [line.largest(budget) for budget in (99, 109, 110, 145)] == [0, 0, 1, 4]
    assert line.of(line.largest(145)) <= 145


def test_memory_does_not_grow_with_the_samples(monkeypatch, tmp_path, dolls, open_dolls):
    many = tmp_path / "set"
    shutil.copytree(dolls, many)
    pairs = [f"0000{p}_00.jpg 0000{g}_00.jpg" for p in range(5) for g in range(5) if p != g]
    (many / "test_pairs.txt").write_text("\n".join(pairs))
    opened, _ = open_dolls(many, batch=1, shard=1, pairs=("unpaired",))
    store = Store.create(tmp_path / "run", opened.plan)
    computing = Worker(store, opened.pipe, opened.data, opened.settings)
    item = opened.data["unpaired"][0]
    made = generating.generate(
        opened.pipe, {name: value[None] for name, value in item.items()}, [0], opened.settings
    )
    # everything but the model, which keeps nothing
    monkeypatch.setattr(worker, "generate", lambda *_: made)
    held = []
    gc.freeze()  # what was there before need not be searched twenty times
    tracemalloc.start()
    for number in store.shard_numbers("unpaired"):
        computing.run("unpaired", number)
        gc.collect()
        held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    gc.unfreeze()
    assert len(held) == 20
    # Python's own caches fill for a while, and those of a coverage tool; ten samples leave less
    # behind than a single picture of one, in fp32
    assert held[-1] - held[9] < 128 * 96 * 3 * 4


def test_two_workers_on_one_shard_write_the_same(whole, tmp_path, digest):
    store, opened = whole
    before = digest(store.folder)
    for _ in range(2):
        again = Store.create(store.folder, opened.plan)
        Worker(again, opened.pipe, opened.data, opened.settings).run("unpaired", 1)
    assert digest(store.folder) == before


def test_no_maps_are_stored_when_none_are_asked_for(tmp_path, dolls, open_dolls):
    shard = first_shard(tmp_path, open_dolls(dolls, maps="none")[0])
    assert not shard.maps
    assert shard.scores[:, 0].isfinite().all()
    assert set(shard.score_names) == set(kept.SCORES)
