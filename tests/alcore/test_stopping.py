"""Converged only if everything holds; each criterion alone stands in its way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from ase import Atoms

from alcore.barrier import estimate_barrier
from alcore.stopping import StopSpec, budget, decide, hop_budget, overall, unmet
from alcore.types import Band, BarrierEstimate, Decision, PathRecord, Residual, Structure

SPEC = StopSpec(barrier_tolerance_ev=0.01, saddle_fmax_ev_per_ang=0.05, max_generations=5, max_labels=10)


def _band(energies: list[float], sigma: float = 0.004, **kwargs: Any) -> Band:
    n = len(energies)
    template = Structure.from_atoms(Atoms("H", positions=[[0, 0, 0]]))
    return Band(
        **{
            "path": "hop",
            "template": template,
            "positions": np.linspace(0, 1, n)[:, None, None] * np.array([[[1.0, 0, 0]]]),
            "energies_ev": np.array(energies),
            "forces": np.zeros((n, 1, 3)),
            "sigma_committee_ev": np.zeros(n),
            "sigma_posterior_ev": np.full(n, sigma),
            "sigma_ev": np.array([0.0] + [sigma] * (n - 1)),
            "coordinate_ang": np.linspace(0, 1, n),
            "status": "converged",
            "climbing_image": 2,
            **kwargs,
        }
    )


def _barrier(forward: float, reverse: float, sigma: float = 0.004) -> BarrierEstimate:
    return BarrierEstimate(
        forward_ev=forward,
        reverse_ev=reverse,
        reaction_energy_ev=forward - reverse,
        spline_forward_ev=forward,
        sigma_ev=sigma,
        sigma_committee_ev=0.0,
        sigma_posterior_ev=sigma,
        saddle_image=2,
    )


def _residual(**kwargs: Any) -> Residual:
    values: dict[str, Any] = {
        "key": "saddle",
        "path": "hop",
        "kind": "saddle",
        "generation": 3,
        "predicted_ev": 0.405,
        "labelled_ev": 0.400,
        "sigma_committee_ev": 0.0,
        "sigma_posterior_ev": 0.004,
        "sigma_ev": 0.008,
        "fmax_ev_per_ang": 0.03,
    }
    return Residual(**{**values, **kwargs})


@pytest.fixture
def settled() -> PathRecord:
    """Everything holds."""
    band = _band([0.0, 0.2, 0.405, 0.2, 0.1])
    return PathRecord(
        path="hop",
        initial=band.template,
        final=band.structure(4),
        band=band,
        barrier=_barrier(0.405, 0.305),
        label_keys=("saddle",),
        residuals=(_residual(),),
        initial_label="i",
        final_label="f",
        initial_fmax_ev_per_ang=0.01,
        final_fmax_ev_per_ang=0.02,
        saddle_key="saddle",
        verified_barrier_ev=0.400,
        saddle_fmax_ev_per_ang=0.03,
        barrier_std_ev=0.005,
    )


def test_converged_if_everything_holds(settled: PathRecord) -> None:
    decision = decide(settled, SPEC)
    assert (decision.stop, decision.code) == (True, "converged")
    assert "0.400 ± 0.005 eV" in decision.reason
    assert unmet(settled, SPEC) == []


CRITERIA: dict[str, tuple[dict[str, Any], str]] = {
    "no label of the initial state": ({"initial_fmax_ev_per_ang": None}, "initial state has no label"),
    "no label of the final state": ({"final_fmax_ev_per_ang": None}, "final state has no label"),
    "force on the initial state": ({"initial_fmax_ev_per_ang": 0.06}, "force on the initial state 0.060"),
    "force on the final state": ({"final_fmax_ev_per_ang": 0.06}, "force on the final state 0.060"),
    "no band": ({"band": None, "barrier": None}, "no band yet"),
    "band ran out of steps": (
        {"band": _band([0, 0.2, 0.405, 0.2, 0.1], status="max_steps", reason="too slow")},
        "too slow",
    ),
    "band was stopped by a guard": (
        {"band": _band([0, 0.2, 0.405, 0.2, 0.1], status="guarded", reason="flew away")},
        "flew away",
    ),
    "saddle not labelled": ({"saddle_key": ""}, "saddle not labelled"),
    "another image labelled": ({"residuals": (_residual(key="other", kind="uncertain"),)}, "saddle not labelled"),
    "saddle was predicted too high": ({"residuals": (_residual(predicted_ev=0.412),)}, "predicted 12 meV off"),
    "saddle was predicted too low": ({"residuals": (_residual(predicted_ev=0.388),)}, "predicted 12 meV off"),
    "force on the saddle": ({"residuals": (_residual(fmax_ev_per_ang=0.051),)}, "force on the saddle 0.051"),
    "uncertainty unknown": ({"barrier_std_ev": None}, "uncertainty unknown"),
    "uncertainty too large": ({"barrier_std_ev": 0.012}, "uncertainty 12 meV"),
    "saddle below the final state": ({"barrier": _barrier(0.405, -0.001)}, "no saddle above both"),
    "saddle within its uncertainty of the final state": ({"barrier": _barrier(0.405, 0.004)}, "no saddle above both"),
    "saddle within its uncertainty of the initial state": ({"barrier": _barrier(0.004, 0.405)}, "no saddle above both"),
}


@pytest.mark.parametrize("criterion", CRITERIA)
def test_each_criterion_alone_prevents_convergence(criterion: str, settled: PathRecord) -> None:
    change, says = CRITERIA[criterion]
    record = replace(settled, **change)
    decision = decide(record, SPEC)
    assert decision.code != "converged"
    missing = unmet(record, SPEC)
    assert len(missing) == 1
    assert says in missing[0]
    if decision.code == "continue":
        assert not decision.stop
        assert says in decision.reason


def _flat(settled: PathRecord, **kwargs: Any) -> PathRecord:
    band = _band([0.0, 0.001, 0.002, -0.2, -0.4], **kwargs)
    return replace(
        settled, band=band, barrier=_barrier(0.002, 0.402), residuals=(), saddle_key="", verified_barrier_ev=None
    )


def test_a_hop_without_a_barrier_is_recognised(settled: PathRecord) -> None:
    decision = decide(_flat(settled), SPEC)
    assert (decision.stop, decision.code) == (True, "barrierless")


@pytest.mark.parametrize(
    "change",
    [{"sigma": 0.02}, {"status": "guarded"}, {"status": "max_steps"}],
)
def test_an_uncertain_flat_band_is_not_called_barrierless(settled: PathRecord, change: dict[str, Any]) -> None:
    assert decide(_flat(settled, **change), SPEC).code == "continue"


def test_a_flat_band_between_restless_end_states_is_not_called_barrierless(settled: PathRecord) -> None:
    assert decide(replace(_flat(settled), final_fmax_ev_per_ang=0.2), SPEC).code == "continue"
    assert decide(replace(_flat(settled), initial_fmax_ev_per_ang=None), SPEC).code == "continue"


@pytest.mark.parametrize(
    ("calls", "code"),
    [(9, None), (10, "label_budget"), (11, "label_budget")],
)
def test_the_budget_of_a_run(calls: int, code: str | None) -> None:
    found = budget(calls, SPEC)
    assert (found.code if found else None) == code
    assert found is None or found.stop


def test_the_budget_of_a_hop_counts_the_generations_in_which_it_asked(settled: PathRecord) -> None:
    """After that of the end states; not those in which it waited."""
    waited = replace(settled, label_keys=())
    assert hop_budget([settled] * 5, SPEC) is None
    assert hop_budget([settled, waited] * 5, SPEC) is None
    found = hop_budget([settled, waited, *[settled] * 5], SPEC)
    assert found is not None
    assert (found.stop, found.code) == (True, "generation_budget")


def test_the_run_goes_on_until_every_hop_is_settled(settled: PathRecord) -> None:
    going = replace(settled, path="a", decision=Decision(stop=False, code="continue", reason="not yet"))
    done = replace(settled, path="b", decision=Decision(stop=True, code="converged", reason="fine"))
    flat = replace(settled, path="c", decision=Decision(stop=True, code="barrierless", reason="flat"))
    spent = Decision(stop=True, code="label_budget", reason="spent")
    found = overall([going, done], None)
    assert not found.stop
    assert found.reason == "a: not yet"
    assert overall([going, done], spent) == spent
    assert overall([done, done], spent).code == "converged"
    both = overall([done, flat], None)
    assert (both.stop, both.code) == (True, "barrierless")
    assert "b: fine" in both.reason
    assert "c: flat" in both.reason


def test_a_saddle_that_jumps_is_said_but_stops_nothing(settled: PathRecord) -> None:
    """Both labels contradict: the path is not the one before."""

    def on_side(y: float) -> PathRecord:
        assert settled.band is not None
        places = settled.band.positions.copy()
        places[2, 0, 1] = y
        wrong = (_residual(predicted_ev=0.6),)
        return replace(settled, band=replace(settled.band, positions=places), residuals=wrong)

    decision = decide(on_side(1.0), SPEC, [on_side(-1.0)])
    assert (decision.stop, decision.code) == (False, "continue")
    assert "the saddle jumped 2.0 Å to another path" in decision.reason
    assert "predicted 200 meV off" in decision.reason
    assert "jumped" not in decide(on_side(1.0), SPEC).reason


def test_an_end_state_above_its_neighbours_is_no_minimum(settled: PathRecord) -> None:
    """Its force vanishes by symmetry, but the reference puts the next images below it."""
    band = _band([0.0, -0.04, -0.1, 0.1, -0.2])
    label = _residual(key="other", kind="uncertain", labelled_ev=-0.09, predicted_ev=-0.1, image=2)
    record = replace(settled, band=band, residuals=(label,), saddle_key="", verified_barrier_ev=None)
    decision = decide(record, SPEC)
    assert (decision.stop, decision.code) == (True, "end_state_not_minimum")
    assert decision.reason.startswith("the initial state is no minimum: image 2, 0.50 Å along the band, lies 90 meV")
    assert "displaced geometry" in decision.reason
    assert decide(replace(record, residuals=(replace(label, labelled_ev=-0.029),)), SPEC).code == "continue"
    hill = replace(record, band=replace(band, energies_ev=np.array([0.0, 0.01, -0.1, 0.1, -0.2])))
    assert decide(hill, SPEC).code == "continue"
    unsound = replace(record, band=replace(band, status="guarded", reason="flew away"))
    assert decide(unsound, SPEC).code == "continue"
    unknown = replace(record, residuals=(replace(label, image=None),))
    assert decide(unknown, SPEC).code == "continue"


def test_a_final_state_that_is_no_minimum_is_seen_from_its_side(settled: PathRecord) -> None:
    band = _band([0.0, 0.3, 0.1, 0.15, 0.2])
    label = _residual(key="other", kind="uncertain", labelled_ev=0.15, predicted_ev=0.15, image=3)
    decision = decide(replace(settled, band=band, residuals=(label,), saddle_key=""), SPEC)
    assert decision.code == "end_state_not_minimum"
    assert decision.reason.startswith("the final state is no minimum: image 3, 0.25 Å along the band, lies 50 meV")


def test_barrierless_says_which_state_gives_way(settled: PathRecord) -> None:
    flat = _flat(settled)
    assert "from the initial state it goes downhill to the final one" in decide(flat, SPEC).reason
    assert flat.band is not None
    back = replace(flat, band=replace(flat.band, energies_ev=flat.band.energies_ev[::-1]), barrier=_barrier(0.402, 0.0))
    assert "from the final state it goes downhill to the initial one" in decide(back, SPEC).reason


def test_another_segment_that_may_be_higher_prevents_convergence(settled: PathRecord) -> None:
    """Two humps, the second 15 meV lower: known to 8 meV it is no rival, unknown to 12 meV it is."""
    for sigma, says in ((0.008, []), (0.012, ["the saddle at image 4, ± 12 meV, may be the highest"])):
        band = _band([0.0, 0.2, 0.405, 0.2, 0.39, 0.2, 0.1], minima=(3,))
        sigmas = np.array([0.0, 0.004, 0.004, 0.004, sigma, 0.004, 0.004])
        record = replace(settled, band=replace(band, sigma_ev=sigmas))
        assert unmet(record, SPEC) == says


def test_a_lower_hump_of_a_whole_band_prevents_convergence_likewise(settled: PathRecord) -> None:
    band = _band([0.0, 0.2, 0.405, 0.3, 0.40, 0.2, 0.1])
    record = replace(settled, band=replace(band, sigma_ev=np.array([0, 0.004, 0.004, 0.03, 0.06, 0.03, 0.004])))
    assert unmet(record, SPEC) == ["the saddle at image 4, ± 60 meV, may be the highest"]


def _pulled(band: Band, image: int, slope_ev_per_ang: float) -> Band:
    """The band with this slope of the energy along it at one image."""
    forces = np.array(band.forces)
    forces[image, 0, 0] = -slope_ev_per_ang
    return replace(band, forces=forces)


def test_a_minimum_behind_a_small_barrier_between_two_images_is_one(settled: PathRecord) -> None:
    """The images fall all the way; the force on the second says that a hump of 11 meV lies before it."""
    falling = _band([0.0, -0.04, -0.1, 0.1, -0.2])
    label = _residual(key="other", kind="uncertain", labelled_ev=-0.09, predicted_ev=-0.1, image=2)
    record = replace(settled, band=falling, residuals=(label,), saddle_key="", verified_barrier_ev=None)
    assert decide(record, SPEC).code == "end_state_not_minimum"
    assert decide(replace(record, band=_pulled(falling, 1, -1.0)), SPEC).code == "continue"
    rising = _band([-0.2, 0.1, -0.1, -0.04, 0.0])
    label = replace(label, labelled_ev=-0.09)
    record = replace(record, band=rising, residuals=(label,))
    assert decide(record, SPEC).reason.startswith("the final state is no minimum: image 2, 0.50 Å along the band")
    assert decide(replace(record, band=_pulled(rising, 3, 1.0)), SPEC).code == "continue"


def test_a_barrier_between_two_images_is_not_called_none(settled: PathRecord) -> None:
    flat = _flat(settled)
    assert flat.band is not None
    band = _pulled(flat.band, 1, -1.0)
    decision = decide(replace(flat, band=band, barrier=estimate_barrier(band)), SPEC)
    assert decision.code == "continue"
    assert "no image on the saddle, 38 meV high between two of them: give more images" in decision.reason
