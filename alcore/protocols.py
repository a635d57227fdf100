"""Every seam of al-loop. What stands on the other side of one needs nothing but this file and ``types``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol, TypeVar

from alcore.types import (
    Calibration,
    CommitteePrediction,
    Dataset,
    FloatArray,
    GenerationRecord,
    Label,
    LabelRequest,
    Residual,
    RunRecord,
    Structure,
)

T = TypeVar("T")
SurrogateT = TypeVar("SurrogateT", bound="Surrogate")
StepName = Literal["probe", "label", "train", "record"]


class Potential(Protocol):
    """Energies and forces of many geometries of the same atoms at once."""

    def evaluate(self, template: Structure, positions: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Energies in eV ``(n_images,)`` and forces in eV/Å ``(n_images, n_atoms, 3)``.

        Args:
            template: the atoms; its own positions are not used.
            positions: Å, ``(n_images, n_atoms, 3)``.
        """
        ...


class Surrogate(Potential, Protocol):
    """A potential that also says how sure it is."""

    @property
    def elsewhere(self) -> Calibration:
        """How far off the sigmas of surrogates of its kind were in other runs."""
        ...

    def predict(self, template: Structure, positions: FloatArray) -> CommitteePrediction:
        """Energies, forces, members and posterior covariance; same arguments as ``evaluate``."""
        ...

    def posterior_sigma(self, template: Structure, positions: FloatArray) -> FloatArray:
        """Posterior sigma alone of each energy relative to the first, uncalibrated eV, ``(n_images,)``: no forces."""
        ...

    def describe(self) -> dict[str, Any]:
        """Plain values for ``GenerationRecord.surrogate``: enough for a person, and for ``Trainer.restore``."""
        ...


class Trainer(Protocol[SurrogateT]):
    """Makes the next surrogate from the labels so far, member by member, so that each is a step of its own."""

    def start(self, samples: Sequence[Structure], ends: Sequence[Structure] = ()) -> SurrogateT:
        """The surrogate that has seen no label; ``samples`` show which environments will occur, ``ends`` are
        the end states."""
        ...

    def due(self, surrogate: SurrogateT, dataset: Dataset) -> list[str]:
        """Names of the members to fine-tune now; none where the correction alone learns."""
        ...

    def train_member(self, name: str, surrogate: SurrogateT, dataset: Dataset, generation: int) -> Any:
        """One fine-tuned member, warm-started from ``surrogate``."""
        ...

    def finish(
        self, surrogate: SurrogateT, members: Mapping[str, Any], dataset: Dataset, residuals: Sequence[Residual]
    ) -> SurrogateT:
        """The surrogate with these new members (all, or none) and its correction fitted to ``dataset``; ``residuals``
        say which surface predicted better so far, and that one leads."""
        ...

    def pack_member(self, member: Any) -> dict[str, Any]:
        """What ``train_member`` returned as plain values (``alcore.plain``)."""
        ...

    def unpack_member(self, packed: Mapping[str, Any]) -> Any:
        """Undoes ``pack_member``, bit for bit."""
        ...

    def restore(
        self, start: SurrogateT, record: GenerationRecord, dataset: Dataset, residuals: Sequence[Residual]
    ) -> SurrogateT:
        """The surrogate as it stood after ``record``."""
        ...


class Labeler(Protocol):
    """Asks the reference calculator. Never raises for physics: a failure is a label's status."""

    @property
    def name(self) -> str:
        """The calculator's name in the registry."""
        ...

    @property
    def fingerprint(self) -> str:
        """Content hash of code, version and every setting that moves the energy."""
        ...

    def label(self, requests: Sequence[LabelRequest], on_done: Callable[[Label], None] | None = None) -> list[Label]:
        """One label for each request, in order; ``on_done`` hears of each as soon as it is there."""
        ...

    def tidy(self, label: Label) -> None:
        """This label is believed and stored: what is left of its calculation on disk may go."""
        ...

    def close(self) -> None:
        """End every worker process; afterwards nothing is left running."""
        ...


class LeaseStore(Protocol):
    """Names that one owner holds for a while, over all runs, processes and machines that share the store."""

    def take_lease(self, names: Sequence[str], owner: str, seconds: float) -> str | None:
        """The first of ``names`` that was free or whose lease had run out, now held by ``owner``; None if all are held.
        Atomic: no name is ever held twice."""
        ...

    def renew_lease(self, name: str, owner: str, seconds: float) -> bool:
        """Whether ``owner`` still holds it; if so, for ``seconds`` from now."""
        ...

    def release_lease(self, name: str, owner: str) -> None:
        """Does nothing if somebody else holds it by now."""
        ...

    def held_leases(self, prefix: str) -> dict[str, str]:
        """Owners of the names that start with ``prefix`` and are held now."""
        ...


class Claims(Protocol):
    """Sees to it that no label is computed twice, whoever asks for it."""

    def claim(self, key: str, *, computed: bool = False) -> AbstractContextManager[Label | None]:
        """Inside, over all runs, processes and machines that share the store, nobody else computes ``key``.

        Waits while somebody else does. Gives the good label if one is stored by then (``computed``: one that was not
        derived by symmetry), and None if it is to be computed now; then it has to be stored before the block ends.
        """
        ...


class StepRunner(Protocol):
    """Runs the loop's steps: plainly in threads (``alcore.runner.PlainRunner``), or as Prefect tasks (``flows``).

    The loop decides what is done; a runner only decides where, how many at once, and what is shown meanwhile.
    """

    def generation(self, index: int) -> AbstractContextManager[None]:
        """Everything inside belongs to generation ``index`` (a task group in the dashboard)."""
        ...

    def map(self, step: StepName, generation: int, names: Sequence[str], work: Callable[[str], T]) -> list[T]:
        """``[work(name) for name in names]``, in order, possibly at the same time.

        Args:
            step: which step this is; bounds how many run at once.
            generation: index of the generation.
            names: ids a person can read (path names, label keys, member names); ``work`` looks its data up by them.
            work: raises only for errors that end the run.
        """
        ...


class RecordStore(Protocol):
    """Remembers runs, generations, labels and models. Writing the same thing twice changes nothing."""

    def load_run(self, name: str) -> RunRecord | None: ...

    def save_run(self, run: RunRecord) -> None: ...

    def list_runs(self) -> list[RunRecord]:
        """Newest first."""
        ...

    def load_generations(self, run: str) -> list[GenerationRecord]:
        """In order of their index."""
        ...

    def save_generation(self, record: GenerationRecord) -> None: ...

    def load_step(self, run: str, generation: int, name: str) -> dict[str, Any] | None:
        """What ``save_step`` was given, or None."""
        ...

    def save_step(self, run: str, generation: int, name: str, content: Mapping[str, Any]) -> None:
        """What a finished step of an unfinished generation found (plain values, ``alcore.plain``)."""
        ...

    def forget_steps(self, run: str, generation: int) -> None:
        """Those of ``generation`` and all before: it is stored as a whole."""
        ...

    def load_labels(self, keys: Sequence[str]) -> dict[str, Label]:
        """Those of ``keys`` that are stored, whatever their status."""
        ...

    def save_label(self, label: Label, run: str = "") -> None: ...

    def save_model(self, weights: bytes, description: dict[str, object]) -> str:
        """Returns the sha256 of ``weights``, which is the model's id."""
        ...

    def load_model(self, sha256: str) -> bytes:
        """Raises:
        StoreError: no such model.
        """
        ...

    def close(self) -> None: ...
