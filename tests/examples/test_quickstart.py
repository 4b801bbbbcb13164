"""examples/quickstart.ipynb runs from top to bottom, in an empty folder."""

import json
import math
from pathlib import Path

import pytest
import torch

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


def test_notebook_is_small_and_holds_no_outputs():
    assert NOTEBOOK.stat().st_size < 200_000
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("code", "markdown")
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


@pytest.mark.slow
def test_every_cell_runs_and_finds_what_it_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    names = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    maps, again = names["maps"], names["again"]
    assert torch.equal(again.reference_to_generated(), maps.reference_to_generated())
    assert all(math.isfinite(score.values.item()) for score in names["scores"].values())
    printed = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(tuple(names["patches"])) for line in printed) == 4
    # what the page says of the pocket model: its maps point at the true place
    for name, patch in names["patches"].items():
        top, left = 8 * patch.row, 8 * patch.column
        flow = names["wanted"].flow[0, :, top : top + 8, left : left + 8].flatten(1)
        true = flow.nanmean(dim=1) * torch.tensor([16, 12])
        found = names["peak"](maps.specific_reference(name)[0])
        assert (found - true).norm() < 2.5, name
