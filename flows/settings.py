"""What a run file may say: one pydantic model a section, with units, defaults and bounds.

The same models are the deployment's parameters, so titles and descriptions are what a person reads in the form.
Whether the files named here exist is asked in ``runfile``; whether the calculator can run, in ``check``.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator

from alcore.errors import InputError

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""Names become folders and ids: letters, digits, dots, dashes and underscores. None can leave a folder."""
NAME_LENGTH = 120

FOUNDATION_NAMES = (
    "small",
    "medium",
    "large",
    "small-0b",
    "medium-0b",
    "small-0b2",
    "medium-0b2",
    "large-0b2",
    "medium-0b3",
    "medium-mpa-0",
    "small-omat-0",
    "medium-omat-0",
    "mace-matpes-pbe-0",
    "mace-matpes-r2scan-0",
    "mh-0",
    "mh-1",
)
"""The names mace-torch 0.3.16 knows; written down here because asking it imports torch."""

SYMMETRIC = ("emt", "tblite", "chgnet", "mace", "vasp", "espresso", "gpaw")
"""Calculators whose energy does not depend on where in the cell, and along which of equal axes, the atoms lie."""

OPTIONS_OF = {
    "lora": ("lora_rank", "lora_alpha"),
    "frozen": ("frozen_layers",),
    "multihead": ("replay_file", "replay_count", "replay_weight"),
}
"""Options that mean something under one strategy only."""


QUEUE_KEYS = {"walltime", "partition", "submit_options"}
"""Keys of the executor that only a queueing system understands."""
PYIRON_KEYS = {*QUEUE_KEYS, "queue", "modules", "prologue"}
"""Keys of the executor that only pyiron's jobs have."""


def checked_name(name: str) -> str:
    """``name``, if it can be that of a run.

    Raises:
        InputError: it cannot: it may hold what would leave a folder, or break a line.
    """
    if re.fullmatch(NAME_PATTERN.rstrip("$"), name) and len(name) <= NAME_LENGTH:
        return name
    shown = reprlib.repr(name)
    mend = f"letters, digits, dots, dashes and underscores, a letter or digit first, {NAME_LENGTH} at most"
    raise InputError(f"{shown} can be no run's name", where="name", mend=mend)


def unvouched(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A run's plain settings without what vouches for model files that run code: who wrote them is not who reads them,
    and no model is another one because it is trusted."""
    found, model, calculator = dict(settings), settings.get("model"), settings.get("calculator")
    if isinstance(model, Mapping) and "foundation_sha256" in model:
        found["model"] = {key: value for key, value in model.items() if key != "foundation_sha256"}
    if isinstance(calculator, Mapping) and calculator.get("name") == "mace":
        own = calculator.get("settings")
        if isinstance(own, Mapping) and "sha256" in own:
            found["calculator"] = {
                **calculator,
                "settings": {key: value for key, value in own.items() if key != "sha256"},
            }
    return found


def _known_foundation(value: Any) -> Any:
    if isinstance(value, str) and not value.endswith(".model") and value not in FOUNDATION_NAMES:
        raise ValueError(f"{value!r} is neither a .model file nor a name mace-torch knows")
    return value


class Section(BaseModel):
    """Common to all sections: unknown keys and silent conversions are refused, values do not change."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class PathSettings(Section):
    """One hop: two end states, or a whole band."""

    name: str = Field(
        default="hop", pattern=NAME_PATTERN, max_length=NAME_LENGTH, description="the hop's name, unique in the run"
    )
    initial: str | None = Field(
        default=None, description="initial state: a file ase.io.read takes, relative to the run file"
    )
    final: str | None = Field(default=None, description="final state: the same atoms in the same order")
    band: str | None = Field(
        default=None, description="a whole starting band, end states included, instead of initial and final"
    )
    relax_endpoints: bool = Field(
        default=True, description="relax the end states on the surrogate, checked with reference labels"
    )
    reference_barrier_ev: float | None = Field(
        default=None, description="eV; a known barrier to report the error against, if there is one"
    )
    charge: float = Field(default=0.0, description="e; total charge, where the calculator needs it")
    magnetic_moments: list[float] | None = Field(
        default=None, min_length=1, description="μ_B; initial moments, one an atom, where the calculator needs them"
    )

    @model_validator(mode="after")
    def _pair_or_band(self) -> Self:
        if self.band is not None and (self.initial is not None or self.final is not None):
            raise ValueError("a band and end states exclude each other (give `initial` and `final`, or `band`)")
        if self.band is None:
            for key in ("initial", "final"):
                if getattr(self, key) is None:
                    raise ValueError(f"`{key}` is missing (give `initial` and `final`, or `band`)")
        return self


class CalculatorSettings(Section):
    """Where reference labels come from."""

    name: str = Field(
        description="vasp, espresso, gpaw, cp2k, tblite, emt, chgnet, mace, ase or a plug-in's (`al-loop calculators`)"
    )
    settings: dict[str, JsonValue] = Field(default_factory=dict, description="the calculator's own settings")
    factory: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$",
        description="package.module:function that returns an ASE calculator; only with name: ase",
    )

    path: str | None = Field(
        default=None, description="folder of the factory's module if it is not installed; empty: the run file's"
    )
    packages: list[str] = Field(
        default_factory=list, description="packages whose version moves the factory's energy, e.g. [gpaw]"
    )

    @model_validator(mode="after")
    def _factory_goes_with_ase(self) -> Self:
        if self.name == "ase" and self.factory is None:
            raise ValueError("`factory` is missing (name: ase needs factory: package.module:function)")
        for key in ("factory", "path", "packages"):
            if self.name != "ase" and getattr(self, key):
                raise ValueError(f"`{key}` belongs to name: ase (remove it, or set name: ase)")
        return self

    def arguments(self) -> dict[str, Any]:
        """The settings as the calculator registry takes them."""
        if self.name == "ase":
            return {key: getattr(self, key) for key in ("factory", "settings", "path", "packages")}
        return dict(self.settings)

    def is_symmetric(self) -> bool:
        """Whether images of a geometry (``alcore.symmetry``) have the same energy, as far as the settings tell.

        Not where atoms feel a real-space grid they do not share (cp2k, gpaw's lcao, vasp's projection in real space),
        where axes of equal length may have unequal k-points, where settings of a code's own may name a direction or an
        atom, and not for a calculator that nothing is known about (ase, plug-ins).
        """
        if self.name not in SYMMETRIC or self.settings.get("mode", "pw") != "pw":
            return False
        even = all(
            isinstance(entry := self.settings.get(key) or [0], list) and len(set(map(str, entry))) == 1
            for key in ("kpts", "koffset")
        )
        return even and not any(self.settings.get(key) for key in ("folder", "incar", "input_data", "lreal"))


class ExecutorSettings(Section):
    """Where and how many reference calculations run."""

    kind: Literal["local", "pyiron"] = Field(
        default="local",
        description="local: warm worker processes on this machine; pyiron: each label a pyiron job, queued if asked",
    )
    workers: int = Field(default=2, ge=1, le=1024, description="calculations of this run at the same time")
    max_running: int | None = Field(
        default=None,
        ge=1,
        description="calculations at the same time of all runs together; empty: what this machine's cores carry, "
        "or 1000 in a queue",
    )
    timeout_s: float = Field(default=3600.0, gt=0, description="s; a calculation that takes longer is ended")
    retries: int = Field(
        default=2, ge=0, le=10, description="further attempts at a calculation that failed: more steps, gentler mixing"
    )
    threads: int = Field(default=1, ge=1, le=1024, description="threads of each calculation")
    memory_gb: float | None = Field(
        default=None, gt=0, description="GB of memory of each calculation, asked of a queue and enforced here"
    )
    queue: Literal["slurm", "sge", "lsf", "torque", "moab", "flux"] | None = Field(
        default=None, description="the queueing system, only with kind: pyiron; empty: this machine"
    )
    cores: int = Field(
        default=1, ge=1, description="cores that a calculation keeps busy, e.g. 8 for a command `mpirun -np 8 pw.x`"
    )
    walltime: str | None = Field(
        default=None,
        pattern=r"^(\d+-)?\d{1,3}:[0-5]\d:[0-5]\d$",
        description="[days-]hours:minutes:seconds of a job in the queue",
    )
    partition: str | None = Field(default=None, pattern=r"^[\w.,-]+$", description="partition of the queueing system")
    modules: list[str] = Field(default_factory=list, description="modules a job loads first, e.g. [vasp/6.4.2]")
    prologue: list[str] = Field(default_factory=list, description="shell lines a job runs after that")
    submit_options: list[str] = Field(
        default_factory=list, description="further options of the submission, e.g. [--account=abc]"
    )

    @model_validator(mode="after")
    def _queue_goes_with_pyiron(self) -> Self:
        given = {
            key
            for key, field in type(self).model_fields.items()
            if getattr(self, key) != field.get_default(call_default_factory=True)
        }
        if self.kind == "local" and (foreign := given & PYIRON_KEYS):
            raise ValueError(f"`{min(foreign)}` belongs to kind: pyiron (remove it, or set kind: pyiron)")
        if self.kind == "local":
            return self
        if self.queue is None and (foreign := given & QUEUE_KEYS):
            raise ValueError(f"`{min(foreign)}` needs a queue (set `queue`, e.g. queue: slurm)")
        if self.queue is not None and self.walltime is None:
            raise ValueError('`walltime` is missing (a job in a queue needs one, e.g. walltime: "12:00:00")')
        return self


class TrainingOptions(Section):
    """What ``model.options`` may hold; ``alcore.mace.training.TrainSpec`` and ``alcore.mace.strategies.StrategySpec``
    have the same names and defaults, ``alcore.mace.sanity.SanitySpec`` the same defaults."""

    epochs: int = Field(
        default=10, ge=1, description="of a member's first training: passes over the labels, of 20 structures at least"
    )
    warm_epochs: int = Field(default=10, ge=1, description="of later ones, which start from the last weights")
    fresh_epochs: int = Field(default=30, ge=1, description="of the first one of weights that know nothing")
    batch_size: int = Field(default=2, ge=1, description="structures a step")
    learning_rate: float = Field(default=0.01, gt=0, description="of Adam, at first; it falls to zero")
    ema_decay: float = Field(default=0.9, ge=0, lt=1, description="of the average of weights that is kept, a step")
    energy_weight: float = Field(default=10.0, ge=0, description="atom²/eV²; on the squared relative energy an atom")
    force_weight: float = Field(default=1.0, ge=0, description="Å²/eV²; on the mean squared force component")
    first_labels: int | None = Field(
        default=None, ge=2, description="how many there must be before anything is trained; null: the strategy decides"
    )
    e0s: dict[str, float] | None = Field(
        default=None,
        description="eV, by symbol; the reference calculator's energies of isolated atoms; null: fitted to the labels",
    )
    sane_energy_ev: float = Field(
        default=0.03, gt=0, description="eV; a member that reproduces its labels' relative energies worse is given up"
    )
    sane_force_ev_per_ang: float = Field(default=0.25, gt=0, description="eV/Å; the same of forces")
    head: str | None = Field(default=None, description="of a foundation model that has several")
    lora_rank: int = Field(default=4, ge=1, description="strategy lora: rank of the adapters")
    lora_alpha: float = Field(default=4.0, gt=0, description="strategy lora: a weight changes by alpha / rank A B")
    frozen_layers: list[Literal["embedding", "interactions", "products", "readouts"]] = Field(
        default=["embedding", "interactions"],
        min_length=1,
        max_length=3,
        description="strategy frozen: parts of the model that keep their weights",
    )
    replay_file: str | None = Field(
        default=None,
        description="strategy multihead: labelled structures of the foundation model's own data; "
        "null: its own energies and forces around the labels",
    )
    replay_count: int = Field(default=32, ge=2, description="strategy multihead: structures to replay")
    replay_weight: float = Field(default=1.0, gt=0, description="strategy multihead: of their loss beside the labels'")


class ModelSettings(Section):
    """The surrogate: a MACE committee plus a closed-form correction."""

    foundation: Annotated[str | None, BeforeValidator(_known_foundation)] = Field(
        default=None,
        description=(
            "a .model file or a name mace-torch knows (small, medium-mpa-0, ...); "
            "empty: a small MACE made at first use from the seed"
        ),
    )
    foundation_sha256: str | None = Field(
        default=None,
        pattern=r"^[0-9a-fA-F]{64}$",
        description="sha256 of that file; vouches for one that can be loaded only by running the code inside it",
        exclude_if=lambda sha256: sha256 is None,  # runs that were begun before there was this key stay the same
    )
    strategy: Literal["auto", "zero-shot", "scratch", "naive", "multihead", "lora", "frozen"] = Field(
        default="auto", description="how MACE learns the labels; auto says which it chose and why"
    )
    committee: int = Field(default=3, ge=1, le=32, description="members of the committee")
    correction: Literal["none", "blr", "gp", "blr+gp"] = Field(
        default="blr+gp",
        description="closed-form correction on top of MACE: linear on its node features, a Gaussian process over the "
        "places of the atoms, or both",
    )
    options: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="how members are fine-tuned: epochs, warm_epochs, learning_rate, energy_weight, ...; "
        "head of the foundation model; what a strategy needs: lora_rank, frozen_layers, replay_file, ...",
    )
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:0")

    @model_validator(mode="after")
    def _strategy_has_what_it_needs(self) -> Self:
        if self.strategy in OPTIONS_OF and self.foundation is None:
            raise ValueError(f"strategy {self.strategy} needs a trained model to start from (set `foundation`)")
        for strategy, keys in OPTIONS_OF.items():
            foreign = sorted(set(self.options) & set(keys))
            if foreign and strategy != self.strategy:
                raise ValueError(f"`options.{foreign[0]}` belongs to strategy: {strategy} (remove it)")
        if self.options.get("head") is not None and self.foundation is None:
            raise ValueError("`options.head` is that of a foundation model (set `foundation`, or remove it)")
        return self

    @model_validator(mode="after")
    def _something_tells_uncertainty(self) -> Self:
        if self.correction == "none" and self.committee < 2:
            raise ValueError(
                "one member without correction states no uncertainty (committee: 2 or more, or correction: blr)"
            )
        return self

    def training(self) -> TrainingOptions:
        """``options`` with their defaults."""
        return TrainingOptions.model_validate(self.options)


class NebSettings(Section):
    """How a band is relaxed on the surrogate."""

    n_images: int = Field(default=7, ge=3, le=97, description="images between the end states")
    climb: bool = Field(default=True, description="let the highest image climb to the saddle")
    fmax_ev_per_ang: float = Field(default=0.03, gt=0, description="eV/Å; the band is relaxed below this NEB force")
    spring_ev_per_ang2: float = Field(default=0.1, gt=0, description="eV/Å²; spring constant between images")
    interpolation: Literal["idpp", "linear"] = Field(default="idpp", description="how the first band is made")
    symmetry: bool | None = Field(
        default=None,
        description="geometries that are images of each other share a label; empty: where the calculator is known to "
        "be as symmetric as the cell",
        exclude_if=lambda symmetry: symmetry is None,  # runs that were begun before there was this key stay the same
    )


class SelectSettings(Section):
    """Which structures are labelled next."""

    strategy: Literal["saddle+uncertainty", "uncertainty", "barrier-variance", "random"] = Field(
        default="saddle+uncertainty",
        description="the saddle, then the most uncertain images; or the most uncertain ones alone; or what tells most "
        "about the barrier; or any image, to compare with",
    )
    labels_per_generation: int = Field(default=1, ge=1, le=100, description="labels a hop asks for in one generation")
    hops_per_generation: int = Field(
        default=1,
        ge=1,
        le=1000,
        description="hops that ask in one generation, the least certain first; more save time where many labels can "
        "run at once, fewer save labels",
    )


class StopSettings(Section):
    """When a run is done."""

    barrier_tolerance_ev: float = Field(
        default=0.01, gt=0, description="eV; agreement and uncertainty asked of a converged barrier"
    )
    saddle_fmax_ev_per_ang: float = Field(
        default=0.05, gt=0, description="eV/Å; largest reference force left on the saddle and the end states"
    )
    max_generations: int = Field(
        default=15, ge=1, description="generations after the labelling of the end states, at most, for each hop"
    )
    max_labels: int = Field(default=60, ge=1, description="reference calculations at most, failed ones included")


class StoreSettings(Section):
    """Where everything is remembered."""

    mongodb_uri: str | None = Field(
        default=None,
        pattern=r"^mongodb(\+srv)?://.+",
        description="mongodb://...; empty: AL_LOOP_MONGODB_URI, or else the embedded server",
        json_schema_extra={"pattern": "^[^@]*$"},  # of a deployment's form, where a password would be stored and shown
    )


class RunSettings(Section):
    """A run file."""

    name: str = Field(
        pattern=NAME_PATTERN,
        max_length=NAME_LENGTH,
        description="the run's name; a name that exists goes on where it stopped",
    )
    paths: list[PathSettings] = Field(
        min_length=1, description="one or several hops; they share one model and one label store"
    )
    data: list[str] = Field(default_factory=list, description="files of labelled structures to start from")
    calculator: CalculatorSettings = Field(description="where reference labels come from")
    executor: ExecutorSettings = Field(default=ExecutorSettings(), description="where reference calculations run")
    model: ModelSettings = Field(default=ModelSettings(), description="the surrogate")
    neb: NebSettings = Field(default=NebSettings(), description="how bands are relaxed")
    select: SelectSettings = Field(default=SelectSettings(), description="which structures are labelled next")
    stop: StopSettings = Field(default=StopSettings(), description="when the run is done")
    store: StoreSettings = Field(default=StoreSettings(), description="where everything is remembered")
    seed: int = Field(default=0, ge=0, lt=2**32, description="of everything that is random")

    @model_validator(mode="after")
    def _path_names_are_unique(self) -> Self:
        names = [path.name for path in self.paths]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"several paths are named {twice[0]!r} (give each path its own `name`)")
        return self
