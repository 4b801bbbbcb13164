"""The benchmarks of speed and memory: that they measure what they say, on the smallest sizes."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import budgets
import eager
import gpu
import harness
import pytest
import report
import scaling_plots
import torch
from diffusers import UNet2DConditionModel
from unets import SIZES, Loop, twin

import i2am
from i2am.kernels import attention_statistics
from i2am.testing import assert_matches_reference, make_qkv

pytestmark = pytest.mark.slow  # they test no product

BENCHMARKS = Path(gpu.__file__).parent
CPU = torch.device("cpu")


@pytest.mark.parametrize("maps", [eager.materialised, eager.chunked])
@pytest.mark.parametrize("chunk", [1, 100, 1 << 24], ids=["row", "several rows", "all rows"])
def test_eager_maps_are_the_statistics(monkeypatch, maps, chunk):
    monkeypatch.setattr(eager, "CHUNK_ELEMENTS", chunk)
    query, key, _ = make_qkv(2, 3, 12, 7, 8)
    exact = attention_statistics(query.double(), key.double(), impl="reference")
    rough = attention_statistics(query, key, impl="reference")
    r2g, g2r = maps(query, key)
    assert_matches_reference(r2g, exact=exact.r2g, eager=rough.r2g, name="r2g")
    assert_matches_reference(g2r, exact=exact.g2r[:, :, 0], eager=rough.g2r[:, :, 0], name="g2r")


@pytest.fixture(scope="module")
def unet():
    return SIZES["tiny"].build(CPU, torch.float32)


@pytest.mark.parametrize("hook", [eager.hook_materialised, eager.hook_published])
def test_hooks_form_the_maps_that_recording_sums(monkeypatch, unet, hook):
    formed = []
    monkeypatch.setattr(eager, "materialised", lambda *call: formed.append(attend(*call)))
    attend = partial(attention_statistics, impl="reference")
    plain, loop = (Loop(unet, SIZES["tiny"], 2, guidance=True) for _ in range(2))
    remove = hook(unet, loop.conditional)
    layout = SIZES["tiny"].layout
    with i2am.record(unet, scheduler=loop.scheduler, layout=layout, time_groups=1) as recorder:
        noise = loop()
        remove()
        layers = recorder.maps().layer_sums
    assert torch.equal(noise, plain())
    assert len(formed) == len(layers) == 4
    for statistics, layer in zip(formed, layers, strict=True):
        g2r = layer.generated_to_reference[:, 0, :, 0].flatten(2)
        torch.testing.assert_close(g2r, statistics.g2r[:, :, 0, 1:])  # without the class token
    loop()
    assert len(formed) == 4


def test_twins_share_their_weights_and_say_the_same(unet):
    other = twin(unet)
    assert {p.data_ptr() for p in other.parameters()} == {p.data_ptr() for p in unet.parameters()}
    steps = [Loop(network, SIZES["tiny"], 1, guidance=False)() for network in (unet, other)]
    assert torch.equal(*steps)
    assert steps[0].isfinite().all()


@pytest.mark.parametrize("size", SIZES)
def test_sizes_of_the_networks(size):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SIZES[size].config)
    assert (
        sum(p.numel() for p in unet.parameters()) // 10**6
        == {"sd15": 859, "sdxl": 2567, "tiny": 0}[size]
    )


def test_extra_memory_is_what_is_held_and_not_returned():
    inputs = torch.zeros(1000)

    def call():
        scratch = [inputs + inputs for _ in range(3)]
        return scratch[0] + scratch[1]

    assert harness.extra_bytes(call, CPU) == 3 * inputs.nbytes
    assert harness.extra_bytes(lambda: inputs + inputs, CPU) == 0


@pytest.mark.parametrize("true", [0, 1, 2, 7, 100, 999, budgets.MAX_BATCH])
@pytest.mark.parametrize("guess", [1, 90, 1000])
def test_largest_batch_is_found(true, guess):
    tried = []

    def fits(batch):
        tried.append(batch)
        return batch <= true

    found = budgets.largest(fits, guess)
    assert found <= true <= found + max(1, found // budgets.PRECISION) - (found == 0 or found == 1)
    assert len(set(tried)) == len(tried) <= 30
    assert min(tried) >= 1
    assert max(tried) <= budgets.MAX_BATCH


def test_guess_of_the_largest_batch():
    assert budgets.guess({8: 3e9, 16: 4e9, 1: 2.9e9}, 12e9) == 80
    assert budgets.guess({1: 2e9}, 12e9) == 1


@pytest.mark.parametrize("budget", [12, 24, 80])
def test_budget_holds_the_process_and_not_only_its_tensors(monkeypatch, budget):
    total, context, weights, sample = 140e9, 0.6e9, 1.7e9, 50e6
    allowed = [1.0]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (total - context - weights, total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: weights)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", allowed.append)
    card = SimpleNamespace(total_memory=total)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: card)

    def step_peak(unet, batch, way):
        if weights + batch * sample > allowed[-1] * total:
            raise torch.OutOfMemoryError
        return weights + batch * sample

    monkeypatch.setattr(budgets, "step_peak", step_peak)
    search = budgets.Search(None, "plain")
    peaks = search.peaks()["peaks"]
    assert [row["batch"] for row in peaks] == list(budgets.BATCHES)
    assert peaks[0]["peak_GiB"] == round((weights + sample) / 2**30, 3)
    true = int((budget * 1e9 - context - weights) / sample)
    (found,) = search.largest(budget)["largest"]
    assert true * (1 - 1 / budgets.PRECISION) <= found["batch"] <= true
    assert (found["way"], found["budget_GB"]) == ("plain", budget)
    assert allowed[-1] == 1.0
    with pytest.raises(harness.LeftOut, match="less than 141 GB"):
        search.largest(141)


ROW = {
    "level": "operator",
    "group": "custom",
    "batch": 8,
    "attends": False,
    "plain_ms": 2.0,
    "p50_ms": 1.0,
    "ratio": 0.5,
    "memory_MiB": 3.0,
    "plain_memory_MiB": 0.5,
}
RESULT = {
    "device": "a card",
    "versions": {"torch": "2"},
    "commit": "0123456789",
    "date": "2026-11-23",
    "budgets": {"peaks": [], "largest": [{"way": "plain", "budget_GB": 12, "batch": 7}]},
}


def test_tables_say_what_recording_costs():
    rows = [
        {**ROW, "way": "beside, given lse", "floor_ms": 0.25},
        {**ROW, "way": "fused", "attends": True, "ratio": 1.25},
        {**ROW, "way": "chunked", "kernels_ms": 4.0, "plain_kernels_ms": 1.6},
    ]
    text = report.tables({**RESULT, "rows": rows})
    assert text.startswith("a card, torch 2, commit 0123456, 2026-11-23.")
    assert "| custom, batch 8 | 2 ms | 1.50 x | 1.25 x | 1.50 x |" in text
    assert "| custom, batch 8 | 1.6 ms | 3.50 x |" in text
    assert "| custom, batch 8 | 0.5 | 3 | 3 | 3 |" in text
    assert "| custom, batch 8 | 0.25 ms | 25 % |" in text
    assert "| 12 GB | 7 | - | - | - |" in text


def test_no_speed_is_shown_for_a_wrong_result():
    rows = [{**ROW, "way": "beside", "wrong": "g2r: error 1", "floor_ms": 1.0}]
    text = report.tables({**RESULT, "rows": rows})
    assert "| custom, batch 8 | 2 ms | wrong |" in text
    assert "roofline" not in text


def environment():
    path = os.pathsep.join([str(BENCHMARKS.parent), os.environ.get("PYTHONPATH", "")])
    # with them pytest-benchmark takes a process for one of xdist's, and measures nothing
    inherited = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    return {**inherited, "PYTHONPATH": path}


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """What the benchmarks write, all of them on their smallest sizes."""
    out = tmp_path_factory.mktemp("raw") / "benchmarks.json"
    command = [sys.executable, "-m", "pytest", str(BENCHMARKS), "-q", "--benchmark-only"]
    options = ["--shapes", "tiny", "--unet", "tiny", "--steps", "5", "--rounds", "1"]
    ran = subprocess.run(
        [*command, *options, "--device", "cpu", f"--benchmark-json={out}"],
        cwd=BENCHMARKS.parent,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    return out


def test_benchmarks_become_a_result_with_tables_and_plots(raw, tmp_path, capsys):
    target = tmp_path / "result.json"
    report.main(raw, target=target)
    text = capsys.readouterr().out
    result = json.loads(target.read_text())
    levels = {row["level"] for row in result["rows"]}
    assert levels == {"operator", "step", "run"}
    assert all(0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] for row in result["rows"])
    assert result["versions"]["torch"] == torch.__version__
    assert len(result["commit"]) == 40
    assert any("GPU" in left["reason"] for left in result["left_out"])
    assert "| tiny-24x13x8, batch 1 |" in text
    assert "| tiny, batch 1, guidance |" in text
    assert "| pocket, 5 steps, batch 1 |" in text
    assert set(scaling_plots.step_points(steps_of(result))) == {
        f"tiny, {way}" for way in ("plain", *report.STEP_WAYS)
    }


def steps_of(result):
    return [row for row in result["rows"] if row["level"] == "step"]


SQUARES = [
    {**ROW, "way": "fused", "heads": 8, "head_dim": 40, "seqlen_q": n, "seqlen_k": n}
    for n in (192, 768)
]


def test_points_of_the_plots():
    others = [
        {**SQUARES[0], "head_dim": 80},
        {**SQUARES[0], "way": "flash-colsum"},
        {**SQUARES[0], "batch": 1},
    ]
    found = scaling_plots.call_points(SQUARES + others, lambda row: row["p50_ms"])
    assert found == {"fused": [(192**2, 1.0), (768**2, 1.0)]}
    peaks = [{"way": "plain", "batch": 8, "peak_GiB": 3.5}]
    assert scaling_plots.peak_points({"budgets": {"peaks": peaks}}) == {"plain": [(8, 3.5)]}


def test_plots_need_no_complete_result():
    pytest.importorskip("matplotlib")
    figure = scaling_plots.draw({**RESULT, "rows": SQUARES})
    assert [len(axes.lines) for axes in figure.axes] == [1, 1, 0, 0]
