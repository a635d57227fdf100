"""Tables of ``run.py``'s records: ``python tests/benchmarks/labels/table.py labels.jsonl [--markdown]``.

Calls: median over seeds, the range in brackets, ✗ for a run that the reference did not verify within its 40 labels a
hop. CI-NEB: from the cache folder (``baselines.py`` fills it).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import baselines
from analysis import FAILED, Record, calls_cell, calls_of, errors_mev, fraction_cell, honesty, latest
from cases import CASES, DEFAULT_CACHE, Case
from rich.console import Console
from rich.table import Table
from variants import VARIANTS

Column = tuple[str, str]
"""A variant and a prior's file."""


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A table before it is printed."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        lines = [self.header, tuple("---" for _ in self.header), *self.rows]
        return f"{self.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"

    def rich(self) -> Table:
        table = Table(title=self.title, title_justify="left")
        for name in self.header:
            table.add_column(name, overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        return table


def column_name(column: Column) -> str:
    variant, prior = column
    return f"{variant}, {Path(prior).stem if prior else 'no prior'}"


def of(records: Sequence[Record], case: str, column: Column) -> list[Record]:
    return [r for r in records if r["case"] == case and (r["variant"], r["prior"]) == column]


def columns_of(records: Sequence[Record]) -> list[Column]:
    """In the order of ``VARIANTS``, without a prior first."""
    found = {(r["variant"], r["prior"]) for r in records}
    return sorted(found, key=lambda c: (list(VARIANTS).index(c[0]), c[1]))


def neb_cells(case: Case, cache: Path) -> tuple[str, str]:
    """Calls of CI-NEB by BFGS and FIRE, all hops together; empty where they are not known yet."""
    cells = []
    for optimizer in ("BFGS", "FIRE"):
        results = baselines.known_calls(case, optimizer, cache)
        cells.append("" if results is None else calls_cell([sum(results)]))
    return cells[0], cells[1]


def calls_sheet(records: Sequence[Record], cases: Sequence[Case], cache: Path, title: str) -> Sheet:
    """Calls of each case and column, with the median and the maximum over the cases below."""
    columns = columns_of(records)
    rows = []
    for case in cases:
        cells = [calls_cell([calls_of(r) for r in of(records, case.name, column)]) for column in columns]
        rows.append((case.name, str(case.n_atoms), *neb_cells(case, cache), *cells))
    runs = [[calls_of(r) for case in cases for r in of(records, case.name, column)] for column in columns]
    for name, reduce in (("median", statistics.median), ("maximum", max)) if cases else ():
        rows.append((f"**{name}**", "", "", "", *(calls_cell([reduce(r)]) if r else "" for r in runs)))
    header = ("case", "atoms", "CI-NEB BFGS", "FIRE", *map(column_name, columns))
    return Sheet(title=title, header=header, rows=tuple(rows))


def detail_sheet(records: Sequence[Record], cases: Sequence[Case], column: Column) -> Sheet:
    """Verdict, error, time and memory of one column."""
    rows = []
    for case in cases:
        mine = [r for r in of(records, case.name, column) if "error" not in r]
        broken = len(of(records, case.name, column)) - len(mine)
        if not mine:
            continue
        errors = errors_mev(mine)
        fmax = [check["fmax_ev_per_ang"] for r in mine for check in r["checks"].values() if "fmax_ev_per_ang" in check]
        rows.append(
            (
                case.name,
                f"{sum(r['converged'] for r in mine)} of {len(mine) + broken}",
                f"{max(errors):.1f}" if errors else "",
                f"{max(fmax):.3f}" if fmax else "",
                f"{statistics.median(r['seconds_loop'] - r['seconds_reference'] for r in mine):.0f}",
                f"{max(r['peak_memory_mb'] for r in mine)}",
                "; ".join(sorted({r["code_of_decision"] for r in mine if not r["converged"]})),
            )
        )
    force, loop = "worst saddle force / eV/Å", "loop without reference / s"
    header = ("case", "verified", "worst error / meV", force, loop, "memory / MB", "if not, why")
    return Sheet(title=column_name(column), header=header, rows=tuple(rows))


def calibration_sheet(records: Sequence[Record]) -> Sheet:
    """How many labels were predicted within the stated sigmas, by column and by kind."""
    rows = []
    for column in columns_of(records):
        mine = [r for r in records if (r["variant"], r["prior"]) == column and "error" not in r]
        residuals = [residual for r in mine for residual in r["residuals"] if residual["sigma_ev"] > 0]
        for kind in ("all", *sorted({r["kind"] for r in residuals})):
            found = honesty([r for r in residuals if kind in ("all", r["kind"])])
            rows.append(
                (
                    column_name(column) if kind == "all" else "",
                    kind,
                    str(found.n),
                    fraction_cell(found.within_1, found.n),
                    fraction_cell(found.within_2, found.n),
                    f"{found.rms_z:.2f}",
                    "yes" if found.honest else "no",
                )
            )
    header = ("run", "labels", "n", "within 1 σ (95 % interval)", "within 2 σ", "rms z", "68 and 95 % in the intervals")
    return Sheet(title="Calibration: labels against what was predicted before", header=header, rows=tuple(rows))


def sets_sheet(records: Sequence[Record], cases: Sequence[Case], cache: Path) -> Sheet:
    """Calls a hop of sets that share model and labels."""
    rows = []
    for case in cases:
        n = len(case.hops)
        for column in columns_of(records):
            mine = of(records, case.name, column)
            if mine:
                calls = [calls_of(r) for r in mine]
                each = ", ".join(f"{c / n:.1f}" if math.isfinite(c) else FAILED for c in calls)
                neb = neb_cells(case, cache)
                rows.append((case.name, str(n), *neb, column_name(column), calls_cell(calls), each))
    header = ("set", "hops", "CI-NEB BFGS", "FIRE", "run", "calls", "calls a hop, each seed")
    return Sheet(title="Sets of hops in one run", header=header, rows=tuple(rows))


def unrelaxed_sheet(records: Sequence[Record], cases: Sequence[Case]) -> Sheet:
    """Extra calls where the end states are given as built."""
    rows = []
    for case in cases:
        for column in columns_of(records):
            mine = of(records, case.name, column)
            given = {r["seed"]: calls_of(r) for r in of(records, case.original, column)}
            extra = [calls_of(r) - given[r["seed"]] for r in mine if math.isfinite(given.get(r["seed"], math.inf))]
            if mine:
                more = ", ".join(f"{e:+g}" if math.isfinite(e) else FAILED for e in extra)
                rows.append((case.original, column_name(column), calls_cell([calls_of(r) for r in mine]), more))
    header = ("case", "run", "calls from end states as built", "more than from relaxed ones, each seed")
    return Sheet(title="End states given unrelaxed", header=header, rows=tuple(rows))


def prior_sheet(records: Sequence[Record], cases: Sequence[Case]) -> Sheet:
    """What the prior alone would give from three reference points."""
    rows = []
    for case in cases:
        for column in columns_of(records):
            for record in of(records, case.name, column)[:1]:
                for hop, found in record.get("without_learning", {}).items():
                    name = case.name if len(case.hops) == 1 else f"{case.name} {hop}"
                    reference = found["reference_error_ev"]
                    rows.append(
                        (
                            name,
                            column_name(column),
                            f"{1e3 * found['prior_error_ev']:+.0f}",
                            "" if reference is None else f"{1e3 * reference:+.0f}",
                            f"{found['saddle_fmax_ev_per_ang'] or float('nan'):.2f}",
                            found["band"],
                        )
                    )
    header = ("case", "prior", "its barrier − truth / meV", "reference at its saddle − truth / meV")
    return Sheet(
        title="The prior's own band, three reference points, no learning",
        header=(*header, "force there / eV/Å", "band"),
        rows=tuple(rows),
    )


def sheets(records: Sequence[Record], half: str, cache: Path) -> list[Sheet]:
    """All tables of one half."""
    named = {r["case"] for r in records}
    cases = [case for case in CASES.values() if case.half == half and case.name in named]
    mine = [r for r in records if CASES[r["case"]].half == half]
    single = [case for case in cases if case.relaxed and not case.is_set]
    return [
        calls_sheet(mine, single, cache, f"Reference calls, {half} half"),
        *(detail_sheet(mine, cases, column) for column in columns_of(mine) if column[0] == "default"),
        calibration_sheet(mine),
        sets_sheet(mine, [case for case in cases if case.is_set], cache),
        unrelaxed_sheet(mine, [case for case in cases if not case.relaxed]),
        prior_sheet(mine, [case for case in cases if case.relaxed]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="records of run.py")
    parser.add_argument("--half", choices=["development", "test", "both"], default="both")
    parser.add_argument("--markdown", action="store_true", help="for the README")
    parser.add_argument("--code", default="", help="only records of this code (run.py prints it)")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder of CI-NEB results")
    given = parser.parse_args()
    lines = [line for file in given.files for line in file.read_text("utf-8").splitlines() if line.strip()]
    read = [record for record in map(json.loads, lines) if record["case"] in CASES]
    records = latest([r for r in read if not given.code or r["code"] == given.code])
    console = Console()
    if len(codes := sorted({r["code"] for r in records})) > 1:
        console.print(f"[yellow]records of {len(codes)} versions of the code: {', '.join(codes)} (see --code)[/yellow]")
    for half in ("development", "test") if given.half == "both" else (given.half,):
        for sheet in sheets(records, half, given.cache):
            if sheet.rows and given.markdown:
                print(sheet.markdown())
            elif sheet.rows:
                console.print(sheet.rich())


if __name__ == "__main__":
    main()
