"""Random features: a kernel's approximation, one block an element, blind to what does not matter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from alcore.mace.features import LENGTH_SCALES, calm_basis, element_index, invariant_columns, make_features
from alcore.mace.surrogate import MaceSurrogate
from alcore.types import FloatArray, Structure

KERNEL = 0.1
"""2000 random features approximate the kernel to about 1/sqrt(2000) = 0.02."""
DOUBLE = torch.zeros(1, dtype=torch.float64)


def test_products_of_features_approximate_a_mixture_of_gaussian_kernels() -> None:
    rng = np.random.default_rng(0)
    sample = rng.standard_normal((200, 6)) * np.array([1.0, 2.0, 0.5, 3.0, 1.0, 1.0])
    features = make_features(sample, [29] * 200, rng, per_element=2000, like=DOUBLE)
    points = torch.as_tensor(sample[:20])
    psi = features.of_nodes(points, torch.zeros(20, dtype=torch.long)).numpy()
    scaled = sample[:20] / sample.std(axis=0)
    squared = ((scaled[:, None] - scaled[None]) ** 2).sum(axis=2)
    lengths = np.geomspace(*LENGTH_SCALES, 101)[:, None, None]
    mixture = np.exp(-squared / (2 * 6 * lengths**2)).mean(axis=0)
    np.testing.assert_allclose(psi @ psi.T, mixture, atol=KERNEL)


def test_frequencies_are_of_every_length_scale() -> None:
    """Their mean square is that of the mixture, and no one scale gives it."""
    rng = np.random.default_rng(1)
    features = make_features(rng.standard_normal((500, 8)), [29] * 500, rng, per_element=4000, like=DOUBLE)
    lengths = 1 / np.sqrt((features.omega[0].numpy() ** 2).sum(axis=0))
    for quantile in (0.25, 0.5, 0.75):
        wanted = LENGTH_SCALES[0] * (LENGTH_SCALES[1] / LENGTH_SCALES[0]) ** quantile
        assert np.quantile(lengths, quantile) == pytest.approx(wanted, rel=0.15)


def test_derivative_is_that_of_the_sum_over_atoms() -> None:
    """By the chain rule through descriptors that are linear in two directions."""
    rng = np.random.default_rng(2)
    features = make_features(rng.standard_normal((60, 4)), [8] * 30 + [29] * 30, rng, per_element=7, like=DOUBLE)
    blocks, step = torch.as_tensor([1, 0, -1, 1]), 1e-5
    descriptors, jacobian = (
        torch.as_tensor(rng.standard_normal((4, 4))),
        torch.as_tensor(rng.standard_normal((2, 4, 4))),
    )
    found = features.derivative(descriptors, jacobian, blocks).numpy()
    for direction in range(2):
        ahead, behind = (
            features.of_nodes(descriptors + sign * step * jacobian[direction], blocks).sum(dim=0).numpy()
            for sign in (1, -1)
        )
        np.testing.assert_allclose(found[direction], (ahead - behind) / (2 * step), atol=1e-8)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_calm_weights_pay_for_the_forces_they_make(share: float) -> None:
    """|w|² in the basis is (1 - share) |v|² and a share of the mean square force of v, the weight of φ itself."""
    rng = np.random.default_rng(3)
    jacobian = rng.standard_normal((30, 12)) * np.geomspace(0.01, 10, 12)
    basis, v = calm_basis(jacobian, share), rng.standard_normal(12)
    w = np.linalg.solve(basis, v)
    force = ((jacobian @ v) ** 2).sum() / (jacobian**2).sum() * 12
    assert w @ w == pytest.approx((1 - share) * (v @ v) + share * force, rel=1e-9)
    calm, plain = ((jacobian @ b @ rng.standard_normal((12, 500))).std() for b in (basis, np.eye(12)))
    assert calm < (0.7 if share else 1.1) * plain


def test_each_element_has_a_block_of_its_own() -> None:
    rng = np.random.default_rng(1)
    features = make_features(rng.standard_normal((40, 3)), [8] * 20 + [29] * 20, rng, per_element=5, like=DOUBLE)
    assert features.elements == (8, 29)
    assert features.n_features == 10
    nodes = features.of_nodes(torch.as_tensor(rng.standard_normal((3, 3))), torch.as_tensor([1, 0, -1]))
    assert not nodes[0, :5].any()
    assert nodes[0, 5:].any()
    assert nodes[1, :5].any()
    assert not nodes[1, 5:].any()
    assert not nodes[2].any()


def test_a_descriptor_that_does_not_vary_is_not_blown_up() -> None:
    rng = np.random.default_rng(2)
    sample = np.stack([rng.standard_normal(50), np.full(50, 3.0) + 1e-9 * rng.standard_normal(50)], axis=1)
    features = make_features(sample, [29] * 50, rng, per_element=8, like=DOUBLE)
    assert float(features.scale[0, 1]) == pytest.approx(0.05 * sample[:, 0].std(), rel=1e-6)


def test_one_seed_gives_one_set_of_features() -> None:
    sample = np.random.default_rng(3).standard_normal((10, 4))
    first, again, other = (
        make_features(sample, [1] * 10, np.random.default_rng(seed), like=DOUBLE) for seed in (5, 5, 6)
    )
    assert torch.equal(first.omega, again.omega)
    assert torch.equal(first.phase, again.phase)
    assert not torch.equal(first.omega, other.omega)


@pytest.fixture(scope="module")
def vector_model() -> Any:
    """A MACE whose hidden features hold vectors too, as foundation models' do."""
    from e3nn import o3
    from mace import modules

    torch.manual_seed(0)
    return modules.ScaleShiftMACE(
        r_max=4.0,
        num_bessel=4,
        num_polynomial_cutoff=5,
        max_ell=2,
        interaction_cls=modules.interaction_classes["RealAgnosticResidualInteractionBlock"],
        interaction_cls_first=modules.interaction_classes["RealAgnosticInteractionBlock"],
        num_interactions=2,
        num_elements=1,
        hidden_irreps=o3.Irreps("4x0e + 4x1o"),
        MLP_irreps=o3.Irreps("4x0e"),
        atomic_energies=np.zeros(1),
        avg_num_neighbors=10.0,
        atomic_numbers=[29],
        correlation=2,
        gate=torch.nn.functional.silu,
        radial_MLP=[8],
        atomic_inter_scale=1.0,
        atomic_inter_shift=0.0,
    ).to(torch.float64)


def test_invariant_columns_do_not_turn_with_the_structure(
    vector_model: Any, geometries: dict[str, tuple[Structure, FloatArray]]
) -> None:
    from dataclasses import replace

    template, positions = geometries["crystal"]
    turn, _ = np.linalg.qr(np.random.default_rng(4).standard_normal((3, 3)))
    turn *= np.sign(np.linalg.det(turn))
    surrogate = MaceSurrogate(prior=vector_model)
    turned = replace(template, cell=template.cell @ turn.T)
    plain, other = surrogate.descriptors(template, positions), surrogate.descriptors(turned, positions @ turn.T)
    assert plain.shape == (12, 8)
    np.testing.assert_allclose(other, plain, atol=1e-8)
    columns = invariant_columns(vector_model)
    with torch.no_grad():
        feats = [
            vector_model(surrogate._graph(t, p), compute_force=False)["node_feats"].numpy()
            for t, p in ((template, positions), (turned, positions @ turn.T))
        ]
    rest = [k for k in range(feats[0].shape[1]) if k not in columns]
    assert len(rest) == 12
    assert np.abs(feats[0][:, rest] - feats[1][:, rest]).max() > 1e-3


def test_block_of_each_node(geometries: dict[str, tuple[Structure, FloatArray]]) -> None:
    water, _ = geometries["molecule without cell"]
    rng = np.random.default_rng(0)
    features = make_features(rng.standard_normal((4, 2)), [1, 1, 8, 8], rng, like=DOUBLE)
    assert element_index(water, features, 2).tolist() == [1, 0, 0, 1, 0, 0]
