"""The vocabulary: frozen data that every step takes and returns.

Units stand in the names; ``Å`` and ``eV`` throughout. Arrays are read-only once they are in one of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms, FixCartesian
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]

LabelStatus = Literal["ok", "unconverged", "crashed", "timeout", "rejected"]
LabelKind = Literal["initial", "final", "endpoint", "saddle", "uncertain", "data"]
"""Why a label was asked for: an end state as given, an end state relaxed on the surrogate, the saddle,
an image of high uncertainty, or a structure the user brought along."""


def frozen_array(values: Any, dtype: Any = np.float64) -> NDArray[Any]:
    """A read-only, contiguous copy of ``values``."""
    array = np.array(values, dtype=dtype, order="C")
    array.setflags(write=False)
    return array


@dataclass(frozen=True, kw_only=True, eq=False)
class Structure:
    """Atoms at fixed places: what a reference calculator is asked about.

    Attributes:
        numbers: atomic numbers, ``(n_atoms,)``.
        positions: in Å, ``(n_atoms, 3)``.
        cell: lattice vectors as rows in Å, ``(3, 3)``; zero rows where there is none.
        pbc: ``(3,)``.
        fixed: True for each Cartesian coordinate that must not move, ``(n_atoms, 3)``.
        charge: total charge in e.
        magnetic_moments: initial moments in μ_B, ``(n_atoms,)``, or None.
    """

    numbers: IntArray
    positions: FloatArray
    cell: FloatArray
    pbc: BoolArray
    fixed: BoolArray
    charge: float = 0.0
    magnetic_moments: FloatArray | None = None

    def __post_init__(self) -> None:
        for name, dtype in (
            ("numbers", np.int64),
            ("positions", np.float64),
            ("cell", np.float64),
            ("pbc", np.bool_),
            ("fixed", np.bool_),
        ):
            object.__setattr__(self, name, frozen_array(getattr(self, name), dtype))
        if self.magnetic_moments is not None:
            object.__setattr__(self, "magnetic_moments", frozen_array(self.magnetic_moments))

    def __len__(self) -> int:
        return len(self.numbers)

    @classmethod
    def from_atoms(cls, atoms: Atoms, *, charge: float = 0.0, magnetic_moments: Any = None) -> Structure:
        """From ASE atoms; ``FixAtoms`` and ``FixCartesian`` are understood, other constraints are ignored here
        (``endpoints.check_pair`` refuses them)."""
        fixed = np.zeros((len(atoms), 3), dtype=bool)
        for constraint in atoms.constraints:
            if isinstance(constraint, FixAtoms):
                fixed[constraint.index] = True
            elif isinstance(constraint, FixCartesian):
                fixed[constraint.index] |= np.asarray(constraint.mask, dtype=bool)
        if magnetic_moments is None and atoms.has("initial_magmoms"):
            magnetic_moments = atoms.get_initial_magnetic_moments()
        return cls(
            numbers=atoms.numbers,
            positions=atoms.positions,
            cell=atoms.cell.array,
            pbc=atoms.pbc,
            fixed=fixed,
            charge=charge,
            magnetic_moments=magnetic_moments,
        )

    def to_atoms(self) -> Atoms:
        """ASE atoms with the same constraints, moments and (in ``info``) charge."""
        atoms = Atoms(numbers=self.numbers, positions=self.positions, cell=self.cell, pbc=self.pbc)
        whole = self.fixed.all(axis=1)
        constraints: list[Any] = [FixAtoms(indices=np.flatnonzero(whole))] if whole.any() else []
        constraints += [FixCartesian(int(i), self.fixed[i]) for i in np.flatnonzero(self.fixed.any(axis=1) & ~whole)]
        if constraints:
            atoms.set_constraint(constraints)
        if self.magnetic_moments is not None:
            atoms.set_initial_magnetic_moments(self.magnetic_moments)
        if self.charge:
            atoms.info["charge"] = self.charge
        return atoms

    def moved(self, positions: FloatArray) -> Structure:
        """The same atoms at other ``positions`` (Å, ``(n_atoms, 3)``)."""
        return Structure(
            numbers=self.numbers,
            positions=positions,
            cell=self.cell,
            pbc=self.pbc,
            fixed=self.fixed,
            charge=self.charge,
            magnetic_moments=self.magnetic_moments,
        )

    def take(self, which: IntArray) -> Structure:
        """The atoms at these places, in this order."""
        moments = self.magnetic_moments
        return replace(
            self,
            numbers=self.numbers[which],
            positions=self.positions[which],
            fixed=self.fixed[which],
            magnetic_moments=None if moments is None else moments[which],
        )

    def free_fmax(self, forces: FloatArray) -> float:
        """Largest force norm over the coordinates that may move, in eV/Å; ``forces`` is ``(n_atoms, 3)``."""
        return float(np.linalg.norm(np.where(self.fixed, 0.0, forces), axis=1).max())


@dataclass(frozen=True, kw_only=True, eq=False)
class EndpointPair:
    """Two end states of one hop, same atoms in the same order, unwrapped so that straight lines are shortest.

    Attributes:
        name: the hop's name, unique in a run.
        initial, final: the end states.
        images: a whole starting band between them (interior images only), or empty.
        relax: whether the end states may be relaxed (on the surrogate, checked by reference labels).
        reference_barrier_ev: a barrier known from elsewhere, to report the error against; or None.
    """

    name: str
    initial: Structure
    final: Structure
    images: tuple[Structure, ...] = ()
    relax: bool = True
    reference_barrier_ev: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class CommitteePrediction:
    """What the surrogate says about ``n_images`` geometries of the same atoms.

    Attributes:
        energies_ev: energy of the surface that relaxations follow, ``(n_images,)``.
        forces: its forces in eV/Å, ``(n_images, n_atoms, 3)``.
        members_ev: each member's energy, ``(n_members, n_images)``; no rows before there is a committee.
        by_lead_ev: energy of each surface that could lead (``prior``, ``committee``), ``(n_images,)`` each.
        lead: the one that does: ``energies_ev`` are its.
        covariance_ev2: posterior covariance of the energies relative to the first geometry, ``(n_images, n_images)``;
            uncalibrated.
    """

    energies_ev: FloatArray
    forces: FloatArray
    members_ev: FloatArray
    by_lead_ev: Mapping[str, FloatArray]
    covariance_ev2: FloatArray
    lead: str = "prior"


@dataclass(frozen=True, kw_only=True, eq=False)
class Band:
    """A relaxed (or abandoned) band, end states included.

    Attributes:
        path: name of its hop.
        template: the atoms; its positions are the initial state's.
        positions: Å, ``(n_images, n_atoms, 3)``.
        energies_ev: surrogate energies relative to image 0, ``(n_images,)``.
        forces: surrogate forces (not the NEB forces) in eV/Å, ``(n_images, n_atoms, 3)``.
        sigma_committee_ev: members' spread (ddof 1) of the energy relative to image 0, ``(n_images,)``; uncalibrated.
        sigma_posterior_ev: the correction's posterior sigma of the same, ``(n_images,)``; uncalibrated.
        sigma_ev: calibrated sigma of the same, ``(n_images,)``.
        coordinate_ang: path coordinate in Å (minimum-image norm of all displacements), ``(n_images,)``.
        status: ``converged``, ``max_steps`` or ``guarded`` (a guard stopped it: this is the last sound band).
        reason: one line, for ``guarded`` and ``max_steps``.
        climbing_image: the image that climbs, or None.
        fmax_ev_per_ang: largest NEB force left on a free atom of an interior image.
        n_steps: optimiser steps taken.
        minima: images at intermediate minima, where the band is divided into segments (``alcore.segments``).
    """

    path: str
    template: Structure
    positions: FloatArray
    energies_ev: FloatArray
    forces: FloatArray
    sigma_committee_ev: FloatArray
    sigma_posterior_ev: FloatArray
    sigma_ev: FloatArray
    coordinate_ang: FloatArray
    status: Literal["converged", "max_steps", "guarded"]
    reason: str = ""
    climbing_image: int | None = None
    fmax_ev_per_ang: float = float("nan")
    n_steps: int = 0
    minima: tuple[int, ...] = ()

    @property
    def converged(self) -> bool:
        return self.status == "converged"

    def structure(self, image: int) -> Structure:
        """Image ``image`` as a structure."""
        return self.template.moved(self.positions[image])


@dataclass(frozen=True, kw_only=True)
class Extremum:
    """A minimum or maximum of the energy along a band, from the force-consistent spline through the images.

    Attributes:
        kind: ``minimum`` or ``maximum``.
        coordinate_ang: where, along the path.
        energy_ev: relative to the initial state.
        image: the nearest image.
    """

    kind: Literal["minimum", "maximum"]
    coordinate_ang: float
    energy_ev: float
    image: int


@dataclass(frozen=True, kw_only=True)
class BarrierEstimate:
    """Barriers of one band on the surrogate, in eV.

    Attributes:
        forward_ev: highest image minus the initial state (the climbing image where there is one).
        reverse_ev: highest image minus the final state.
        reaction_energy_ev: final minus initial state.
        spline_forward_ev: the same barrier from the spline through energies and tangential forces.
        sigma_ev: calibrated uncertainty of ``forward_ev``.
        sigma_committee_ev, sigma_posterior_ev: its uncalibrated parts.
        saddle_image: index of the highest image.
        extrema: every minimum and maximum of the path, in order.
    """

    forward_ev: float
    reverse_ev: float
    reaction_energy_ev: float
    spline_forward_ev: float
    sigma_ev: float
    sigma_committee_ev: float
    sigma_posterior_ev: float
    saddle_image: int
    extrema: tuple[Extremum, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """A structure worth a label, with what the surrogate says about it *before* the label is known.

    Attributes:
        path: name of the hop.
        kind: why it was picked.
        image: its place in the band (0 and the last for end states).
        structure: where.
        energy_ev: predicted energy relative to the hop's initial state; None for end states.
        sigma_committee_ev, sigma_posterior_ev, sigma_ev: uncertainty of it (the last calibrated); None likewise.
        forces: predicted forces in eV/Å, ``(n_atoms, 3)``, or None.
        by_lead_ev: what each surface that could lead predicted for the same energy difference.
    """

    path: str
    kind: LabelKind
    image: int
    structure: Structure
    energy_ev: float | None = None
    sigma_committee_ev: float | None = None
    sigma_posterior_ev: float | None = None
    sigma_ev: float | None = None
    forces: FloatArray | None = None
    by_lead_ev: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelRequest:
    """A candidate on its way to the reference calculator.

    Attributes:
        key: content key of geometry and calculator fingerprint (``alcore.identity.label_key``).
        candidate: what is asked, and what was predicted for it.
        generation: in which generation it was asked.
    """

    key: str
    candidate: Candidate
    generation: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Label:
    """What the reference calculator answered.

    Attributes:
        key: content key of the request.
        structure: the geometry that was computed.
        status: only ``ok`` ever enters a data set.
        energy_ev: the energy whose gradient the forces are; None unless ``ok`` or ``rejected``.
        forces: eV/Å, ``(n_atoms, 3)``, constraints not applied; None likewise.
        stress: eV/Å^3 in ASE's Voigt order, ``(6,)``, or None.
        magnetic_moments: final moments in μ_B, ``(n_atoms,)``, or None.
        fingerprint: the calculator's content hash (code, version, settings that move the energy).
        calculator: its name.
        reason: one line; why it is not ``ok``.
        folder: where the calculation ran, or ""; its files are kept there until the label is believed.
        seconds: wall time of the calculation.
        reused: True if it was already in the store when this run asked; never for one derived by symmetry.
        details: plain values worth keeping (code version, electronic steps, …); of a label that was derived by symmetry
            ``equivalent_to`` (the key of the one that was computed) and ``operation``.
    """

    key: str
    structure: Structure
    status: LabelStatus
    fingerprint: str
    calculator: str
    energy_ev: float | None = None
    forces: FloatArray | None = None
    stress: FloatArray | None = None
    magnetic_moments: FloatArray | None = None
    reason: str = ""
    folder: str = ""
    seconds: float = 0.0
    reused: bool = False
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def derived_from(self) -> str:
        """Key of the label it was derived from by symmetry (``alcore.symmetry``), or "" if it was computed."""
        return str(self.details.get("equivalent_to", ""))


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Labelled frames in the order they were learned; all of one fingerprint, all ``ok``."""

    labels: tuple[Label, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, kw_only=True)
class Residual:
    """One label held against what was predicted before it was trained on.

    Attributes:
        key: the label's key.
        path, kind, generation: where it was asked.
        predicted_ev, labelled_ev: energy relative to the hop's initial state.
        sigma_committee_ev, sigma_posterior_ev: uncalibrated uncertainties stated with the prediction.
        sigma_ev: calibrated uncertainty stated with the prediction.
        fmax_ev_per_ang: the reference force on its free atoms.
        by_lead_ev: what each surface that could lead predicted (see ``Candidate``).
        image: its place in the band it was picked from, or None where that was not kept.
    """

    key: str
    path: str
    kind: LabelKind
    generation: int
    predicted_ev: float
    labelled_ev: float
    sigma_committee_ev: float
    sigma_posterior_ev: float
    sigma_ev: float
    fmax_ev_per_ang: float
    by_lead_ev: Mapping[str, float] = field(default_factory=dict)
    image: int | None = None

    @property
    def error_ev(self) -> float:
        return self.predicted_ev - self.labelled_ev

    @property
    def lead(self) -> str:
        """The surface that predicted: the one whose prediction was stated."""
        return min(
            self.by_lead_ev, key=lambda name: abs(self.by_lead_ev[name] - self.predicted_ev), default="committee"
        )


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Factor that makes stated sigmas honest.

    Attributes:
        factor: multiplies the model's raw sigma (the label noise is added after it).
        astray: the same for a band that did not converge, where the model has left what its labels know, and for what
            is asked because it is uncertain.
        n_residuals: how many of the loop's own residuals both rest on.
        source: how it came about, for a person.
    """

    factor: float = 2.0
    astray: float = 5.5
    n_residuals: int = 0
    source: str = "default, no residuals yet"


StopCode = Literal[
    "continue",
    "converged",
    "barrierless",
    "label_budget",
    "generation_budget",
    "end_state_not_minimum",
    "labels_failing",
]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Whether a path (or the run) is done, and why: ``reason`` is a sentence for a person."""

    stop: bool
    code: StopCode
    reason: str


@dataclass(frozen=True, kw_only=True, eq=False)
class PathRecord:
    """What one generation found out about one hop.

    Attributes:
        path: its name.
        initial, final: the end states as they stand after this generation.
        band: the band that was probed; None while the end states are being settled.
        barrier: its barriers; None likewise.
        label_keys: keys of the labels asked for in this generation, failed ones included.
        residuals: those labels against their predictions.
        initial_label, final_label: key of the label at each end state as it stands, or "".
        initial_fmax_ev_per_ang, final_fmax_ev_per_ang: reference force on it (free atoms), or None.
        saddle_key: key of the label at this band's saddle image, or "".
        verified_barrier_ev: reference energy at that saddle minus that of the initial state, or None.
        saddle_fmax_ev_per_ang: reference force on that saddle (free atoms), or None.
        error_to_verified_ev: ``barrier.forward_ev`` minus ``verified_barrier_ev``, or None.
        error_to_reference_ev: ``verified_barrier_ev`` (``barrier.forward_ev`` before there is one) minus the known
            barrier of the run file, or None.
        barrier_std_ev: calibrated uncertainty of the barrier: given this generation's labels where they confirm the
            prediction, otherwise as predicted, and at least as large as the miss; None without a band.
        decision: go on, or stop and why.
    """

    path: str
    initial: Structure
    final: Structure
    band: Band | None = None
    barrier: BarrierEstimate | None = None
    label_keys: tuple[str, ...] = ()
    residuals: tuple[Residual, ...] = ()
    initial_label: str = ""
    final_label: str = ""
    initial_fmax_ev_per_ang: float | None = None
    final_fmax_ev_per_ang: float | None = None
    saddle_key: str = ""
    verified_barrier_ev: float | None = None
    saddle_fmax_ev_per_ang: float | None = None
    error_to_verified_ev: float | None = None
    error_to_reference_ev: float | None = None
    barrier_std_ev: float | None = None
    decision: Decision = Decision(stop=False, code="continue", reason="")


@dataclass(frozen=True, kw_only=True, eq=False)
class GenerationRecord:
    """One turn of the loop: enough to go on from, and enough to plot.

    Attributes:
        run: the run's name.
        index: 0 is the labelling of the end states as given.
        paths: one record a hop, in the order of the run file.
        label_keys: keys of all labels in the data set *after* this generation, in training order.
        kinds: why each label so far was asked for, by key (failed and reused ones included).
        n_reference_calls: evaluations of the reference calculator so far, failures included; labels that were
            reused or derived by symmetry cost none.
        n_labels_reused: labels so far that the store already had.
        calls_by_kind: ``n_reference_calls`` by ``LabelKind``, plus ``failed``.
        doubts: why labels that are ``ok`` by themselves are not believed beside the others, by key; none is trained on.
        calibration: as it stands after this generation.
        surrogate: what the surrogate is, for a person and for going on: ``strategy``, ``why``, ``members`` (sha256 of
            each member's weights), ``prior`` (sha256), ``train`` (epochs, errors), ``correction`` (precision, …).
        seconds: wall time by step (``probe``, ``label``, ``measure``, which fits the correction, and ``train``); a step
            that had been done before the run was stopped takes none.
        sitting: index in ``RunRecord.sittings`` of the one that finished it.
        decision: of the run.
    """

    run: str
    index: int
    paths: tuple[PathRecord, ...]
    label_keys: tuple[str, ...] = ()
    kinds: Mapping[str, str] = field(default_factory=dict)
    n_reference_calls: int = 0
    n_labels_reused: int = 0
    calls_by_kind: Mapping[str, int] = field(default_factory=dict)
    doubts: Mapping[str, str] = field(default_factory=dict)
    calibration: Calibration = Calibration()
    surrogate: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    sitting: int = 0
    decision: Decision = Decision(stop=False, code="continue", reason="")


@dataclass(frozen=True, kw_only=True)
class Sitting:
    """One process's stretch of work on a run; a run that was stopped and gone on with has several.

    Attributes:
        started: ISO 8601 in UTC.
        host: the machine's name.
        versions: of Python and the packages that compute (``al-loop``, ``torch``, ``mace-torch``, ``ase``, …).
        code_sha256: hash of al-loop's own source files.
        settings_sha256: hash of the settings it ran with.
        changed: settings that differ from those of the sitting before, ``[then, now]`` by their key.
    """

    started: str
    host: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    code_sha256: str = ""
    settings_sha256: str = ""
    changed: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class RunRecord:
    """A run as the store knows it.

    Attributes:
        name: unique in the database.
        settings: the resolved run file as plain JSON values, as of the latest sitting.
        settings_sha256: hash of ``settings``.
        status: ``running``, ``converged``, ``budget_spent``, ``failed`` or ``cancelled``.
        reason: one line for a person.
        sittings: who worked on it, when and with what, in order.
        started, finished: ISO 8601 in UTC; ``finished`` is "" while it runs.
    """

    name: str
    settings: Mapping[str, Any]
    settings_sha256: str
    status: Literal["running", "converged", "budget_spent", "failed", "cancelled"] = "running"
    reason: str = ""
    sittings: tuple[Sitting, ...] = ()
    started: str = ""
    finished: str = ""
