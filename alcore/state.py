"""What the loop is asked, what it works with, and what a generation starts from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from alcore.neb import NebSpec
from alcore.protocols import Claims, Labeler, RecordStore, StepRunner, Trainer
from alcore.selection import SelectSpec
from alcore.stopping import StopSpec
from alcore.types import Dataset, Decision, EndpointPair, GenerationRecord, Label, PathRecord, Residual
from alcore.vetting import believed


@dataclass(frozen=True, kw_only=True)
class LoopSpec:
    """What the loop is asked to do; sections as in the run file. ``sitting`` is that of ``GenerationRecord``."""

    run: str
    sitting: int = 0
    neb: NebSpec = NebSpec()
    select: SelectSpec = SelectSpec()
    stop: StopSpec = StopSpec()


class NobodyElse:
    """``Claims`` of a store that nobody shares."""

    def claim(self, key: str, *, computed: bool = False) -> AbstractContextManager[Label | None]:
        """Never waits."""
        return nullcontext(None)


@dataclass(frozen=True, kw_only=True, eq=False)
class Workshop:
    """What the loop works with.

    Attributes:
        labeler: the reference calculator.
        trainer: makes surrogates.
        store: remembers.
        runner: runs the steps (plainly, or as Prefect tasks).
        claims: keeps others from computing the same label.
        on_generation: hears of each record once it is stored.
        log: takes lines for a person.
    """

    labeler: Labeler
    trainer: Trainer[Any]
    store: RecordStore
    runner: StepRunner
    claims: Claims = NobodyElse()
    on_generation: Callable[[GenerationRecord, Mapping[str, Label]], None] = lambda record, labels: None
    log: Callable[[str], None] = lambda line: None


@dataclass(frozen=True, kw_only=True, eq=False)
class LoopState:
    """Everything a generation starts from.

    Attributes:
        pairs: hops with their end states as they stand, by name.
        records: generations so far.
        asked: kind and label of everything asked for so far, by key; the labels as the reference gave them.
        doubts: why labels are not believed although they are ``ok`` by themselves (``alcore.vetting``), by key.
        dataset: labels learned.
        surrogate: what the trainer made of them.
    """

    pairs: Mapping[str, EndpointPair]
    records: tuple[GenerationRecord, ...] = ()
    asked: Mapping[str, tuple[str, Label]] = field(default_factory=dict)
    doubts: Mapping[str, str] = field(default_factory=dict)
    dataset: Dataset = Dataset()
    surrogate: Any = None

    @property
    def residuals(self) -> list[Residual]:
        """All residuals so far that are ``independent``, in order."""
        found = (residual for record in self.records for path in record.paths for residual in path.residuals)
        return self.independent(found)

    def independent(self, residuals: Iterable[Residual]) -> list[Residual]:
        """All but those of labels derived by symmetry from one that this run has: what was learned at one geometry is
        no prediction at its image."""
        return [r for r in residuals if r.key not in self.asked or self.asked[r.key][1].derived_from not in self.asked]

    @property
    def labels(self) -> dict[str, Label]:
        """All labels by key; those in doubt are ``rejected``."""
        return believed({key: label for key, (_, label) in self.asked.items()}, self.doubts)

    @property
    def decision(self) -> Decision:
        return self.records[-1].decision if self.records else Decision(stop=False, code="continue", reason="")

    def last(self, path: str) -> PathRecord | None:
        """The latest record of a hop."""
        return next((p for p in self.records[-1].paths if p.path == path), None) if self.records else None

    def last_tested(self, path: str) -> PathRecord | None:
        """The latest record of a hop in which labels were held against predictions; it may have waited since."""
        records = (p for record in reversed(self.records) for p in record.paths if p.path == path)
        return next((p for p in records if p.residuals), None)

    def keys_of(self, path: str) -> list[str]:
        """Keys of everything asked for a hop, in order."""
        records = (p for record in self.records for p in record.paths if p.path == path)
        return [key for record in records for key in record.label_keys if key in self.asked]


def good_label(labels: Mapping[str, Label], key: str) -> Label | None:
    """The label of that key if there is one that is believed."""
    label = labels.get(key)
    return label if label is not None and label.ok else None
