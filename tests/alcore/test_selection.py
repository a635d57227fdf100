"""What is labelled next: never twice, never nonsense, spread over the band."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from hypothesis import given
from hypothesis import strategies as st

from alcore.identity import label_key
from alcore.selection import SelectSpec, barrier_gain, select, whose_turn
from alcore.types import Band, Candidate, CommitteePrediction, FloatArray, Structure

N = 9
STRATEGIES = ["saddle+uncertainty", "uncertainty", "barrier-variance", "random"]


def key_of(structure: Structure) -> str:
    return label_key(structure, "f")


def _covariance(length: float = 2.0) -> FloatArray:
    """That of a smooth function that is known at both ends."""
    k = np.arange(N)
    prior = 0.04 * np.exp(-0.5 * ((k[:, None] - k) / length) ** 2)
    ends = [0, N - 1]
    return np.asarray(
        prior - prior[:, ends] @ np.linalg.solve(prior[np.ix_(ends, ends)] + 1e-9 * np.eye(2), prior[ends])
    )


def _band(energies: Any = None, **kwargs: Any) -> Band:
    template = Structure.from_atoms(Atoms("Cu2", positions=[[0, 0, 0], [0, 0, 4.0]]))
    positions = np.repeat(template.positions[None], N, axis=0)
    positions[:, 0, 0] = np.linspace(0, 3, N)
    energies = np.sin(np.pi * np.arange(N) / (N - 1)) ** 2 if energies is None else np.array(energies)
    sigma = np.sqrt(np.maximum(np.diag(_covariance()), 0))
    values: dict[str, Any] = {
        "path": "hop",
        "template": template,
        "positions": positions,
        "energies_ev": energies,
        "forces": np.zeros_like(positions),
        "sigma_committee_ev": np.zeros(N),
        "sigma_posterior_ev": sigma,
        "sigma_ev": 2 * sigma,
        "coordinate_ang": np.linspace(0, 3, N),
        "status": "converged",
    }
    return Band(**{**values, **kwargs})


def _prediction(band: Band, covariance: FloatArray | None = None) -> CommitteePrediction:
    return CommitteePrediction(
        energies_ev=band.energies_ev - 7.0,
        forces=band.forces,
        members_ev=np.zeros((0, N)),
        by_lead_ev={"prior": band.energies_ev - 7.0},
        covariance_ev2=_covariance() if covariance is None else covariance,
    )


def _pick(
    band: Band, labelled: frozenset[str] = frozenset(), covariance: FloatArray | None = None, **spec: Any
) -> list[Candidate]:
    return select(band, _prediction(band, covariance), SelectSpec(**spec), key_of=key_of, labelled=labelled)


def test_the_saddle_comes_first_and_carries_its_prediction() -> None:
    band = _band()
    (saddle,) = _pick(band)
    assert (saddle.kind, saddle.image, saddle.path) == ("saddle", 4, "hop")
    assert saddle.energy_ev == band.energies_ev[4]
    assert saddle.sigma_ev == band.sigma_ev[4]
    assert saddle.by_lead_ev == {"prior": pytest.approx(1.0)}
    np.testing.assert_array_equal(saddle.structure.positions, band.positions[4])


@pytest.mark.parametrize("status", ["max_steps", "guarded"])
def test_a_band_that_did_not_converge_has_no_saddle_worth_a_label(status: str) -> None:
    covariance = _covariance()
    covariance[6, 6] += 1.0
    (found,) = _pick(_band(status=status), covariance=covariance)
    assert (found.kind, found.image) == ("uncertain", 6)


def test_a_band_without_a_hump_has_no_saddle() -> None:
    (found,) = _pick(_band(np.linspace(0, -1, N)))
    assert found.kind == "uncertain"


@pytest.mark.parametrize(("lead", "image"), [("committee", 7), ("prior", 4)])
def test_the_committee_counts_where_it_leads(lead: str, image: int) -> None:
    spread = np.zeros(N)
    spread[7] = 1.0
    band = _band(sigma_committee_ev=spread)
    prediction = replace(_prediction(band, None), lead=lead)
    (found,) = select(band, prediction, SelectSpec(strategy="uncertainty"), key_of=key_of, labelled=frozenset())
    assert found.image == image


def test_a_well_that_no_label_supports_comes_before_the_saddle() -> None:
    energies = np.array(_band().energies_ev)
    energies[2] = -0.2
    (found,) = _pick(_band(energies))
    assert (found.kind, found.image) == ("uncertain", 2)


def test_a_batch_spreads_over_the_band() -> None:
    """Each pick teaches something of its neighbours, so the next one lies elsewhere."""
    images = [c.image for c in _pick(_band(), labels_per_generation=3)]
    assert images[0] == 4
    assert len(set(images)) == 3
    assert np.diff(np.sort(images)).min() >= 2


@given(st.sets(st.integers(1, N - 2)), st.integers(1, 10), st.sampled_from(STRATEGIES))
def test_nothing_labelled_and_no_end_state_is_ever_picked(done: set[int], wanted: int, strategy: Any) -> None:
    band = _band()
    labelled = frozenset(key_of(band.structure(k)) for k in done)
    found = _pick(band, labelled, labels_per_generation=wanted, strategy=strategy)
    images = [c.image for c in found]
    assert len(images) == len(set(images)) == min(wanted, N - 2 - len(done))
    assert not set(images) & (done | {0, N - 1})


def test_an_unphysical_image_is_never_picked() -> None:
    band = _band()
    positions = band.positions.copy()
    positions[4, 0] = [0.0, 0.0, 3.2]  # 0.8 Å from the other atom
    crowded = replace(band, positions=positions)
    images = [c.image for c in _pick(crowded, labels_per_generation=N)]
    assert sorted(images) == [1, 2, 3, 5, 6, 7]


def test_nothing_left_is_nothing_picked() -> None:
    band = _band()
    assert _pick(band, frozenset(key_of(band.structure(k)) for k in range(N))) == []


def test_the_label_that_tells_most_of_the_barrier_is_the_highest_image_where_that_is_certain() -> None:
    """And a batch goes on with another one: after its label nothing is left to learn there."""
    energies = np.array(_band().energies_ev)
    energies[4] += 50.0
    covariance = _covariance()
    covariance[1, 1] += 1.0  # the most uncertain one, which says nothing about the barrier
    first, second = _pick(_band(energies), covariance=covariance, strategy="barrier-variance", labels_per_generation=2)
    assert (first.kind, first.image) == ("saddle", 4)
    assert second.kind == "uncertain"
    (uncertain,) = _pick(_band(energies), covariance=covariance, strategy="uncertainty")
    assert uncertain.image == 1


def test_where_two_humps_compete_the_less_certain_one_is_asked() -> None:
    """The higher one is known already; whether the barrier is there hangs on the other."""
    energies = np.zeros(N)
    energies[[2, 6]] = 1.0, 0.98
    covariance = np.diag(np.r_[0.0, np.full(N - 2, 1e-6), 0.0])
    covariance[6, 6] = 0.05**2
    band = _band(energies, sigma_posterior_ev=np.sqrt(np.diag(covariance)), sigma_ev=np.sqrt(np.diag(covariance)))
    (found,) = _pick(band, covariance=covariance, strategy="barrier-variance")
    assert (found.kind, found.image) == ("uncertain", 6)
    (default,) = _pick(band, covariance=covariance)
    assert (default.kind, default.image) == ("uncertain", 6)
    (default,) = _pick(replace(band, sigma_ev=np.minimum(band.sigma_ev, 0.005)), covariance=covariance)
    assert (default.kind, default.image) == ("saddle", 2)


def _two_humps(sigma_of_saddle_ev: float) -> Band:
    """Divided in the middle; the second hump is 20 meV lower, give or take 30, and its sides are no better known."""
    sigma = np.array([0.0, 0.004, sigma_of_saddle_ev, 0.004, 0.004, 0.025, 0.03, 0.025, 0.004])
    energies = np.array([0.0, 0.3, 0.5, 0.3, 0.1, 0.3, 0.48, 0.3, 0.0])
    return _band(energies, minima=(4,), sigma_ev=sigma, sigma_posterior_ev=sigma)


def test_a_rival_is_asked_before_the_saddle_and_with_it_where_two_may() -> None:
    band = _two_humps(0.004)
    covariance = np.diag(band.sigma_ev**2)
    for strategy in ("saddle+uncertainty", "uncertainty"):
        (first,) = _pick(band, covariance=covariance, strategy=strategy)
        assert (first.kind, first.image) == ("uncertain", 6)
    both = _pick(band, covariance=covariance, labels_per_generation=2)
    assert [(c.kind, c.image) for c in both] == [("uncertain", 6), ("saddle", 2)]
    (alone,) = _pick(band, {key_of(band.structure(6))}, covariance=covariance)
    assert (alone.kind, alone.image) == ("saddle", 2)
    (unsure,) = _pick(replace(band, status="guarded"), covariance=covariance)
    assert unsure.kind == "uncertain"


def test_a_rival_that_is_known_better_than_the_saddle_waits() -> None:
    band = _two_humps(0.04)
    first, second = _pick(band, covariance=np.diag(band.sigma_ev**2), labels_per_generation=2)
    assert [(c.kind, c.image) for c in (first, second)] == [("saddle", 2), ("uncertain", 6)]


def test_the_gain_of_a_label_is_what_the_variance_of_the_highest_energy_falls_by() -> None:
    """Against brute force: the variance of the maximum, drawn given each possible answer."""
    rng = np.random.default_rng(0)
    energies = np.array(_band().energies_ev)
    covariance = _covariance(length=1.0)
    sigma = np.sqrt(np.diag(covariance))
    gain = barrier_gain(_band(energies, sigma_posterior_ev=sigma, sigma_ev=sigma), covariance, np.zeros(N))
    drawn = rng.multivariate_normal(energies, covariance, size=200_000, method="eigh")
    highest = drawn[:, 1:-1].max(axis=1)
    for image in range(1, N - 1):
        slope, _ = np.polyfit(drawn[:, image], highest, 1)
        explained = slope**2 * drawn[:, image].var()
        assert gain[image] == pytest.approx(explained, rel=0.1, abs=2e-5)


def test_the_gain_scales_with_the_calibrated_sigma() -> None:
    covariance, sigma = _covariance(), np.sqrt(np.diag(_covariance()))
    energies = np.array(_band().energies_ev)
    energies[4] += 50.0  # no doubt which image is the highest
    stated, doubled = (
        barrier_gain(_band(energies, sigma_posterior_ev=sigma, sigma_ev=f * sigma), covariance, np.zeros(N))
        for f in (1, 2)
    )
    np.testing.assert_allclose(doubled[1:-1], 4 * stated[1:-1], rtol=1e-3)


def test_random_images_depend_on_the_seed_and_on_how_much_was_asked() -> None:
    def image(seed: int, n_labelled: int) -> int:
        labelled = frozenset(str(k) for k in range(n_labelled))
        (found,) = _pick(_band(), labelled, strategy="random", seed=seed)
        return found.image

    assert image(0, 2) == image(0, 2)
    assert len({image(seed, 2) for seed in range(20)}) > 3
    assert len({image(0, n) for n in range(20)}) > 3


@pytest.mark.parametrize(("hops", "turn"), [(1, ["b"]), (2, ["b", "c"]), (9, ["b", "c", "a"])])
def test_the_least_certain_hops_ask_first(hops: int, turn: list[str]) -> None:
    assert whose_turn({"a": 0.01, "b": 0.3, "c": 0.2}, SelectSpec(hops_per_generation=hops)) == turn
