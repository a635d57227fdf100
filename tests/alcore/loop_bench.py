"""A bench for the loop end to end: EMT as the reference, real MACE, the in-memory store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from alcore.loop import begin, run_loop
from alcore.mace.trainer import MaceTrainer, ModelSpec
from alcore.mace.training import TrainSpec
from alcore.neb import NebSpec
from alcore.runner import PlainRunner
from alcore.state import LoopSpec, LoopState, Workshop
from alcore.stopping import StopSpec
from alcore.types import EndpointPair, GenerationRecord, Label
from storage.memory import MemoryStore

AU_BARRIER_EV = 0.3745
"""Au on Al(100), EMT, from an ordinary CI-NEB at 0.01 eV/Å."""
BARRIER_EV = 0.010
SPEC = LoopSpec(run="au", neb=NebSpec(n_images=3), stop=StopSpec(max_labels=30))
EVERY_CALL = replace(SPEC, neb=replace(SPEC.neb, symmetry=False))


@dataclass
class Bench:
    """Everything a run needs. What a second process would find is the store alone: each run makes a new trainer."""

    model: Any
    labeler: Any
    store: MemoryStore = field(default_factory=MemoryStore)

    def shop(
        self, on_generation: Callable[[GenerationRecord, Mapping[str, Label]], None] = lambda record, labels: None
    ) -> Workshop:
        spec = ModelSpec(seed=0, committee=2, train=TrainSpec(fresh_epochs=2, warm_epochs=1), features_per_element=48)
        trainer = MaceTrainer(
            self.model, spec, untrained=True, save_model=self.store.save_model, load_model=self.store.load_model
        )
        return Workshop(
            labeler=self.labeler, trainer=trainer, store=self.store, runner=PlainRunner(), on_generation=on_generation
        )

    def run(
        self, *pairs: EndpointPair, spec: LoopSpec = SPEC, given: tuple[Label, ...] = (), **kwargs: Any
    ) -> LoopState:
        shop = self.shop(**kwargs)
        return run_loop(begin(pairs, spec, shop, given), spec, shop)


def barrier_of(state: LoopState, path: str = "hop") -> float:
    record = state.last(path)
    assert record is not None
    assert record.verified_barrier_ev is not None, record.decision.reason
    return record.verified_barrier_ev


def assert_counted_honestly(state: LoopState, place: Bench) -> None:
    last = state.records[-1]
    assert last.n_reference_calls == len(place.labeler.calls)
    assert sum(n for kind, n in last.calls_by_kind.items() if kind != "failed") == last.n_reference_calls
