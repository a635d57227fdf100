"""POTCAR files: where they lie, what they say of themselves, and which one an element gets."""

from __future__ import annotations

import gzip
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ase.data import atomic_numbers

from alcore.errors import CalculatorError
from alcore.identity import sha256_hex

END = b"End of Dataset"
MEND = "set calculator.settings.potcar_folder, or VASP_PP_PATH, to the folder that holds them"
RELEASES = ("", "52", "54", "64")

_TITEL = re.compile(rb"TITEL\s*=\s*(\S+\s+(\S+).*)")
_ZVAL = re.compile(rb"ZVAL\s*=\s*([-\d.]+)")


@dataclass(frozen=True, kw_only=True)
class Potcar:
    """One element's data set.

    Attributes:
        element: its symbol.
        title: its TITEL, e.g. ``PAW_PBE Fe_pv 02Aug2007``.
        valence: electrons of the neutral atom (ZVAL).
        data: the text, byte for byte.
        sha256: of ``data``.
    """

    element: str
    title: str
    valence: float
    data: bytes
    sha256: str

    @property
    def identity(self) -> str:
        return f"{self.title} sha256:{self.sha256}"


def parse_potcar(data: bytes, where: str) -> Potcar:
    """Raises:
    CalculatorError: it is no POTCAR of one element.
    """
    title, valence = _TITEL.search(data), _ZVAL.search(data)
    if not title or not valence:
        raise CalculatorError("not a POTCAR: it has no TITEL or no ZVAL", where=where, mend="replace the file")
    element = re.split(r"[_.]", title[2].decode("latin-1"))[0]
    if element not in atomic_numbers:
        raise CalculatorError(f"a POTCAR of the unknown element {element!r}", where=where, mend="replace the file")
    text = " ".join(title[1].decode("latin-1").split())
    return Potcar(element=element, title=text, valence=float(valence[1]), data=data, sha256=sha256_hex(data))


def split_potcar(data: bytes, where: str) -> list[Potcar]:
    """The data sets of a POTCAR for several elements, in its order."""
    parts = data.split(END)
    tail = parts.pop() if len(parts) > 1 else b""
    sets = [part.removeprefix(b"\r").lstrip(b"\n") + END + b"\n" for part in parts]
    return [parse_potcar(part, where) for part in (sets if not tail.strip() else [*sets, tail])]


def read_potcar(path: Path) -> Potcar:
    """Raises:
    CalculatorError: the file cannot be read, or is no POTCAR.
    """
    try:
        status = path.stat()
        return _read(path, (status.st_mtime_ns, status.st_size))
    except OSError as error:
        raise CalculatorError(f"cannot read the POTCAR: {error}", where=str(path), mend=MEND) from error


@cache
def _read(path: Path, _stamp: tuple[int, int]) -> Potcar:
    data = path.read_bytes()
    return parse_potcar(gzip.decompress(data) if path.suffix == ".gz" else data, str(path))


def configured_folder() -> Path | None:
    """What VASP_PP_PATH says, else PMG_VASP_PSP_DIR (pymatgen's); from the environment or ASE's own configuration."""
    from ase.config import cfg

    named = cfg.get("VASP_PP_PATH") or cfg.get("PMG_VASP_PSP_DIR")
    return Path(named).expanduser().absolute() if named else None


def set_names(family: str, releases: Sequence[str] = RELEASES) -> list[str]:
    """Folders that may hold a set of POTCARs, as VASP's archives unpack and as pymatgen names them.

    Args:
        family: ``PBE`` or ``LDA``.
        releases: which of ``RELEASES``; "" is the oldest.
    """
    stems = (
        ("POT_LDA_PAW", "POTPAW_LDA", "POT_PAW_LDA")
        if family == "LDA"
        else ("POT_GGA_PAW_PBE", "POTPAW_PBE", "POT_PAW_PBE")
    )
    archives = ("potpaw_LDA", "potpaw") if family == "LDA" else ("potpaw_PBE",)
    names = [(f"{stem}.{release}" if release else stem) for stem in archives for release in releases]
    return names + [(f"{stem}_{release}" if release else stem) for stem in stems for release in releases]


@dataclass(frozen=True, kw_only=True)
class Library:
    """A folder of POTCARs.

    Attributes:
        folder: as the user or VASP_PP_PATH gives it, or None.
        subfolder: the one of its folders to take, or None: whichever there is.
        family, releases: what may be taken otherwise, see ``set_names``; if none is there, the folder itself.
    """

    folder: Path | None
    subfolder: str | None
    family: str = "PBE"
    releases: tuple[str, ...] = RELEASES

    @property
    def subfolders(self) -> list[str]:
        """Where the POTCARs may lie, if not in the folder itself."""
        return [self.subfolder] if self.subfolder else set_names(self.family, self.releases)

    @property
    def mend(self) -> str:
        return f"{MEND}, in one of {', '.join(self.subfolders)}, or name that by potcar_set"

    def home(self) -> Path:
        """The folder that holds ``Cu/POTCAR`` or ``POTCAR.Cu.gz``.

        Raises:
            CalculatorError: there is none, or more than one.
        """
        if self.folder is None:
            raise CalculatorError("no folder of POTCAR files is known", where="calculator vasp", mend=MEND)
        if not self.folder.is_dir():
            raise CalculatorError("there is no such folder of POTCAR files", where=str(self.folder), mend=MEND)
        found = [self.folder / name for name in self.subfolders if (self.folder / name).is_dir()]
        if len(found) > 1:
            which = ", ".join(path.name for path in found)
            mend = "name one by calculator.settings.potcar_set"
            raise CalculatorError(f"several sets of POTCAR files: {which}", where=str(self.folder), mend=mend)
        if not found and self.subfolder:
            raise CalculatorError(f"it has no folder {self.subfolder}", where=str(self.folder), mend="mend potcar_set")
        return found[0] if found else self.folder

    def path(self, name: str) -> Path | None:
        """The file of ``Fe_pv``, or None."""
        home = self.home()
        tries = [home / name / "POTCAR", home / f"POTCAR.{name}"]
        return next(
            (path for stem in tries for path in (stem, stem.with_name(f"{stem.name}.gz")) if path.is_file()), None
        )

    def get(self, element: str, name: str) -> Potcar:
        """Raises:
        CalculatorError: there is no such POTCAR, or it is another element's.
        """
        path = self.path(name)
        if path is None:
            where = str(self.home())
            raise CalculatorError(f"there is no POTCAR {name} for {element}", where=where, mend=self.mend)
        potcar = read_potcar(path)
        if potcar.element != element:
            raise CalculatorError(f"it is a POTCAR of {potcar.element}, not of {element}", where=str(path))
        return potcar

    def identities(self, names: Mapping[str, str], needed: Collection[str] = ()) -> dict[str, str]:
        """TITEL and hash of every POTCAR that is there, by element.

        Args:
            names: which one an element gets.
            needed: elements without whose POTCAR this is an error.
        Raises:
            CalculatorError: there is no such folder, nothing in it, or one that is needed is missing.
        """
        home = self.home()
        there = {element: name for element, name in names.items() if element in needed or self.path(name)}
        if not there:
            raise CalculatorError("it holds no POTCAR (Cu/POTCAR, POTCAR.Cu, ...)", where=str(home), mend=self.mend)
        return {element: self.get(element, name).identity for element, name in sorted(there.items())}


def default_names(setups: str | Mapping[str, str] | None) -> dict[str, str]:
    """Which POTCAR each element gets: one of ASE's tables, with a user's choice (``Fe_pv`` or ``_pv``) on top."""
    from ase.calculators.vasp.create_input import get_pp_setup

    table: dict[Any, str] = get_pp_setup(setups if isinstance(setups, str) else None)[0]
    names = {element: element + table.get(element, "") for element in atomic_numbers if element != "X"}
    chosen = {} if setups is None or isinstance(setups, str) else dict(setups)
    return names | {element: v if v.startswith(element) else element + v for element, v in chosen.items()}
