"""Medians of interleaved repeats: what slows the machine down for a while slows all candidates down alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Comparison:
    """Median seconds (or peak memory) of several candidates, and what they say relative to each other."""

    title: str
    seconds: dict[str, float]
    ratios: dict[str, float]
    targets: dict[str, str]
    """What a ratio is meant to reach, in words, where there is such an aim."""
    megabytes: dict[str, float] = field(default_factory=dict)


def medians(
    candidates: Mapping[str, Callable[[], object]], *, repeats: int, warm_up: int = 3, units: Mapping[str, int] = {}
) -> dict[str, float]:
    """Median seconds of each candidate, divided by the number of `units` that one call works off (1 if not given)."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(-warm_up, repeats):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) / units.get(name, 1) for name, taken in seconds.items()}
