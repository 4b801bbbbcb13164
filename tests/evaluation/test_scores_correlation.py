"""Rank correlations: known coefficients, exact p, and reasons where there are none."""

import csv
import io
import sys

import numpy as np
import pytest
from scipy import stats

from i2am.evaluation.scores.comparison import compare
from i2am.evaluation.scores.correlation import across_models, within_model
from i2am.evaluation.scores.samples import Samples
from i2am.evaluation.scores.scoring import RunScores
from i2am.evaluation.scores.summary import entry
from i2am.evaluation.scores.tables import correlation_table, labels, paper_table
from i2am.wording import Footnotes


def samples(**scores):
    n = len(next(iter(scores.values()), []))
    ids = [str(number) for number in range(n)]
    columns = {name: np.array(values, dtype=float) for name, values in scores.items()}
    return Samples("paired", ids, ids, ids, [0], 1, np.full(n, "ok", dtype="<U7"), columns)


def document(name="model", protocol="i2am", **settings):
    one = samples(imacs_g=[0.0])

    def made(value):
        return entry(one, int(value is not None), [], value=value)

    return {
        "model": {"name": name},
        "protocol": {"name": protocol},
        "settings": {
            setting: {
                "n_ok": 1,
                "n_expected": 1,
                "metrics": {metric: made(value) for metric, value in values.items()},
            }
            for setting, values in settings.items()
        },
    }


def models(imacs, fid):
    return [
        document(paired={"imacs_g": x}, unpaired={"fid": y})
        for x, y in zip(imacs, fid, strict=True)
    ]


@pytest.mark.parametrize(
    ("fid", "spearman", "kendall", "p"),
    [
        ([4, 3, 2, 1], -1.0, -1.0, 2 / 24),
        ([1, 2, 3, 4], 1.0, 1.0, 2 / 24),
        ([1, 2, 4, 3], 0.8, 2 / 3, 8 / 24),
    ],
    ids=["opposite", "alike", "one-swap"],
)
def test_coefficients_across_models_are_known(fid, spearman, kendall, p):
    (found,) = across_models(models([0.1, 0.2, 0.3, 0.4], fid))
    assert (found.over, found.imacs, found.metric, found.n) == ("models", "imacs_g", "fid", 4)
    assert (found.imacs_setting, found.metric_setting) == ("paired", "unpaired")
    assert found.better == "lower"
    assert found.spearman == pytest.approx(spearman)
    assert found.kendall == pytest.approx(kendall)
    assert found.spearman_p == pytest.approx(p)
    assert found.reason is None


def test_p_of_three_models_is_not_zero():
    # the usual approximation gives 0 for every perfect order
    (found,) = across_models(models([1, 2, 3], [1, 2, 3]))
    assert found.spearman_p == pytest.approx(1 / 3)


def test_many_models_and_ties_are_scipys():
    x, y = [1, 2, 2, 3, 5, 6, 7, 8, 9, 9], [2, 1, 3, 3, 4, 9, 7, 6, 8, 8]
    (found,) = across_models(models(x, y))
    assert found.spearman == pytest.approx(stats.spearmanr(x, y).statistic)
    assert found.spearman_p == pytest.approx(stats.spearmanr(x, y).pvalue)
    assert found.kendall == pytest.approx(stats.kendalltau(x, y).statistic)
    assert found.kendall_p == pytest.approx(stats.kendalltau(x, y).pvalue)


@pytest.mark.parametrize(
    ("imacs", "fid", "n", "reason"),
    [
        ([1, 2], [1, 2], 2, "at least 3 models with both, there are 2"),
        ([1, 2, 3, None], [1, None, 2, 3], 2, "at least 3 models with both, there are 2"),
        ([1, 1, 1], [1, 2, 3], 3, "all 3 models have the same value"),
        ([1, 2, 3], [5, 5, 5], 3, "all 3 models have the same value"),
    ],
    ids=["two", "gaps", "equal-imacs", "equal-metric"],
)
def test_coefficients_that_do_not_exist_have_a_reason(imacs, fid, n, reason):
    (found,) = across_models(models(imacs, fid))
    assert (found.spearman, found.spearman_p, found.kendall, found.kendall_p) == (None,) * 4
    assert found.n == n
    assert reason in found.reason


def test_runs_with_different_settings_are_compared_in_what_they_share():
    documents = [
        document(paired={"imacs_g": x, "ssim": 4 - x}, unpaired={"fid": x}) for x in (1, 2, 3)
    ]
    documents.append(document(unpaired={"imacs_g": 5.0, "fid": 4.0}))
    found = {(of.imacs_setting, of.metric): of for of in across_models(documents)}
    assert found["paired", "fid"].n == 3
    assert found["paired", "ssim"].spearman == pytest.approx(-1)
    assert found["unpaired", "fid"].n == 1


def test_samples_of_a_model_are_correlated_where_both_scores_are_there():
    of = samples(
        imacs_g=[0.1, 0.2, np.nan, 0.4, 0.5],
        imacs_r=[1.0] * 5,
        ssim=[0.5, 0.4, 0.9, 0.2, np.nan],
    )
    found = {one.imacs: one for one in within_model("pocket", {"paired": of})}
    assert found["imacs_g"].n == 3
    assert found["imacs_g"].spearman == pytest.approx(-1)
    assert (found["imacs_g"].over, found["imacs_g"].better) == ("pocket", "higher")
    assert found["imacs_r"].reason == "all 4 samples have the same value"


def a_run(name, noise, n=12):
    generator = np.random.default_rng(int(noise * 10))
    quality = generator.normal(size=n)
    of = samples(imacs_g=quality + noise, ssim=quality + generator.normal(size=n) / 3)
    fields = {"imacs_g": float(of.scores["imacs_g"].mean()), "ssim": noise}
    return RunScores(document(name, paired=fields), {"paired": of})


def test_a_comparison_is_written_whole(tmp_path):
    runs = [a_run(name, noise) for name, noise in (("a", 0.1), ("b", 0.2), ("c", 0.3))]
    comparison = compare(runs, ["a", "b", "c"])
    comparison.write(tmp_path / "out")
    assert not comparison.obstacles
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert set(written) == {
        *("models.csv", "correlation.csv", "comparison.json"),
        *("models.png", "samples.png"),
    }
    rows = list(csv.DictReader(io.StringIO(written["correlation.csv"].decode())))
    assert [row["over"] for row in rows] == ["models", "a", "b", "c"]
    table = list(csv.DictReader(io.StringIO(written["models.csv"].decode())))
    assert [(row["model"], row["metric"]) for row in table[:2]] == [("a", "imacs_g"), ("a", "ssim")]
    comparison.write(tmp_path / "again")
    for path in (tmp_path / "again").iterdir():
        assert path.read_bytes() == written[path.name]


def test_plots_have_one_panel_per_pair_of_metrics_and_all_points():
    from i2am.evaluation.scores.figure import models_figure, samples_figure

    runs = [a_run(name, noise) for name, noise in (("a", 0.1), ("b", 0.2), ("c", 0.3))]
    comparison = compare(runs, ["a", "b", "c"])
    documents = [run.document for run in runs]
    (panel,) = models_figure(documents, comparison.names, comparison.models).axes
    assert [line.get_xydata().tolist() for line in panel.lines] == [
        [[of["settings"]["paired"]["metrics"][name]["value"] for name in ("imacs_g", "ssim")]]
        for of in documents
    ]
    assert panel.get_xlabel() == "imacs_g (paired)"
    assert "higher is better" in panel.get_ylabel()
    figure = samples_figure([run.samples for run in runs], comparison.names, comparison.samples)
    drawn = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title().split("\n")[0] for axes in drawn] == ["a", "b", "c"]
    assert all(len(axes.lines[0].get_xydata()) == 12 for axes in drawn)


@pytest.mark.parametrize("package", ["scipy", "matplotlib"])
def test_a_missing_library_costs_what_needs_it(tmp_path, monkeypatch, package):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    runs = [a_run(name, noise) for name, noise in (("a", 0.1), ("b", 0.2), ("c", 0.3))]
    comparison = compare(runs, ["a", "b", "c"])
    comparison.write(tmp_path / "out")
    (obstacle,) = comparison.obstacles
    assert f"{package}, which could not be imported" in obstacle
    assert "i2am[" in obstacle
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"models.csv", "correlation.csv", "comparison.json"}


def test_tables_print_dashes_and_parts():
    whole = document("a", paired={"imacs_g": 0.5, "imacs_r": None}, unpaired={"fid": 3.25})
    part = document("b", paired={"imacs_g": 0.25}, unpaired={"fid": None})
    made = part["settings"]["paired"]["metrics"]["imacs_g"]
    made |= {"n_ok": 1, "n_expected": 4}
    lines = paper_table([whole, part], ["a", "b"])
    assert lines[0].split() == ["paired", "paired", "unpaired"]
    assert lines[1].split() == ["model", "n", "IMACS_g", "IMACS_r", "FID"]
    assert lines[2].split() == ["a", "1+1", "0.5000", "-", "3.2500"]
    assert lines[3].split() == ["b", "1+1", "0.2500*", "-", "-"]
    assert lines[4] == "protocol i2am; - undefined or not computed; * of a part of the samples"


def test_models_of_one_name_are_told_apart_by_their_folders():
    documents = [document("pocket"), document("custom"), document("pocket")]
    assert labels(documents, ["x", "y", "z"]) == ["pocket (x)", "custom", "pocket (z)"]


def test_the_printed_correlations_leave_out_what_nothing_has():
    found = across_models(models([1, 2, 3], [None] * 3))
    assert len(found) == 1
    assert len(correlation_table(found, Footnotes())) == 1
