"""Folders of runs, damaged in any way: one sentence, and nothing is shown that is not theirs."""

import io
import json
import os
import random
import shutil
import signal
import zlib
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from i2am.attribution import Box
from i2am.cli.errors import ExitCode
from i2am.cli.result import Run, write
from i2am.cli.settings import NamedBox, Settings, read_inputs
from i2am.data import write_viton_hd
from i2am.evaluation.plan_file import fingerprint_of
from i2am.evaluation.store import Store
from i2am.evaluation.testing import make_plan, make_shard
from i2am.files import canonical, digests_of, open_regular
from i2am.files.container import pack, read_container
from i2am.testing import make_maps, make_site

ENDS = (ExitCode.DONE, ExitCode.INCOMPLETE, ExitCode.REJECTED, ExitCode.CONFLICT)
SECONDS = 60
COMMANDS = {
    "evaluated": {
        "status": lambda run, out: ["status", run, "--json"],
        "verify": lambda run, out: ["verify", run],
        "parquet": lambda run, out: ["export", run, "--parquet", f"{out}/file.parquet"],
        "zarr": lambda run, out: ["export", run, "--zarr", f"{out}/folder"],
        "report": lambda run, out: ["report", run, "-o", f"{out}/page.html"],
        "score": lambda run, out: ["score", run, "--metrics", "imacs,ssim", *QUICK],
    },
    "recorded": {
        "report": lambda run, out: ["report", run, "-o", f"{out}/page.html"],
        "figure": lambda run, out: [
            "figure",
            run,
            "--which",
            "heads",
            "--dpi",
            "50",
            "-o",
            f"{out}/f",
        ],
    },
}
QUICK = ["--bootstrap", "20", "--quiet"]


# Two folders, whole


def evaluated(folder):
    """A run of i2am evaluate with its data set beside it."""
    write_viton_hd(folder / "data", train=0, test=4)
    plan = make_plan(pairs=4)
    plan["data"] |= {"folder": str(folder / "data"), "split": "test"}
    people = [f"{number:05d}_00" for number in range(4)]
    for line, person in enumerate(people, 1):
        garment = people[line % 4]
        plan["data"]["pairs"]["unpaired"][line - 1] = [
            f"{person}_{garment}",
            person,
            garment,
            line,
            f"{person}.jpg",
        ]
    store = Store.create(folder / "run", plan)
    for setting in store.settings():
        for number in store.shard_numbers(setting):
            shard, images = make_shard(plan, setting, number)
            images = {id: png(zlib.crc32(id.encode()) % 100) for id in images}
            sums = {id: zlib.crc32(image) for id, image in images.items()}
            store.commit(replace(shard, images=sums), images)


def png(level):
    file = io.BytesIO()
    Image.new("RGB", (96, 128), (level, 2 * level, 200)).save(file, "PNG")
    return file.getvalue()


def recorded(folder):
    """An output folder of i2am record with its input files beside it."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (128, 96, 3), dtype=np.uint8)
    for name in ("person", "reference"):
        Image.fromarray(pixels).save(folder / f"{name}.png")
    mask = np.zeros((128, 96), dtype=np.uint8)
    mask[40:110, 20:80] = 255
    for name in ("mask", "reference_mask"):
        Image.fromarray(mask).save(folder / f"{name}.png")
    settings = Settings(
        model="pocket",
        person=folder / "person.png",
        mask=folder / "mask.png",
        reference=folder / "reference.png",
        reference_mask=folder / "reference_mask.png",
        out=folder / "run",
        steps=4,
        guidance=2.0,
        time_groups=2,
        regions=(NamedBox("logo", top=40, left=24, height=16, width=16, truth=(0.25, 0.5)),),
    )
    region = torch.zeros(128, 96)
    region[40:56, 24:40] = 1
    maps = make_maps(
        (make_site("down_blocks.0", (4, 3), (5, 5)), make_site("up_blocks.0", (8, 6), (5, 5))),
        samples=1,
        steps=4,
        mask=torch.eye(128)[:, :96],
        reference_mask=torch.eye(128)[:, :96],
        regions={"logo": region},
        provenance={
            "steps": 4,
            "branch": "conditional",
            "regions": {"logo": str(Box(40, 24, 16, 16, (128, 96)))},
        },
    )
    (folder / "run").mkdir()
    image = Image.fromarray(np.full((128, 96, 3), 90, np.uint8))
    made = Run(image, {"conditional": maps}, True, "CustomPipeline", "DDIM", "cpu", 1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("i2am.cli.result.draw", lambda *_, **__: [])
        write(folder / "run", settings, read_inputs(settings), made)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Makes a folder of either kind once; they are copied, to the same place each time."""
    made = {}

    def of(kind):
        if kind not in made:
            here = tmp_path_factory.mktemp(kind) / "here"
            here.mkdir()
            {"evaluated": evaluated, "recorded": recorded}[kind](here)
            made[kind] = shutil.copytree(here, here.with_name("whole"))
        return made[kind]

    return of


# What may have become of them


def overwritten(path, data):
    path.unlink()
    path.write_bytes(data)


def cut(path, chance):
    os.truncate(path, chance.randrange(path.stat().st_size))


def extended(path, chance):
    os.truncate(path, path.stat().st_size + chance.choice([1, 8, 10**4, 6 * 10**9]))


def flipped(path, chance):
    data = bytearray(path.read_bytes())
    for _ in range(chance.choice([1, 1, 2, 5])):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    overwritten(path, data)


def zeros(path, chance):
    data = bytearray(path.read_bytes())
    start = chance.randrange(len(data))
    data[start : start + 512] = bytes(len(data[start : start + 512]))
    overwritten(path, data)


def inserted(path, chance):
    data = path.read_bytes()
    place = chance.randrange(len(data))
    overwritten(path, data[:place] + chance.randbytes(chance.randrange(1, 9)) + data[place:])


def empty(path, chance):
    overwritten(path, b"")


def another(path, chance):
    others = [other for other in files(path.parents[-1], path) if other != path]
    overwritten(path, chance.choice(others).read_bytes())


def a_link(path, chance):
    others = [other for other in files(path.parents[-1], path) if other != path]
    target = chance.choice([*others, "nothing", path.name, "/dev/zero", ".", "/"])
    path.unlink()
    path.symlink_to(target)


def a_fifo(path, chance):
    path.unlink()
    os.mkfifo(path)


def a_folder(path, chance):
    path.unlink()
    path.mkdir()


DAMAGES = [
    *(cut, extended, flipped, zeros, inserted, empty, another, a_link, a_fifo, a_folder),
]


# Files that were forged: what they say is odd, and their checksums are right

ODD = [
    *(None, True, False, 0, -1, 3, 10**18, 10**30, 1.5, -1e308, "", "x", "\ud800", "\n", "..", "/"),
    *("9" * 300, [], [None], [[]], [1, "a"], [0] * 100, {}, {"a": 1}, {"": {}}),
]


def odd(document, chance):
    """Puts something else in one place of a document."""
    place, key = [document], 0
    for _ in range(chance.randrange(1, 6)):
        inner = place[key]
        if not isinstance(inner, dict | list) or not inner:
            break
        place, key = (
            inner,
            chance.choice([*inner] if isinstance(inner, dict) else range(len(inner))),
        )
    if chance.random() < 0.2:
        del place[key]
    else:
        place[key] = chance.choice(ODD)


def forged_run(run, chance):
    """Of a run.json: with the fingerprint of what it says, which all shards have too."""
    plan = json.loads((run / "run.json").read_bytes())
    odd(plan, chance)
    with suppress(KeyError, TypeError, AttributeError):
        plan["fingerprint"] = fingerprint_of(plan)
        for path in (run / "shards").rglob("*.safetensors"):
            resealed(path, plan["fingerprint"])
    (run / "run.json").write_bytes(canonical(plan))


def forged_manifest(run, chance):
    manifest = json.loads((run / "run.json").read_bytes())
    odd(manifest, chance)
    (run / "run.json").write_bytes(canonical(manifest))


def forged_file(run, chance):
    """One of a record, which its run.json lists."""
    name = chance.choice(["scores.json", "image.png"])
    if name == "scores.json":
        scores = json.loads((run / name).read_bytes())
        odd(scores, chance)
        (run / name).write_bytes(canonical(scores))
    else:
        mode, size = (
            chance.choice(["RGB", "L", "RGBA", "P", "1", "I;16"]),
            chance.choice([1, 7, 96]),
        )
        Image.new(mode, (size, 128)).save(run / name)
    manifest = json.loads((run / "run.json").read_bytes())
    manifest["files"] |= digests_of(run, [name])
    (run / "run.json").write_bytes(canonical(manifest))


def resealed(path, fingerprint):
    with open_regular(path) as file:
        container = read_container(file, path)
        tensors = container.load_all(file)
    document = {key: value for key, value in container.document.items() if key != "tensors"}
    overwritten(path, b"".join(pack(tensors, {**document, "fingerprint": fingerprint})))


def files(root, near):
    """Files of the run that a path lies in."""
    while not (near / "run.json").exists():
        near = near.parent
    return sorted(path for path in near.rglob("*") if path.is_file())


@contextmanager
def no_hang():
    def stop(number, frame):
        raise TimeoutError("it waits")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def outcome(here, kind, command, run_here):
    """How a command ends, and what it has shown: on stdout and in files."""
    out = here / "out"
    out.mkdir()
    before = {path for path in (here / "run").rglob("*")}
    with no_hang():
        done = run_here(COMMANDS[kind][command](str(here / "run"), str(out)))
    assert done.code in ENDS, done
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    # `verify` tells on stdout
    assert len(errors) == (done.code > ExitCode.INCOMPLETE and not done.out)
    assert "Traceback" not in done.err + done.out
    made = [path for path in out.rglob("*") if path.is_file()]
    made += sorted({path for path in (here / "run").rglob("*")} - before)
    return done, {str(path): path.read_bytes() for path in made if path.is_file()}


def damaged_outcome(whole, kind, command, damage, run_here):
    """The outcome after a function has changed the folder."""
    here = whole(kind).with_name("here")
    shutil.rmtree(here)
    shutil.copytree(whole(kind), here)
    damage(here / "run")
    return outcome(here, kind, command, run_here)


CASES = [(kind, command) for kind, commands in COMMANDS.items() for command in commands]


def damage(seed, run):
    chance = random.Random(seed)
    path = chance.choice(files(run, run))
    chance.choice(DAMAGES)(path, chance)


def forgery(kind, seed, run):
    chance = random.Random(seed)
    chance.choice(FORGERIES[kind])(run, chance)


@pytest.fixture(scope="module")
def known(whole):
    """What commands show of whole folders."""
    outcomes = {}

    def of(kind, command, run_here):
        if (kind, command) not in outcomes:
            found = damaged_outcome(whole, kind, command, lambda run: None, run_here)
            assert found[0].code == ExitCode.DONE
            outcomes[kind, command] = found
        return outcomes[kind, command]

    return of


seeds = given(case=st.sampled_from(CASES), seed=st.integers(0, 2**32 - 1))
many = partial(settings, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check_damage(whole, known, run_here, case, seed):
    done, shown = damaged_outcome(whole, *case, partial(damage, seed), run_here)
    if done.code == ExitCode.DONE:
        # it read nothing of what is damaged
        before, shown_before = known(*case, run_here)
        assert (done.out, shown) == (before.out, shown_before)
    elif done.code != ExitCode.INCOMPLETE:
        assert not shown


def check_forgery(whole, run_here, case, seed):
    done, shown = damaged_outcome(whole, *case, partial(forgery, case[0], seed), run_here)
    assert done.code in (ExitCode.DONE, ExitCode.INCOMPLETE) or not shown


def test_a_split_that_no_data_set_has(whole, run_here):
    def change(run):
        plan = json.loads((run / "run.json").read_bytes())
        plan["data"]["split"] = "/"
        plan["fingerprint"] = fingerprint_of(plan)
        for path in (run / "shards").rglob("*.safetensors"):
            resealed(path, plan["fingerprint"])
        (run / "run.json").write_bytes(canonical(plan))

    done, _ = damaged_outcome(whole, "evaluated", "report", change, run_here)
    assert done.code == ExitCode.REJECTED
    assert "cannot be read, name it with --data: split must be" in done.err


def test_an_image_of_gigabytes_is_not_read(whole, run_here):
    def change(run):
        os.truncate(run / "images" / "paired" / "00001_00.png", 6 * 10**12)

    done, _ = damaged_outcome(whole, "evaluated", "verify", change, run_here)
    assert done.code == ExitCode.CONFLICT
    assert "00001_00.png must have at most 536,870,912 bytes" in done.out


@many(max_examples=25, derandomize=True)
@seeds
def test_damage_is_told_and_not_shown(whole, known, run_here, case, seed):
    check_damage(whole, known, run_here, case, seed)


@many(max_examples=25, derandomize=True)
@seeds
def test_forgeries_are_told(whole, run_here, case, seed):
    check_forgery(whole, run_here, case, seed)


@pytest.mark.slow
@many(max_examples=400)
@seeds
def test_damage_of_many_kinds(whole, known, run_here, case, seed):
    check_damage(whole, known, run_here, case, seed)


@pytest.mark.slow
@many(max_examples=400)
@seeds
def test_forgeries_of_many_kinds(whole, run_here, case, seed):
    check_forgery(whole, run_here, case, seed)


# Containers that were forged, and folders that are none


def forge(path, change):
    with open_regular(path) as file:
        container = read_container(file, path)
        tensors = container.load_all(file)
    document = {key: value for key, value in container.document.items() if key != "tensors"}
    change(document, tensors)
    overwritten(path, b"".join(pack(tensors, document)))


def of_shard(change):
    return lambda run: forge(run / "shards" / "paired" / "000000.safetensors", change)


def of_maps(change):
    def changed(run):
        forge(run / "maps.safetensors", change)
        manifest = json.loads((run / "run.json").read_bytes())
        manifest["files"] |= digests_of(run, ["maps.safetensors"])
        (run / "run.json").write_bytes(canonical(manifest))

    return changed


def odd_container(document, tensors, chance):
    if chance.random() < 0.2:
        name = chance.choice([*tensors])
        tensors[name] = chance.choice(
            [tensors[name].flatten(), tensors[name].long(), tensors[name][:0]]
        )
    else:
        odd(document, chance)


def forged_shard(run, chance):
    of_shard(lambda document, tensors: odd_container(document, tensors, chance))(run)


def forged_maps(run, chance):
    of_maps(lambda document, tensors: odd_container(document, tensors, chance))(run)


FORGERIES = {
    "evaluated": [forged_run, forged_shard],
    "recorded": [forged_manifest, forged_file, forged_maps],
}


def a_file_for(folder):
    def change(run):
        shutil.rmtree(run / folder)
        (run / folder).write_bytes(b"a file")

    return change


def a_loop_for(folder):
    def change(run):
        shutil.rmtree(run / folder)
        (run / folder).symlink_to((run / folder).name)

    return change


def reason(document, tensors):
    tensors["scores"][0, 2] = torch.nan
    document["reasons"] = {
        document["ids"][0]: {document["score_names"][2]: {"code": {}, "message": "x"}}
    }


def integers(document, tensors):
    for name in tensors:
        tensors[name] = tensors[name].long()


def first_site(**change):
    return of_maps(lambda document, tensors: document["sites"][0].update(change))


FOUND = {
    "score name": ("evaluated", "zarr", of_shard(lambda d, t: d["score_names"].__setitem__(0, []))),
    "reason code": ("evaluated", "status", of_shard(reason)),
    "no images": ("evaluated", "report", of_shard(lambda d, t: d.update(images={}))),
    "shards file": ("evaluated", "status", a_file_for("shards/paired")),
    "shards loop": ("evaluated", "verify", a_loop_for("shards/paired")),
    "images file": ("evaluated", "verify", a_file_for("images/paired")),
    "images loop": ("evaluated", "report", a_loop_for("images/paired")),
    "layer": ("recorded", "report", first_site(layer=5)),
    "layer in a figure": ("recorded", "figure", first_site(layer=True)),
    "grid": ("recorded", "report", first_site(generated_grid=1.5)),
    "steps": ("recorded", "report", of_maps(lambda d, t: d["provenance"].update(steps=[]))),
    "integers": ("recorded", "report", of_maps(integers)),
}


@pytest.mark.parametrize(("kind", "command", "change"), FOUND.values(), ids=FOUND)
def test_what_was_found_once(whole, run_here, kind, command, change):
    damaged_outcome(whole, kind, command, change, run_here)
