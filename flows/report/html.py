"""``report.html``: everything about a run in one file that needs no network."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alcore.types import GenerationRecord, Label, RunRecord
from flows.report.frames import LabelledFrame, labelled_frames
from flows.report.summary import barrier_summary
from flows.report.table import barrier_text, estimate_text, number, signed_mev

TEMPLATE = "template.html.j2"

CAPTIONS = {
    "path": "Energy along the band: spline through the images' energies and tangential forces, with its calibrated "
    "uncertainty. Diamonds are reference energies at exactly these images; circles are labels of earlier bands, at the "
    "coordinate their image had then.",
    "barrier": "The barrier (a, b) and its errors (c, d) over generations and over reference calculations. The "
    "surrogate's barrier is what it said before that generation's labels were known; the reference's is the labelled "
    "energy of that band's saddle.",
    "parity": "Every label against what was predicted for it before it was trained on (a), and the error in the order "
    "of labels (b); bars are the stated calibrated uncertainty.",
    "calibration": "Errors of those predictions in units of the stated uncertainty (a), and the share of them within a "
    "multiple of it against what a normal law promises (b).",
}


def headline(summary: Mapping[str, Any]) -> dict[str, str]:
    """Title, tone (``good``, ``open`` or ``bad``) and one honest sentence on the whole run."""
    paths = summary["paths"]
    done = sum(path["converged"] for path in paths)
    if paths and done == len(paths):
        what = "the saddle" if done == 1 else "every saddle"
        text = f"The reference calculator ({summary['teacher']['name']}) confirmed {what}."
        return {"title": "Converged", "tone": "good", "text": text}
    reason = summary["stop_reason"] or next((path["stop_reason"] for path in paths if path["stop_reason"]), "")
    if summary["status"] == "running" and not any(path["stop_code"] != "continue" for path in paths):
        return {"title": "Still running", "tone": "open", "text": reason or "No stop rule holds yet."}
    if paths and all(path["converged"] or path["stop_code"] == "barrierless" for path in paths):
        return {"title": "Barrierless", "tone": "open", "text": reason}
    partly = f"{done} of {len(paths)} hops converged. " if len(paths) > 1 else ""
    tone = "bad" if summary["status"] == "failed" else "open"
    return {"title": "Not converged", "tone": tone, "text": f"{partly}{reason}".strip()}


def _label_row(frame: LabelledFrame) -> dict[str, Any]:
    label, residual = frame.label, frame.residual
    fmax = label.structure.free_fmax(label.forces) if label.forces is not None else None
    return {
        "number": frame.number,
        "generation": "–" if frame.generation < 0 else frame.generation,
        "path": frame.path or "–",
        "kind": frame.kind,
        "image": "–" if frame.image is None else frame.image,
        "status": label.status,
        "ok": label.ok,
        "energy": number(frame.energy_ev, 4),
        "predicted": number(residual.predicted_ev if residual else None, 4),
        "error": number(residual.error_ev if residual else None, 1, 1000),
        "sigma": number(residual.sigma_ev if residual else None, 1, 1000),
        "fmax": number(fmax),
        "seconds": "by symmetry" if label.derived_from else "reused" if label.reused else f"{label.seconds:.1f}",
        "reason": label.reason,
        "folder": label.folder,
        "key": label.key,
    }


def _yaml(values: Any) -> str:
    """Settings as a person writes them; JSON where YAML is not at hand."""
    try:
        import yaml
    except ImportError:
        return json.dumps(values, indent=2, ensure_ascii=False)
    return str(
        yaml.safe_dump(json.loads(json.dumps(values, default=str)), sort_keys=False, allow_unicode=True, width=100)
    )


def _figures(pictures: Mapping[str, bytes], names: Sequence[str]) -> list[dict[str, str]]:
    """Figures in reading order: the run's paths, then the statistics of all."""
    several = len(names) > 1
    order = [f"{name}/path" if several else "path" for name in names] + ["barrier", "parity", "calibration"]
    return [
        {
            "stem": stem,
            "alt": f"{stem} figure",
            "uri": "data:image/svg+xml;base64," + base64.b64encode(pictures[stem]).decode(),
            "caption": (f"{stem.rpartition('/')[0]}. " if "/" in stem else "") + CAPTIONS[stem.rpartition("/")[2]],
        }
        for stem in order
        if stem in pictures
    ]


def report_html(
    run: RunRecord,
    generations: Sequence[GenerationRecord],
    labels: Mapping[str, Label],
    pictures: Mapping[str, bytes],
) -> str:
    """The report as one HTML document.

    Args:
        run, generations, labels: as everywhere here.
        pictures: SVG of each figure by the stem of its file, e.g. ``"path"`` or ``"hop-1/path"``.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    summary = barrier_summary(run, generations, labels)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "signed_mev": signed_mev,
        "short": lambda text: str(text)[:12] if text else "–",
    }
    environment.globals |= {"barrier_text": barrier_text, "estimate_text": estimate_text}
    names = [path["name"] for path in summary["paths"]]
    return environment.get_template(TEMPLATE).render(
        s=summary,
        headline=headline(summary),
        figures=_figures(pictures, names),
        labels=[_label_row(frame) for frame in labelled_frames(generations, labels)],
        settings=_yaml(run.settings),
        provenance=_yaml(
            {"surrogate": summary["surrogate"], "calibration": summary["calibration"], "teacher": summary["teacher"]}
        ),
    )
