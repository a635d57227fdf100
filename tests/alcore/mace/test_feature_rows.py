"""φ and its derivatives: gradients of what they say they are, whichever way they are computed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from alcore.mace import surrogate as surrogate_module
from alcore.mace.fitting import make_surrogate
from alcore.mace.network import make_networks
from alcore.mace.surrogate import MaceSurrogate
from alcore.neb import NebSpec, interpolate
from alcore.types import EndpointPair, FloatArray, Structure

FEATURES = 48


@pytest.fixture(scope="module")
def band(au_pair: EndpointPair) -> FloatArray:
    return interpolate(au_pair, NebSpec(n_images=5))


def _samples(pair: EndpointPair, band: FloatArray) -> list[Structure]:
    rng = np.random.default_rng(0)
    return [pair.initial.moved(p + 0.05 * rng.standard_normal(p.shape)) for p in band]


@pytest.fixture(scope="module")
def bare(au_pair: EndpointPair, band: FloatArray, untrained_model: Any) -> MaceSurrogate:
    """Random features alone, more of them than coordinates."""
    rng = np.random.default_rng(0)
    return make_surrogate(untrained_model, _samples(au_pair, band), rng, per_element=FEATURES, networks={})


@pytest.fixture(scope="module")
def few(au_pair: EndpointPair, band: FloatArray, lively_model: Any) -> MaceSurrogate:
    """A few random features of a trained prior."""
    rng = np.random.default_rng(0)
    return make_surrogate(lively_model, _samples(au_pair, band), rng, per_element=8, correction="blr+gp")


@pytest.fixture(scope="module")
def over_network(au_pair: EndpointPair, untrained_model: Any) -> MaceSurrogate:
    """The energy of an elastic network alone."""
    networks = make_networks([au_pair.initial, au_pair.final])
    return make_surrogate(untrained_model, [], np.random.default_rng(0), correction="gp", networks=networks)


def test_feature_rows_are_gradients_of_features(bare: MaceSurrogate, au_pair: EndpointPair, band: FloatArray) -> None:
    structure = au_pair.initial.moved(band[1])
    _, rows = bare.feature_rows(structure)
    step = 1e-4
    for atom, axis in ((0, 2), (5, 0), (len(structure) - 1, 1)):
        shift = np.zeros((len(structure), 3))
        shift[atom, axis] = step
        ahead, _ = bare.feature_rows(structure.moved(structure.positions + shift))
        behind, _ = bare.feature_rows(structure.moved(structure.positions - shift))
        np.testing.assert_allclose(rows[3 * atom + axis], -(ahead - behind) / (2 * step), atol=1e-5)


def test_elements_without_features_are_left_to_the_model(
    lively_model: Any, geometries: dict[str, tuple[Structure, FloatArray]]
) -> None:
    """Data of an element that no hop contains: nothing breaks, and the correction has nothing to say."""
    copper, places = geometries["crystal"]
    water, water_places = geometries["molecule without cell"]
    samples = [copper.moved(p) for p in places]
    surrogate = make_surrogate(lively_model, samples, np.random.default_rng(0), per_element=8, networks={})
    phi, rows = surrogate.feature_rows(water.moved(water_places[0]))
    assert phi.shape == (8,)
    assert rows.shape == (9, 8)
    assert not phi.any()
    assert not rows.any()


def test_rows_of_atoms_without_a_network_are_flat(over_network: MaceSurrogate, au_pair: EndpointPair) -> None:
    whole = au_pair.initial
    slab = replace(whole, numbers=whole.numbers[:-1], positions=whole.positions[:-1], fixed=whole.fixed[:-1])
    phi, rows = over_network.feature_rows(slab)
    assert phi.tolist() == [0.0]
    assert rows.shape == (36, 1)
    assert not rows.any()


def test_the_last_row_is_the_force_of_the_network(
    over_network: MaceSurrogate, few: MaceSurrogate, au_pair: EndpointPair, band: FloatArray
) -> None:
    """Over a trained prior there is none."""
    structure = au_pair.initial.moved(band[2] + 0.05 * np.random.default_rng(6).standard_normal(band[2].shape))
    here = structure.positions[None]
    assert len(few.feature_rows(structure)[0]) == 16
    (whole,), (pull,) = over_network.evaluate(structure, here)
    (alone,), (push,) = replace(over_network, networks={}).evaluate(structure, here)
    phi, rows = over_network.feature_rows(structure)
    assert phi.tolist() == pytest.approx([whole - alone], abs=1e-9)
    np.testing.assert_allclose(rows[:, 0], (pull - push).ravel(), atol=1e-9)
    assert np.abs(rows).max() > 0.1


@pytest.mark.parametrize("trained", [True, False])
def test_forward_and_backward_derivatives_agree(
    trained: bool, lively_model: Any, au_pair: EndpointPair, band: FloatArray
) -> None:
    """More features than coordinates, or a few of the same ones: each way has its own derivative."""
    rng = np.random.default_rng(0)
    networks = None if trained else make_networks([au_pair.initial, au_pair.final])
    many = make_surrogate(
        lively_model, _samples(au_pair, band), rng, per_element=FEATURES, correction="blr", networks=networks
    )
    assert many.features is not None
    mixing = [torch.as_tensor(rng.standard_normal((n, n))) for n in (2 * FEATURES, 12)]
    plain = replace(many, features=replace(many.features, basis=torch.eye(2 * FEATURES, dtype=torch.float64)))
    many = replace(many, features=replace(many.features, basis=mixing[0]))
    some = {"omega": many.features.omega[:, :, :6], "phase": many.features.phase[:, :6], "basis": mixing[1]}
    few = replace(many, features=replace(many.features, **some))
    structure = au_pair.initial.moved(band[1])
    assert few.features is not None
    assert few.features.n_features < 3 * len(structure) < many.features.n_features
    (phi, rows), (mixed_phi, mixed_rows), (few_phi, few_rows) = (s.feature_rows(structure) for s in (plain, many, few))
    chosen, factor = [*range(6), *range(FEATURES, FEATURES + 6)], (FEATURES / 6) ** 0.5
    random = slice(None, None if trained else -1)
    np.testing.assert_allclose(few_phi[random], factor * phi[chosen] @ mixing[1].numpy(), atol=1e-10)
    np.testing.assert_allclose(few_rows[:, random], factor * rows[:, chosen] @ mixing[1].numpy(), atol=1e-8)
    np.testing.assert_allclose(mixed_phi[random], phi[random] @ mixing[0].numpy(), atol=1e-10)
    np.testing.assert_allclose(mixed_rows[:, random], rows[:, random] @ mixing[0].numpy(), atol=1e-8)
    if not trained:
        np.testing.assert_allclose(few_rows[:, -1], rows[:, -1], atol=1e-8)
    assert (np.abs(few_rows).max(axis=0) > 1e-4).all()


def test_rows_do_not_depend_on_the_size_of_batches(
    bare: MaceSurrogate, few: MaceSurrogate, au_pair: EndpointPair, band: FloatArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    structure = au_pair.initial.moved(band[2])
    whole = [surrogate.feature_rows(structure)[1] for surrogate in (bare, few)]
    monkeypatch.setattr(surrogate_module, "MAX_BATCH_ATOMS", 2 * len(structure))
    for surrogate, rows in zip((bare, few), whole, strict=True):
        np.testing.assert_allclose(surrogate.feature_rows(structure)[1], rows, atol=1e-10)
