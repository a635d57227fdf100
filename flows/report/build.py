"""Writes the report folder."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from alcore.types import GenerationRecord, Label, RunRecord
from flows.report.frames import last_probed, path_names
from flows.report.html import report_html
from flows.report.mep import mep_csv, mep_rows, write_path_files
from flows.report.summary import barrier_summary

MANIFEST = ".report-files.json"
"""What the last report wrote here, so that the next one takes away what it no longer has, and nothing else."""


def write_report(
    run: RunRecord, generations: Sequence[GenerationRecord], labels: Mapping[str, Label], folder: Path
) -> Path:
    """Writes everything a run leaves into ``folder``; with several hops, one subfolder a hop.

    Files appear one by one but each of them whole, ``report.html`` last. Writing again overwrites what an earlier
    report wrote and removes what it no longer has; other files in ``folder`` are left alone.

    Returns:
        The path of ``report.html``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _staging(folder) as stage:
        _write_all(run, generations, labels, stage)
        names = sorted(str(file.relative_to(stage)) for file in stage.rglob("*") if file.is_file())
        names.sort(key=lambda name: name == "report.html")
        for name in names:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(stage / name, target)
    _forget_old(folder, names)
    return folder / "report.html"


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A scratch folder on the same file system, gone afterwards."""
    stage = Path(tempfile.mkdtemp(prefix=".report-", dir=folder))
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _write_all(
    run: RunRecord, generations: Sequence[GenerationRecord], labels: Mapping[str, Label], stage: Path
) -> None:
    from flows.report import plots, plots_statistics
    from flows.report.style import render

    names = path_names(generations)
    summary = barrier_summary(run, generations, labels)
    (stage / "barrier.json").write_text(
        json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )
    (stage / "mep.csv").write_text(mep_csv(mep_rows(run, generations, labels)), encoding="utf-8")
    figures = {
        "barrier": plots.draw_barrier(run, generations, labels),
        "parity": plots_statistics.draw_parity(run, generations, labels),
        "calibration": plots_statistics.draw_calibration(run, generations, labels),
    }
    for name in names:
        place = Path(".") if len(names) == 1 else Path(name)
        write_path_files(run, generations, labels, name, stage / place)
        figures[str(place / "path")] = plots.draw_path(run, generations, labels, name)
        if len(names) > 1 and last_probed(generations, name) is not None:
            figures[str(place / "barrier")] = plots.draw_barrier(run, generations, labels, name)
            (stage / place / "mep.csv").write_text(mep_csv(mep_rows(run, generations, labels, name)), encoding="utf-8")
    pictures = {}
    for stem, figure in figures.items():
        (stage / stem).parent.mkdir(parents=True, exist_ok=True)
        pictures[stem] = render(figure, "svg")
        figure.set_layout_engine("none")  # laid out once is enough
        (stage / f"{stem}.png").write_bytes(render(figure, "png"))
        (stage / f"{stem}.pdf").write_bytes(render(figure, "pdf"))
    (stage / "report.html").write_text(report_html(run, generations, labels, pictures), encoding="utf-8")


def _forget_old(folder: Path, names: Sequence[str]) -> None:
    """Removes what an earlier report wrote and this one did not: a shorter band must not leave images behind."""
    manifest = folder / MANIFEST
    try:
        old = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        old = []
    root = folder.resolve()
    for name in old if isinstance(old, list) else []:
        stale = (folder / str(name)).resolve()
        if name in names or root not in stale.parents:
            continue
        stale.unlink(missing_ok=True)
        if stale.parent != root and stale.parent.is_dir() and not any(stale.parent.iterdir()):
            stale.parent.rmdir()
    manifest.write_text(json.dumps(names, indent=0), encoding="utf-8")
