"""``barrier.json`` says what the records say, and nothing that they do not."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.interpolate import CubicSpline

from alcore.barrier import estimate_barrier
from alcore.types import Decision, GenerationRecord
from flows.report import barrier_summary
from flows.report.frames import labelled_frames, path_forces
from flows.report.schema import BarrierReport
from flows.report.table import result_lines


def change_last(case: Any, **changes: Any) -> tuple[Any, list[GenerationRecord], Any]:
    """The run with its last record of the only hop changed."""
    run, generations, labels = case
    last = generations[-1]
    record = replace(last.paths[0], **changes)
    return run, [*generations[:-1], replace(last, paths=(record,), decision=record.decision)], labels


def test_numbers_are_those_of_the_bands_and_labels(case: Any) -> None:
    summary = barrier_summary(*case)
    record = case.generations[-1].paths[0]
    band, labels = record.band, case.labels
    path = summary["paths"][0]
    assert path["barrier_forward_ev"] == pytest.approx(band.energies_ev.max(), abs=1e-12)
    assert path["reaction_energy_ev"] == pytest.approx(band.energies_ev[-1], abs=1e-12)
    reference = labels[record.saddle_key].energy_ev - labels[record.initial_label].energy_ev
    assert path["verified_barrier_ev"] == pytest.approx(reference, abs=1e-12)
    assert path["verified_barrier_ev"] == pytest.approx(0.3745, abs=0.001)  # an independent CI-NEB
    assert path["error_to_verified_ev"] == pytest.approx(path["barrier_forward_ev"] - reference, abs=1e-12)
    assert path["barrier_std_ev"] == pytest.approx(0.8 * 0.004)
    assert [row["predicted_std_ev"] for row in path["generations"]] == pytest.approx([None, 0.09, 0.03, 0.004])
    assert [extremum["kind"] for extremum in path["extrema"]] == ["minimum", "maximum", "minimum"]
    assert summary["converged"]
    assert path["saddle_verified"]
    assert {key: summary[key] for key in ("barrier_forward_ev", "verified_barrier_ev")} == {
        key: path[key] for key in ("barrier_forward_ev", "verified_barrier_ev")
    }


def test_calls_are_counted_once_failures_included_reused_not(case: Any) -> None:
    summary = barrier_summary(*case)
    path = summary["paths"][0]
    new = [label for label in case.labels.values() if not label.reused]
    assert summary["n_reference_calls"] == path["n_reference_calls"] == len(new) == 6
    assert path["n_reference_calls_by_kind"] == {"final": 1, "saddle": 3, "uncertain": 2, "failed": 1}
    assert path["n_labels_reused"] == summary["n_labels_reused"] == 1
    assert [row["n_labels"] for row in summary["generations"]] == [2, 4, 6, 7]
    assert summary["dataset_size"] == sum(label.ok for label in case.labels.values())


def test_a_spin_state_that_jumps_is_reported(case: Any) -> None:
    """Moments drift along the path but for the saddle, whose electron flipped."""
    run, generations, labels = case
    record = generations[-1].paths[0]
    n_atoms = len(record.initial)
    with_moments = {key: replace(label, magnetic_moments=np.full(n_atoms, 0.1)) for key, label in labels.items()}
    assert barrier_summary(run, generations, with_moments)["paths"][0]["spin_jumps"] == []
    flipped = np.full(n_atoms, 0.1)
    flipped[-1] = 2.1
    with_moments[record.saddle_key] = replace(with_moments[record.saddle_key], magnetic_moments=flipped)
    jumps = barrier_summary(run, generations, with_moments)["paths"][0]["spin_jumps"]
    assert jumps
    assert all(f"moment of atom {n_atoms - 1}" in jump and "+2.10" in jump for jump in jumps)


def test_failures_keep_reason_and_folder(case: Any) -> None:
    (failure,) = barrier_summary(*case)["failures"]
    assert failure["status"] == "crashed"
    assert (failure["generation"], failure["kind"]) == (2, "uncertain")
    assert failure["reason"] == "SCF <did not> settle"
    assert failure["folder"] == "/scratch/labels/abc"


def test_provenance_names_teacher_and_prior(case: Any) -> None:
    summary = barrier_summary(*case)
    assert summary["prior"]["description"] == "untrained MACE, seed 0: has seen no reference"
    assert summary["teacher"]["name"] == "emt"
    assert summary["teacher"]["fingerprints"] == ["emt-1"]
    assert summary["model_members_sha256"] == ["a1" * 32, "b2" * 32]
    assert len(summary["model_sha256"]) == 64


def test_the_leading_model_is_named(case: Any) -> None:
    run, generations, labels = case
    led = replace(generations[-1], surrogate={**generations[-1].surrogate, "lead": "prior"})
    summary = barrier_summary(run, [*generations[:-1], led], labels)
    assert summary["model_sha256"] == "c3" * 32
    assert summary["model_members_sha256"] == ["a1" * 32, "b2" * 32]


def test_a_settled_hop_that_is_carried_along_says_nothing_new(case: Any) -> None:
    run, generations, labels = case
    last = generations[-1]
    carried = replace(last, index=4, paths=(replace(last.paths[0], label_keys=(), residuals=()),))
    before, after = (barrier_summary(run, g, labels)["paths"] for g in (generations, [*generations, carried]))
    assert after == before


def test_a_prior_that_is_the_teacher_is_called_so(case: Any) -> None:
    settings = dict(case.run.settings)
    settings |= {"model": {"foundation": "small"}, "calculator": {"name": "mace", "settings": {"model": "small"}}}
    summary = barrier_summary(replace(case.run, settings=settings), case.generations, case.labels)
    assert "also the teacher" in summary["prior"]["description"]
    assert "rehearsal" in summary["teacher"]["description"]


def test_nan_and_infinity_become_null(case: Any) -> None:
    last = case.generations[-1].paths[0]
    barrier = replace(last.barrier, sigma_ev=float("inf"), forward_ev=np.float64("nan"))
    band = replace(last.band, fmax_ev_per_ang=float("nan"))
    summary = barrier_summary(*change_last(case, barrier=barrier, band=band, barrier_std_ev=None))
    text = json.dumps(summary, allow_nan=False)
    path = json.loads(text)["paths"][0]
    assert path["barrier_forward_ev"] is None
    assert path["barrier_std_ev"] is None
    assert path["neb_fmax_ev_per_ang"] is None
    assert summary["surrogate"]["noise"] is None


def test_summary_fits_its_own_schema(case: Any) -> None:
    assert BarrierReport.model_validate(barrier_summary(*case)).run == case.run.name


@pytest.mark.parametrize(
    "changes",
    [
        {"error_to_verified_ev": -0.011},
        {"error_to_verified_ev": None},
        {"saddle_fmax_ev_per_ang": 0.051},
        {"saddle_key": ""},
    ],
)
def test_a_saddle_is_verified_only_by_its_own_label_within_the_limits(case: Any, changes: dict[str, Any]) -> None:
    assert not barrier_summary(*change_last(case, **changes))["saddle_verified"]


def test_barrierless_and_exhausted_budgets_are_not_converged(case: Any) -> None:
    for code in ("barrierless", "label_budget", "generation_budget", "labels_failing"):
        stopped = change_last(case, decision=Decision(stop=True, code=code, reason="why"))
        summary = barrier_summary(*stopped)
        assert not summary["converged"]
        assert (summary["stop_code"], summary["stop_reason"]) == (code, "why")


def test_a_failure_two_hops_share_is_one_failure(make_case: Any) -> None:
    summary = barrier_summary(*make_case("two", ("a", "b")))
    assert [failure["path"] for failure in summary["failures"]] == ["a"]


def test_one_open_hop_keeps_the_run_open(make_case: Any) -> None:
    run, generations, labels = make_case("two", ("a", "b"))
    last = generations[-1]
    record = replace(last.paths[1], decision=Decision(stop=True, code="label_budget", reason="spent"))
    summary = barrier_summary(run, [*generations[:-1], replace(last, paths=(last.paths[0], record))], labels)
    assert [path["converged"] for path in summary["paths"]] == [True, False]
    assert not summary["converged"]
    assert summary["barrier_forward_ev"] is None  # of which hop?


def test_a_run_without_generations_or_bands_has_no_barrier(case: Any) -> None:
    empty = barrier_summary(case.run, [], {})
    assert not empty["converged"]
    assert empty["paths"] == []
    early = barrier_summary(case.run, case.generations[:1], case.labels)
    assert early["paths"][0]["barrier_forward_ev"] is None
    assert not early["paths"][0]["neb_converged"]


def test_an_unlabelled_saddle_falls_back_on_the_last_labelled_one_by_name_only(case: Any) -> None:
    summary = barrier_summary(*change_last(case, saddle_key="", verified_barrier_ev=None, error_to_verified_ev=None))
    path = summary["paths"][0]
    assert path["verified_barrier_ev"] is None
    assert path["last_verified_generation"] == 2
    assert path["last_verified_barrier_ev"] == pytest.approx(case.generations[2].paths[0].verified_barrier_ev)


def test_tangential_force_is_minus_the_slope_along_the_path(case: Any) -> None:
    band = case.generations[-1].paths[0].band
    forces = path_forces(band)
    along = forces.tangential_ev_per_ang
    work = CubicSpline(band.coordinate_ang, -along)
    saddle = int(band.energies_ev.argmax())
    uphill = work.integrate(band.coordinate_ang[0], band.coordinate_ang[saddle])
    assert uphill == pytest.approx(band.energies_ev[saddle], rel=0.03)
    assert work.integrate(*band.coordinate_ang[[0, -1]]) == pytest.approx(band.energies_ev[-1], abs=0.005)
    assert abs(along[saddle]) < 0.02
    assert forces.perpendicular_fmax_ev_per_ang.max() < 0.05  # a relaxed band


def test_labels_sit_on_their_image_of_their_generation(case: Any) -> None:
    frames = list(labelled_frames(case.generations, case.labels))
    assert [frame.number for frame in frames] == list(range(1, 8))
    for frame in frames[2:]:
        band = next(g for g in case.generations if g.index == frame.generation).paths[0].band
        assert np.allclose(band.positions[frame.image], frame.label.structure.positions)
        assert frame.coordinate_ang == band.coordinate_ang[frame.image]


def test_a_path_in_one_piece_is_one_segment(case: Any) -> None:
    path = barrier_summary(*case)["paths"][0]
    (segment,) = path["segments"]
    assert path["rate_limiting_segment"] == 0
    assert (segment["barrier_forward_ev"], segment["barrier_reverse_ev"]) == (
        path["barrier_forward_ev"],
        path["barrier_reverse_ev"],
    )
    assert (segment["start_image"], segment["saddle_image"]) == (0, path["saddle_image"])
    assert not any("segments" in line for line in result_lines(barrier_summary(*case)))


def test_a_divided_path_says_each_segment_and_which_limits_the_rate(case: Any) -> None:
    *before, last = case.generations
    record = last.paths[0]
    n = len(record.band.energies_ev)
    energies = np.interp(np.arange(n), [0, 1, 2, 3, n - 1], [0.0, 0.2, 0.05, 0.3, 0.1])
    band = replace(record.band, energies_ev=energies, minima=(2,))
    barrier = estimate_barrier(band)
    divided = [*before, replace(last, paths=(replace(record, band=band, barrier=barrier),))]
    summary = barrier_summary(case.run, divided, case.labels)
    path = summary["paths"][0]
    assert [(s["start_image"], s["saddle_image"], s["end_image"]) for s in path["segments"]] == [
        (0, 1, 2),
        (2, 3, n - 1),
    ]
    assert [s["barrier_forward_ev"] for s in path["segments"]] == pytest.approx([0.2, 0.25])
    assert [s["barrier_reverse_ev"] for s in path["segments"]] == pytest.approx([0.15, 0.2])
    assert path["segments"][1]["saddle_std_ev"] == pytest.approx(float(band.sigma_ev[3]))
    assert (path["rate_limiting_segment"], path["verified_segment"]) == (1, 1)
    assert path["rate_limiting_ev"] == pytest.approx(0.3), "from the initial state, which is lower than the well"
    (line,) = (line for line in result_lines(summary) if "segments" in line)
    assert "number 2 is rate-limiting forward" in line
    assert not any("limits the rate" in line for line in result_lines(summary))
    assert "1: 0.200 eV forward, 0.150 eV reverse" in line


def test_a_lower_saddle_behind_a_deep_well_is_said_to_limit_the_rate(case: Any) -> None:
    """The barrier that is verified stays the highest saddle above the initial state."""
    *before, last = case.generations
    record = last.paths[0]
    n = len(record.band.energies_ev)
    energies = np.interp(np.arange(n), [0, 1, 2, 3, n - 1], [0.0, 0.5, -0.4, 0.4, 0.0])
    band = replace(record.band, energies_ev=energies, minima=(2,))
    divided = [*before, replace(last, paths=(replace(record, band=band, barrier=estimate_barrier(band)),))]
    summary = barrier_summary(case.run, divided, case.labels)
    path = summary["paths"][0]
    assert (path["rate_limiting_segment"], path["verified_segment"], path["saddle_image"]) == (1, 0, 1)
    assert path["rate_limiting_ev"] == pytest.approx(0.8)
    said = (
        "  the barrier is that of number 1, the highest saddle above the initial state; but number 2 climbs 0.800 eV "
        "from a well before it, and limits the rate"
    )
    assert said in result_lines(summary)
