"""Strategies: the same surface to begin with, only what may learn moves, one head in the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from alcore.errors import TrainingError
from alcore.mace.models import weights_sha256
from alcore.mace.replay import pseudo_labels
from alcore.mace.reshaping import one_headed
from alcore.mace.strategies import LABELS, REPLAY, StrategySpec, learner
from alcore.mace.surrogate import MaceSurrogate
from alcore.mace.training import TrainSpec, fine_tune, predictions
from alcore.neb import NebSpec, interpolate
from alcore.types import Dataset, EndpointPair, FloatArray, Label

ROUNDING_EV = 1e-9
STRATEGIES = ("naive", "lora", "frozen", "multihead")
SPEC = TrainSpec(epochs=20)


@pytest.fixture(scope="module")
def band(au_pair: EndpointPair) -> FloatArray:
    return interpolate(au_pair, NebSpec(n_images=5))


@pytest.fixture(scope="module")
def dataset(au_pair: EndpointPair, band: FloatArray, label_of: Callable[..., Label]) -> Dataset:
    return Dataset(labels=tuple(label_of(au_pair.initial.moved(band[k])) for k in (0, 1, 2, 3)))


@pytest.fixture(scope="module")
def replay(lively_model: Any, dataset: Dataset) -> list[Label]:
    return pseudo_labels(lively_model, [x.structure for x in dataset.labels], 6, np.random.default_rng(0))


def _energies(model: Any, au_pair: EndpointPair, band: FloatArray) -> FloatArray:
    return MaceSurrogate(prior=model).evaluate(au_pair.initial, band)[0]


def _trained(model: Any, dataset: Dataset, replay: list[Label], strategy: Any) -> Any:
    return fine_tune(
        model,
        dataset,
        SPEC,
        weights=np.ones(len(dataset)),
        strategy=StrategySpec(learning=strategy),
        replay=replay if strategy == "multihead" else (),
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_changes_before_anything_is_learned(
    strategy: Any, lively_model: Any, au_pair: EndpointPair, band: FloatArray
) -> None:
    before = weights_sha256(lively_model)
    made = learner(lively_model, StrategySpec(learning=strategy), seed=0)
    single = made.finished(made.model)
    np.testing.assert_allclose(
        _energies(single, au_pair, band), _energies(lively_model, au_pair, band), rtol=0, atol=ROUNDING_EV
    )
    assert weights_sha256(lively_model) == before
    shapes = {name: value.shape for name, value in lively_model.state_dict().items()}
    assert {name: value.shape for name, value in single.state_dict().items()} == shapes
    assert not any(weight.requires_grad for weight in single.parameters())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_learns(
    strategy: Any, lively_model: Any, dataset: Dataset, replay: list[Label], au_pair: EndpointPair, band: FloatArray
) -> None:
    member = _trained(lively_model, dataset, replay, strategy)
    truth = np.array([label.energy_ev for label in dataset.labels])
    error = [_energies(m, au_pair, band[[0, 1, 2, 3]]) - truth for m in (lively_model, member.model)]
    before, after = (float(np.std(e)) for e in error)
    assert after < (0.999 if strategy == "frozen" else 0.3) * before  # of random features little is left to learn
    assert member.energy_rmse_ev == pytest.approx(after, rel=1e-6)
    assert member.told["strategy"] == strategy
    assert member.told["heads"] == ([LABELS, REPLAY] if strategy == "multihead" else list(lively_model.heads))
    assert member.told["n_replay"] == (len(replay) if strategy == "multihead" else 0)


def test_what_is_frozen_stays_as_it_was(lively_model: Any, dataset: Dataset) -> None:
    member = _trained(lively_model, dataset, [], "frozen")
    old, new = lively_model.state_dict(), member.model.state_dict()
    moved = {name.split(".")[0] for name in old if not torch.equal(old[name], new[name])}
    assert moved == {"products", "readouts", "atomic_energies_fn"}
    assert member.told["frozen"] == ["embedding", "interactions"]
    assert 0 < member.told["n_trainable"] < member.told["n_parameters"]


def test_adapters_change_weights_by_low_rank(lively_model: Any, dataset: Dataset) -> None:
    """e3nn stores a linear layer of scalars as its flattened matrix."""
    spec = StrategySpec(learning="lora", lora_rank=2)
    member = fine_tune(lively_model, dataset, SPEC, weights=np.ones(4), strategy=spec)
    name = "interactions.1.linear_up.weight"
    change = member.model.state_dict()[name] - lively_model.state_dict()[name]
    side = round(len(change) ** 0.5)
    assert torch.linalg.matrix_rank(change.reshape(side, side), rtol=1e-6) == 2


def test_the_second_head_keeps_what_was_known(
    lively_model: Any, dataset: Dataset, replay: list[Label], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forces of the starting model on what it replays, from either head while there are two."""
    two: list[Any] = []

    def watched(*args: Any) -> Any:
        made = learner(*args)
        two.append(made.model)
        return made

    monkeypatch.setattr("alcore.mace.training.learner", watched)
    _trained(lively_model, dataset, replay, "multihead")
    known, learned = (_force_rmse(one_headed(two[0], head, "model"), replay) for head in (REPLAY, LABELS))
    assert known < 0.3 * learned


def _force_rmse(model: Any, labels: list[Label]) -> float:
    _, forces = predictions(model, labels)
    return float(np.sqrt(np.mean([np.mean((f - x.forces) ** 2) for f, x in zip(forces, labels, strict=True)])))


def test_replay_and_strategy_must_agree(lively_model: Any, dataset: Dataset, replay: list[Label]) -> None:
    """What mace-torch does in silence: multi-head without a replay set trains naively."""
    for strategy, given in (("multihead", ()), ("naive", replay)):
        with pytest.raises(TrainingError, match="that is another strategy"):
            fine_tune(
                lively_model,
                dataset,
                SPEC,
                weights=np.ones(4),
                strategy=StrategySpec(learning=strategy),  # type: ignore[arg-type]
                replay=given,
            )


def test_all_frozen_is_refused(lively_model: Any) -> None:
    spec = StrategySpec(learning="frozen", frozen_layers=("embedding", "interactions", "products", "readouts"))
    with pytest.raises(TrainingError, match="leaves no weight"):
        learner(lively_model, spec, seed=0)


def test_pseudo_labels_are_the_models_own(lively_model: Any, replay: list[Label]) -> None:
    surrogate = MaceSurrogate(prior=lively_model)
    for label in replay:
        energies, forces = surrogate.evaluate(label.structure, label.structure.positions[None])
        assert label.energy_ev == pytest.approx(float(energies[0]), abs=ROUNDING_EV)
        np.testing.assert_allclose(label.forces, forces[0], atol=1e-9)
    assert len({label.key for label in replay}) == len(replay)
    assert replace(replay[0], status="ok").calculator == "replay"
