from __future__ import annotations

from pathlib import Path

import pytest

from calculators.cp2k_data import entries_named

BASIS = """# Element, names
 H  SZV-TEST SZV-TEST-q1   # comment
  1
  1 0 0 1 1
      0.5   1.0
NA SZV-TEST SZV-TEST-q9
  1
  1 0 0 1 1
      0.3  1.0
"""
POTENTIAL = """Na GTH-PBE-q1 GTH-PBE
    1
    0.9  1  -1.2
    0
#
Na GTH-PBE-q9 GTH-PBE
    3    6
    0.2  1  -1.2
    0
    NLCC  1
"""


def test_entries_are_found_by_every_name(tmp_path: Path) -> None:
    path = tmp_path / "BASIS"
    path.write_text(BASIS)
    basis = entries_named(path, "szv-test")
    assert {symbol: entry.electrons for symbol, entry in basis.items()} == {"H": 1, "Na": 9}
    assert basis["H"].text == "1\n1 0 0 1 1\n0.5 1.0"
    assert entries_named(path, "SZV-TEST-q9") == {"Na": basis["Na"]}
    assert entries_named(path, "SZV-NO") == {}


def test_the_first_of_a_name_counts_as_in_cp2k(tmp_path: Path) -> None:
    path = tmp_path / "POTENTIALS"
    path.write_text(POTENTIAL)
    assert entries_named(path, "GTH-PBE")["Na"].valence == 1
    large = entries_named(path, "GTH-PBE-q9")["Na"]
    assert (large.valence, large.electrons) == (9, 9)
    assert large.text.endswith("NLCC 1")


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "BASIS"
    path.write_text(BASIS)
    before = entries_named(path, "SZV-TEST")["H"]
    path.write_text(BASIS.replace("0.5 ", "0.55 "))
    assert entries_named(path, "SZV-TEST")["H"] != before
    path.unlink()
    with pytest.raises(OSError, match="BASIS"):
        entries_named(path, "SZV-TEST")
