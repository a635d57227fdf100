from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alcore.errors import CalculatorError
from calculators.registry import resolve
from calculators.vasp.potcars import parse_potcar, split_potcar


def test_potcars_are_found_in_every_usual_place(
    ready: Any, tmp_path: Path, potcar_text: Callable[[str], str], put_potcars: Callable[..., Path]
) -> None:
    text = potcar_text("Cu")
    prints = set()
    for place in (
        "a/potpaw_PBE.54/Cu/POTCAR",
        "b/Cu/POTCAR",
        "c/POT_GGA_PAW_PBE_54/POTCAR.Cu.gz",
        "d/potpaw_PBE/Cu/POTCAR",
    ):
        path = tmp_path / place
        path.parent.mkdir(parents=True)
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
        folder = tmp_path / place.split("/")[0]
        prints.add(resolve("vasp", ready(potcar_folder=str(folder))).fingerprint)
    assert len(prints) == 1  # the content counts, not the place
    put_potcars(tmp_path / "a" / "potpaw_PBE.64", "Cu")
    with pytest.raises(CalculatorError, match=r"several sets of POTCAR files: potpaw_PBE\.54, potpaw_PBE\.64"):
        resolve("vasp", ready(potcar_folder=str(tmp_path / "a")))
    resolve("vasp", ready(potcar_folder=str(tmp_path / "a"), potcar_set="potpaw_PBE.64"))


def test_the_potcar_folder_comes_from_the_environment(ready: Any, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VASP_PP_PATH", str(home / "pp"))
    resolved = resolve("vasp", ready(potcar_folder=None))
    assert resolved.settings.potcar_folder == home / "pp"  # type: ignore[attr-defined]
    assert resolved.fingerprint == resolve("vasp", ready()).fingerprint


def test_a_potcar_of_several_elements_comes_apart_as_it_was_put_together(potcar_text: Callable[[str], str]) -> None:
    texts = [potcar_text(name).encode() for name in ("Al", "Cu_pv", "O")]
    parts = split_potcar(b"".join(texts), "here")
    assert [part.data for part in parts] == texts
    assert [(part.element, part.valence) for part in parts] == [("Al", 3.0), ("Cu", 17.0), ("O", 6.0)]
    with pytest.raises(CalculatorError, match="here: not a POTCAR"):
        parse_potcar(b"PAW_PBE", "here")


def test_a_changed_potcar_moves_the_fingerprint(ready: Any, tmp_path: Path, put_potcars: Callable[..., Path]) -> None:
    put_potcars(tmp_path, "Cu")
    before = resolve("vasp", ready(potcar_folder=str(tmp_path)))
    file = tmp_path / "Cu" / "POTCAR"
    file.write_text(file.read_text().replace("295.446", "295.447"))
    after = resolve("vasp", ready(potcar_folder=str(tmp_path)))
    assert before.fingerprint != after.fingerprint
    assert (
        before.facts["potcars"]["Cu"].split()[:3]
        == after.facts["potcars"]["Cu"].split()[:3]
        == ["PAW_PBE", "Cu", "01Jan2001"]
    )
