"""The report folder: complete, offline, and written again without leftovers."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alcore.types import Decision
from flows.report import barrier_summary, write_report
from flows.report.html import headline, report_html

EXPECTED = {
    "barrier.json",
    "mep.csv",
    "band.extxyz",
    "saddle.vasp",
    "au-al100-neb-results.dat",
    "au-al100-neb-band.extxyz",
    "report.html",
    *(f"{stem}.{end}" for stem in ("path", "barrier", "parity", "calibration") for end in ("png", "pdf")),
    *(f"{image:02d}/POSCAR" for image in range(7)),
}


def files(folder: Path) -> set[str]:
    return {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file() and not f.name.startswith(".")}


@pytest.fixture(scope="module")
def folder(case: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report")
    assert write_report(*case, path) == path / "report.html"
    return path


def test_everything_is_there(folder: Path) -> None:
    assert files(folder) == EXPECTED
    assert not [entry for entry in folder.iterdir() if entry.is_dir() and entry.name.startswith(".")]


def test_barrier_json_is_the_summary(case: Any, folder: Path) -> None:
    assert json.loads((folder / "barrier.json").read_text("utf-8")) == barrier_summary(*case)


def test_html_needs_no_network(folder: Path) -> None:
    html = (folder / "report.html").read_text("utf-8")
    assert not re.findall(r"(?:https?:)?//[\w.-]+\.\w+", html)
    assert html.count('src="data:image/svg+xml;base64,') == html.count("<img ") == 4
    assert not re.findall(r"<(?:script|link|iframe)\b", html)


def test_html_says_what_happened(case: Any, folder: Path) -> None:
    html = (folder / "report.html").read_text("utf-8")
    assert "0.376 ± 0.003 eV" in html
    assert "SCF &lt;did not&gt; settle" in html
    assert "/scratch/labels/abc" in html
    assert "untrained MACE, seed 0: has seen no reference" in html
    assert all(key[:12] in html for key in case.labels)


def test_writing_again_overwrites_and_takes_away_only_what_it_wrote(case: Any, tmp_path: Path) -> None:
    write_report(*case, tmp_path)
    (tmp_path / "06" / "INCAR").write_text("mine", encoding="utf-8")
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    write_report(case.run, case.generations[:1], case.labels, tmp_path)
    left = files(tmp_path)
    assert {"06/INCAR", "notes.txt"} <= left
    assert not [name for name in left if name.endswith("POSCAR")]
    assert not (tmp_path / "00").exists()
    assert json.loads((tmp_path / "barrier.json").read_text("utf-8"))["paths"][0]["barrier_forward_ev"] is None


def test_several_hops_have_a_folder_each(make_case: Any, tmp_path: Path) -> None:
    write_report(*make_case("two", ("a", "b")), tmp_path)
    names = files(tmp_path)
    for hop in ("a", "b"):
        wanted = ("mep.csv", "band.extxyz", "saddle.vasp", "path.png", f"{hop}-neb-results.dat", "06/POSCAR")
        assert {f"{hop}/{name}" for name in wanted} <= names
    with (tmp_path / "mep.csv").open(encoding="utf-8") as stream:
        assert [row["path"] for row in csv.DictReader(stream)] == ["a"] * 7 + ["b"] * 7


def test_headline_never_flatters(case: Any) -> None:
    summary = barrier_summary(*case)
    assert headline(summary)["title"] == "Converged"
    last = case.generations[-1]
    for code, title in (("label_budget", "Not converged"), ("barrierless", "Barrierless")):
        decision = Decision(stop=True, code=code, reason="because")  # type: ignore[arg-type]
        record = replace(last.paths[0], decision=decision)
        generations = [*case.generations[:-1], replace(last, paths=(record,), decision=decision)]
        found = headline(barrier_summary(case.run, generations, case.labels))
        assert (found["title"], found["text"]) == (title, "because")
    running = replace(case.run, status="running")
    assert headline(barrier_summary(running, case.generations[:2], case.labels))["title"] == "Still running"


@pytest.mark.parametrize("n_generations", [0, 1])
def test_html_of_a_young_run(case: Any, n_generations: int) -> None:
    run = replace(case.run, status="running")
    html = report_html(run, case.generations[:n_generations], case.labels if n_generations else {}, {})
    assert "Still running" in html
    assert "±" not in html.split("<h2>")[0].split("</style>")[1]
