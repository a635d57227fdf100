"""Pure parts of the benchmark's tables: medians with failures, fractions with intervals, calibration."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]
Z_95 = 1.959964
"""Of a two-sided 95 % interval."""
FAILED = "✗"


def wilson(hits: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a fraction (J. Am. Stat. Assoc. 22, 209 (1927)); (0, 1) where there is nothing.

    Raises:
        ValueError: more hits than trials, or a negative number.
    """
    if not 0 <= hits <= n:
        raise ValueError(f"{hits} of {n}")
    if n == 0:
        return 0.0, 1.0
    fraction, share = hits / n, z**2 / n
    centre = (fraction + share / 2) / (1 + share)
    half = z * math.sqrt(fraction * (1 - fraction) / n + share / (4 * n)) / (1 + share)
    return max(0.0, centre - half), min(1.0, centre + half)


def calls_of(record: Record) -> float:
    """Calls of a run; infinite where the reference did not verify it (or it broke down)."""
    return float(record["calls"]) if "error" not in record and record["converged"] else math.inf


def shown(value: float) -> str:
    """A number of calls for a person."""
    return FAILED if math.isinf(value) else f"{value:g}"


def calls_cell(calls: Sequence[float]) -> str:
    """Median and, where runs differ, the range: ``6 (5–7)``; a failed run is ``✗``."""
    if not calls:
        return ""
    middle = statistics.median(calls)
    return shown(middle) if min(calls) == max(calls) else f"{shown(middle)} ({shown(min(calls))}–{shown(max(calls))})"


@dataclass(frozen=True, kw_only=True)
class Honesty:
    """How honest stated sigmas are.

    Attributes:
        n: residuals.
        within_1, within_2: of them within one and two sigmas.
        rms_z: root of the mean of (error / sigma)², 1 where honest.
    """

    n: int
    within_1: int
    within_2: int
    rms_z: float

    @property
    def honest(self) -> bool:
        """Whether both fractions of a Gaussian lie within the intervals."""
        return all(
            low <= asked <= high
            for asked, (low, high) in (
                (0.6827, wilson(self.within_1, self.n)),
                (0.9545, wilson(self.within_2, self.n)),
            )
        )


def honesty(residuals: Sequence[Mapping[str, float]]) -> Honesty:
    """Each label's prediction before it was trained on, against it, in the sigmas stated with it (``sigma_ev``, above
    zero)."""
    scores = [abs(r["predicted_ev"] - r["labelled_ev"]) / r["sigma_ev"] for r in residuals]
    return Honesty(
        n=len(scores),
        within_1=sum(score < 1 for score in scores),
        within_2=sum(score < 2 for score in scores),
        rms_z=math.sqrt(statistics.fmean(score**2 for score in scores)) if scores else math.nan,
    )


def fraction_cell(hits: int, n: int) -> str:
    """``67 % (45–83)``, the interval in brackets."""
    if n == 0:
        return ""
    low, high = wilson(hits, n)
    return f"{100 * hits / n:.0f} % ({100 * low:.0f}–{100 * high:.0f})"


def latest(records: Sequence[Record]) -> list[Record]:
    """The last record of each case, variant, prior and seed."""
    found = {(r["case"], r["variant"], r["prior"], r["seed"]): r for r in records}
    return list(found.values())


def errors_mev(records: Sequence[Record]) -> list[float]:
    """|verified barrier − true barrier| of every hop that has both, meV."""
    hops = [hop for record in records if "error" not in record for hop in record["hops"].values()]
    return [1e3 * abs(hop["error_ev"]) for hop in hops if hop["error_ev"] is not None]
