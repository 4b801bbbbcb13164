"""Scores of whole runs: right, reproducible, resumable, and honest about what is missing."""

import io
import json
import math
import shutil
import socket
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchmetrics
from PIL import Image

from i2am.data.images import read_image
from i2am.evaluation.errors import StoreDamaged
from i2am.evaluation.scores import scoring as scoring_module
from i2am.evaluation.scores.pictures import resize, to_pixels
from i2am.evaluation.scores.protocols import PROTOCOLS
from i2am.evaluation.scores.results import samples_csv
from i2am.evaluation.scores.scoring import Scoring, score_run
from i2am.evaluation.scores.summary import to_json
from i2am.evaluation.scores.testing import make_run, tiny_extractor, tiny_features
from i2am.evaluation.store import Store
from i2am.evaluation.testing import make_shard
from i2am.metrics.names import IMACS_NAMES

IMACS = Scoring(metrics=("imacs",), replicates=50)
SETS = Scoring(metrics=("fid", "kid"), replicates=50)
ALL = Scoring(metrics=("imacs", "ssim", "fid", "kid"), replicates=50)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a network connection was attempted")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run", tmp_path / "data")


def scored(store, scoring=ALL, **options):
    return score_run(store, scoring, features=tiny_features(scoring.protocol), **options)


def everything(scores):
    return to_json(scores.document), samples_csv(scores.samples)


def metrics(scores, setting):
    return scores.document["settings"][setting]["metrics"]


def generated(store, setting):
    for id in store.ids(setting):
        yield to_pixels(read_image(store.image_path(setting, id)))


def real(store, setting):
    for pair in store.plan["data"]["pairs"][setting]:
        folder = store.plan["data"]["folder"]
        yield to_pixels(read_image(f"{folder}/test/image/{pair[1]}.jpg"))


# Right


@pytest.mark.parametrize("setting", ["paired", "unpaired"])
def test_imacs_is_the_mean_of_what_the_shards_hold(run, setting):
    made = metrics(scored(run, IMACS), setting)
    values = torch.cat([shard.scores for shard in run.shards(setting)]).T.tolist()
    assert list(made) == list(IMACS_NAMES)
    for name, column in zip(IMACS_NAMES, values, strict=True):
        assert abs(made[name]["value"] - sum(column) / len(column)) < 1e-12
        assert made[name]["value"] == math.fsum(column) / len(column)
        low, high = made[name]["interval"]
        assert min(column) <= low < made[name]["value"] < high <= max(column)
        assert (made[name]["n_ok"], made[name]["status"]) == (6, "ok")


def test_imacs_never_comes_from_maps(tmp_path):
    store = Store.open(make_run(tmp_path / "run", tmp_path / "data").folder)
    before = metrics(scored(store, IMACS), "paired")
    for number in store.shard_numbers("paired"):
        shard, _ = make_shard(store.plan, "paired", number, maps=True)
        old = store.read("paired", number)
        images = {id: store.image_path("paired", id).read_bytes() for id in old.ids}
        store.commit(replace(old, maps=shard.maps), images)
    assert metrics(scored(store, IMACS), "paired") == before


def test_ssim_agrees_with_torchmetrics_on_the_same_arrays(run):
    from torchmetrics.image import StructuralSimilarityIndexMeasure

    ladi = Scoring(metrics=("ssim",), protocol=PROTOCOLS["ladi"], replicates=50)
    made = metrics(scored(run, ladi), "paired")["ssim"]
    metric = StructuralSimilarityIndexMeasure(data_range=1.0)
    for picture, target in zip(generated(run, "paired"), real(run, "paired"), strict=True):
        target = resize(target, tuple(picture.shape[1:]), "pil-bilinear")
        metric.update(picture[None].float() / 255, target[None].float() / 255)
    assert made["value"] == pytest.approx(float(metric.compute()), rel=1e-6)


def test_fid_agrees_with_torchmetrics_on_the_same_arrays(run):
    from torchmetrics.image.fid import FrechetInceptionDistance

    protocol = PROTOCOLS["hr-viton"]  # whose pictures go to the network as they are
    made = metrics(scored(run, replace(SETS, protocol=protocol)), "unpaired")
    metric = FrechetInceptionDistance(feature=tiny_extractor())
    for picture, target in zip(generated(run, "unpaired"), real(run, "unpaired"), strict=True):
        metric.update(picture[None], real=False)
        metric.update(target[None], real=True)
    # theirs is rounded to fp32 at the end
    assert made["fid"]["value"] == pytest.approx(float(metric.compute()), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "settings"), [("i2am", {"unpaired"}), ("ladi", {"paired", "unpaired"})]
)
def test_fid_and_kid_are_computed_where_the_protocol_has_them(run, name, settings):
    scores = scored(run, replace(SETS, protocol=PROTOCOLS[name]))
    found = {setting for setting in ("paired", "unpaired") if "fid" in metrics(scores, setting)}
    assert found == settings


def test_worse_pictures_have_worse_scores(tmp_path):
    results = [
        scored(make_run(tmp_path / f"{noise}", tmp_path / "data", noise=noise))
        for noise in (5.0, 60.0)
    ]
    good, bad = ({**metrics(of, "paired"), **metrics(of, "unpaired")} for of in results)
    assert good["ssim"]["value"] > bad["ssim"]["value"]
    assert good["fid"]["value"] < bad["fid"]["value"]


# Reproducible


def test_the_order_of_work_changes_no_bit(tmp_path):
    results = []
    for number, order in enumerate(([0, 1, 2], [2, 0, 1], [1, 2, 0])):
        store = make_run(tmp_path / f"{number}", tmp_path / "data", commit=order)
        results.append(everything(scored(store)))
    assert results[0] == results[1] == results[2]


def test_kept_numbers_change_no_bit(run):
    first = everything(scored(run))
    assert (run.folder / "features").is_dir()
    assert everything(scored(run)) == first


def test_seed_and_replicates_decide_the_intervals_only(run):
    first, second, none = (
        metrics(scored(run, replace(IMACS, seed=seed, replicates=replicates)), "paired")["imacs_g"]
        for seed, replicates in ((0, 50), (1, 50), (0, 0))
    )
    assert first["value"] == second["value"] == none["value"]
    assert first["interval"] != second["interval"]
    assert (none["interval"], none["interval_reason"]) == (None, "no bootstrap was asked for")


def test_the_document_names_protocol_and_bootstrap_and_is_strict_json(run):
    document = json.loads(to_json(scored(run).document))
    assert document["protocol"]["name"] == "i2am"
    assert document["bootstrap"] == {"replicates": 50, "seed": 0, "level": 0.95}
    assert document["fingerprint"] == run.plan["fingerprint"]
    assert document["computed_with"] == {
        "ssim": {"torch": torch.__version__, "torchmetrics": torchmetrics.__version__},
        "features": {"torch": torch.__version__, "name": "tiny"},
    }
    assert str(run.folder) not in to_json(document)


# Resumable


class Counting:
    """The tiny features, which count the pictures and may stop."""

    def __init__(self, stop_at=None):
        self.pictures, self._stop_at = 0, stop_at

    def __call__(self):
        features = tiny_features()()
        extract = features._extractor

        def extractor(pictures):
            if self.pictures == self._stop_at:
                raise KeyboardInterrupt
            self.pictures += 1
            return extract(pictures)

        features._extractor = extractor
        return features


def test_an_interrupted_score_goes_on_where_it_was(run, tmp_path):
    # two pictures for each of two samples in each of three shards
    with pytest.raises(KeyboardInterrupt):
        score_run(run, SETS, features=Counting(stop_at=9))
    rest = Counting()
    resumed = score_run(run, SETS, features=rest)
    assert rest.pictures == 4
    other = make_run(tmp_path / "other", tmp_path / "data")
    assert everything(resumed) == everything(score_run(other, SETS, features=Counting()))


def damage_cache(run):
    path = next((run.folder / "features").rglob("000001.safetensors"))
    return path, path.read_bytes()


@pytest.mark.parametrize("way", ["truncated", "flipped", "empty", "text", "deleted"])
def test_damaged_numbers_are_computed_again(run, way):
    first = everything(score_run(run, SETS, features=Counting()))
    path, data = damage_cache(run)
    flipped = data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]
    contents = {"truncated": data[:-5], "flipped": flipped, "empty": b"", "text": b"a" * 50}
    if way == "deleted":
        path.unlink()
    else:
        path.write_bytes(contents[way])
    counting = Counting()
    assert everything(score_run(run, SETS, features=counting)) == first
    assert counting.pictures == 4
    assert path.read_bytes() == data


def test_numbers_of_other_pictures_are_not_taken(run, tmp_path):
    first = score_run(run, SETS, features=Counting())
    path = tmp_path / "data" / "test" / "image" / "00000_00.jpg"
    Image.new("RGB", (72, 96), "red").save(path)
    counting = Counting()
    second = score_run(run, SETS, features=counting)
    assert counting.pictures == 4
    assert metrics(first, "unpaired")["fid"] != metrics(second, "unpaired")["fid"]


def test_numbers_of_another_network_are_not_taken(run):
    first = scored(run, SETS)

    def other():
        features = tiny_features()()
        features.key |= {"weights": "other"}
        features._extractor = tiny_extractor(5)
        return features

    assert metrics(score_run(run, SETS, features=other), "unpaired") != metrics(first, "unpaired")


# Honest


def test_a_part_of_a_run_is_scored_and_called_one(tmp_path):
    store = make_run(tmp_path / "run", tmp_path / "data", commit=[0, 2])
    scores = scored(store)
    assert not scores.complete
    setting = scores.document["settings"]["paired"]
    assert (setting["shards_committed"], setting["shards_expected"]) == (2, 3)
    assert (setting["n_ok"], setting["n_missing"], setting["n_expected"]) == (4, 2, 6)
    for made in (*metrics(scores, "paired").values(), metrics(scores, "unpaired")["fid"]):
        assert (made["status"], made["n_ok"], made["n_missing"]) == ("partial", 4, 2)
        assert made["value"] is not None


def test_an_empty_run_has_reasons_in_place_of_scores(tmp_path):
    scores = scored(make_run(tmp_path / "run", tmp_path / "data", commit=[]))
    assert not scores.complete
    for setting in ("paired", "unpaired"):
        for name, made in metrics(scores, setting).items():
            assert (name, made["value"]) == (name, None)
            assert made["reason"]
    assert metrics(scores, "paired")["imacs_g"]["reason"] == "no sample is committed"


def test_shards_committed_meanwhile_do_not_enter(tmp_path):
    store = make_run(tmp_path / "run", tmp_path / "data", commit=[0, 1])
    before = everything(scored(store))
    other = make_run(tmp_path / "other", tmp_path / "data")

    def commit_another(pictures):
        for setting in ("paired", "unpaired"):
            shard = other.read(setting, 2)
            images = {id: other.image_path(setting, id).read_bytes() for id in shard.ids}
            store.commit(shard, images)
        return extract(pictures)

    features = tiny_features()()
    extract, features._extractor = features._extractor, commit_another
    shutil.rmtree(store.folder / "features")
    during = score_run(store, ALL, features=lambda: features)
    assert store.committed("unpaired") == {0, 1, 2}
    assert everything(during) == before
    assert scored(store).complete


def test_failed_samples_are_counted_with_their_reason(tmp_path):
    scores = scored(make_run(tmp_path / "run", tmp_path / "data", failed=1))
    assert not scores.complete
    for made in (*metrics(scores, "paired").values(), metrics(scores, "unpaired")["fid"]):
        assert (made["n_ok"], made["n_undefined"], made["status"]) == (5, 1, "partial")
        assert made["undefined"] == [
            {"code": "nonfinite_map", "n": 1, "message": "NaN in layer up.0"}
        ]


def test_an_undefined_score_is_no_gap(tmp_path):
    scores = scored(make_run(tmp_path / "run", tmp_path / "data", undefined=0))
    assert scores.complete
    made = metrics(scores, "paired")
    assert (made["imacs_r"]["n_ok"], made["imacs_r"]["n_undefined"]) == (5, 1)
    assert made["imacs_r"]["undefined"][0]["code"] == "degenerate_map"
    assert (made["imacs_g"]["n_ok"], made["imacs_g"]["n_undefined"]) == (6, 0)


def test_a_model_without_reference_grid_has_no_imacs_r(tmp_path):
    store = make_run(tmp_path / "run", tmp_path / "data", pairs=1, shard=1, undefined=0)
    scores = scored(store, IMACS)
    made = metrics(scores, "paired")["imacs_r"]
    assert scores.complete
    assert (made["value"], made["status"]) == (None, "undefined")
    assert made["reason"] == "its map is the same everywhere"
    assert metrics(scores, "paired")["imacs_g"]["interval_reason"].startswith("a confidence inter")


def test_one_pair_leaves_fid_undefined_and_the_rest_defined(tmp_path):
    scores = scored(make_run(tmp_path / "run", tmp_path / "data", pairs=1, shard=1))
    made = metrics(scores, "unpaired")
    assert made["fid"]["reason"].endswith("generated pictures must be at least 2, got 1")
    assert made["kid_full"]["status"] == "undefined"
    assert made["imacs_g"]["value"] is not None
    assert metrics(scores, "paired")["ssim"]["value"] is not None
    assert scores.complete


def test_missing_weights_leave_the_rest_to_be_computed(run):
    # as the command does it: nothing is at hand, and the network is blocked
    scores = score_run(run, replace(ALL, metrics=("imacs", "ssim", "lpips", "fid", "kid")))
    assert not scores.complete
    by_name = {**metrics(scores, "paired"), **metrics(scores, "unpaired")}
    lost = {name for name, made in by_name.items() if made["status"] == "not_computed"}
    kid = {f"kid_{way}{unit}" for way in ("full", "subset50") for unit in ("", "_x1000")}
    assert lost == {"lpips", "fid", *kid}
    assert "--lpips" in by_name["lpips"]["reason"]
    assert "--inception" in by_name["fid"]["reason"]
    assert all(by_name[name]["value"] is not None for name in by_name.keys() - lost)


def test_missing_real_pictures_leave_imacs_to_be_computed(run, tmp_path):
    scores = scored(run, replace(ALL, real=tmp_path / "nowhere"))
    assert metrics(scores, "paired")["imacs_g"]["value"] is not None
    for made in (metrics(scores, "paired")["ssim"], metrics(scores, "unpaired")["fid"]):
        assert made["status"] == "not_computed"
        assert f"not at {tmp_path / 'nowhere'}: name their folder with --real" in made["reason"]


def test_real_pictures_may_lie_elsewhere(run, tmp_path):
    before = metrics(scored(run), "paired")["ssim"]
    (tmp_path / "data" / "test" / "image").rename(tmp_path / "elsewhere")
    assert (
        metrics(scored(run, replace(ALL, real=tmp_path / "elsewhere")), "paired")["ssim"] == before
    )


def png(size):
    file = io.BytesIO()
    Image.new("RGB", size).save(file, format="PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("which", "content", "said"),
    [
        ("generated", None, "is missing"),
        ("generated", b"", "is damaged: it does not match its checksum"),
        ("generated", png((36, 48)), "is damaged: it does not match its checksum"),
        ("real", None, "does not exist"),
        ("real", b"text", "not an image that can be read"),
        ("real", b"\xff\xd8\xff\xe0 damaged", "picture"),
    ],
    ids=["absent", "empty", "exchanged", "real-absent", "real-text", "real-damaged"],
)
def test_one_unusable_picture_costs_one_sample(run, tmp_path, which, content, said):
    whole = everything(scored(run))
    path = run.image_path("paired", "00002_00")
    if which == "real":
        path = tmp_path / "data" / "test" / "image" / "00002_00.jpg"
    before = path.read_bytes()
    path.unlink() if content is None else path.write_bytes(content)
    if which == "generated":
        # numbers that were kept belong to the picture that the shard lists
        for kept in (run.folder / "features").rglob("*.safetensors"):
            kept.unlink()
    scores = scored(run)
    made = metrics(scores, "paired")["ssim"]
    assert (made["n_ok"], made["n_undefined"], made["status"]) == (5, 1, "partial")
    assert made["undefined"][0]["code"] == "picture"
    assert said in made["undefined"][0]["message"]
    assert metrics(scores, "paired")["imacs_g"]["n_ok"] == 6
    # repaired, it counts: nothing was kept of the shard in the meantime
    path.write_bytes(before)
    assert everything(scored(run)) == whole


def test_pictures_that_are_all_unusable_are_a_gap(run, tmp_path):
    for path in (tmp_path / "data" / "test" / "image").iterdir():
        path.write_bytes(b"text")
    scores = scored(run)
    assert not scores.complete
    made = metrics(scores, "paired")["ssim"]
    assert (made["value"], made["n_ok"], made["status"]) == (None, 0, "not_computed")
    assert "is not an image that can be read" in made["reason"]


def test_a_run_without_images_has_imacs_only(run):
    for setting in run.settings():
        for number in run.shard_numbers(setting):
            run.commit(replace(run.read(setting, number), images={}), {})
    scores = scored(run)
    assert metrics(scores, "paired")["ssim"]["reason"] == "the run kept no image of it"
    assert metrics(scores, "unpaired")["fid"]["undefined"][0] == {
        "code": "no_image",
        "n": 6,
        "message": "the run kept no image of it",
    }
    assert metrics(scores, "unpaired")["imacs_g"]["status"] == "ok"


def test_a_truncated_shard_counts_as_not_committed(run, caplog):
    path = run.shard_path("paired", 1)
    path.write_bytes(path.read_bytes()[:-1])
    scores = scored(run, IMACS)
    assert metrics(scores, "paired")["imacs_g"]["n_missing"] == 2
    assert "000001.safetensors is truncated" in caplog.text
    assert not scores.complete


def test_a_shard_with_altered_scores_stops_everything(run):
    path = run.shard_path("paired", 1)
    data = bytearray(path.read_bytes())
    place = bytes(data).index(run.read("paired", 1).scores.numpy().tobytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreDamaged, match="scores does not match its checksum"):
        scored(run, IMACS)


def test_the_known_metrics_are_those_of_the_command():
    from i2am.cli import score

    assert scoring_module.METRICS == score._METRICS
    assert tuple(PROTOCOLS) == score._PROTOCOLS


def test_status_and_scores_agree_sample_by_sample(tmp_path):
    store = make_run(tmp_path / "run", tmp_path / "data", commit=[0, 1], failed=0, undefined=1)
    samples = scored(store).samples["paired"]
    assert samples.status.tolist() == ["failed", "ok", "ok", "ok", "missing", "missing"]
    assert np.isnan(samples.scores["imacs_r"]).tolist() == [True, True, False, False, True, True]
    assert np.isnan(samples.scores["ssim"]).tolist() == [True, False, False, False, True, True]
