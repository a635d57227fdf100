from __future__ import annotations

from pathlib import Path

import ase
import pytest

from calculators.vasp.output import cycle_of_outcar, cycle_of_xml, inspect_folder, is_whole, name_error

REAL = Path(ase.__file__).parent / "test" / "testdata" / "vasp"
with_ase_s_files = pytest.mark.skipif(not REAL.is_dir(), reason="this ASE came without its test data")


@with_ase_s_files
@pytest.mark.parametrize(
    ("name", "version", "limit"), [("vasprun_pstress.xml", "6.3.0", 60), ("vasprun_dfpt.xml", "6.3.2", 100)]
)
def test_real_files_of_vasp_6(tmp_path: Path, name: str, version: str, limit: int) -> None:
    cycle, text = cycle_of_xml(REAL / name), (REAL / name).read_text()
    assert (cycle.version, cycle.limit) == (version, limit)
    assert cycle.steps == text.rpartition("<calculation>")[2].count("<scstep>") > 5
    assert is_whole(REAL / name)
    for share in (0.3, 0.6, 0.9, 0.999):
        (tmp_path / name).write_text(text[: int(share * len(text))])
        assert not is_whole(tmp_path / name)
        assert cycle_of_xml(tmp_path / name).steps <= cycle.steps


@with_ase_s_files
def test_a_real_outcar_of_vasp_5() -> None:
    cycle = cycle_of_outcar((REAL / "OUTCAR_example_1").read_text())
    assert (cycle.steps, cycle.limit, cycle.version) == (63, 120, "5.3.3")


def test_an_error_box_is_read_without_its_ornaments() -> None:
    text = (
        " ------\n|     EEEEEEE  RRRRRR   RRRRRR   OOOOOOO  RRRRRR      ###   |\n|     E        R     R  R     R   |\n"
        "|     The number of bands is not sufficient to hold all electrons.     |\n ------\n"
    )
    assert name_error(text).startswith("The number of bands is not sufficient to hold all electrons.")
    assert name_error("DAV:   1    -0.1E+02\n   1 F= -.1 E0= -.1  d E =0\n") == ""


def test_an_unfinished_file_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    step = "<scstep><energy><i name='e_fr_energy'> -1.0 </i></energy></scstep>"
    head = "<modeling><generator><i name='version'>5.4.4.18Apr17-6-g9f103f2a35 </i></generator><i name='NELM'> 60</i>"
    (tmp_path / "vasprun.xml").write_text(f"{head}<calculation>{step * 3}</calculation><calculation>{step * 2}<scst")
    cycle = cycle_of_xml(tmp_path / "vasprun.xml")
    assert (cycle.steps, cycle.limit, cycle.version) == (2, 60, "5.4.4")
    found = inspect_folder(tmp_path, exit_code=-9)
    assert (found.converged, found.electronic_steps, found.code_version) == (None, 2, "5.4.4")
    assert found.reason.startswith("VASP ended, killed by signal 9, after 2 electronic steps, vasprun.xml is cut off")
