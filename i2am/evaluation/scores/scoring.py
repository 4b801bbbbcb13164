"""Every number of a run, from its committed shards and pictures alone."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from i2am.evaluation.scores.inception import Features, inception
from i2am.evaluation.scores.lpips import LPIPS
from i2am.evaluation.scores.measure import Measure, attempt
from i2am.evaluation.scores.measuring import PictureMeasures
from i2am.evaluation.scores.protocols import PROTOCOLS, Protocol
from i2am.evaluation.scores.samples import Samples, read_samples
from i2am.evaluation.scores.sets import KID_NAMES, SetScores
from i2am.evaluation.scores.ssim import SSIM
from i2am.evaluation.scores.summary import (
    NOT_COMPUTED,
    PARTIAL,
    Entry,
    counts,
    mean_entry,
    not_computed,
)
from i2am.evaluation.store import Store
from i2am.metrics.names import IMACS_NAMES
from i2am.wording import printable

log = logging.getLogger("i2am")

METRICS = ("imacs", "ssim", "lpips", "fid", "kid")

_PAIRED = ("ssim", "lpips")
_SETS = ("fid", "kid")


@dataclass(frozen=True)
class Scoring:
    """What to compute and how.

    Attributes:
        metrics: Of :data:`METRICS`.
        protocol: Of the image metrics.
        real: Folder of the real pictures; None takes the one of the run's data set.
        lpips, inception: Weight files; None if there is none.
        replicates: Resamples of the confidence intervals; 0 for none.
        seed: Key of all random generators.
    """

    metrics: tuple[str, ...] = METRICS
    protocol: Protocol = PROTOCOLS["i2am"]
    real: Path | None = None
    lpips: Path | None = None
    inception: Path | None = None
    replicates: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class RunScores:
    """The numbers of one run.

    Attributes:
        document: JSON values, the content of ``metrics.json``.
        samples: By setting, every sample's scores.
    """

    document: dict[str, Any]
    samples: dict[str, Samples]

    @property
    def complete(self) -> bool:
        """Whether nothing is missing that could be had; an undefined score is not missing."""
        return all(samples.complete for samples in self.samples.values()) and not any(
            made["status"] in (PARTIAL, NOT_COMPUTED)
            for setting in self.document["settings"].values()
            for made in setting["metrics"].values()
        )


def score_run(
    store: Store,
    scoring: Scoring,
    *,
    features: Callable[[], Features] | None = None,
    progress: bool = False,
) -> RunScores:
    """Score what is committed now.

    Args:
        store: The run; other processes may be writing to it.
        scoring: What to compute.
        features: Makes the features of FID and KID; None takes Inception.
        progress: Whether to show a bar on stderr.

    Raises:
        StoreError: If a shard is damaged or belongs to another run.
        OSError: If a file cannot be read, or computed numbers cannot be kept.
    """
    protocol = scoring.protocol
    run = _Run(store, scoring, features or (lambda: inception(protocol, scoring.inception)))
    for problems in store.check_headers().values():
        for problem in problems.values():
            log.warning("%s; it counts as not committed", problem)
    # of all settings before anything slow, so that they show the run at one moment
    samples = {setting: read_samples(store, setting) for setting in store.settings()}
    settings = {
        setting: {**counts(of), "metrics": run.entries(of, progress=progress)}
        for setting, of in samples.items()
    }
    plan = store.plan
    document = {
        "schema": 1,
        "i2am": plan["i2am"],
        "fingerprint": plan["fingerprint"],
        "model": plan["model"],
        "protocol": protocol.as_dict(),
        "computed_with": run.identities,
        "bootstrap": {"replicates": scoring.replicates, "seed": scoring.seed, "level": 0.95},
        "settings": settings,
    }
    return RunScores(document, samples)


class _Run:
    """One run with the measures that can be had; each is made once, or its obstacle found once."""

    def __init__(self, store: Store, scoring: Scoring, features: Callable[[], Features]) -> None:
        self._store, self._scoring = store, scoring
        self._measures: dict[str, Measure | str] = {}
        data = store.plan["data"]
        self._real = scoring.real or Path(data["folder"]) / data["split"] / "image"
        makers: dict[str, Callable[[], Measure]] = {
            "ssim": lambda: SSIM(scoring.protocol),
            "lpips": lambda: LPIPS(scoring.protocol, scoring.lpips),
            "features": features,
        }
        for name in {name: None for name in map(_measure_of, self._image_metrics(None))}:
            if not self._real.is_dir():
                self._measures[name] = (
                    f"the real pictures are not at {self._real}: name their folder with --real"
                )
            else:
                self._measures[name] = attempt(makers[name])

    @property
    def identities(self) -> dict[str, Any]:
        """By measure that can be had, its libraries and weights, as JSON values."""
        return {
            name: {key: value for key, value in measure.key.items() if key != "protocol"}
            for name, measure in self._measures.items()
            if not isinstance(measure, str)
        }

    def entries(self, samples: Samples, *, progress: bool) -> dict[str, Entry]:
        """Every metric of one setting."""
        wanted = self._image_metrics(samples.setting)
        sets = SetScores(samples)
        self._measure(samples, sets, wanted, progress=progress)
        made: dict[str, Entry] = {}
        options = {"replicates": self._scoring.replicates, "seed": self._scoring.seed}
        if "imacs" in self._scoring.metrics:
            names = [name for name in samples.scores if name.startswith("imacs")]
            for name in names or IMACS_NAMES:
                made[name] = mean_entry(samples, name, **options)
        for metric in wanted:
            obstacle = self._measures[_measure_of(metric)]
            if isinstance(obstacle, str):
                names = _kid_columns() if metric == "kid" else [metric]
                made |= {name: not_computed(samples, obstacle) for name in names}
            elif metric in _PAIRED:
                made[metric] = mean_entry(samples, metric, **options)
            else:
                made |= sets.entries([metric], **options)
        return made

    def _image_metrics(self, setting: str | None) -> list[str]:
        """Those that are asked for and that a setting has; of any setting for None."""
        settings = self._store.settings() if setting is None else [setting]
        where = dict.fromkeys(_PAIRED, ("paired",)) | dict.fromkeys(
            _SETS, self._scoring.protocol.set_settings
        )
        return [
            metric
            for metric in METRICS
            if metric in self._scoring.metrics and {*where.get(metric, ())} & {*settings}
        ]

    def _measure(
        self, samples: Samples, sets: SetScores, wanted: Sequence[str], *, progress: bool
    ) -> None:
        from tqdm import tqdm

        names = {name: None for name in map(_measure_of, wanted)}
        found = {name: self._measures[name] for name in names}
        measures = {name: of for name, of in found.items() if not isinstance(of, str)}
        if not measures:
            return
        pictures = PictureMeasures(
            self._store, self._scoring.protocol, self._real, list(measures.values())
        )
        bar = tqdm(samples.shards, printable(samples.setting), unit="shard", disable=not progress)
        for shard, result in pictures.over(samples.setting, bar):
            positions = shard.index.tolist()
            at = dict(zip(shard.ids, positions, strict=True))
            for name, measure in measures.items():
                numbers = result.numbers[measure.name]
                reasons = result.reasons[measure.name]
                if name == "features":
                    if numbers:
                        sets.add(positions, numbers["generated"], numbers["real"])
                    for identity, reason in reasons.items():
                        sets.explain(at[identity], reason)
                    continue
                if numbers:
                    samples.column(name)[positions] = numbers[name].numpy()
                for identity, reason in reasons.items():
                    samples.reasons.setdefault(identity, {})[name] = reason


def _measure_of(metric: str) -> str:
    return "features" if metric in _SETS else metric


def _kid_columns() -> list[str]:
    return [f"{name}{unit}" for unit in ("", "_x1000") for name in KID_NAMES]
