"""Tables as lines to print: the paper's, and every number with its interval."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from i2am.evaluation.scores.correlation import Correlation
from i2am.evaluation.scores.summary import NOT_COMPUTED, UNDEFINED
from i2am.wording import Footnotes

_TITLES = {
    "imacs_g": "IMACS_g",
    "imacs_g_share": "IMACS_g share",
    "imacs_r": "IMACS_r",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "fid": "FID",
    "kid_full": "KID",
    "kid_full_x1000": "KID x1000",
}
_NONE, _PART = "-", "*"


def labels(documents: Sequence[Mapping[str, Any]], folders: Sequence[str]) -> list[str]:
    """A name for each run: its model's, with the folder's where two have the same."""
    names = [document["model"]["name"] for document in documents]
    return [
        name if names.count(name) == 1 else f"{name} ({folder})"
        for name, folder in zip(names, folders, strict=True)
    ]


def paper_table(documents: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """One row per run: IMACS and the image metrics of each setting.

    A dash stands for what is undefined or not computed, an asterisk marks numbers of a part of the
    samples.

    Args:
        documents: ``metrics.json`` of each run.
        names: What to call them.
    """
    found = {
        (setting, name): None
        for document in documents
        for setting, of in document["settings"].items()
        for name in _TITLES
        if name in of["metrics"]
    }
    header = [["", ""], ["model", "n"]]
    for setting, name in found:
        header[0].append(setting)
        header[1].append(_TITLES[name])
    rows = [
        [label, _progress(document), *(_value(document, *key) for key in found)]
        for document, label in zip(documents, names, strict=True)
    ]
    protocols = sorted({document["protocol"]["name"] for document in documents})
    cells = [cell for row in rows for cell in row[2:]]
    notes = [f"protocol {', '.join(protocols)}"]
    if _NONE in cells:
        notes.append(f"{_NONE} undefined or not computed")
    if any(cell.endswith(_PART) for cell in cells):
        notes.append(f"{_PART} of a part of the samples")
    return [*_aligned([*header, *rows]), "; ".join(notes)]


def detail_table(document: Mapping[str, Any], footnotes: Footnotes) -> list[str]:
    """Every metric of a run with its interval and counts, and the reasons for what is not there.

    Args:
        document: ``metrics.json`` of the run.
        footnotes: Gets the reasons, of which the table has the numbers.
    """
    rows = [["setting", "metric", "value", "95 % interval", "n", "note"]]
    for setting, of in document["settings"].items():
        for name, made in of["metrics"].items():
            bounds = made["interval"]
            rows.append(
                [
                    setting,
                    name,
                    _number(made["value"]),
                    _NONE if bounds is None else f"{_number(bounds[0])} .. {_number(bounds[1])}",
                    f"{made['n_ok']}/{made['n_expected']}",
                    _note(made, footnotes),
                ]
            )
    return _aligned(rows)


def correlation_table(found: Iterable[Correlation], footnotes: Footnotes) -> list[str]:
    """One row per pair of metrics that something has both of.

    Args:
        found: All pairs.
        footnotes: Gets the reasons for what has no coefficients.
    """
    rows = [["over", "IMACS", "metric", "better", "n", "Spearman", "p", "Kendall", "p", "note"]]
    rows += [
        [
            of.over,
            f"{of.imacs} {of.imacs_setting}",
            f"{of.metric} {of.metric_setting}",
            of.better,
            str(of.n),
            *(_number(x) for x in (of.spearman, of.spearman_p, of.kendall, of.kendall_p)),
            footnotes.mark(of.reason) if of.reason else "",
        ]
        for of in found
        if of.n
    ]
    return _aligned(rows)


def _progress(document: Mapping[str, Any]) -> str:
    settings = document["settings"].values()
    done = "+".join(str(of["n_ok"]) for of in settings)
    if all(of["n_ok"] == of["n_expected"] for of in settings):
        return done
    return f"{done} of {'+'.join(str(of['n_expected']) for of in settings)}"


def _value(document: Mapping[str, Any], setting: str, name: str) -> str:
    made = document["settings"].get(setting, {"metrics": {}})["metrics"].get(name)
    if made is None or made["value"] is None:
        return _NONE
    return _number(made["value"]) + (_PART if made["n_ok"] < made["n_expected"] else "")


def _note(made: Mapping[str, Any], footnotes: Footnotes) -> str:
    if made["status"] in (UNDEFINED, NOT_COMPUTED):
        return f"{made['status'].replace('_', ' ')} {footnotes.mark(made['reason'])}"
    notes = [f"{of['n']} without {footnotes.mark(of['message'])}" for of in made["undefined"]]
    if made["n_missing"]:
        notes.append(f"{made['n_missing']} not committed")
    if made.get("std") is not None:
        notes.append(f"std {_number(made['std'])} over {made['subsets']} subsets")
    return ", ".join(notes)


def _number(value: float | None) -> str:
    return _NONE if value is None else f"{value:.4f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
