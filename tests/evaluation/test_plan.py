"""What decides the bytes of a run has a fingerprint, and what does not has none."""

import shutil

import pytest

from i2am.evaluation.engines import Share, share_of
from i2am.evaluation.opening import Sources, open_run, settings_of, stored_options
from i2am.evaluation.plan import Settings, seed_of

GOOD = {"size": (128, 96), "steps": 10, "guidance": 2.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 4}, "steps must be at least the 5 time groups, got 4"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"batch": 8, "shard": 4}, "shard must be at least the batch of 8, got 4"),
        ({"pairs": ("paired", "paired")}, "pairs must be paired, unpaired or both"),
        ({"pairs": ()}, "pairs must be paired, unpaired or both"),
        ({"pairs": ("mixed",)}, "pairs must be paired, unpaired or both, got mixed"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"offload": "model"}, "offload model needs a GPU to load to, got device cpu"),
    ],
)
def test_settings_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        Settings(**{**GOOD, **change})


def test_seeds_are_of_the_run_and_the_sample():
    seeds = {seed_of(seed, id) for seed in range(20) for id in ("00000_00", "00001_00", "0")}
    assert len(seeds) == 60
    assert all(0 <= seed < 2**64 for seed in seeds)
    # the same in every version: published numbers depend on it
    assert seed_of(0, "00006_00") == 12418514362808759342


def test_what_decides(dolls, open_dolls, tmp_path):
    plan = open_dolls(dolls)[0].plan
    moved = tmp_path / "elsewhere"
    shutil.copytree(dolls, moved)
    same = open_dolls(moved)[0].plan
    assert same["fingerprint"] == plan["fingerprint"]
    assert same["data"]["folder"] != plan["data"]["folder"]
    found = {plan["fingerprint"]}
    changes = [
        {"steps": 3},
        {"guidance": 3.0},
        {"seed": 1},
        {"time_groups": 1},
        {"batch": 1},
        {"shard": 4},
        {"threads": 2},
        {"maps": "none"},
        {"attach": "fused"},
        {"pairs": ("paired",)},
        {"sampler": "paper"},
        {"preset": "official"},
        {"stretch": True},
    ]
    for change in changes:
        found.add(open_dolls(dolls, **change)[0].plan["fingerprint"])
    assert len(found) == 1 + len(changes)
    # another file of the data set: its size, or with contents=True its bytes
    with (moved / "test" / "cloth" / "00000_00.jpg").open("ab") as file:
        file.write(b"0")
    assert open_dolls(moved)[0].plan["fingerprint"] not in found


@pytest.mark.parametrize("listed", [True, False], ids=["listed", "found"])
def test_pairs_name_the_picture_that_is_read(dolls, open_dolls, tmp_path, listed):
    data = shutil.copytree(dolls, tmp_path / "set")
    picture = data / "test" / "image" / "00000_00.jpg"
    picture.rename(picture.with_suffix(".JPG"))
    pairs = data / "test_pairs.txt"
    if listed:
        pairs.write_text(pairs.read_text().replace("00000_00.jpg ", "00000_00.JPG ", 1))
    for of in open_dolls(data)[0].plan["data"]["pairs"].values():
        assert [pair[4] for pair in of][:2] == ["00000_00.JPG", "00001_00.jpg"]


@pytest.mark.parametrize(
    ("asked", "batch", "shard"),
    [
        ({}, 8, 16),
        ({"shard": 4}, 4, 4),
        ({"shard": 1}, 1, 1),
        ({"shard": 9}, 8, 9),
        ({"batch": 3}, 3, 16),
        ({"batch": 20}, 20, 20),
        ({"batch": 2, "shard": 4}, 2, 4),
    ],
    ids=str,
)
def test_of_batch_and_shard_the_one_not_asked_for_gives_way(dolls, asked, batch, shard):
    options = {"steps": 2, "time_groups": 2, "pairs": ("paired",), **asked}
    settings = open_run(Sources("pocket", dolls), options).settings
    assert (settings.batch, settings.shard) == (batch, shard)


def test_more_time_groups_than_steps_become_as_many(dolls, caplog):
    with caplog.at_level("WARNING", logger="i2am"):
        settings = open_run(Sources("pocket", dolls), {"steps": 3}).settings
    assert settings.time_groups == 3
    assert caplog.messages == [
        "5 time groups were asked for and the run has 3 steps: its maps have 3 time groups"
    ]


def test_a_run_goes_on_with_its_own_settings(dolls, open_dolls):
    opened, _ = open_dolls(dolls, seed=3, pairs=("unpaired",))
    assert settings_of(opened.plan) == opened.settings
    asked = stored_options(opened.plan, {"seed": None, "steps": 4})
    assert asked["seed"] == 3
    assert asked["pairs"] == ("unpaired",)
    assert asked["steps"] == 4


@pytest.mark.parametrize(
    ("environment", "share"),
    [
        ({}, Share(0, 1, 0)),
        ({"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1"}, Share(1, 3, 1)),
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}, Share(5, 8, 1)),
        # torchrun under srun: each task starts processes of its own
        (
            {"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"},
            Share(1, 2, 0),
        ),
    ],
)
def test_shares(environment, share):
    assert share_of(environment) == share


@pytest.mark.parametrize("rank", ["3", "-1", "one"])
def test_a_share_that_cannot_be(rank):
    with pytest.raises(ValueError, match=r"RANK must be a number below WORLD_SIZE, got .* and .3."):
        share_of({"RANK": rank, "WORLD_SIZE": "3"})


def test_shares_split_everything_once():
    jobs = [("paired", number) for number in range(11)]
    parts = [Share(rank, 3, 0).of(jobs) for rank in range(3)]
    assert sorted(job for part in parts for job in part) == jobs
    assert {len(part) for part in parts} == {3, 4}
