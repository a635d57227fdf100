"""What the terminal shows."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

from rich.console import Console

from alcore.types import Decision
from flows.report import barrier_summary, generation_table, result_lines
from flows.report.table import number, signed_mev


def shown(table: Any) -> str:
    stream = io.StringIO()
    Console(file=stream, width=100).print(table)
    return stream.getvalue()


def stopped(case: Any, **changes: Any) -> Any:
    run, generations, labels = case
    last = generations[-1]
    decision = Decision(stop=True, code="label_budget", reason="60 labels are spent, σ is still 24 meV")
    record = replace(last.paths[0], decision=decision, **changes)
    return run, [*generations[:-1], replace(last, paths=(record,), decision=decision)], labels


def test_table_has_a_row_a_generation(case: Any) -> None:
    text = shown(generation_table(case.generations))
    rows = [line for line in text.splitlines() if line.startswith("│")]
    assert len(rows) == len(case.generations)
    assert "0.376 ± 0.004" in rows[-1]  # as stated before its label was known
    assert "converged" in rows[-1]
    assert "–" in rows[0]


def test_table_of_several_hops_names_them(make_case: Any) -> None:
    text = shown(generation_table(make_case("two", ("a", "b")).generations))
    assert text.count("converged") == 2
    assert "path" in text


def test_table_of_nothing_is_empty() -> None:
    assert generation_table([]).row_count == 0


def test_a_converged_run_says_who_confirmed_it(case: Any) -> None:
    lines = result_lines(barrier_summary(*case))
    assert lines[0] == "hop: converged, barrier 0.376 ± 0.003 eV"
    assert lines[1].startswith("  emt at this saddle: 0.3745 eV")
    text = "\n".join(lines)
    assert "6 reference calculations (1 final, 3 saddle, 2 uncertain), 1 label reused" in text
    assert "SCF <did not> settle, see /scratch/labels/abc" in text
    assert "has seen no reference" in text


def test_an_unconverged_run_says_so_first_and_why(case: Any) -> None:
    lines = result_lines(barrier_summary(*stopped(case)))
    assert lines[0].startswith("hop: NOT converged, the surrogate says 0.376 ± 0.004 eV: 60 labels are spent")


def test_an_unlabelled_saddle_is_no_confirmation(case: Any) -> None:
    bare = stopped(case, saddle_key="", verified_barrier_ev=None, error_to_verified_ev=None)
    lines = result_lines(barrier_summary(*bare))
    assert "this saddle has no emt label" in lines[1]
    alone = [replace(g, paths=tuple(replace(p, verified_barrier_ev=None) for p in g.paths)) for g in bare[1]]
    assert "surrogate's word alone" in result_lines(barrier_summary(bare[0], alone, bare[2]))[1]


def test_a_run_without_a_band_gives_no_number(case: Any) -> None:
    lines = result_lines(barrier_summary(case.run, case.generations[:1], case.labels))
    assert lines[0].startswith("hop: NOT converged, no barrier")
    assert result_lines(barrier_summary(case.run, [], {})) == ["au-al100: no generation yet (converged)"]


def test_numbers_have_no_negative_zero() -> None:
    assert number(-1e-9) == "0.000"
    assert number(None) == "–"
    assert signed_mev(-1e-9) == "+0.0 meV"
    assert signed_mev(-0.0015) == "-1.5 meV"
