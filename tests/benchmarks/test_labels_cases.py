"""The label benchmark's hops are what they say, and what it compares with finds known barriers."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "labels"))

import baselines
from cases import CASES, Case, end_states, pairs_of
from reference import InProcessLabeler
from rich.console import Console
from run import Task, done_keys, loop_spec, run_task, tasks_of, told
from variants import VARIANTS, Variant

from alcore.identity import label_key
from alcore.mace.models import build_model, save_model_file
from alcore.types import Candidate, Label, LabelRequest, Structure
from calculators.registry import resolve

FREE = {"pt7-pt111": 7, "pt7-edge": 7, "cu-vacancy-107": 107, "set-cu-ni-vacancy": 31}
MOVING = {"pt7-pt111": 7, "cu-dumbbell": 3, "ni-cu-dumbbell": 3}
"""Atoms that move by more than 0.5 Å, where these are more than two."""
ATOMS = {"au-al100": 13, "cu-vacancy-31": 31, "cu-vacancy-107": 107, "asym-al-au": 20, "nacl-vacancy": 63}


def test_both_halves_have_single_hops_and_sets() -> None:
    for half, least in (("development", 5), ("test", 12)):
        mine = [case for case in CASES.values() if case.half == half and case.relaxed]
        assert sum(not case.is_set for case in mine) >= least
        assert any(case.is_set for case in mine)
        assert any(case.half == half and not case.relaxed for case in CASES.values())
    assert {name: CASES[name].n_atoms for name in ATOMS} == ATOMS
    assert CASES["cu-vacancy-107"].half == "development"  # it had been looked at in an earlier study


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_states_of_a_case_differ_in_positions_alone_and_one_hop_moves_few_atoms(case: Case) -> None:
    first, *others = case.built.values()
    for other in others:
        np.testing.assert_array_equal(other.numbers, first.numbers)
        np.testing.assert_array_equal(other.cell.array, first.cell.array)
        assert [c.todict() for c in other.constraints] == [c.todict() for c in first.constraints]
    if case.name in FREE:
        fixed = Structure.from_atoms(first).fixed.all(axis=1)
        assert (~fixed).sum() == FREE[case.name]
    if case.calculator == "emt":
        for hop in case.hops:
            moves = case.built[hop.final].positions - case.built[hop.initial].positions
            n_moving = int((np.linalg.norm(moves, axis=1) > 0.5).sum())
            assert 1 <= n_moving <= MOVING.get(case.name, 2), hop.name


def test_states_are_relaxed_once_and_found_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = CASES["au-al100"]
    made = end_states(case, tmp_path)
    assert "states relaxed" in capsys.readouterr().err
    found = end_states(case, tmp_path)
    assert capsys.readouterr().err == ""
    for name, atoms in made.items():
        np.testing.assert_allclose(found[name].positions, atoms.positions, atol=1e-8)
        labelled = label(case, Structure.from_atoms(found[name]))
        assert labelled.structure.free_fmax(labelled.forces) < 0.0101
    assert not np.allclose(made["initial"].positions, case.built["initial"].positions)
    assert end_states(CASES["au-al100-unrelaxed"], tmp_path)["initial"] is not None


def label(case: Case, structure: Structure):  # type: ignore[no-untyped-def]
    labeler = InProcessLabeler(resolve(case.calculator, case.settings))
    candidate = Candidate(path="hop", kind="data", image=0, structure=structure)
    key = label_key(structure, labeler.fingerprint)
    (found,) = labeler.label([LabelRequest(key=key, candidate=candidate, generation=0)])
    labeler.close()
    assert labeler.n_calls == 1
    return found


def test_an_impossible_structure_is_a_failed_call_not_an_error() -> None:
    case = CASES["malonaldehyde"]
    crowded = case.built["initial"]
    crowded = crowded.copy()
    crowded.positions[1] = crowded.positions[0]
    found = label(case, Structure.from_atoms(crowded))
    assert not found.ok
    assert found.reason


@pytest.mark.parametrize(("optimizer", "low", "high"), [("BFGS", 60, 130), ("FIRE", 120, 190)])
def test_plain_ci_neb_finds_the_known_barrier_and_counts_its_calls(
    tmp_path: Path, optimizer: str, low: int, high: int
) -> None:
    """Against the published calls of this hop and the independent ground truth of the example."""
    case = CASES["au-al100"]
    (pair,) = pairs_of(case, tmp_path)
    assert baselines.known_calls(case, optimizer, tmp_path) is None  # type: ignore[arg-type]
    found = baselines.counted_neb(case, pair, baselines.band_spec(case, optimizer), tmp_path)  # type: ignore[arg-type]
    truth = json.loads((Path(__file__).parents[1] / "ground_truth/ci_neb.json").read_text())["au_al100"]
    assert found["converged"]
    assert found["barrier_ev"] == pytest.approx(truth["barrier_ev"], abs=0.003)
    assert low <= found["calls"] <= high
    assert (found["calls"] - 2) % 7 == 0
    assert baselines.known_calls(case, optimizer, tmp_path) == [found["calls"]]  # type: ignore[arg-type]


def test_a_saddle_has_one_negative_mode_and_a_minimum_none(tmp_path: Path) -> None:
    (row,) = baselines.check(CASES["au-al100"], tmp_path, modes=True)
    assert row["valid"]
    assert [len(modes) for modes in row["negative_modes"]] == [0, 1, 0]


def test_a_band_that_spends_its_calls_has_not_converged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "CAP", 30)
    case = CASES["au-al100"]
    (pair,) = pairs_of(case, tmp_path)
    found = baselines.ci_neb(case, pair, baselines.band_spec(case, "FIRE"))
    assert not found["converged"]
    assert 30 <= found["calls"] <= 37
    assert "30 evaluations" in found["failed"]


def test_a_band_that_did_not_converge_is_no_truth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "CAP", 30)
    (row,) = baselines.check(CASES["au-al100"], tmp_path, modes=False)
    assert not row["converged"]
    assert not row["valid"]
    with pytest.raises(
        baselines.NoTruthError, match=r"^au-al100, hop: no true barrier, .* \(CapError: 30 evaluations\)$"
    ):
        baselines.truths(CASES["au-al100-unrelaxed"], tmp_path)


def test_cases_with_elements_the_prior_does_not_know_are_left_out_and_named(tmp_path: Path) -> None:
    save_model_file(build_model([3, 9, 29, 47], 0), tmp_path / "some.model")
    names = "cu-vacancy-31,lif-vacancy,ag-adatom-111,butane,set-au-al100"
    told = Console(file=StringIO(), width=200)

    def chosen(prior: str) -> list[str]:
        given = Namespace(cases=names, half="all", prior=prior, cache=tmp_path, variants="default", seeds="0,1")
        tasks = tasks_of(given, told)
        assert [task.seed for task in tasks] == [0, 1] * (len(tasks) // 2)
        return [task.case for task in tasks[::2]]

    assert chosen("none") == names.split(",")
    assert told.file.getvalue() == ""  # type: ignore[attr-defined]
    assert chosen(str(tmp_path / "some.model")) == ["cu-vacancy-31", "lif-vacancy", "ag-adatom-111"]
    said = "left out, some.model does not know their elements: butane (H C), set-au-al100 (Al Au)\n"
    assert told.file.getvalue() == said  # type: ignore[attr-defined]


def test_a_run_whose_calls_were_miscounted_is_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice(InProcessLabeler):
        def _label_one(self, request: LabelRequest) -> Label:
            super()._label_one(request)
            return super()._label_one(request)

    monkeypatch.setitem(VARIANTS, "brief", Variant(about="two labels", stop={"max_labels": 2, "max_generations": 1}))
    monkeypatch.setattr(baselines, "truths", lambda case, cache: {"hop": 0.374})
    monkeypatch.setattr("run.recheck", lambda path, labeler: {})
    task = Task(case="au-al100", variant="brief", seed=0, prior="", cache=str(tmp_path), code="x")
    record = run_task(task)
    assert "error" not in record
    assert record["calls"] == record["n_calls_counted"] > 0
    monkeypatch.setattr("run.InProcessLabeler", Twice)
    assert (
        f"counts {record['calls']} calls of the reference, which was asked {2 * record['calls']}"
        in run_task(task)["error"]
    )


def test_every_variant_is_one_the_code_knows() -> None:
    from alcore.mace.trainer import ModelSpec

    for variant in VARIANTS.values():
        spec = loop_spec(CASES["cr-sb2te3"], variant, seed=3)
        assert (spec.neb.n_images, spec.neb.spring_ev_per_ang2, spec.select.seed) == (11, 1.0, 3)
        ModelSpec(**variant.model)
    assert loop_spec(CASES["set-cu-ni-vacancy"], VARIANTS["default"], 0).stop.max_labels == 200
    assert loop_spec(CASES["au-al100"], VARIANTS["images-5"], 0).neb.n_images == 5


def test_the_key_of_a_record_tells_runs_apart_and_broken_ones_are_repeated(tmp_path: Path) -> None:
    task = Task(case="a", variant="b", seed=0, prior="/some/where/p.model", cache="c", code="x")
    assert task.key == "a|b|p.model|0|x"
    file = tmp_path / "out.jsonl"
    assert done_keys(file, keep_code=False) == set()
    file.write_text('{"key": "a|b||0|x"}\n{"key": "a|b||1|x", "error": "died"}\n')
    assert done_keys(file, keep_code=False) == {"a|b||0|x"}
    assert done_keys(file, keep_code=True) == {"a|b||0"}


@pytest.mark.slow
def test_a_run_is_recorded_with_all_that_the_tables_need(tmp_path: Path) -> None:
    """The whole loop on the smallest hop, from nothing; what is told agrees with an independent evaluation."""
    task = Task(case="au-al100", variant="zero-shot", seed=0, prior="", cache=str(tmp_path), code="x")
    record = json.loads(json.dumps(run_task(task)))
    assert "error" not in record, record.get("error")
    assert record["calls"] == record["n_calls_counted"] == sum(record["calls_by_kind"].values())
    hop, check = record["hops"]["hop"], record["checks"]["hop"]
    assert record["converged"]
    assert check["barrier_ev"] == pytest.approx(hop["verified_ev"], abs=1e-9)
    assert check["fmax_ev_per_ang"] == pytest.approx(hop["saddle_fmax_ev_per_ang"], abs=1e-9)
    assert abs(hop["error_ev"]) < 0.01
    asked = sum(n for kind, n in record["calls_by_kind"].items() if kind in ("saddle", "uncertain"))
    assert len(record["residuals"]) == asked > 0
    assert "verified" in told(record)
