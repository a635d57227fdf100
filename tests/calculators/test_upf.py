from __future__ import annotations

from pathlib import Path

from calculators.upf import read_upf

NEW = """<UPF version="2.0.1">
<PP_HEADER generated="by hand" comment="a > b"
  element="Si" functional=" SLA  PW   PBX  PBC" pseudo_type="NC" total_psenergy="-1.0e0" z_valence="4.000000000000e0"/>
"""
OLD = """<PP_HEADER>
   0                   Version Number
  Pt                   Element
   US                  Ultrasoft pseudopotential
    T                  Nonlinear Core Correction
 SLA  PW   PBX  PBC    PBE  Exchange-Correlation functional
   10.00000000000      Z valence
</PP_HEADER>
"""


def test_both_versions_of_the_format(tmp_path: Path) -> None:
    (tmp_path / "new.UPF").write_text(NEW)
    (tmp_path / "old.UPF").write_text(OLD)
    new, old = read_upf(tmp_path / "new.UPF"), read_upf(tmp_path / "old.UPF")
    assert new is not None
    assert old is not None
    assert (new.element, new.valence, new.functional) == ("Si", 4.0, "SLA PW PBX PBC")
    assert (old.element, old.valence) == ("Pt", 10.0)
    assert old.functional.startswith("SLA PW PBX PBC")
    assert new.sha256 != old.sha256


def test_what_is_not_upf(tmp_path: Path) -> None:
    for name, text in (("text", "nothing"), ("half", "<PP_HEADER element='Si'"), ("bytes", "")):
        (tmp_path / name).write_text(text)
        assert read_upf(tmp_path / name) is None
