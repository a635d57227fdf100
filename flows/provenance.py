"""Where a barrier came from: the labels, models, settings, code and machines behind it, for a person or as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from alcore.errors import InputError
from alcore.identity import keys_sha256
from flows.report.summary import jsonable
from flows.report.table import number
from flows.sittings import PACKAGES
from flows.status import load_run

if TYPE_CHECKING:
    from rich.console import RenderableType

    from storage.memory import MemoryStore
    from storage.provenance import Provenance
    from storage.store import MongoStore

SHORT = 12
"""Digits of a hash that a person is shown; the JSON has them all."""
ROLES = {"initial_label": "initial state", "saddle_key": "saddle", "final_label": "final state"}
OF_LABEL = ("status", "reason", "calculator", "fingerprint", "energy_ev", "fmax_ev_per_ang", "formula", "seconds")
OF_DETAILS: tuple[str, ...] = (
    "code_version",
    "computed_by",
    "generation",
    "settings",
    "calculator",
    "attempts",
    "source",
)
OF_DETAILS += ("equivalent_to", "operation")


def barrier_provenance(store: MongoStore | MemoryStore, name: str, generation: int | None = None) -> dict[str, Any]:
    """All that made the barriers of one generation, as JSON values; the store is asked once.

    Args:
        store: where the run is.
        name: its name.
        generation: index of the generation; None: the last.

    Raises:
        InputError: no such run or generation.
    """
    found = store.provenance(name, generation)
    if found is None:
        load_run(store, name)  # says which there are
    assert found is not None
    rows = found.generations
    if generation is not None and (not rows or rows[-1]["index"] != generation):
        there = f"they are 0 to {rows[-1]['index']}" if rows else "it has none yet"
        raise InputError(f"the run '{name}' has no generation {generation}", where="--generation", mend=there)
    last = rows[-1] if rows else {}
    result: dict[str, Any] = {
        **{key: found.run.get(key) for key in ("name", "status", "reason", "started", "finished", "settings_sha256")},
        "generation": last.get("index"),
        "seed": found.run.get("settings", {}).get("seed"),
        "paths": [_path(found, path["path"]) for path in last.get("paths", [])],
        "labels": {key: _label(found, key) for key in _keys(last)},
        "models": found.models,
        "sittings": [_sitting(found, k) for k in range(len(found.run.get("sittings", [])))],
        "other_runs": found.others,
        "settings": found.run.get("settings", {}),
    }
    plain: dict[str, Any] = jsonable(result)
    return plain


def _keys(row: Mapping[str, Any]) -> list[str]:
    """Of everything a generation knows, in the order in which it was asked for."""
    ends = [path.get(role) for path in row.get("paths", []) for role in ROLES]
    return [key for key in dict.fromkeys([*row.get("kinds", {}), *row.get("label_keys", []), *ends]) if key]


def _path(found: Provenance, name: str) -> dict[str, Any]:
    """One hop's barrier, the labels that confirm it, and the surrogate that predicted it.

    A generation's record holds the surrogate as it stands *after* it: a band was relaxed on that of the one before. A
    hop that had been settled is carried along with the band it had.
    """
    rows = found.generations
    history = [next((p for p in row["paths"] if p["path"] == name), None) for row in rows]
    at = len(rows) - 1
    while at > 0 and _is_carried(history[at - 1], history[at]):
        at -= 1
    path = history[-1] or {}
    before = rows[at - 1] if at > 0 else None
    barrier = path.get("barrier") or {}
    return {
        "path": name,
        "decision": path.get("decision"),
        "barrier_forward_ev": barrier.get("forward_ev"),
        "barrier_std_ev": path.get("barrier_std_ev"),
        "verified_barrier_ev": path.get("verified_barrier_ev"),
        "saddle_fmax_ev_per_ang": path.get("saddle_fmax_ev_per_ang"),
        "error_to_verified_ev": path.get("error_to_verified_ev"),
        "probed_in_generation": rows[at]["index"],
        "sitting": rows[at].get("sitting", 0),
        "verified_by": {role: path.get(key) or None for key, role in ROLES.items()},
        "predicted_by": _surrogate(found, before),
        "calibration": (before or rows[at]).get("calibration"),
    }


def _is_carried(before: Mapping[str, Any] | None, path: Mapping[str, Any] | None) -> bool:
    if before is None or path is None:
        return False
    return bool(before["decision"]["stop"]) and not path.get("label_keys") and not path.get("residuals")


def _surrogate(found: Provenance, row: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a generation left for the next, with the labels it had learned; of the first one only the prior is known."""
    if row is None:
        surrogate = found.generations[0].get("surrogate", {})
        known = {key: surrogate[key] for key in ("prior", "prior_name", "strategy") if key in surrogate}
        return {**known, "lead": "prior", "why": "no labels yet: the prior alone", "members": [], "label_keys": []}
    surrogate = dict(row.get("surrogate", {}))
    members = [_member(found, sha256) for sha256 in surrogate.pop("members", [])]
    return {**surrogate, "members": members, "label_keys": row.get("label_keys", [])}


def _member(found: Provenance, sha256: str) -> dict[str, Any]:
    """A model with the labels it was trained on, if they are still those it was trained on."""
    made = found.models.get(sha256, {}).get("description", {})
    rows = [row for row in found.generations if row["index"] == made.get("generation")]
    keys = rows[0].get("label_keys", []) if rows else []
    known = keys_sha256(keys) == made.get("labels_sha256")
    return {"sha256": sha256, "stored": sha256 in found.models, **made, "label_keys": keys if known else None}


def _label(found: Provenance, key: str) -> dict[str, Any]:
    """A label, who computed it and with what; ``stored`` is False if the database has it no more."""
    row, last = found.labels.get(key), found.generations[-1]
    asked = {"kind": last.get("kinds", {}).get(key, "unknown"), "doubt": last.get("doubts", {}).get(key)}
    if row is None:
        return {"stored": False, **asked}
    details = row.get("details", {})
    known = {name: details[name] for name in OF_DETAILS if name in details}
    computed = {name: known.pop(name, None) for name in ("computed_by", "generation")}
    computed |= {"stored_at": row.get("created"), "made_with": _made_with(found, computed, row.get("created") or "")}
    return {"stored": True, **asked, **{name: row.get(name) for name in OF_LABEL}, **computed, "details": known}


def _made_with(found: Provenance, computed: Mapping[str, Any], created: str) -> dict[str, Any] | None:
    """The sitting in which a label was computed: of its generation in this run, by the time of it in another one."""
    run, index = computed["computed_by"], computed["generation"]
    if run == found.run["name"]:
        row = next((row for row in found.generations if row["index"] == index), None)
        sittings = found.run.get("sittings", [])
        return None if row is None or row.get("sitting", 0) >= len(sittings) else sittings[row.get("sitting", 0)]
    begun = [s for s in found.others.get(run, {}).get("sittings", []) if s["started"] <= created]
    return begun[-1] if begun else None


def _sitting(found: Provenance, k: int) -> dict[str, Any]:
    indices = [row["index"] for row in found.generations if row.get("sitting", 0) == k]
    return {**found.run["sittings"][k], "generations": indices}


# --- for a person -----------------------------------------------------------------------------------------------------


def provenance_view(values: Mapping[str, Any]) -> Iterator[RenderableType]:
    """``barrier_provenance`` for a terminal."""
    yield _heading(f"{values['name']}: {values['status']}, generation {values['generation']}", values["reason"] or "")
    for path in values["paths"]:
        yield from _path_view(path, values["labels"])
    if values["labels"]:
        yield _heading("labels", f"all {len(values['labels'])} that were known by then")
        yield _labels_view({key: key for key in values["labels"]}, values["labels"], named="key")
    if values["sittings"]:
        yield _heading("sittings", "who worked on it, when and with what")
        yield _sittings_view(values["sittings"])
    for name, other in values["other_runs"].items():
        yield _heading(f"run {name}", "computed labels that are used here")
        yield _sittings_view(other.get("sittings", []))
    yield _heading("settings", f"sha256 {values['settings_sha256']}, seed {values['seed']}")
    yield _table([], [[name, _short_text(value)] for name, value in values["settings"].items() if name != "name"])


def _path_view(path: Mapping[str, Any], labels: Mapping[str, Any]) -> Iterator[RenderableType]:
    surrogate = path["predicted_by"]
    said = f"{number(path['barrier_forward_ev'], 4)} ± {number(path['barrier_std_ev'], 4)} eV"
    verified = f"reference {number(path['verified_barrier_ev'], 4)} eV, " if path["verified_barrier_ev"] else ""
    decision = path["decision"]["code"] if path["decision"] else "unknown"
    where = f"generation {path['probed_in_generation']}, sitting {path['sitting']}"
    yield _heading(f"{path['path']}: {said}", f"{verified}{decision}; band of {where}")
    roles = {role: key for role, key in path["verified_by"].items() if key}
    if roles:
        yield _line("  verified by")
        yield _labels_view(roles, labels, named="role")
    kind = f"led by the {surrogate.get('lead', 'prior')} ({surrogate.get('why', '')})"
    yield _line(f"  predicted by: strategy {surrogate.get('strategy', 'unknown')}, {kind}")
    yield _line(f"  starting model: {surrogate.get('prior_name') or 'unknown'}, sha256 {surrogate.get('prior')}")
    keys = surrogate["label_keys"]
    names = f": {' '.join(key[:SHORT] for key in keys)}" if keys else ""
    yield _line(f"  corrected by {len(keys)} label{'' if len(keys) == 1 else 's'}{names}")
    if surrogate["members"]:
        rows = [
            [
                member["sha256"],
                str(member.get("name", "?")),
                str(member.get("generation", "?")),
                f"{member.get('n_labels', '?')}",
                str(member.get("epochs", "?")),
                str(member.get("seed", "?")),
                str(member.get("began_from", "?"))[:SHORT],
            ]
            for member in surrogate["members"]
        ]
        yield _table(["committee (sha256)", "name", "generation", "labels", "epochs", "seed", "began from"], rows)


def _labels_view(keys: Mapping[str, str], labels: Mapping[str, Any], *, named: str) -> RenderableType:
    rows = []
    for name, key in keys.items():
        label = labels.get(key, {"stored": False, "kind": "?"})
        made, details = label.get("made_with") or {}, label.get("details", {})
        who = label.get("computed_by") or details.get("source") or "?"
        when = "" if label.get("generation") is None else f" (gen {label['generation']})"
        rows.append(
            [
                *([name] if named == "role" else []),
                key[:SHORT],
                label["kind"],
                label.get("status", "not stored") if not label.get("doubt") else "doubted",
                number(label.get("energy_ev"), 4),
                number(label.get("fmax_ev_per_ang")),
                f"{label.get('calculator', '?')} {details.get('code_version') or ''}".strip(),
                str(label.get("fingerprint", "?"))[:SHORT],
                f"{who}{when}",
                str(label.get("stored_at") or "")[:19].replace("T", " "),
                str(made.get("code_sha256", ""))[:SHORT],
            ]
        )
    columns = [
        "key",
        "kind",
        "status",
        "E / eV",
        "fmax / eV/Å",
        "calculator",
        "fingerprint",
        "by run",
        "stored (UTC)",
        "code",
    ]
    return _without_constants([*(["role"] if named == "role" else []), *columns], rows)


def _without_constants(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> RenderableType:
    """A table whose columns on where labels come from are said once where they are the same for all."""
    from rich.console import Group

    same = {
        column: values.pop()
        for k, column in enumerate(columns)
        if column in ("calculator", "fingerprint", "code") and len(values := {row[k] for row in rows}) == 1
    }
    kept = [k for k, column in enumerate(columns) if column not in same]
    table = _table([columns[k] for k in kept], [[row[k] for k in kept] for row in rows])
    said = ", ".join(f"{column} {value}" for column, value in same.items() if value)
    return Group(table, _line(f"    all by {said}")) if said else table


def _sittings_view(sittings: Sequence[Mapping[str, Any]]) -> RenderableType:
    rows = []
    for k, sitting in enumerate(sittings):
        versions = sitting.get("versions", {})
        named = ["python", *PACKAGES, *(name for name in versions if name not in ("python", *PACKAGES))]
        changed = [f"{key}: {then} → {now}" for key, (then, now) in sitting.get("changed", {}).items()]
        generations = sitting.get("generations")
        made = f"generations {generations[0]} to {generations[-1]}" if generations else ""
        facts = [f"{name} {versions[name]}" for name in named if name in versions]
        rows.append(
            [
                str(k),
                sitting["started"][:19].replace("T", " "),
                str(sitting.get("host", "")),
                str(sitting.get("code_sha256", ""))[:SHORT],
                "\n".join([part for part in (", ".join(facts), made, *changed) if part]),
            ]
        )
    return _table(["#", "started (UTC)", "host", "code", "versions, generations, what changed"], rows)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> RenderableType:
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="dim", pad_edge=False, show_header=bool(columns))
    for column in columns:
        table.add_column(Text(column), overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return Padding(table, (0, 0, 0, 4))


def _heading(what: str, more: str) -> RenderableType:
    from rich.text import Text

    return Text.assemble((what, "bold"), f"  {more}" if more else "")


def _line(text: str) -> RenderableType:
    from rich.text import Text

    return Text(text)


def _short_text(value: Any) -> str:
    """A setting on one line: ``key=value`` of a section."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={item}" for key, item in value.items() if item is not None)
    return str(value)
