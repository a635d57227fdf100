"""What the database refuses, for ever or for now, and what comes too late."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from pymongo.errors import AutoReconnect, NetworkTimeout, NotPrimaryError, OperationFailure, WTimeoutError

from alcore.errors import StoreError, StoreUnreachableError
from alcore.types import Sitting
from storage import courier
from storage.faults import refuses_content, store_error


def test_what_is_refused_for_ever_is_put_aside_and_the_others_go_on(kit: Any, records: Any) -> None:
    kit.there._database.command("collMod", "generations", validator={"index": {"$ne": 1}})
    kit.store.save_run(records.run("r"))
    kit.store.save_generation(records.generation("r", 0))
    with pytest.raises(StoreError, match=r"failed validation.*kept as .*\.refused"):
        kit.store.save_generation(records.generation("r", 1))
    kit.store.save_generation(records.generation("r", 2))
    assert [record.index for record in kit.there.load_generations("r")] == [0, 2]
    assert (kit.store.waiting, kit.store.spool.count_aside()) == (0, 1)
    assert len(kit.told) == 1
    assert "cannot be delivered and is kept as" in kit.told[0]
    assert "failed validation" in kit.told[0]


def test_an_entry_that_lacks_something_is_put_aside(kit: Any, records: Any) -> None:
    kit.store.spool.put("label", {"label": {"key": "k"}, "run": ""})
    kit.store.save_run(records.run("r"))
    assert kit.there.load_run("r") is not None
    assert (kit.store.waiting, kit.store.spool.count_aside()) == (0, 1)
    assert "a Label lacks structure" in kit.told[0]


def test_a_label_of_an_earlier_al_loop_is_read(kit: Any, records: Any) -> None:
    from alcore.plain import to_plain

    plain = to_plain(records.label())
    for name in ("stress", "magnetic_moments", "reason", "folder", "reused", "details"):
        del plain[name]
    kit.store.spool.put("label", {"label": plain | {"gone": 1}, "run": "r"})
    assert list(kit.store.load_labels([plain["key"]])) == [plain["key"]]


def test_a_run_that_went_on_elsewhere_is_not_mixed(kit: Any, records: Any, wait: Any) -> None:
    """One machine is cut off and dies; the run goes on on another; later the first comes back with what it had."""
    first = (Sitting(started="2026-01-01"),)
    kit.store.save_run(records.run("r", sittings=first))
    kit.relay.cut()
    kit.store.save_generation(records.generation("r", 0, 0.5))
    kit.store.save_run(records.run("r", sittings=first, status="failed"))
    kit.there.save_run(records.run("r", sittings=(*first, Sitting(started="2026-01-02")), status="converged"))
    kit.there.save_generation(records.generation("r", 0, 0.001, sitting=1))
    kit.relay.mend()
    assert wait(lambda: kit.store.waiting == 0)
    assert kit.there.load_run("r").status == "converged"
    assert kit.there.load_generations("r")[0].paths[0].error_to_verified_ev == 0.001
    assert kit.store.spool.count_aside() == 2
    assert any("has gone on without it" in line for line in kit.told)


def test_a_write_that_is_refused_after_an_outage_holds_up_nobody(kit: Any, records: Any, wait: Any) -> None:
    kit.there._database.command("collMod", "generations", validator={"index": {"$ne": 1}})
    kit.store.save_run(records.run("r"))
    kit.relay.cut()
    for index in range(3):
        kit.store.save_generation(records.generation("r", index))
    kit.relay.mend()
    assert wait(lambda: kit.store.waiting == 0)
    assert [record.index for record in kit.there.load_generations("r")] == [0, 2]
    assert kit.store.spool.count_aside() == 1


def doubtful(*arguments: Any) -> None:
    error = store_error(cause := OperationFailure("WiredTigerIdIndex::insert", 1), "host:1")
    raise error from cause


def test_an_error_that_mostly_passes_is_tried_again_but_not_for_ever(
    kit: Any, records: Any, wait: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(courier, "DOUBTED_TIMES", 3)
    monkeypatch.setattr(courier, "ASKED_TIMES", 2)
    kit.store.save_run(records.run("r"))
    with monkeypatch.context() as patch:
        patch.setattr(kit.store.mongo, "save_label", doubtful)
        kit.store.save_label(records.label())
        assert (kit.store.waiting, kit.store.spool.count_aside()) == (1, 0)
        kit.store.save_run(records.run("r", reason="later"))
        assert wait(lambda: kit.store.waiting == 0)
    assert kit.there.load_run("r").reason == "later"
    assert kit.store.spool.count_aside() == 1
    assert any("cannot be delivered and is kept as" in line for line in kit.told)
    with monkeypatch.context() as patch:
        patch.setattr(kit.store.mongo, "load_run", doubtful)
        with pytest.raises(StoreError, match="WiredTigerIdIndex"):
            kit.store.load_run("r")


@pytest.mark.parametrize("then", ["removed", "made anew"])
def test_nothing_comes_late_to_a_run_that_was_removed(then: str, kit: Any, records: Any, wait: Any) -> None:
    """By ``gc --run``, on a machine that does not know of the other's spool."""
    sittings = (Sitting(started="2026-01-01", host="a"),)
    kit.store.save_run(records.run("r", sittings=sittings))
    kit.relay.cut()
    kit.store.save_run(records.run("r", sittings=sittings, status="failed", finished="2026-01-02"))
    if then == "removed":
        kit.store.save_generation(records.generation("r", 0))
        kit.store.save_step("r", 1, "probe/hop", {"x": 1})
    kit.there.delete_run("r")
    if then == "made anew":
        kit.there.save_run(records.run("r", sittings=(Sitting(started="2026-01-01", host="b"),)))
    kit.relay.mend()
    assert wait(lambda: kit.store.waiting == 0)
    if then == "removed":
        assert kit.there.list_runs() == []
        assert (kit.there.generation_indices("r"), kit.there.step_places("r")) == ([], [])
        assert kit.store.spool.count_aside() == 3
    else:
        assert kit.there.load_run("r").status == "running"
        assert kit.store.spool.count_aside() == 1


def test_a_file_that_the_disk_did_not_let_go_changes_nothing_when_it_comes_again(kit: Any, records: Any) -> None:
    begun = records.run("r", sittings=(Sitting(started="2026-01-01"),))
    ended = replace(begun, status="converged", finished="2026-01-02")
    for run in (begun, ended):
        kit.store.save_run(run)
    kit.store.save_run(begun)  # as its file would be delivered once more
    assert kit.there.load_run("r").status == "converged"
    assert (kit.store.waiting, kit.store.spool.count_aside()) == (0, 0)
    more = replace(begun, sittings=(*begun.sittings, Sitting(started="2026-01-03")))
    kit.store.save_run(more)
    assert kit.there.load_run("r").status == "running"


@pytest.mark.parametrize(
    ("error", "away"),
    [
        (AutoReconnect("connection closed"), True),
        (NetworkTimeout("timed out"), True),
        (NotPrimaryError("not primary", {}), True),
        (OperationFailure("shutting down", 91), True),
        (OperationFailure("interrupted", 11600), True),
        (OperationFailure("not primary", 10107), True),
        (OperationFailure("out of disk space", 14031), True),
        (OperationFailure("who knows", 8), True),
        (OperationFailure("28: No space left on device", 8), True),
        (OperationFailure("writes blocked", 371), True),
        (WTimeoutError("waited"), True),
        (OperationFailure("x", 0, {"errorLabels": ["TransientTransactionError"]}), True),
        (OperationFailure("Document failed validation", 121), False),
        (OperationFailure("bad value", 2), False),
        (OperationFailure("not allowed", 13), False),
    ],
)
def test_what_may_work_later(error: Any, away: bool) -> None:
    made = store_error(error, "host:1")
    assert isinstance(made, StoreUnreachableError) == away
    made.__cause__ = error
    assert refuses_content(made) == (not away and error.code != 13)


def test_a_user_whose_rights_are_gone_waits_too(kit: Any, records: Any, wait: Any) -> None:
    """It is not the entry's fault."""
    real = kit.store.mongo.save_label

    def refused(*arguments: Any) -> None:
        error = store_error(cause := OperationFailure("not authorized", 13), "host:1")
        raise error from cause

    kit.store.mongo.save_label = refused
    kit.store.save_label(records.label())
    assert (kit.store.waiting, kit.store.spool.count_aside()) == (1, 0)
    assert wait(lambda: "refuses this user" in "".join(kit.told))
    kit.store.mongo.save_label = real
    assert wait(lambda: kit.store.waiting == 0)
