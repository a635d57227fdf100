"""A store that loses nothing while the database is away."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from alcore.errors import StoreError, StoreUnreachableError
from storage import courier
from storage.spool import Spool

# while the database is there

PATIENCE_S = 60.0


def test_with_the_database_there_a_write_is_in_it_at_once(kit: Any, records: Any) -> None:
    label = records.label()
    kit.store.save_run(records.run("r", settings={"store": {"mongodb_uri": "mongodb://ann:s3cret@host"}}))
    kit.store.save_label(label, "r")
    kit.store.save_generation(records.generation("r", 0, 0.01))
    kit.store.save_step("r", 1, "probe/hop", {"x": 1})
    sha256 = kit.store.save_model(b"weights", {"epochs": 3})
    assert kit.there.load_run("r").settings["store"]["mongodb_uri"] == "mongodb://***@host"
    assert list(kit.there.load_labels([label.key])) == [label.key]
    assert [record.index for record in kit.there.load_generations("r")] == [0]
    assert kit.there.load_step("r", 1, "probe/hop") == {"x": 1}
    assert kit.there.load_model(sha256) == b"weights"
    kit.store.forget_steps("r", 1)
    assert kit.there.load_step("r", 1, "probe/hop") is None
    assert (kit.store.waiting, kit.told) == (0, [])


def test_everything_else_a_store_can_do_is_there(kit: Any, records: Any) -> None:
    from storage.documents import LabelDocument

    kit.store.save_label(records.label(), "r")
    kit.store.save_run(records.run("r"))
    assert kit.store.count_labels_by_status("r") == {"ok": 1}
    assert [document.key for document in kit.store.query(LabelDocument, runs="r")] == [records.label().key]
    assert [run.name for run in kit.store.list_runs()] == ["r"]
    assert kit.store.address == kit.store.mongo.address
    assert kit.store.ping() is None
    assert kit.store.delete_run("r")
    with pytest.raises(AttributeError):
        kit.store.no_such_thing  # noqa: B018
    with pytest.raises(StoreError, match="nothing with sha256"):
        kit.store.load_model("0" * 64)


def test_what_cannot_be_stored_is_said_at_once(kit: Any, records: Any) -> None:
    with pytest.raises(StoreError, match="cannot be stored"):
        kit.store.save_step("r", 0, "probe", {"x": object()})
    assert kit.store.waiting == 0


# while it is away


def test_while_it_is_away_writes_wait_on_disk_and_own_ones_can_be_read(kit: Any, records: Any, wait: Any) -> None:
    label, other = records.label(1), records.label(2)
    kit.store.save_label(other, "r")
    kit.store.save_run(records.run("r"))
    kit.store.save_generation(records.generation("r", 0))
    kit.relay.cut()
    kit.store.save_run(records.run("r"))
    kit.store.save_label(label, "r")
    kit.store.save_generation(records.generation("r", 1))
    kit.store.forget_steps("r", 1)
    kit.store.save_step("r", 2, "probe/hop", {"x": [1, 2]})
    sha256 = kit.store.save_model(b"weights", {})
    assert kit.store.waiting == 6
    assert kit.store.load_labels([label.key])[label.key].energy_ev == label.energy_ev
    assert kit.store.load_model(sha256) == b"weights"
    assert kit.store.load_step("r", 2, "probe/hop") == {"x": [1, 2]}
    assert kit.store.load_step("r", 2, "train/0") is None, "this process came to that generation: nobody did it before"
    assert len(kit.told) == 1
    assert kit.told[0].startswith(f"MongoDB at 127.0.0.1:{kit.relay.port} does not answer (")
    assert kit.told[0].endswith(f"; 1 write waits on disk in {kit.store.spool.folder}; waiting")
    kit.relay.mend()
    assert wait(lambda: len(kit.told) == 2)
    assert "answers again after" in kit.told[1]
    assert "6 writes delivered" in kit.told[1]
    assert sorted(kit.there.load_labels([label.key, other.key])) == sorted([label.key, other.key])
    assert [record.index for record in kit.there.load_generations("r")] == [0, 1]
    assert kit.there.load_step("r", 2, "probe/hop") == {"x": [1, 2]}
    assert kit.store.waiting == 0


def test_it_is_told_each_minute(kit: Any, records: Any, monkeypatch: pytest.MonkeyPatch, wait: Any) -> None:
    monkeypatch.setattr(courier, "TELL_EVERY_S", 0.3)
    kit.relay.cut()
    kit.store.save_label(records.label(1))
    kit.store.save_label(records.label(2))
    assert wait(lambda: len(kit.told) >= 3)
    assert "2 writes wait" in kit.told[-1]


def test_a_reader_waits_until_it_is_back_and_sees_its_own(kit: Any, records: Any) -> None:
    kit.relay.cut()
    kit.store.save_run(records.run("r"))
    kit.store.save_generation(records.generation("r", 0))
    found: list[Any] = []
    readers = [
        threading.Thread(target=lambda: found.append(kit.store.load_generations("r")[0].index)),
        threading.Thread(target=lambda: found.append(kit.store.load_run("r").name)),
        threading.Thread(target=lambda: found.append(len(kit.store.load_labels([records.label().key])))),
        threading.Thread(target=lambda: found.append(kit.store.take_lease(["a"], "me", 60))),
    ]
    for reader in readers:
        reader.start()
    time.sleep(0.5)
    assert found == []
    kit.relay.mend()
    for reader in readers:
        reader.join(PATIENCE_S)
    assert sorted(map(str, found)) == ["0", "0", "a", "r"]


def test_the_run_is_delivered_before_what_became_of_it(kit: Any, records: Any, wait: Any) -> None:
    seen: list[str] = []
    real = kit.store.mongo.save_run
    kit.store.mongo.save_run = lambda run: (seen.append(run.status), real(run))
    kit.relay.cut()
    for status in ("running", "failed", "running", "converged"):
        kit.store.save_run(records.run("r", status=status))
    kit.relay.mend()
    assert wait(lambda: kit.store.waiting == 0)
    assert [status for k, status in enumerate(seen) if seen[k - 1 : k] != [status]] == [
        "running",
        "failed",
        "running",
        "converged",
    ]
    assert kit.there.load_run("r").status == "converged"


def test_stop_waiting_ends_who_waits_and_loses_nothing(kit: Any, records: Any, wait: Any) -> None:
    kit.relay.cut()
    ended: list[BaseException] = []

    def read() -> None:
        try:
            kit.store.load_run("r")
        except StoreUnreachableError as error:
            ended.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    assert wait(lambda: kit.told)
    kit.store.stop_waiting()
    reader.join(PATIENCE_S)
    assert len(ended) == 1
    kit.store.save_run(records.run("r", status="cancelled"))
    kit.store.close()
    assert kit.told[-1].startswith(f"1 write waits on disk in {kit.store.spool.folder} for MongoDB at 127.0.0.1")
    kit.relay.mend()
    kit.make()
    assert kit.told[-1].startswith("1 writes that had waited")
    assert kit.there.load_run("r").status == "cancelled"


def test_what_a_dead_process_left_is_delivered_by_the_next(kit: Any, records: Any) -> None:
    kit.store.save_run(records.run("r"))
    kit.relay.cut()
    kit.store.save_generation(records.generation("r", 0))
    left = Spool(kit.store.spool.folder)  # as if this process had died here
    assert left.count() == 1
    kit.relay.mend()
    assert [record.index for record in kit.make().load_generations("r")] == [0]


# leases


def test_a_heart_beat_does_not_wait(kit: Any, records: Any, wait: Any) -> None:
    assert kit.store.take_lease(["a", "b"], "me", 60) == "a"
    assert kit.store.renew_lease("a", "me", 60)
    kit.relay.cut()
    with pytest.raises(StoreUnreachableError):
        kit.store.renew_lease("a", "me", 60)
    kit.store.save_label(records.label())
    began = time.monotonic()
    for _ in range(50):
        with pytest.raises(StoreUnreachableError):
            kit.store.renew_lease("a", "me", 60)
    kit.store.release_lease("a", "me")
    assert time.monotonic() - began < PATIENCE_S / 20
    assert kit.there.held_leases("a") == {"a": "me"}
    kit.relay.mend()
    assert wait(lambda: kit.there.held_leases("a") == {}), "released when it is back"
    assert kit.store.held_leases("") == {}


def test_leases_are_renewed_while_a_fat_spool_is_delivered(
    kit: Any, records: Any, wait: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else others, who deliver less, would take them meanwhile."""
    assert kit.store.take_lease(["a"], "me", 60)
    delivering, go_on = threading.Event(), threading.Event()
    real = kit.store.mongo.save_label

    def slow(*arguments: Any) -> None:
        delivering.set()
        go_on.wait(PATIENCE_S)
        real(*arguments)

    kit.relay.cut()
    kit.store.save_label(records.label())
    monkeypatch.setattr(kit.store.mongo, "save_label", slow)
    kit.relay.mend()
    try:
        assert delivering.wait(PATIENCE_S)
        assert kit.store.renew_lease("a", "me", 60)
        assert kit.store.waiting == 1
    finally:
        go_on.set()
    assert wait(lambda: kit.store.waiting == 0)


def test_a_lease_is_released_only_after_what_was_written_under_it(kit: Any, records: Any, wait: Any) -> None:
    """Else the next owner would not find the label, and compute it again."""
    label = records.label()
    assert kit.store.take_lease(["label/x"], "me", 60)
    deeds: list[str] = []
    mongo = kit.store.mongo
    for name in ("save_label", "release_lease"):
        real = getattr(mongo, name)
        setattr(mongo, name, lambda *args, real=real, name=name: (real(*args), deeds.append(name)))
    kit.relay.cut()
    kit.store.save_label(label, "r")
    kit.store.release_lease("label/x", "me")
    kit.relay.mend()
    assert wait(lambda: len(deeds) == 2)
    assert deeds == ["save_label", "release_lease"]


def test_a_lease_whose_answer_was_lost_is_found(kit: Any) -> None:
    real = kit.store.mongo.take_lease

    def cut_off(*arguments: Any) -> Any:
        kit.store.mongo.take_lease = real
        real(*arguments)
        raise StoreUnreachableError("the answer was lost")

    kit.store.mongo.take_lease = cut_off
    assert kit.store.take_lease(["s/0", "s/1"], "me", 60) == "s/0"
    assert kit.there.held_leases("s/") == {"s/0": "me"}
