"""The trainer: when members learn, which surface leads, and a surrogate that comes back as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from alcore.errors import ModelError, TrainingError
from alcore.mace.fitting import CorrectionName
from alcore.mace.models import weights_sha256
from alcore.mace.sanity import SanitySpec
from alcore.mace.strategies import Learning
from alcore.mace.surrogate import MaceSurrogate
from alcore.mace.trainer import FIRST_TRAINING, GROWTH, ROUNDS, MaceTrainer, ModelSpec
from alcore.mace.training import TrainSpec
from alcore.neb import NebSpec, interpolate
from alcore.plain import to_plain
from alcore.types import Dataset, EndpointPair, FloatArray, GenerationRecord, Label, Residual, Structure
from storage.memory import MemoryStore

TRAIN = TrainSpec(epochs=2, warm_epochs=1, fresh_epochs=2)
LENIENT = SanitySpec(energy_rmse_ev=1e3, force_rmse_ev_per_ang=1e3, regression_factor=1e3, max_drift_ev_per_atom=1e3)
"""Such short trainings would be given up."""
LABELS = FIRST_TRAINING


@pytest.fixture(scope="module")
def samples(au_pair: EndpointPair) -> list[Structure]:
    """A band, then rattled images of it: as many as a first fine-tuning takes."""
    band, rng = interpolate(au_pair, NebSpec(n_images=5)), np.random.default_rng(0)
    rattled = [p + np.where(au_pair.initial.fixed, 0.0, 0.05 * rng.standard_normal(p.shape)) for p in [*band, *band]]
    return [au_pair.initial.moved(p) for p in [*band, *rattled]]


@pytest.fixture(scope="module")
def dataset(samples: list[Structure], label_of: Callable[..., Label]) -> Dataset:
    return Dataset(labels=tuple(label_of(s) for s in samples[:LABELS]))


def test_there_are_as_many_labels_as_a_first_fine_tuning_takes(dataset: Dataset) -> None:
    assert len(dataset) == FIRST_TRAINING


@pytest.fixture(scope="module")
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture(scope="module")
def trainer(untrained_model: Any, store: MemoryStore) -> MaceTrainer:
    return _trainer(untrained_model, store)


def _trainer(
    model: Any, store: MemoryStore | None, strategy: Any = "auto", untrained: bool = True, **kwargs: Any
) -> MaceTrainer:
    given = {"committee": 2, "train": TRAIN, "features_per_element": 16, "sanity": LENIENT, **kwargs}
    spec = ModelSpec(strategy=strategy, **given)
    return MaceTrainer(
        model,
        spec,
        untrained=untrained,
        save_model=store.save_model if store else None,
        load_model=store.load_model if store else None,
    )


@pytest.fixture(scope="module")
def trained(trainer: MaceTrainer, samples: list[Structure], dataset: Dataset) -> MaceSurrogate:
    fresh = trainer.finish(trainer.start(samples), {}, dataset, ())
    due = trainer.due(fresh, dataset)
    assert due == ["member-0", "member-1"]
    return trainer.finish(fresh, {name: trainer.train_member(name, fresh, dataset, 3) for name in due}, dataset, [])


def _residual(prior_error: float, committee_error: float) -> Residual:
    return Residual(
        key="k",
        path="hop",
        kind="saddle",
        generation=4,
        predicted_ev=0.5,
        labelled_ev=0.5,
        sigma_committee_ev=0.01,
        sigma_posterior_ev=0.01,
        sigma_ev=0.02,
        fmax_ev_per_ang=0.01,
        by_lead_ev={"prior": 0.5 + prior_error, "committee": 0.5 + committee_error},
    )


def _same(a: tuple[FloatArray, FloatArray], b: tuple[FloatArray, FloatArray], atol: float) -> None:
    np.testing.assert_allclose(a[0], b[0], rtol=0, atol=atol)
    np.testing.assert_allclose(a[1], b[1], rtol=0, atol=atol)


def test_the_start_is_the_prior_alone(trainer: MaceTrainer, samples: list[Structure], untrained_model: Any) -> None:
    start = trainer.start(samples)
    places = np.array([samples[2].positions])
    _same(start.evaluate(samples[0], places), MaceSurrogate(prior=untrained_model).evaluate(samples[0], places), 1e-10)
    assert start.describe()["n_members"] == 0
    again = trainer.start(samples)
    assert start.features is not None
    assert again.features is not None
    assert np.array_equal(start.features.omega.numpy(), again.features.omega.numpy())


def test_fixed_atoms_are_not_rattled(
    untrained_model: Any, samples: list[Structure], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Structure] = []
    real = MaceSurrogate.descriptors
    monkeypatch.setattr(MaceSurrogate, "descriptors", lambda self, s, p: (seen.append(s), real(self, s, p))[1])
    _trainer(untrained_model, None, correction="blr").start(samples[:1])
    moved = seen[0].positions - samples[0].positions
    assert not moved[samples[0].fixed].any()
    assert moved[~samples[0].fixed].std() == pytest.approx(0.05, rel=0.4)


def test_members_learn_seldom(
    trainer: MaceTrainer, trained: MaceSurrogate, samples: list[Structure], dataset: Dataset
) -> None:
    start = trainer.start(samples)
    few = Dataset(labels=dataset.labels[: FIRST_TRAINING - 1])
    assert trainer.due(start, few) == []
    assert trainer.due(trained, dataset) == []
    enough = int(np.ceil(GROWTH * LABELS)) - LABELS
    for more, due in ((enough - 1, []), (enough, ["member-0", "member-1"])):
        assert trainer.due(trained, Dataset(labels=dataset.labels + dataset.labels[:more])) == due


def test_the_first_training_is_when_it_was_asked_for(
    untrained_model: Any, samples: list[Structure], dataset: Dataset
) -> None:
    trainer = MaceTrainer(untrained_model, ModelSpec(train=TrainSpec(first_labels=3)), untrained=True)
    start = trainer.start(samples[:1])
    assert trainer.due(start, Dataset(labels=dataset.labels[:2])) == []
    assert trainer.due(start, Dataset(labels=dataset.labels[:3])) == ["member-0", "member-1", "member-2"]


def test_zero_shot_never_learns(untrained_model: Any, samples: list[Structure], dataset: Dataset) -> None:
    trainer = _trainer(untrained_model, None, "zero-shot")
    assert trainer.due(trainer.start(samples), dataset) == []


def test_without_a_correction_members_learn_from_two_labels(
    untrained_model: Any, samples: list[Structure], dataset: Dataset
) -> None:
    trainer = _trainer(untrained_model, None, correction="none")
    start = trainer.start(samples)
    assert start.features is None
    assert trainer.due(start, Dataset(labels=dataset.labels[:1])) == []
    assert len(trainer.due(start, Dataset(labels=dataset.labels[:2]))) == 2
    assert trainer.finish(start, {}, dataset, ()).correction is None


def test_members_differ_and_are_kept(trained: MaceSurrogate, store: MemoryStore, untrained_model: Any) -> None:
    hashes = {weights_sha256(m) for m in trained.members}
    assert len(hashes) == 2
    assert weights_sha256(untrained_model) not in hashes
    assert len(trained.describe()["members"]) == 2
    assert all(store.load_model(key) for key in trained.describe()["members"])
    assert trained.describe()["train"]["epochs"] == TRAIN.fresh_epochs
    assert trained.describe()["train"]["learning_rate"] == TRAIN.learning_rate


@pytest.mark.parametrize(("bad_rounds", "rounds"), [(0, 1), (1, 2), (9, ROUNDS)])
def test_a_member_with_faults_goes_on_learning(
    bad_rounds: int, rounds: int, untrained_model: Any, samples: list[Structure], dataset: Dataset, monkeypatch: Any
) -> None:
    trainer = _trainer(untrained_model, None, committee=1)
    found = iter([["a hole"]] * bad_rounds + [[]] * ROUNDS)
    monkeypatch.setattr(trainer, "_faults", lambda *args: next(found))
    member = trainer.train_member("member-0", trainer.start(samples), Dataset(labels=dataset.labels[:3]), 0)
    assert member.epochs == member.told["epochs"] == rounds * TRAIN.fresh_epochs
    assert member.faults == (("a hole",) if bad_rounds >= ROUNDS else ())


def test_the_prior_never_learns(trained: MaceSurrogate, trainer: MaceTrainer, samples: list[Structure]) -> None:
    assert weights_sha256(trained.prior) == trainer.start(samples).describe()["prior"]


def test_the_surface_that_predicted_better_leads(trainer: MaceTrainer) -> None:
    assert trainer.choose_lead(False, [_residual(0.1, 0.0)])[0] == "prior"
    assert trainer.choose_lead(True, [])[0] == "prior"
    assert trainer.choose_lead(True, [_residual(0.1, 0.01)])[0] == "committee"
    assert trainer.choose_lead(True, [_residual(0.01, 0.1)])[0] == "prior"
    old = [_residual(5.0, 0.0)] * 4
    lead, why = trainer.choose_lead(True, [*old, *[_residual(0.01, 0.02)] * 3])
    assert lead == "prior", "only recent labels count"
    assert "20 meV" in why
    assert "10 by" in why


def test_naive_is_led_by_the_committee_it_was_asked_for(untrained_model: Any) -> None:
    lead, why = _trainer(untrained_model, None, "naive").choose_lead(True, [_residual(0.0, 1.0)])
    assert lead == "committee"
    assert "asked" in why


def test_a_surrogate_comes_back_as_it_was(
    trainer: MaceTrainer,
    trained: MaceSurrogate,
    samples: list[Structure],
    dataset: Dataset,
    untrained_model: Any,
    store: MemoryStore,
) -> None:
    record = GenerationRecord(run="r", index=3, paths=(), surrogate=trained.describe())
    other = _trainer(untrained_model, store)
    back = other.restore(other.start(samples), record, dataset, [])
    _identical(back, trained, samples)
    assert other.due(back, dataset) == []


@pytest.mark.parametrize("correction", ["blr", "gp", "blr+gp", "none"])
@pytest.mark.parametrize("untrained", [True, False])
def test_every_correction_comes_back_bit_for_bit(
    correction: CorrectionName,
    untrained: bool,
    untrained_model: Any,
    lively_model: Any,
    samples: list[Structure],
    dataset: Dataset,
) -> None:
    """Learned label by label, restored at once: over an untrained prior with its network, and over a trained one."""
    model, ends = (untrained_model if untrained else lively_model), [samples[0], samples[6]]
    first, second = (_trainer(model, None, untrained=untrained, correction=correction) for _ in range(2))
    learned = first.start(samples, ends)
    for n in (2, 3, 5):
        known = Dataset(labels=dataset.labels[:n])
        learned = first.finish(learned, {}, known, ())
    record = GenerationRecord(run="r", index=3, paths=(), surrogate=learned.describe())
    _identical(second.restore(second.start(samples, ends), record, known, []), learned, samples)
    assert bool(learned.networks) == untrained
    assert (learned.features is not None) == ("blr" in correction)
    assert bool(learned.known) == ("gp" in correction)
    assert ("network_scale" in learned.describe()) == (untrained and correction != "none")


def _identical(one: MaceSurrogate, other: MaceSurrogate, samples: list[Structure]) -> None:
    positions = np.array([s.positions for s in samples[:7]])
    _same(one.evaluate(samples[0], positions), other.evaluate(samples[0], positions), 0.0)
    a, b = one.predict(samples[0], positions), other.predict(samples[0], positions)
    np.testing.assert_array_equal(a.members_ev, b.members_ev)
    np.testing.assert_array_equal(a.covariance_ev2, b.covariance_ev2)
    assert one.describe() == other.describe()


def test_members_cannot_come_back_without_a_store(
    untrained_model: Any, trained: MaceSurrogate, samples: list[Structure], dataset: Dataset
) -> None:
    lonely = _trainer(untrained_model, None)
    record = GenerationRecord(run="r", index=3, paths=(), surrogate=trained.describe())
    with pytest.raises(TrainingError, match="without a model store"):
        lonely.restore(lonely.start(samples), record, dataset, [])


def test_fine_tunes_of_a_foundation_model_start_from_it(
    lively_model: Any, samples: list[Structure], dataset: Dataset
) -> None:
    """From one prior with different label weights; from scratch with weights of their own."""
    for strategy, shared in (("naive", True), ("scratch", False)):
        trainer = MaceTrainer(
            lively_model,
            ModelSpec(
                strategy=strategy, committee=1, train=TrainSpec(epochs=1, learning_rate=1e-9), features_per_element=4
            ),  # type: ignore[arg-type]
            untrained=False,
        )
        start = trainer.start(samples[:1])
        (name,) = trainer.due(start, dataset)
        member = trainer.train_member(name, start, dataset, 1).model
        near = all(
            np.allclose(p.numpy(), q.numpy(), atol=1e-6)
            for p, q in zip(member.parameters(), lively_model.parameters(), strict=True)
        )
        assert near == shared


def test_eleven_members_keep_their_places(untrained_model: Any, samples: list[Structure], dataset: Dataset) -> None:
    """Member 10 comes after member 9, so that each goes on from its own weights."""
    from alcore.mace.training import TrainedMember

    trainer = MaceTrainer(untrained_model, ModelSpec(committee=11, correction="none"), untrained=True)
    start = trainer.start(samples[:1])
    members = {
        f"member-{k}": TrainedMember(
            model=untrained_model, energy_rmse_ev=float(k), force_rmse_ev_per_ang=0.0, epochs=k, learning_rate=0.0
        )
        for k in range(11)
    }
    seen: list[int] = []
    trainer._keep = lambda member, n: (seen.append(member.epochs), "id")[1]  # type: ignore[method-assign]
    trainer.finish(start, members, dataset, ())
    assert seen == list(range(11))


@pytest.mark.parametrize("strategy", ["naive", "lora", "frozen", "multihead"])
def test_every_strategy_tells_what_it_did_and_comes_back(
    strategy: Learning, lively_model: Any, samples: list[Structure], dataset: Dataset
) -> None:
    trainer = _trainer(lively_model, MemoryStore(), strategy, untrained=False, committee=1, replay_count=4)
    start = trainer.start(samples)
    member = trainer.train_member("member-0", start, dataset, 0)
    again = trainer.unpack_member(to_plain(trainer.pack_member(member)))
    assert weights_sha256(again.model) == weights_sha256(member.model) != weights_sha256(lively_model)
    assert again.faults == member.faults
    learned = trainer.finish(start, {"member-0": member}, dataset, [])
    told = learned.describe()["train"]
    assert told["strategy"] == strategy
    assert told["learning_rate"] == TRAIN.learning_rate
    assert told["n_trainable"] <= told["n_parameters"]
    assert ("replay" in told, told["n_replay"]) == ((True, 4) if strategy == "multihead" else (False, 0))
    assert learned.lead == "committee"
    record = GenerationRecord(run="r", index=1, paths=(), surrogate=learned.describe())
    restored = trainer.restore(trainer.start(samples), record, dataset, [])
    _identical(restored, learned, samples)


def test_members_that_are_not_sane_are_given_up_for_their_predecessors(
    lively_model: Any, samples: list[Structure], dataset: Dataset
) -> None:
    trainer = _trainer(lively_model, MemoryStore(), "naive", untrained=False)
    start = trainer.start(samples)
    first = {name: trainer.train_member(name, start, dataset, 0) for name in ("member-0", "member-1")}
    broken = {**first, "member-1": replace(first["member-1"], faults=("a hole where Au and Al meet",))}
    alone = trainer.finish(start, broken, dataset, [])
    assert alone.members == ()
    assert alone.lead == "prior"
    assert "member-1 given up: a hole where Au and Al meet" in alone.describe()["why"]
    assert trainer.due(alone, dataset) == [], "the same labels would teach the same"
    both = trainer.finish(start, first, dataset, [])
    after = trainer.finish(both, broken, dataset, [])
    assert after.members == both.members
    assert after.describe()["members"] == both.describe()["members"]
    assert "given up" in after.describe()["why"]


def test_a_training_that_learns_nothing_has_faults(
    lively_model: Any, samples: list[Structure], dataset: Dataset
) -> None:
    lost = _trainer(lively_model, None, "naive", untrained=False, sanity=SanitySpec(), train=TrainSpec(epochs=1))
    assert any("energies" in fault for fault in lost.train_member("member-0", lost.start(samples), dataset, 0).faults)


@pytest.mark.parametrize("strategy", ["multihead", "lora", "frozen"])
def test_some_strategies_need_something_to_start_from(strategy: Learning, untrained_model: Any) -> None:
    with pytest.raises(ModelError, match=f"strategy {strategy} needs a trained model"):
        _trainer(untrained_model, None, strategy)
