"""What a run says when its maps are asked for: sums in order of noise, provenance, remarks."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from i2am.adapters.inputs import versions
from i2am.adapters.run import ELSEWHERE, Run
from i2am.attribution.accumulator import Accumulator
from i2am.attribution.grid import describe_regions
from i2am.attribution.layers import apply
from i2am.attribution.sums import LayerSums
from i2am.attribution.time_groups import too_many


class Report:
    """One guidance branch of a run.

    Args:
        run: The run.
        branch: The guidance branch.
        accumulator: Its sums, at least of one layer.
        over: Whether nothing more will come.
        lost: Layers whose processors were replaced, and by what.
        attach: How recorded layers attended.
        elsewhere: Calls of the denoiser from contexts that are not recorded.
        unread: Runs that were recorded and replaced before.

    Attributes:
        sums: A copy of the sums, the noisiest group first.
        pairs: Every patch against every patch, ``None`` if there is none.

    Raises:
        RuntimeError: A level of the denoiser is missing.
    """

    def __init__(
        self,
        run: Run,
        branch: str,
        accumulator: Accumulator,
        *,
        over: bool,
        lost: Mapping[str, str],
        attach: str,
        elsewhere: int,
        unread: int,
    ) -> None:
        self._run, self._branch, self._accumulator = run, branch, accumulator
        self._over, self._lost, self._attach = over, lost, attach
        self._elsewhere, self._unread = elsewhere, unread
        counted = range(run.clock.groups)
        groups = list(reversed(counted) if run.clock.rises else counted)
        sums, pairs = accumulator.layers(), accumulator.pairs()
        run.check_grids({layer.site.generated_grid for layer in sums})
        # an index makes a copy
        sums = apply(lambda held: held[:, groups], sums)
        self.sums = [self._multiplied(layer, groups) for layer in sums]
        self.pairs = pairs and pairs.of_groups(groups)

    def _multiplied(self, layer: LayerSums, groups: list[int]) -> LayerSums:
        multipliers, site = self._run.multipliers, layer.site
        held = multipliers.of(site, len(groups))
        if multipliers.silence(site):
            site = replace(site, informative=False)
        return replace(layer, site=site, multiplier=None if held is None else held[groups])

    def provenance(self) -> dict[str, Any]:
        """Where the maps come from, as JSON values."""
        run, clock, layout = self._run, self._run.clock, self._run.subject.layout
        said = {
            "denoiser": run.subject.denoiser,
            "scheduler": None if clock.scheduler is None else type(clock.scheduler).__name__,
            "layout": layout.name,
            "note": layout.note or None,
            "prefix_votes": layout.prefix_votes if run.sources.beside else None,
            "guidance_order": list(run.branches.order),
            "branch": self._branch,
            "attach": self._attach,
            "sums": self._accumulator.sums,
            "pictures": run.subject.pictures.provenance(),
            "regions": describe_regions(self._accumulator.regions),
            "steps": clock.steps,
            "evaluations": clock.evaluation,
            "timesteps": [float(t) for t in clock.timesteps if t is not None],
            "calls": dict(run.seen.calls),
            "versions": versions(),
        }
        others = run.other_calls
        if self._elsewhere:
            others[ELSEWHERE] = self._elsewhere
        # where there are none, nothing is said
        return {**said, "other_calls": others} if others else said

    def remarks(self) -> list[str]:
        """What was not said yet about this run."""
        run, clock = self._run, self._run.clock
        remarks = run.seen.remarks(self.sums, lost=self._lost, over=self._over)
        if self.pairs is None and self._accumulator.records_pairs:
            remarks.append(
                "pair maps were asked for and there are none: they need reference tokens with a "
                "place on the reference image, which no recorded layer has"
            )
        remarks += self._of_multipliers()
        if (more := too_many(clock.time_groups, clock.steps)) is not None:
            remarks.append(more)
        announced, made = clock.evaluations, clock.evaluation
        if self._over and announced is not None and made != announced:
            remarks.append(
                f"the run made {made} of {announced} announced evaluations: "
                "its time groups are not equally long"
            )
        if clock.idle:
            remarks.append(
                f"the denoiser was not called in {clock.idle} of {made} evaluations (does "
                "another one take its place?): they are missing in its maps"
            )
        if self._unread:
            remarks.append(
                f"{self._unread + 1} runs were recorded since maps() was last called, and these "
                "are the maps of the last one (set_timesteps begins a run)"
            )
        if self._elsewhere:
            remarks.append(
                f"{self._elsewhere} calls of the denoiser came from other threads or tasks and are "
                "not in the maps"
            )
        remarks = [remark for remark in remarks if remark not in run.said]
        run.said.update(remarks)
        return remarks

    def _of_multipliers(self) -> list[str]:
        multiplied = [layer.multiplier for layer in self.sums if layer.multiplier is not None]
        remarks = []
        if self.pairs is not None and multiplied:
            remarks.append(
                "pair maps are what the layers attend to, without the scales and masks of the "
                "adapter that they multiply it by"
            )
        if any(bool((each != each[:, :1, :1]).any()) for each in multiplied):
            remarks.append(
                "ip_adapter_masks confine the adapter: R2G is multiplied by them, while G2R counts "
                "all patches alike; record(mask=...) and weights='mask' count those inside"
            )
        return remarks
