"""What a pre-training file may say: sections as in ``flows.settings``, read and refused as run files are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from alcore.errors import InputError
from flows import runfile
from flows.runfile import Loc, Report, RunFileErrors
from flows.settings import NAME_LENGTH, NAME_PATTERN, CalculatorSettings, Section

EXAMPLE = "config/pretrain_cr_sb_te.yaml is an example"


class SamplingSettings(Section):
    """How structures are changed before the teacher sees them; ``alcore.sampling`` has the same names and defaults."""

    count: int = Field(default=200, ge=1, description="structures around those of `around`, as many around each")
    rattle_ang: list[float] = Field(
        default=[0.02, 0.2],
        min_length=2,
        max_length=2,
        description="Å; lowest and highest standard deviation of a coordinate, e.g. [0.02, 0.2]",
    )
    strain: float = Field(default=0.03, ge=0, le=0.3, description="largest component of a cell's strain")
    squeezed_fraction: float = Field(
        default=0.15, ge=0, le=1, description="share of structures with one bond compressed, which teaches repulsion"
    )
    vacancy_fraction: float = Field(
        default=0.15, ge=0, le=1, description="share of the structures around yours that miss an atom"
    )
    swap_fraction: float = Field(
        default=0.1, ge=0, le=1, description="share of them in which two atoms of different elements change places"
    )

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        low, high = self.rattle_ang
        if not 0 < low < high:
            raise ValueError(f"`rattle_ang` is [{low:g}, {high:g}] (give a low and a higher one, both above 0)")
        if self.vacancy_fraction + self.swap_fraction > 1:
            raise ValueError("`vacancy_fraction` and `swap_fraction` add up to more than 1 (lower one)")
        return self


class SpaceSettings(Section):
    """Structures over a chemical space, without any of yours."""

    kind: Literal["metals", "salts", "tellurides"] = Field(
        description="metals: crystals, alloys, surfaces, adatoms; salts: rock salts, fluorites; tellurides: layered "
        "ones of Sb and Bi; all with defects"
    )
    elements: list[str] = Field(min_length=1, description="symbols, e.g. [Al, Cu, Au]")
    count: int = Field(default=300, ge=1, description="structures")


class LearningSettings(Section):
    """How the student is made; ``alcore.mace.pretraining.PretrainSpec`` has the same names and defaults."""

    epochs: int = Field(default=60, ge=1, description="passes over the structures")
    batch_size: int = Field(default=8, ge=1, description="structures a step")
    learning_rate: float = Field(default=0.01, gt=0, description="peak of the one-cycle schedule")
    energy_weight: float = Field(default=20.0, ge=0, description="1/eV²; on the loss of energies an atom")
    force_weight: float = Field(default=1.0, ge=0, description="Å²/eV²; on the loss of forces")
    held_out: float = Field(default=0.1, gt=0, lt=1, description="share of structures that only judge")
    validate_every: int = Field(default=2, ge=1, description="epochs between two looks at those")
    channels: int = Field(default=32, ge=1, le=512, description="of the student's hidden features")
    max_ell: int = Field(default=2, ge=0, le=4, description="highest spherical harmonic on its edges")
    correlation: int = Field(default=2, ge=1, le=4, description="body order of its product basis minus one")
    r_max_ang: float = Field(default=5.0, gt=1, le=12, description="Å; its cutoff")
    n_layers: int = Field(default=2, ge=1, le=4, description="its message-passing layers")
    max_force_ev_per_ang: float = Field(default=20.0, gt=0, description="eV/Å; labels with larger forces are left out")
    threads: int = Field(default=1, ge=1, le=1024, description="of teacher and training; moves the last digits")


class PretrainSettings(Section):
    """A pre-training file."""

    name: str = Field(pattern=NAME_PATTERN, max_length=NAME_LENGTH, description="the model's name")
    output: str = Field(
        default=".", description="a .model file, or a folder for NAME.model; relative to the pre-training file"
    )
    teacher: CalculatorSettings = Field(description="what labels the structures: any calculator, but the reference")
    around: list[str] = Field(default_factory=list, description="files of structures of your system, all their frames")
    sampling: SamplingSettings = Field(default=SamplingSettings(), description="how structures are changed")
    space: SpaceSettings | None = Field(default=None, description="structures over a chemical space")
    pairs: int = Field(
        default=0, ge=0, description="pairs of atoms alone, of every two elements; their energies are learned badly"
    )
    withhold: list[str] = Field(
        default_factory=list,
        description="files, or formulas such as CrSb16Te24; no structure of such a composition is learned from",
    )
    training: LearningSettings = Field(default=LearningSettings(), description="how the student is made")
    seed: int = Field(default=0, ge=0, lt=2**32, description="of everything that is random")

    @model_validator(mode="after")
    def _something_to_learn_from(self) -> Self:
        if not self.around and self.space is None:
            raise ValueError("there is nothing to learn from (give `around`, `space`, or both)")
        return self


def load_pretrain_file(path: str | Path, output: Path | None = None) -> PretrainSettings:
    """Read a pre-training file; relative paths in it are relative to its folder, and absolute in what is returned.

    Args:
        path: a YAML file.
        output: in the place of the file's ``output``; relative to the current folder.

    Raises:
        InputError: it cannot be read at all.
        RunFileErrors: it can be read, and this is what is wrong with it.
    """
    where, file = str(path), Path(path).expanduser()
    try:
        text = runfile._read_text(file)
        data = runfile._parse(text, where)
    except InputError as error:  # what a run file would start from is no help here
        mend = EXAMPLE if "al-loop init" in error.mend else error.mend
        raise InputError(error.message, where=where, mend=mend) from None
    node = runfile._yaml().compose(text)
    problems: list[str] = []

    def report(loc: Loc, message: str, mend: str) -> None:
        key = ".".join(str(part) for part in loc if part != "[key]")
        note = "; ".join(part for part in (mend, f"line {runfile._line(node, loc)}") if part)
        problems.append(str(InputError(message, where=f"{where}: {key}" if key else where, mend=note)))

    _resolve_paths(data, file.absolute().parent, report)
    if output is not None:
        data["output"] = str(output.expanduser().absolute())
    settings = runfile._validate(PretrainSettings, data, (), report)
    if settings is None or problems:
        raise RunFileErrors(problems)
    return settings


def _resolve_paths(data: dict[str, Any], base: Path, report: Report) -> None:
    """Drop empty sections, make paths absolute (in place), and look whether files are there."""
    for key in ("around", "withhold", "sampling", "space", "training", "output"):
        if data.get(key, ...) is None:
            del data[key]
    if isinstance(teacher := data.get("teacher"), dict):
        if teacher.get("settings", ...) is None:
            del teacher["settings"]

        def of_teacher(loc: Loc, message: str, mend: str) -> None:
            report(("teacher", *loc[1:]), message, mend)

        runfile._resolve_calculator(teacher, base, of_teacher)
    for files, place, loc in _files(data):
        path = base / Path(files[place]).expanduser()
        if path.is_file():
            files[place] = str(path)
        elif loc[0] == "around":
            report(loc, f"no such file: {path}", "give a file ase.io.read takes, relative to this one's folder")
        elif formula_counts(files[place]) is None:
            mend = "give a file, relative to this one's folder, or a formula such as CrSb16Te24"
            report(loc, f"{files[place]!r} is neither a file nor a formula", mend)
    if isinstance(output := data.get("output", "."), str):
        data["output"] = str(base / Path(output).expanduser())


def _files(data: dict[str, Any]) -> Iterator[tuple[list[Any], int, Loc]]:
    for key in ("around", "withhold"):
        files = data.get(key)
        if not isinstance(files, list):
            continue
        for k, file in enumerate(files):
            if isinstance(file, str):
                yield files, k, (key, k)


def formula_counts(text: str) -> dict[str, int] | None:
    """Atoms of each element in a formula, or None if it is none."""
    from ase.formula import Formula

    try:
        return dict(Formula(text, strict=True).count()) or None
    except ValueError:
        return None
