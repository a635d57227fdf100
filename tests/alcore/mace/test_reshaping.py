"""Other heads or fewer elements: the same surface."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from e3nn import o3
from mace import modules

from alcore.errors import ModelError
from alcore.mace import reshaping
from alcore.mace.models import CONSTRUCTION, build_model, model_elements
from alcore.mace.reshaping import for_elements, one_headed, with_heads
from alcore.mace.surrogate import MaceSurrogate
from alcore.neb import NebSpec, interpolate
from alcore.types import EndpointPair, FloatArray

ROUNDING_EV = 1e-9
NAMES = ("labels", "replay")


@pytest.fixture(scope="module")
def band(au_pair: EndpointPair) -> FloatArray:
    return interpolate(au_pair, NebSpec(n_images=5))


def says(model: Any, pair: EndpointPair, band: FloatArray) -> tuple[FloatArray, FloatArray]:
    return MaceSurrogate(prior=model).evaluate(pair.initial, band)


def assert_same(one: Any, other: Any, pair: EndpointPair, band: FloatArray) -> None:
    for first, second in zip(says(one, pair, band), says(other, pair, band), strict=True):
        np.testing.assert_allclose(first, second, rtol=0, atol=ROUNDING_EV)


def with_vectors(numbers: list[int]) -> Any:
    """As foundation models are: messages of l = 1, per-layer readouts, weights that are all at work."""
    with CONSTRUCTION, torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = modules.ScaleShiftMACE(
            r_max=5.0,
            num_bessel=8,
            num_polynomial_cutoff=5,
            max_ell=2,
            interaction_cls=modules.interaction_classes["RealAgnosticDensityResidualInteractionBlock"],
            interaction_cls_first=modules.interaction_classes["RealAgnosticDensityInteractionBlock"],
            num_interactions=2,
            num_elements=len(numbers),
            hidden_irreps=o3.Irreps("8x0e+8x1o"),
            MLP_irreps=o3.Irreps("8x0e"),
            atomic_energies=np.linspace(-3.0, -1.0, len(numbers)),
            avg_num_neighbors=12.0,
            atomic_numbers=numbers,
            correlation=3,
            gate=torch.nn.functional.silu,
            pair_repulsion=True,
            distance_transform="Agnesi",
            radial_MLP=[16, 16],
            atomic_inter_scale=0.8,
            atomic_inter_shift=0.1,
        )
    return model.double().eval().requires_grad_(False)


def test_a_head_is_chosen_by_name(lively_model: Any, au_pair: EndpointPair, band: FloatArray) -> None:
    two = with_heads(lively_model, NAMES)
    assert one_headed(lively_model, None, "model") is lively_model
    for name in NAMES:
        assert_same(one_headed(two, name, "model"), lively_model, au_pair, band)
    for head in (None, "omat"):
        with pytest.raises(ModelError, match="choose among labels, replay"):
            one_headed(two, head, "model")


def test_fewer_elements_are_the_same_surface(lively_model: Any, au_pair: EndpointPair, band: FloatArray) -> None:
    foundation = with_vectors([8, 13, 29, 79])
    for model in (lively_model, foundation):
        small = for_elements(model, au_pair.initial.numbers)
        assert model_elements(small) == [13, 79]
        assert model_elements(model) != [13, 79]
        assert sum(w.numel() for w in small.parameters()) < sum(w.numel() for w in model.parameters())
        assert_same(small, model, au_pair, band)
        assert not any(weight.requires_grad for weight in small.parameters())
        assert torch.get_default_dtype() == torch.float32


def test_a_model_of_these_elements_stays_itself() -> None:
    model = build_model([79, 13], 0)
    assert for_elements(model, [79, 13, 13]) is model


def test_a_model_that_comes_out_different_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rebuilt = with_vectors([8, 13, 79]), reshaping._rebuilt

    def broken(*args: Any) -> Any:
        twin = rebuilt(*args)
        twin.node_embedding.linear.weight.data[0] += 0.1
        return twin

    monkeypatch.setattr(reshaping, "_rebuilt", broken)
    assert for_elements(model, [13, 79]) is model


def test_a_model_that_cannot_be_rebuilt_stays_whole(lively_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: Any) -> dict[str, Any]:
        raise ModelError("this model cannot be rebuilt")

    monkeypatch.setattr(reshaping, "_config", refuse)
    assert for_elements(lively_model, [13, 79]) is lively_model
