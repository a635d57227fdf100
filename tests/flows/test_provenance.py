"""Where a barrier came from, as a person and a program are told it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from alcore.errors import InputError
from alcore.identity import keys_sha256
from alcore.runner import PlainRunner
from alcore.types import (
    BarrierEstimate,
    Decision,
    GenerationRecord,
    Label,
    PathRecord,
    Residual,
    RunRecord,
    Sitting,
    Structure,
)
from flows.cli import app
from flows.provenance import barrier_provenance
from flows.runfile import load_run_file
from flows.session import RunOutcome, open_record_store, run_session
from flows.sittings import code_sha256
from storage.memory import MemoryStore


def al_loop(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "300"})


ATOM = Structure(
    numbers=np.array([29]),
    positions=np.zeros((1, 3)),
    cell=np.eye(3),
    pbc=np.ones(3, bool),
    fixed=np.zeros((1, 3), bool),
)
BARRIER = BarrierEstimate(
    forward_ev=0.7,
    reverse_ev=0.7,
    reaction_energy_ev=0.0,
    spline_forward_ev=0.7,
    sigma_ev=0.01,
    sigma_committee_ev=0.01,
    sigma_posterior_ev=0.01,
    saddle_image=1,
)
STOP, GO_ON = Decision(stop=True, code="converged", reason="r"), Decision(stop=False, code="continue", reason="")


def path(name: str, *keys: str, decision: Decision = GO_ON, **changes: Any) -> PathRecord:
    return PathRecord(
        path=name, initial=ATOM, final=ATOM, barrier=BARRIER, label_keys=keys, decision=decision, **changes
    )


@pytest.fixture
def store() -> MemoryStore:
    """Two hops: ``early`` settles in generation 1 and is carried along, ``late`` goes on to 3. The committee of
    generation 0 predicted what generation 1 found, and so on."""
    store = MemoryStore()
    names = "abcd"
    for k, name in enumerate(names):
        details = {"computed_by": "hop", "generation": k, "code_version": "7"}
        label = Label(key=name, structure=ATOM, status="ok", fingerprint="f", calculator="emt", details=details)
        store.save_label(dataclasses.replace(label, energy_ev=-1.0 - k, forces=np.full((1, 3), 0.1)), "hop")
    members = []
    for k in range(4):
        made = {"generation": k, "name": "member-0", "seed": 0, "labels_sha256": keys_sha256(names[: k + 1])}
        members.append(store.save_model(f"weights {k}".encode(), made))
    early = [path("early", "a"), path("early", "b", decision=STOP, saddle_key="b", initial_label="a")]
    early += [dataclasses.replace(early[1], label_keys=())] * 2
    late = [path("late", key) for key in "abc"] + [path("late", "d", decision=STOP, saddle_key="d", initial_label="a")]
    for k in range(4):
        record = GenerationRecord(
            run="hop",
            index=k,
            paths=(early[k], late[k]),
            label_keys=tuple(names[: k + 1]),
            kinds=dict.fromkeys(names[: k + 1], "saddle"),
            surrogate={"members": [members[k]], "lead": "committee", "prior": "p" * 64},
            sitting=k // 2,
        )
        store.save_generation(record)
    sittings = tuple(Sitting(started=f"2026-01-0{k + 1}T00:00:00+00:00", code_sha256=f"code{k}") for k in range(2))
    run = RunRecord(name="hop", settings={"name": "hop", "seed": 5}, settings_sha256="s" * 64, sittings=sittings)
    store.save_run(run)
    return store


def generations_behind(store: MemoryStore, generation: int | None = None) -> dict[str, tuple[int, list[str]]]:
    """Where each hop's band was relaxed, and the labels that its surrogate had learned."""
    paths = barrier_provenance(store, "hop", generation)["paths"]
    return {path["path"]: (path["probed_in_generation"], path["predicted_by"]["label_keys"]) for path in paths}


def test_a_band_was_relaxed_on_what_the_generation_before_it_had_learned(store: MemoryStore) -> None:
    assert generations_behind(store)["late"] == (3, ["a", "b", "c"])
    assert generations_behind(store, 2)["late"] == (2, ["a", "b"])
    assert generations_behind(store, 0)["late"] == (0, [])


def test_a_settled_hop_keeps_the_provenance_it_had(store: MemoryStore) -> None:
    for generation in (1, 2, 3):
        assert generations_behind(store, generation)["early"] == (1, ["a"])


def test_a_hop_that_was_opened_again_has_a_new_one(store: MemoryStore) -> None:
    record = store.load_generation("hop", 3)
    assert record is not None
    residual = Residual(
        key="d", path="early", kind="saddle", generation=3, predicted_ev=0.7, labelled_ev=0.7, sigma_committee_ev=0.1,
        sigma_posterior_ev=0.1, sigma_ev=0.1, fmax_ev_per_ang=0.1,
    )  # fmt: skip
    again = dataclasses.replace(record.paths[0], residuals=(residual,))
    store.save_generation(dataclasses.replace(record, paths=(again, record.paths[1])))
    assert generations_behind(store)["early"] == (3, ["a", "b", "c"])


def test_a_model_knows_what_it_was_trained_on(store: MemoryStore) -> None:
    late = barrier_provenance(store, "hop")["paths"][1]
    (member,) = late["predicted_by"]["members"]
    assert (member["generation"], member["stored"], member["label_keys"]) == (2, True, ["a", "b", "c"])
    record = store.load_generation("hop", 2)
    assert record is not None
    store.save_generation(dataclasses.replace(record, label_keys=("a", "c")))
    (member,) = barrier_provenance(store, "hop")["paths"][1]["predicted_by"]["members"]
    assert member["label_keys"] is None, "the record names other labels than those the model saw"


def test_a_label_knows_who_made_it_with_what_code(store: MemoryStore) -> None:
    labels = barrier_provenance(store, "hop")["labels"]
    assert [labels[key]["made_with"]["code_sha256"] for key in "abcd"] == ["code0", "code0", "code1", "code1"]
    assert labels["d"]["details"]["code_version"] == "7"
    assert barrier_provenance(store, "hop")["sittings"][1]["generations"] == [2, 3]


def test_a_label_that_is_gone_is_said_to_be_gone(store: MemoryStore) -> None:
    record = store.load_generation("hop", 3)
    assert record is not None
    late = dataclasses.replace(record.paths[1], saddle_key="gone")
    store.save_generation(dataclasses.replace(record, paths=(record.paths[0], late)))
    assert barrier_provenance(store, "hop")["labels"]["gone"]["stored"] is False


def test_what_is_not_there(store: MemoryStore) -> None:
    with pytest.raises(InputError, match=r"the run 'hop' has no generation 4 \(they are 0 to 3\)"):
        barrier_provenance(store, "hop", 4)
    with pytest.raises(InputError, match="no run named 'hopp'"):
        barrier_provenance(store, "hopp")
    store.save_run(RunRecord(name="new", settings={}, settings_sha256=""))
    assert barrier_provenance(store, "new")["paths"] == []
    with pytest.raises(InputError, match="it has none yet"):
        barrier_provenance(store, "new", 0)


# --- a real run -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def borrowed(hop: Any, loop_home: Path) -> Iterator[RunOutcome]:
    """A run that finds all its labels made by another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AL_LOOP_HOME", str(loop_home))
        for name in ("lender", "borrower"):
            file = hop.run_file(name, tag="lender", stop={"max_generations": 1})
            outcome = run_session(load_run_file(file), runner=PlainRunner({"label": 1}))
        yield outcome


def test_a_barrier_whose_labels_another_run_computed(borrowed: RunOutcome, hop: Any, home: Path) -> None:
    assert borrowed.generations[-1].n_reference_calls == 0
    values = json.loads(al_loop("show", "borrower", "--provenance", "--json").stdout)
    assert len(values["labels"]) == len(borrowed.labels) == 3
    for key, label in values["labels"].items():
        assert label["computed_by"] == "lender"
        assert label["energy_ev"] == borrowed.labels[key].energy_ev
        assert label["made_with"]["code_sha256"] == code_sha256()
        assert label["details"]["code_version"] == borrowed.labels[key].details["code_version"]
    assert list(values["other_runs"]) == ["lender"]
    (hop_path,) = values["paths"]
    assert hop_path["barrier_forward_ev"] == borrowed.generations[-1].paths[0].barrier.forward_ev  # type: ignore[union-attr]
    saddle = hop_path["verified_by"]["saddle"]
    assert values["labels"][saddle]["kind"] == "saddle"
    assert hop_path["predicted_by"]["label_keys"] == list(borrowed.generations[0].label_keys)
    assert hop_path["predicted_by"]["prior"] == borrowed.generations[0].surrogate["prior"]
    assert values["settings"]["calculator"]["factory"] == "counted:calculator"
    (sitting,) = values["sittings"]
    assert {"torch", "mace-torch", "ase", "python", "al-loop"} <= set(sitting["versions"])


def test_for_a_person(borrowed: RunOutcome, home: Path) -> None:
    text = al_loop("show", "borrower", "--provenance").stdout
    saddle = borrowed.generations[-1].paths[0].saddle_key
    for part in (
        f"hop: {borrowed.generations[-1].paths[0].barrier.forward_ev:.4f} ± ",  # type: ignore[union-attr]
        saddle[:12],
        "lender (gen 1)",
        borrowed.generations[0].surrogate["prior"],
        borrowed.run.settings_sha256,
        code_sha256()[:12],
        borrowed.run.sittings[0].versions["torch"],
        "run lender",
    ):
        assert part in text, part
    earlier = al_loop("show", "borrower", "--provenance", "--generation", "0").stdout
    assert saddle[:12] not in earlier


def test_a_changed_setting_is_told_where_it_changed(borrowed: RunOutcome, hop: Any, home: Path) -> None:
    file = hop.run_file("lender", stop={"max_generations": 2})
    run_session(load_run_file(file), runner=PlainRunner({"label": 1}))
    with closing(open_record_store(None)) as store:
        values = barrier_provenance(getattr(store, "mongo", store), "lender")  # type: ignore[arg-type]
    assert values["sittings"][-1]["changed"] == {"stop.max_generations": [1, 2]}
    assert values["sittings"][-1]["generations"] == [2]
    assert values["paths"][0]["sitting"] == len(values["sittings"]) - 1
    assert "stop.max_generations: 1 → 2" in al_loop("show", "lender", "--provenance").stdout


def test_a_generation_is_for_provenance(home: Path) -> None:
    result = al_loop("show", "x", "--generation", "1")
    assert (result.exit_code, result.stderr) == (2, "--generation: is for --provenance only (add --provenance)\n")
