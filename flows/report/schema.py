"""The schema of ``barrier.json``. Units stand in the names; what is not known (yet) is null, never NaN.

``BarrierReport.model_json_schema()`` prints it with every field's meaning.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def finite_or_none(value: Any) -> Any:
    """NaN and infinities are not JSON: they mean "not known"."""
    number = value.item() if hasattr(value, "item") else value
    if isinstance(number, float) and not (abs(number) < float("inf")):
        return None
    return number


Number = Annotated[float | None, BeforeValidator(finite_or_none)]


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ExtremumRow(_Row):
    """A minimum or maximum of the energy along the path."""

    kind: str = Field(description="minimum or maximum")
    coordinate_ang: Number = Field(description="path coordinate, Å")
    energy_ev: Number = Field(description="relative to the initial state, eV")
    image: int = Field(description="nearest image; 0 is the initial state")


class SegmentRow(_Row):
    """A stretch of the path between two neighbouring minima; a path without intermediate minima is one."""

    start_image: int
    saddle_image: int
    end_image: int
    barrier_forward_ev: Number = Field(description="its highest image above its start, on the surrogate")
    barrier_reverse_ev: Number = Field(description="the same above its end")
    saddle_ev: Number = Field(description="energy of that image relative to the initial state")
    saddle_std_ev: Number = Field(description="calibrated standard deviation of saddle_ev, as predicted")


class FailureRow(_Row):
    """A reference calculation that gave no usable label."""

    key: str
    path: str
    generation: int
    kind: str = Field(description="why it was asked for, or unknown")
    status: str = Field(description="unconverged, crashed, timeout or rejected")
    reason: str
    folder: str = Field(description='where its files are kept, or ""')


class DecisionRow(_Row):
    """Go on or stop, and why."""

    stop: bool
    code: str
    reason: str


class GenerationRow(_Row):
    """One generation of a hop, or of the run (barriers only if the run has a single hop)."""

    index: int
    barrier_forward_ev: Number = Field(None, description="on the surrogate, before this generation's labels were known")
    predicted_std_ev: Number = Field(None, description="calibrated, stated with barrier_forward_ev before those labels")
    barrier_std_ev: Number = Field(None, description="calibrated, once this generation's labels are known")
    verified_barrier_ev: Number = Field(None, description="reference energy at this band's saddle minus initial state")
    saddle_reference_fmax_ev_per_ang: Number = Field(None, description="reference force there, free atoms, eV/Å")
    error_to_verified_ev: Number = Field(None, description="barrier_forward_ev minus verified_barrier_ev")
    error_to_reference_ev: Number = Field(None, description="verified (else surrogate) barrier minus the known barrier")
    n_labels: int = Field(description="labels asked for so far, reused and failed ones included")
    n_reference_calls: int = Field(description="reference calculations so far, in the whole run")
    dataset_size: int = Field(description="labels the surrogate has learned after this generation")
    seconds: dict[str, Number] = Field(description="wall time by step, s")
    decision: DecisionRow


class PathResult(_Row):
    """One hop."""

    name: str
    converged: bool = Field(description="only if the reference calculator confirmed it")
    stop_code: str
    stop_reason: str
    barrier_forward_ev: Number = None
    barrier_reverse_ev: Number = None
    reaction_energy_ev: Number = None
    barrier_std_ev: Number = Field(None, description="calibrated standard deviation, once the last labels are known")
    predicted_std_ev: Number = Field(None, description="the same, stated before those labels were known")
    barrier_std_committee_ev: Number = Field(None, description="uncalibrated: spread of the members")
    barrier_std_posterior_ev: Number = Field(None, description="uncalibrated: posterior of the correction")
    barrier_spline_ev: Number = Field(None, description="forward barrier of the spline through energies and forces")
    extrema: list[ExtremumRow] = []
    segments: list[SegmentRow] = Field([], description="in order; where the path passes wells, it is divided there")
    rate_limiting_segment: int | None = Field(
        None,
        description="index in segments: its saddle lies furthest above the lowest minimum before it, which limits the "
        "rate forward",
    )
    rate_limiting_ev: Number = Field(None, description="how far above: what the way forward climbs there")
    verified_segment: int | None = Field(
        None, description="index in segments: its saddle is the highest, and the one the barrier is verified at"
    )
    saddle_image: int | None = None
    saddle_verified: bool = Field(
        description="the reported saddle is labelled, agrees within the tolerance with what was predicted before, "
        "and its reference force is below the limit"
    )
    verified_barrier_ev: Number = Field(None, description="reference energy at the saddle minus initial state")
    saddle_reference_fmax_ev_per_ang: Number = None
    initial_reference_fmax_ev_per_ang: Number = None
    final_reference_fmax_ev_per_ang: Number = None
    last_verified_generation: int | None = Field(None, description="the newest generation whose saddle was labelled")
    last_verified_barrier_ev: Number = Field(None, description="what the label said there")
    error_to_verified_ev: Number = None
    reference_barrier_ev: Number = Field(None, description="barrier known from elsewhere, as the run file states it")
    error_to_reference_ev: Number = None
    spin_jumps: list[str] = Field([], description="neighbouring labels of the path whose final moments differ")
    n_reference_calls: int = Field(description="calculations this hop asked for (of a label two hops share, both)")
    n_reference_calls_by_kind: dict[str, int] = Field(description="a failed one counts under its kind and as failed")
    n_labels_reused: int
    neb_converged: bool = Field(description="the band is converged on the surrogate")
    neb_status: str | None = Field(None, description="converged, max_steps or guarded")
    neb_reason: str = ""
    neb_fmax_ev_per_ang: Number = None
    neb_n_images: int | None = Field(None, description="end states included")
    path_length_ang: Number = None
    generations: list[GenerationRow]


class BarrierReport(_Row):
    """``barrier.json``. Barriers stand at the top as well if the run has a single hop."""

    run: str
    status: str
    converged: bool = Field(description="every hop is converged")
    stop_code: str
    stop_reason: str
    barrier_forward_ev: Number = None
    barrier_reverse_ev: Number = None
    reaction_energy_ev: Number = None
    barrier_std_ev: Number = None
    saddle_verified: bool = Field(description="of every hop")
    verified_barrier_ev: Number = None
    saddle_reference_fmax_ev_per_ang: Number = None
    neb_converged: bool = Field(description="of every hop")
    neb_fmax_ev_per_ang: Number = None
    n_reference_calls: int = Field(description="all of them, failures included; reused labels not")
    n_reference_calls_by_kind: dict[str, int]
    n_labels_reused: int
    dataset_size: int
    barrier_tolerance_ev: Number
    saddle_fmax_limit_ev_per_ang: Number
    model_sha256: str | None = Field(
        description="of the leading model: the prior, or the committee (then of its members' hashes joined)"
    )
    model_members_sha256: list[str]
    settings_sha256: str
    teacher: dict[str, Any] = Field(description="where the reference labels come from")
    prior: dict[str, Any] = Field(description="what the surrogate knew before its first label")
    surrogate: dict[str, Any]
    calibration: dict[str, Any] = Field(description="factor on the raw sigma, and the residuals it rests on")
    failures: list[FailureRow]
    generations: list[GenerationRow]
    paths: list[PathResult]
    seconds: dict[str, Number] = Field(description="wall time by step over all generations, s")
    versions: dict[str, str]
    started: str
    finished: str
