"""A run that dies at any write goes on with the step that was in flight, and ends where an unbroken one ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from alcore.errors import StoreError
from alcore.loop import begin, run_loop
from alcore.mace import trainer as trainer_module
from alcore.mace.trainer import MaceTrainer, ModelSpec
from alcore.mace.training import TrainSpec
from alcore.plain import to_plain
from alcore.runner import PlainRunner
from alcore.state import LoopSpec, LoopState, Workshop
from alcore.steps import Steps
from alcore.stopping import StopSpec
from alcore.types import EndpointPair, GenerationRecord
from storage.memory import MemoryStore

SPEC = LoopSpec(run="au", stop=StopSpec(max_labels=9, max_generations=5, barrier_tolerance_ev=1e-4))
"""Long enough for the committee to be trained once and to be used."""
WRITES = ("save_label", "save_step", "save_model", "save_generation", "forget_steps")


class Killed(BaseException):
    """The process is gone."""


class MortalStore:
    """A store whose process dies at its ``dies_at``-th write: just before it, or just after it."""

    def __init__(self, store: MemoryStore, dies_at: int | None, after: bool) -> None:
        self._store, self._dies_at, self._after, self.writes = store, dies_at, after, 0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        if name not in WRITES:
            return method

        def write(*arguments: Any) -> Any:
            fatal = self.writes == self._dies_at
            self.writes += 1
            if fatal and not self._after:
                raise Killed
            result = method(*arguments)
            if fatal:
                raise Killed
            return result

        return write


class CountingTrainer(MaceTrainer):
    """Counts fine-tunings, by member and generation."""

    def __init__(self, trained: list[tuple[str, int]], *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._trained = trained

    def train_member(self, name: str, surrogate: Any, dataset: Any, generation: int) -> Any:
        member = super().train_member(name, surrogate, dataset, generation)
        self._trained.append((name, generation))
        return member


@dataclass
class Place:
    """What outlives a process: the store, and who counted."""

    model: Any
    labeler: Any
    pair: EndpointPair
    store: MemoryStore = field(default_factory=MemoryStore)
    trained: list[tuple[str, int]] = field(default_factory=list)
    writes: int = 0

    def run(self, dies_at: int | None = None, *, after: bool = False) -> LoopState:
        """A new process: nothing but the store is left of the one before."""
        store: Any = MortalStore(self.store, dies_at, after)
        spec = ModelSpec(seed=0, committee=2, train=TrainSpec(fresh_epochs=2, warm_epochs=1), features_per_element=48)
        trainer = CountingTrainer(
            self.trained, self.model, spec, untrained=True, save_model=store.save_model, load_model=store.load_model
        )
        shop = Workshop(labeler=self.labeler, trainer=trainer, store=store, runner=PlainRunner())
        try:
            return run_loop(begin([self.pair], SPEC, shop), SPEC, shop)
        finally:
            self.writes = store.writes


@pytest.fixture(scope="module", autouse=True)
def an_early_committee() -> Iterator[None]:
    """So small a hop ends before the labels of a first fine-tuning are there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "FIRST_TRAINING", 3)
        yield


@pytest.fixture(scope="module")
def place(untrained_model: Any, emt_labeler: Any, au_pair: EndpointPair) -> Callable[[], Place]:
    return lambda: Place(model=untrained_model, labeler=emt_labeler(), pair=au_pair)


@pytest.fixture(scope="module")
def whole(place: Callable[[], Place]) -> tuple[list[Any], Place]:
    """The run that nothing happened to."""
    unbroken = place()
    unbroken.run()
    assert unbroken.trained, "the committee has a part in it"
    return timeless(unbroken.store.load_generations("au")), unbroken


def timeless(records: list[GenerationRecord]) -> list[Any]:
    """Everything of every generation but the time it took; arrays by their bytes."""

    def fixed(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return value.dtype.str, value.shape, value.tobytes()
        if isinstance(value, Mapping):
            return {key: fixed(item) for key, item in value.items() if key != "seconds"}
        return [fixed(item) for item in value] if isinstance(value, list) else value

    return [fixed(to_plain(record)) for record in records]


@pytest.mark.parametrize(("fraction", "after"), [(0.2, False), (0.6, True), (0.85, False)])
def test_killed_at_a_write_it_ends_as_if_nothing_had_happened(
    whole: tuple[list[Any], Place], place: Callable[[], Place], fraction: float, after: bool
) -> None:
    expected, unbroken = whole
    mortal = place()
    with pytest.raises(Killed):
        mortal.run(int(fraction * unbroken.writes), after=after)
    mortal.run()
    assert timeless(mortal.store.load_generations("au")) == expected
    in_flight = 0 if after else 1
    assert len(mortal.labeler.calls) + len(mortal.trained) <= (
        len(unbroken.labeler.calls) + len(unbroken.trained) + in_flight
    ), "only what was in flight is done again"


@pytest.mark.slow
def test_killed_again_and_again_it_gets_there(whole: tuple[list[Any], Place], place: Callable[[], Place]) -> None:
    """Each process does a few writes and dies; a completed step is never done twice."""
    expected, unbroken = whole
    mortal, kills = place(), 0
    while True:
        try:
            mortal.run(3, after=True)  # two of them may be labels that were there already
            break
        except Killed:
            kills += 1
            assert kills < 2 * unbroken.writes, "it does not get any further"
    assert kills >= 5
    assert timeless(mortal.store.load_generations("au")) == expected
    assert mortal.labeler.calls == unbroken.labeler.calls
    assert mortal.trained == unbroken.trained


def test_a_probe_of_other_end_states_is_not_taken(place: Callable[[], Place]) -> None:
    """Killed in its first generation, then called again with a corrected end state."""
    home = place()
    with pytest.raises(Killed):
        home.run(2, after=True)
    assert home.store.load_step("au", 0, "probe/hop") is not None
    shift = np.where(home.pair.final.fixed, 0.0, 0.05)
    home.pair = replace(home.pair, final=home.pair.final.moved(home.pair.final.positions + shift))
    home.run()
    first = home.store.load_generations("au")[0]
    final = home.store.load_labels(first.label_keys)[first.label_keys[1]]
    assert np.array_equal(final.structure.positions, home.pair.final.positions)


def test_a_hole_in_what_is_stored_ends_the_run_before_anything_is_overwritten(
    whole: tuple[list[Any], Place], place: Callable[[], Place]
) -> None:
    _, unbroken = whole
    stored = unbroken.store.load_generations("au")
    holed, unlabelled = place(), place()
    for record in stored:
        if record.index != 2:
            holed.store.save_generation(record)
        unlabelled.store.save_generation(record)
    with pytest.raises(StoreError, match="run 'au': a generation is missing: there are 0, 1, 3"):
        holed.run()
    with pytest.raises(StoreError, match=r"labels of generation 5 are missing, the first is \w{12}"):
        unlabelled.run()


def test_steps_of_finished_generations_are_forgotten(whole: tuple[list[Any], Place]) -> None:
    expected, unbroken = whole
    assert not [
        index for index in range(len(expected)) if unbroken.store.load_step("au", index, "probe/hop") is not None
    ]


def test_a_step_with_other_inputs_is_done_again(place: Callable[[], Place]) -> None:
    home = place()
    shop = Workshop(labeler=home.labeler, trainer=None, store=home.store, runner=PlainRunner())  # type: ignore[arg-type]
    done: list[str] = []

    def work(name: str) -> str:
        done.append(name)
        return f"{name} {len(done)}"

    def ask(limit: float) -> list[str]:
        steps = Steps(shop, "r", 0)
        return steps.remembered("probe", ["a", "b"], work, inputs={"limit": limit}, unpack=str)

    assert ask(0.1) == ask(0.1) == ["a 1", "b 2"]
    assert ask(0.2) == ["a 3", "b 4"]
    assert done == ["a", "b", "a", "b"]
