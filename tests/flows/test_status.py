"""Rows of ``al-loop status``, and an old database shown and gone on with."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pymongo import MongoClient
from typer.testing import CliRunner

from alcore.errors import InputError
from alcore.types import RunRecord
from calculators.registry import resolve
from flows.cli import app
from flows.leases import RUN_PREFIX, LeaseKeeper
from flows.status import run_labels, run_rows
from storage.memory import MemoryStore
from storage.mongod import ensure_mongod
from storage.store import MongoStore

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture
def old_home(home: Path) -> Iterator[Path]:
    """Its database is one that al-loop wrote with schema 1."""
    place = CHECKOUT / "tests" / "storage" / "make_dump.py"
    spec = importlib.util.spec_from_file_location("make_dump", place)
    assert spec is not None
    assert spec.loader is not None
    make_dump = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_dump)
    with MongoClient[Any](ensure_mongod(home)) as client:
        client.drop_database("al_loop")
        make_dump.restore_dump(make_dump.DATA / "schema-1.bson.xz", client["al_loop"])
        yield home
        client.drop_database("al_loop")


def test_a_run_that_nobody_works_on_is_abandoned() -> None:
    store = MemoryStore()
    for name, status in (("a", "running"), ("b", "running"), ("c", "converged")):
        store.save_run(RunRecord(name=name, settings={}, settings_sha256="", status=status))  # type: ignore[arg-type]
    keeper = LeaseKeeper(store, run="a")
    assert keeper.take([f"{RUN_PREFIX}a"])
    assert {row["name"]: row["status"] for row in run_rows(store)} == {
        "a": "running",
        "b": "abandoned",
        "c": "converged",
    }
    keeper.close()
    assert [row["status"] for row in run_rows(store, "a")] == ["abandoned"]
    with pytest.raises(InputError, match="no run named 'd'"):
        run_rows(store, "d")


def test_rows_count_the_labels_that_the_run_itself_would_load(old_home: Path) -> None:
    store = MongoStore(ensure_mongod(old_home))
    for row in run_rows(store):
        labels = run_labels(store, store.load_generations(row["name"]))
        assert sum(row["labels"].values()) == len(labels) > 0
    store.close()


def test_an_old_run_is_shown_and_gone_on_with(old_home: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    rows = {row["name"]: row for row in json.loads(runner.invoke(app, ["status", "--json"]).stdout)}
    assert (rows["stopped"]["status"], rows["stopped"]["generations"]) == ("budget_spent", 4)
    shown = json.loads(runner.invoke(app, ["show", "quickstart", "--json"]).stdout)
    assert shown["converged"] is True
    assert shown["verified_barrier_ev"] == pytest.approx(0.3751, abs=2e-4)
    assert runner.invoke(app, ["report", "quickstart", "-o", str(tmp_path / "report")]).exit_code == 0
    assert (tmp_path / "report" / "report.html").is_file()
    store = MongoStore(ensure_mongod(old_home))
    before = store.load_generations("stopped")
    (label,) = store.load_labels(before[0].label_keys[:1]).values()
    if label.fingerprint != resolve("emt", {}).fingerprint:
        pytest.skip("the reference calculator here is another version than that of the dump")
    quickstart = CHECKOUT / "config" / "quickstart.yaml"
    changes = ["name=stopped", "stop.max_generations=4", "model.strategy=zero-shot", "model.committee=1"]
    sets = [word for change in changes for word in ("--set", change)]
    done = runner.invoke(app, ["run", str(quickstart), "--no-server", *sets])
    assert done.exit_code == 3, done.output
    after = store.load_generations("stopped")
    assert [record.index for record in after] == [0, 1, 2, 3, 4]
    assert set(before[-1].label_keys) <= set(after[-1].label_keys)
    assert [record.sitting for record in after] == [0, 0, 0, 0, 1]
    store.close()
