"""What can be set of a VASP calculation, and the INCAR, KPOINTS and POTCAR that follow from it."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from alcore.errors import CalculatorError
from calculators.base import CalculatorSettings, LocalPath
from calculators.vasp.incar import NOT_FACTS, objection, parse_incar
from calculators.vasp.output import VERSION
from calculators.vasp.potcars import RELEASES, Library, Potcar, configured_folder, default_names, split_potcar
from calculators.vasp.presets import PresetName, potcar_names, potcar_release

IVDW = {"D2": 1, "D3": 11, "D3BJ": 12, "D4": 13, "TS": 20, "TS-HI": 21, "MBD": 202, "dDsC": 4}
PLAIN = {"PREC": "Accurate", "EDIFF": 1e-6, "ISMEAR": 0, "SIGMA": 0.05, "LREAL": False, "LASPH": True}
"""What a calculation from settings has besides the functional, the cutoff and the k-points."""
LEVEL = ("encut", "kspacing", "ediff", "ismear", "sigma", "ispin", "lreal")
"""Settings that are INCAR tags of the same name and move the energy."""
DEFAULT_NELM = 100


class VaspSettings(CalculatorSettings):
    command: str = Field(
        "vasp_std", min_length=1, description="what starts VASP, as in a shell: mpirun -np 16 vasp_std"
    )
    version: str | None = Field(None, description="6.4.2, ...; null: read from the program on this machine")
    preset: PresetName | None = Field(
        None, description="settings of a foundation model's data; replaces xc, encut, ..."
    )
    folder: LocalPath | None = Field(
        None, description="a folder with INCAR, and perhaps KPOINTS and POTCAR, that are taken as they are"
    )
    xc: str | None = Field(None, description="functional as ASE names it (PBE, PBEsol, r2SCAN, HSE06, ...); null: PBE")
    encut: float | None = Field(None, gt=0, description="plane-wave cutoff in eV; needed without preset or folder")
    kspacing: float | None = Field(
        None,
        gt=0,
        description="largest distance of k-points in 1/Å (2π included); this or kpts without preset or folder",
    )
    kpts: tuple[int, int, int] | None = Field(None, description="k-points along the three axes, instead of kspacing")
    gamma: bool | None = Field(None, description="k-points around Γ; null: true")
    ediff: float | None = Field(None, gt=0, description="SCF: change of energy in eV; null: 1e-6")
    ismear: int | None = Field(None, ge=-5, description="kind of smearing; null: 0, Gaussian")
    sigma: float | None = Field(None, ge=0, description="smearing width in eV; null: 0.05")
    ispin: Literal[1, 2] | None = Field(None, description="2: spin-polarised; null: if the structure brings moments")
    lreal: bool | Literal["Auto", "On"] | None = Field(None, description="projection in real space; null: false")
    nelm: int | None = Field(None, ge=2, description="electronic steps before it counts as unconverged; null: 100")
    algo: Literal["Normal", "Fast", "VeryFast", "All", "Damped"] | None = Field(
        None, description="how the SCF is solved; null: Normal, or the preset's"
    )
    dispersion: Literal["D2", "D3", "D3BJ", "D4", "TS", "TS-HI", "MBD", "dDsC"] | None = Field(
        None, description="van der Waals correction (IVDW)"
    )
    ldau_luj: dict[str, dict[Literal["L", "U", "J"], float]] | None = Field(
        None, description="DFT+U by element, U and J in eV: {Fe: {L: 2, U: 5.3, J: 0}}"
    )
    setups: Literal["minimal", "recommended", "gw"] | dict[str, str] | None = Field(
        None, description="ASE's table of POTCARs, or a POTCAR by element: {Fe: Fe_pv}; null: minimal, or the preset's"
    )
    potcar_folder: LocalPath | None = Field(None, description="where POTCAR files lie; null: VASP_PP_PATH")
    potcar_set: str | None = Field(None, description="folder in it: potpaw_PBE.54, ...; null: the only one that fits")
    elements: tuple[str, ...] | None = Field(
        None, description="whose POTCARs are in the fingerprint; null: all that potcar_folder holds"
    )
    incar: dict[str, bool | int | float | str | list[bool | int | float | str]] = Field(
        default_factory=dict, description="further INCAR tags: {LMAXMIX: 4}"
    )

    @field_validator("version")
    @classmethod
    def _digits(cls, version: str | None) -> str | None:
        found = VERSION.search(version or "")
        if version is not None and found is None:
            raise ValueError(f"{version} is no version of VASP (three numbers: 6.4.2)")
        return found[1] if found else None

    @field_validator("xc")
    @classmethod
    def _known_functional(cls, xc: str | None) -> str | None:
        if xc is not None and xc.lower() not in _recipes():
            raise ValueError(f"unknown functional {xc}, known: {', '.join(_recipes())}")
        return xc

    @field_validator("incar")
    @classmethod
    def _tags_in_capitals(cls, incar: dict[str, Any]) -> dict[str, Any]:
        tags = {tag.upper(): value for tag, value in incar.items()}
        if why := objection(tags):
            raise ValueError(why)
        own = [tag for tag in tags if tag.lower() in (*LEVEL, "nelm", "algo") or tag in ("IVDW", "KGAMMA")]
        if own:
            raise ValueError(f"{', '.join(own)} is a setting of its own: set it beside incar, in small letters")
        return tags

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        levels = [name for name in (*LEVEL, "xc", "kpts", "gamma", "dispersion", "ldau_luj") if self.sets(name)]
        if self.folder is not None:
            levels += ["preset"] if self.preset else []
            levels += ["setups"] if self.setups and (self.folder / "POTCAR").exists() else []
            levels += [f"incar.{tag}" for tag in self.incar if tag not in NOT_FACTS]
            if levels:
                raise ValueError(f"folder already says {', '.join(levels)} (remove it here, or change the files)")
        elif self.preset is not None:
            if twice := [name for name in ("xc", "ldau_luj") if self.sets(name)]:
                raise ValueError(f"preset {self.preset} already says {', '.join(twice)} (remove it, or the preset)")
        elif self.encut is None or (self.kspacing is None and self.kpts is None):
            raise ValueError("encut (eV) and kspacing (1/Å) or kpts are needed (or a preset, or a folder)")
        if self.kspacing is not None and self.kpts is not None:
            raise ValueError("kspacing and kpts say the same thing twice (remove one)")
        return self

    def sets(self, name: str) -> bool:
        return getattr(self, name) is not None


@cache
def _recipes() -> dict[str, dict[str, Any]]:
    """INCAR tags of each functional, by ASE."""
    from ase.calculators.vasp.create_input import GenerateVaspInput

    recipes: Any = GenerateVaspInput.xc_defaults
    return {xc: {k.upper(): v for k, v in tags.items() if k != "pp"} for xc, tags in recipes.items()}


def own_tags(settings: VaspSettings) -> dict[str, Any]:
    """The INCAR tags that the settings themselves say, those of a preset or a folder not among them."""
    tags = {name.upper(): getattr(settings, name) for name in (*LEVEL, "nelm", "algo") if settings.sets(name)}
    if settings.kspacing is not None:
        tags["KGAMMA"] = settings.gamma is not False
    if settings.dispersion is not None:
        tags["IVDW"] = IVDW[settings.dispersion]
    return tags | settings.incar


def plain_tags(settings: VaspSettings) -> dict[str, Any]:
    start = {"NELM": DEFAULT_NELM, "ALGO": "Normal", **PLAIN, **_recipes()[(settings.xc or "PBE").lower()]}
    return start | own_tags(settings)


def mesh(settings: VaspSettings) -> str | None:
    if settings.kpts is None:
        return None
    kind = "Monkhorst-Pack" if settings.gamma is False else "Gamma"
    return f"k-points\n0\n{kind}\n{' '.join(map(str, settings.kpts))}\n0 0 0\n"


def _file(settings: VaspSettings, name: str, needed: bool = False) -> bytes | None:
    """A file of the user's folder.

    Raises:
        CalculatorError: it is needed and not there, or cannot be read.
    """
    assert settings.folder is not None
    path = settings.folder / name
    if not needed and not path.exists():
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        mend = "mend calculator.settings.folder"
        raise CalculatorError(f"cannot read {name}: {error.strerror}", where=str(path), mend=mend) from error


def folder_tags(settings: VaspSettings) -> dict[str, Any]:
    """Raises:
    CalculatorError: there is no INCAR, or it is not one of a single point.
    """
    tags = parse_incar((_file(settings, "INCAR", needed=True) or b"").decode("utf-8", "replace"))
    own_order = {"LDAUL", "LDAUU", "LDAUJ", "RWIGS", "ROPT", "MAGMOM"} if _file(settings, "POTCAR") else set()
    if why := objection(tags, own_order):
        raise CalculatorError(why, where=f"{settings.folder}/INCAR")
    return {**tags, **own_tags(settings)}


def folder_kpoints(settings: VaspSettings) -> str | None:
    """The text of the folder's KPOINTS, or None."""
    kpoints = _file(settings, "KPOINTS")
    return None if kpoints is None else kpoints.decode("utf-8", "replace")


def folder_potcars(settings: VaspSettings) -> list[Potcar] | None:
    if settings.folder is None or (data := _file(settings, "POTCAR")) is None:
        return None
    return split_potcar(data, str(settings.folder / "POTCAR"))


def library(settings: VaspSettings) -> Library:
    releases: tuple[str, ...] = RELEASES if settings.preset is None else (potcar_release(settings.preset),)
    family = "LDA" if (settings.xc or "").lower() == "lda" else "PBE"
    folder = settings.potcar_folder or configured_folder()
    return Library(folder=folder, subfolder=settings.potcar_set, family=family, releases=releases)


def names(settings: VaspSettings) -> dict[str, str]:
    """Which POTCAR each element gets."""
    if settings.preset is None:
        return default_names(settings.setups)
    chosen = settings.setups
    table = default_names(chosen)
    if isinstance(chosen, str):
        return table
    return potcar_names(settings.preset) | {element: table[element] for element in chosen or {}}
