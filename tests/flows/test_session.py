"""Whole runs on real parts: the embedded MongoDB, worker processes, EMT as reference, steps in plain threads."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import psutil
import pytest
from ase.calculators.emt import EMT
from ase.mep import NEB
from ase.optimize import BFGS
from typer.testing import CliRunner, Result

from alcore.errors import InputError
from alcore.runner import PlainRunner
from alcore.types import GenerationRecord, RunRecord
from flows.cli import app
from flows.runfile import load_run_file
from flows.session import RunOutcome, open_record_store, run_session
from flows.settings import StoreSettings
from storage.mongod import find_mongod

FIRST_TWO = {"stop": {"max_generations": 1}}
"""The end states and one image: enough to see where labels come from."""


def al_loop(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "160"})


def run(file: Path, **options: Any) -> RunOutcome:
    return run_session(load_run_file(file), runner=PlainRunner({"label": 1}), **options)


def stored_run(name: str) -> RunRecord:
    with closing(open_record_store(None)) as store:
        record = store.load_run(name)
    assert record is not None
    return record


def stored_generations(name: str) -> list[GenerationRecord]:
    with closing(open_record_store(None)) as store:
        return store.load_generations(name)


def barriers(generations: Sequence[GenerationRecord]) -> list[float]:
    """Surrogate barrier of every generation in eV; -1 while there is none."""
    return [g.paths[0].barrier.forward_ev if g.paths[0].barrier else -1.0 for g in generations]


@pytest.fixture(scope="module")
def finished(hop: Any, loop_home: Path) -> RunOutcome:
    """The hop, run to its end in one go."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AL_LOOP_HOME", str(loop_home))
        return run(hop.run_file("finished"))


def test_it_converges_to_what_an_ordinary_neb_finds(finished: RunOutcome, hop: Any) -> None:
    images = [ase.io.read(hop.folder / "initial.extxyz")]
    images += [images[0].copy() for _ in range(3)] + [ase.io.read(hop.folder / "final.extxyz")]
    for image in images:
        image.calc = EMT()
    neb = NEB(images, climb=True, method="improvedtangent")
    neb.interpolate("idpp", mic=True)
    BFGS(neb, logfile=None).run(fmax=0.02)
    expected = images[2].get_potential_energy() - images[0].get_potential_energy()
    assert finished.run.status == "converged"
    last = finished.generations[-1].paths[0]
    assert last.verified_barrier_ev == pytest.approx(expected, abs=0.010)
    assert last.barrier is not None
    assert last.barrier.forward_ev == pytest.approx(expected, abs=0.010)


def test_every_evaluation_of_the_reference_is_counted(finished: RunOutcome, hop: Any) -> None:
    last = finished.generations[-1]
    assert hop.calls("finished") == last.n_reference_calls == len(finished.labels) <= 15
    assert last.n_labels_reused == 0


def test_a_finished_run_called_again_is_there_at_once(finished: RunOutcome, hop: Any, home: Path) -> None:
    before = hop.calls("finished")
    lines: list[str] = []
    again = run(hop.run_file("finished"), log=lines.append)
    assert hop.calls("finished") == before
    assert again.run.status == "converged"
    assert again.run.started == finished.run.started
    assert barriers(again.generations) == barriers(finished.generations)
    assert any("goes on after generation" in line for line in lines)


def test_interrupted_between_generations_it_ends_as_if_it_had_not_been(
    finished: RunOutcome, hop: Any, home: Path
) -> None:
    def stop_after_two(record: RunRecord, generations: Sequence[GenerationRecord], labels: Any) -> None:
        if generations[-1].index == 2:
            raise RuntimeError("the power failed")

    file = hop.run_file("interrupted")
    with pytest.raises(RuntimeError):
        run(file, on_generation=stop_after_two)
    broken = stored_run("interrupted")
    assert (broken.status, broken.reason) == ("failed", "the power failed")
    assert len(stored_generations("interrupted")) == 3
    outcome = run(file)
    assert outcome.run.status == "converged"
    np.testing.assert_allclose(barriers(outcome.generations), barriers(finished.generations), atol=1e-6)
    assert hop.calls("interrupted") == hop.calls("finished")
    assert outcome.generations[-1].n_reference_calls == finished.generations[-1].n_reference_calls
    assert outcome.generations[-1].n_labels_reused == 0, "what the run itself has computed is not reused"


def test_another_correction_may_take_over(finished: RunOutcome, hop: Any, home: Path) -> None:
    """It is fitted anew from the labels each time, so nothing of the run is lost or mixed."""
    outcome = run(hop.run_file("finished", model={"correction": "blr", "committee": 1}))
    assert outcome.run.status == "converged"
    assert outcome.run.sittings[-1].changed == {"model.correction": ["blr+gp", "blr"]}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"neb": {"spring_ev_per_ang2": 0.5}}, "neb.spring_ev_per_ang2 was 0.1, is now 0.5"),
        ({"seed": 1}, "seed was 0, is now 1"),
        ({"tag": "other"}, "calculator.settings.tag was finished, is now other"),
        (
            {"model": {"strategy": "naive", "committee": 2}},
            "model.strategy was zero-shot, is now naive; model.committee was 1, is now 2",
        ),
        (
            {"calculator": {"settings": {"tag": "finished", "xc": "LDA"}}},
            "calculator.settings.xc was not set, is now LDA",
        ),
    ],
)
def test_other_physics_under_its_name_is_refused(
    change: dict[str, Any], told: str, finished: RunOutcome, hop: Any, home: Path
) -> None:
    file = hop.run_file("finished", **change)
    result = al_loop("run", file, "--no-server")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        f"name: the run 'finished' exists with other settings: {told} "
        "(choose another name (--name), or undo the change)\n"
    )
    assert al_loop("check", file).stderr == result.stderr
    assert stored_run("finished").status == "converged"


def test_other_end_states_in_the_same_files_are_refused(finished: RunOutcome, hop: Any, home: Path) -> None:
    kept = (hop.folder / "final.extxyz").read_bytes()
    moved = ase.io.read(hop.folder / "final.extxyz")
    moved.positions[8, 2] += 0.1
    try:
        ase.io.write(hop.folder / "final.extxyz", moved)
        with pytest.raises(InputError, match="exists with other settings: the end states' files were others"):
            run(hop.run_file("finished"))
    finally:
        (hop.folder / "final.extxyz").write_bytes(kept)


def test_the_same_end_states_may_lie_elsewhere(
    finished: RunOutcome, hop: Any, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = hop.folder / "copied"
    copied.mkdir()
    for name in ("initial.extxyz", "final.extxyz"):
        (copied / name).write_bytes((hop.folder / name).read_bytes())
    paths = [{"name": "hop", "initial": "copied/initial.extxyz", "final": "copied/final.extxyz"}]
    assert run(hop.run_file("finished", paths=paths)).run.status == "converged"


def _perturbed(file: Path, seed: int, moved: float = 0.0) -> None:
    """One labelled frame that does not say which calculator made it."""
    atoms = ase.io.read(file.parent / "initial.extxyz")
    atoms.rattle(0.05, seed=seed)
    atoms.positions[8, 2] += moved
    atoms.calc = EMT()
    atoms.get_forces()
    ase.io.write(file, atoms)


def test_brought_along_data_and_bands_may_lie_elsewhere_but_be_no_others(hop: Any, home: Path, tmp_path: Path) -> None:
    images = [ase.io.read(hop.folder / f"{end}.extxyz") for end in ("initial", "initial", "final")]
    images[1].positions += 0.5 * (images[2].positions - images[0].positions)
    ase.io.write(hop.folder / "band.traj", images)
    _perturbed(hop.folder / "mine.extxyz", 1)
    options: dict[str, Any] = {
        "tag": "brought",
        "paths": [{"name": "hop", "band": "band.traj"}],
        "data": ["mine.extxyz"],
        "stop": {"max_generations": 1},
    }
    file = hop.run_file("brought", **options)
    asked = run(file).generations[-1].n_reference_calls
    assert run(file).generations[-1].n_reference_calls == asked
    out = tmp_path / "out"
    assert al_loop("export", "brought", "-o", out).exit_code == 0
    (hop.folder / "mine.extxyz").rename(hop.folder / "moved.extxyz")
    (hop.folder / "band.traj").rename(hop.folder / "moved.traj")
    assert al_loop("import", out, "--name", "brought-2").exit_code == 0
    for name in ("brought", "brought-2"):
        gone_on = run_session(load_run_file(out / "run.yaml", name=name), runner=PlainRunner({"label": 1}))
        assert gone_on.generations[-1].n_reference_calls == asked
        assert len(gone_on.generations) == 2
    moved = {"paths": [{"name": "hop", "band": "moved.traj"}], "data": ["moved.extxyz"]}
    assert al_loop("check", hop.run_file("brought", **options | moved)).exit_code == 0
    for change in (lambda: _perturbed(hop.folder / "moved.extxyz", 2), (hop.folder / "none").touch):
        change()
        data = [] if (hop.folder / "none").exists() else ["moved.extxyz"]
        for verb in (("run", "--no-server"), ("check",)):
            refused = al_loop(*verb, hop.run_file("brought", **options | moved | {"data": data}))
            assert refused.exit_code == 2, refused.output
            assert "with other settings: data: the labels in its files were others (choose" in refused.stderr


def test_what_a_cut_off_import_left_is_not_gone_on_with(finished: RunOutcome, hop: Any, home: Path) -> None:
    with closing(open_record_store(None)) as store:
        for record in finished.generations[:2]:
            store.mongo.save_generation(replace(record, run="left"))  # as an import does
    file = hop.run_file("left", tag="finished", **FIRST_TWO)
    for verb in (("run", "--no-server"), ("check",)):
        refused = al_loop(*verb, file)
        assert refused.exit_code == 2, refused.output
        assert refused.stderr.startswith("name: 2 generations of a run 'left' without its record"), refused.stderr
        assert "`al-loop gc --run left --yes`" in refused.stderr
    assert al_loop("gc", "--run", "left", "--yes").exit_code == 0
    assert al_loop("run", "--no-server", file).exit_code == 3
    assert len(stored_generations("left")) == 2


def test_a_spent_budget_is_exit_3_and_a_larger_one_goes_on(finished: RunOutcome, hop: Any, home: Path) -> None:
    file = hop.run_file("budget")
    result = al_loop("run", file, "--no-server", "--set", "stop.max_labels=3")
    assert result.exit_code == 3, result.output
    assert stored_run("budget").status == "budget_spent"
    assert "3 reference calls spent (limit 3)" in stored_run("budget").reason
    spent = len(stored_generations("budget"))
    assert hop.calls("budget") == 3
    result = al_loop("run", file, "--no-server", "--set", "stop.max_labels=20")
    assert result.exit_code == 0, result.output
    assert stored_run("budget").status == "converged"
    assert len(stored_generations("budget")) > spent
    shown = json.loads(al_loop("show", "budget", "--json").stdout)
    assert shown["converged"]
    assert shown["n_reference_calls"] == hop.calls("budget") <= 15
    verified = finished.generations[-1].paths[0].verified_barrier_ev
    assert shown["paths"][0]["verified_barrier_ev"] == pytest.approx(verified, abs=0.010)


def test_two_runs_share_their_labels(finished: RunOutcome, hop: Any, home: Path) -> None:
    outcome = run(hop.run_file("sharing", tag="finished", **FIRST_TWO))
    last = outcome.generations[-1]
    assert (last.n_reference_calls, last.n_labels_reused) == (0, len(outcome.labels))
    assert last.n_labels_reused == 3
    assert hop.calls("finished") == finished.generations[-1].n_reference_calls


def test_what_one_run_exports_starts_another(finished: RunOutcome, hop: Any, home: Path, tmp_path: Path) -> None:
    assert al_loop("export", "finished", "-o", tmp_path / "data").exit_code == 0
    exported = tmp_path / "data" / "dataset.extxyz"
    frames = ase.io.read(exported, index=":")
    (fingerprint,) = {label.fingerprint for label in finished.labels.values()}
    assert {(frame.info["calculator"], frame.info["fingerprint"]) for frame in frames} == {("ase", fingerprint)}

    asked = hop.calls("finished")
    _forget_labels(home)
    outcome = run(hop.run_file("started", tag="finished", data=[str(exported)]))
    first, last = outcome.generations[0], outcome.generations[-1]
    assert (first.n_reference_calls, first.n_labels_reused) == (0, len(finished.labels))
    assert outcome.run.status == "converged"
    new = set(outcome.labels) - set(finished.labels)
    assert hop.calls("finished") - asked == last.n_reference_calls == len(new) < len(finished.labels)

    refused = al_loop("run", "--no-server", hop.run_file("refused", tag="other theory", data=[str(exported)]))
    assert refused.exit_code == 2
    assert "data.0: frame 0 of dataset.extxyz is of another level of theory" in refused.stderr


def _forget_labels(home: Path) -> None:
    """As on a machine that has never computed them."""
    from pymongo import MongoClient

    from storage.mongod import ensure_mongod

    with MongoClient(ensure_mongod(home)) as client:
        client["al_loop"]["labels"].delete_many({})


def test_a_dry_run_asks_a_cheap_teacher_instead(hop: Any, home: Path, tmp_path: Path) -> None:
    file = hop.run_file("dear", **FIRST_TWO)
    result = al_loop("run", file, "--no-server", "--dry-run")
    assert result.exit_code == 3, result.output
    assert hop.calls("dear") == 0
    with closing(open_record_store(None)) as store:
        assert store.load_run("dear") is None
        record = store.load_run("dear-dry-run")
    assert record is not None
    assert record.settings["calculator"]["name"] == "emt"
    assert len(stored_generations("dear-dry-run")) == 2


@pytest.fixture
def guarded_uri(tmp_path: Path) -> Iterator[str]:
    """A MongoDB that wants a password."""
    from pymongo import MongoClient

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "db").mkdir()
    command = [find_mongod(), "--auth", "--fork", "--nounixsocket", "--bind_ip", "127.0.0.1", "--port", port]
    command += ["--dbpath", tmp_path / "db", "--logpath", tmp_path / "log"]
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)
    process = psutil.Process(int((tmp_path / "db" / "mongod.lock").read_text()))
    with MongoClient("127.0.0.1", port) as client:
        client.admin.command("createUser", "me", pwd="s3cret", roles=["root"])
    yield f"mongodb://me:s3cret@127.0.0.1:{port}/"
    process.terminate()
    process.wait(30)


def test_a_password_is_neither_stored_nor_printed(guarded_uri: str, hop: Any, home: Path, tmp_path: Path) -> None:
    from pymongo import MongoClient

    file = hop.run_file("secret", store={"mongodb_uri": guarded_uri}, stop={"max_generations": 1, "max_labels": 2})
    result = al_loop("run", file, "--no-server")
    assert result.exit_code == 3, result.output
    with MongoClient(guarded_uri) as client:
        database = client["al_loop"]
        everything = [str(document) for name in database.list_collection_names() for document in database[name].find()]
    assert any("budget_spent" in document for document in everything)
    said = [result.output, *everything]
    said += [al_loop("show", "secret", "--json", "--mongodb-uri", guarded_uri).output]
    assert al_loop("export", "secret", "-o", tmp_path / "out", "--mongodb-uri", guarded_uri).exit_code == 0
    said += [(tmp_path / "out" / "run.yaml").read_text()]
    wrong = al_loop("run", file, "--no-server", "--set", f"store.mongodb_uri={guarded_uri.replace('s3c', 's3cret-')}")
    assert (wrong.exit_code, wrong.stderr.count("\n")) == (2, 1)
    assert "MongoDB refuses this user (check user, password and authSource)" in wrong.stderr
    said += [wrong.output]
    assert not [text for text in said if "s3cret" in text]
    with closing(open_record_store(None)) as store:
        assert store.load_run("secret") is None, "its place is where the run file says, not the embedded database"


def test_prefect_does_not_learn_the_password_either(
    prefect_api: str, guarded_uri: str, hop: Any, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.client.orchestration import get_client

    monkeypatch.setattr("flows.services.connected", lambda say: nullcontext())  # the session's server runs already
    file = hop.run_file("guarded", store={"mongodb_uri": guarded_uri}, stop={"max_generations": 1, "max_labels": 2})
    result = al_loop("run", file)
    assert result.exit_code == 3, result.output
    assert hop.calls("guarded") == 2
    with get_client(sync_client=True) as client:
        (flow_run,) = [run for run in client.read_flow_runs() if run.name == "guarded"]
        logs = client.read_logs()
        artifacts = client.read_artifacts()
    assert flow_run.parameters["settings"]["name"] == "guarded"
    assert flow_run.state is not None
    assert flow_run.state.is_completed()
    said = [result.output, flow_run.model_dump_json(), *(str(thing) for thing in [*logs, *artifacts])]
    assert not [text for text in said if "s3cret" in text]
    assert "AL_LOOP_MONGODB_URI" not in os.environ
    with closing(open_record_store(StoreSettings(mongodb_uri=guarded_uri))) as store:
        record = store.load_run("guarded")
    assert record is not None
    assert record.status == "budget_spent"
