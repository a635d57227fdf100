"""The same with real servers that are killed or hang, disks that are full, and outages at any moment."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pymongo import MongoClient

from alcore.errors import InputError, StoreUnreachableError
from alcore.identity import sha256_hex
from storage.durable import DurableStore, open_durable_store, spool_folder
from storage.mongod import ensure_mongod, mongod_status, stop_mongod
from storage.spool import Spool
from storage.store import MongoStore

PATIENCE_S = 60.0

# real servers in real trouble


@pytest.fixture
def own(quick: None, own_server: Path) -> Iterator[SimpleNamespace]:
    """The durable store of an embedded server of this test's own."""
    told: list[str] = []
    store = open_durable_store(None, own_server, log=told.append)

    def pid() -> int:
        return mongod_status(own_server).pid or 0

    def client() -> MongoClient[Any]:
        return MongoClient(mongod_status(own_server).uri)

    yield SimpleNamespace(store=store, told=told, folder=own_server, pid=pid, client=client)
    with suppress(psutil.Error):
        psutil.Process(pid()).resume()
    store.close()


def test_the_embedded_server_is_started_again(own: Any, records: Any) -> None:
    own.store.save_run(records.run("r"))
    own.store.save_generation(records.generation("r", 0))
    for index in (1, 2):
        before = own.pid()
        os.kill(before, signal.SIGKILL)
        own.store.save_generation(records.generation("r", index))
        assert [record.index for record in own.store.load_generations("r")] == list(range(index + 1))
        assert own.pid() not in (0, before)
    assert any("was started again" in line for line in own.told)


def test_a_server_that_was_stopped_on_purpose_is_waited_for(own: Any, records: Any, wait: Any) -> None:
    stop_mongod(own.folder)
    own.store.save_run(records.run("r"))
    assert wait(lambda: any("stopped on purpose" in line for line in own.told))
    assert not mongod_status(own.folder).running
    ensure_mongod(own.folder)
    assert own.store.load_run("r") is not None


def test_closing_starts_no_server(own: Any, records: Any, freeze: Any) -> None:
    freeze(own.pid())
    own.store.stop_waiting()
    own.store.save_run(records.run("r"))
    own.store._courier._closed.set()
    server = psutil.Process(own.pid())
    server.kill()
    server.wait(30)
    own.store.close()
    assert not mongod_status(own.folder).running
    assert own.told[-1].startswith("1 write waits on disk")


def test_a_server_that_hangs_holds_up_no_write(own: Any, records: Any, freeze: Any) -> None:
    own.store.save_run(records.run("r"))
    freeze(own.pid())
    for index in range(3):
        own.store.save_generation(records.generation("r", index))
    assert own.store.waiting == 3
    assert "does not answer" in own.told[0]
    with pytest.raises(StoreUnreachableError):
        own.store.renew_lease("a", "me", 60)
    os.kill(own.pid(), signal.SIGCONT)
    assert [record.index for record in own.store.load_generations("r")] == [0, 1, 2]
    assert own.store.waiting == 0


def test_a_server_whose_writes_hang_while_it_answers(own: Any, records: Any) -> None:
    with own.client() as client:
        client.admin.command("fsync", lock=True)
        own.store.save_label(records.label(1))
        own.store.save_label(records.label(2))
        assert own.store.waiting == 2
        client.admin.command("fsyncUnlock")
    assert len(own.store.load_labels([records.label(1).key, records.label(2).key])) == 2


def test_a_server_that_takes_no_writes_for_a_while(own: Any, records: Any, wait: Any) -> None:
    with own.client() as client:
        client.admin.command("replSetStepDown", 3, force=True)
    own.store.save_label(records.label())
    assert own.store.waiting == 1
    assert wait(lambda: own.store.waiting == 0)
    assert len(own.store.load_labels([records.label().key])) == 1


def test_the_embedded_database_has_one_spool_however_it_is_named(own: Any) -> None:
    uri = mongod_status(own.folder).uri
    assert spool_folder(uri, own.folder) == spool_folder(None, own.folder) == own.store.spool.folder
    port = mongod_status(own.folder).port
    others = {spool_folder(u, own.folder) for u in (f"mongodb://127.0.0.1:{(port or 0) + 1}", "mongodb://a,b/?x=y")}
    assert own.store.spool.folder not in others
    assert len(others) == 2
    assert spool_folder(uri.replace("127.0.0.1", "localhost"), own.folder) == own.store.spool.folder
    hosts = {spool_folder(f"mongodb://{host}/", own.folder) for host in ("localhost", "127.0.0.1:27017")}
    assert len(hosts) == 1, "the same machine"
    secret = spool_folder("mongodb://ann:s3cret@db.example:27017/?authSource=x", own.folder)
    assert "s3cret" not in str(secret)
    assert "ann" not in secret.name
    assert secret == spool_folder("mongodb://eve@db.example", own.folder), "the place counts, not who asks"


# disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"mounting is not permitted here: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def on_small_disk(kit: Any, small_disk: Path) -> Iterator[SimpleNamespace]:
    mongo = MongoStore(kit.relay.uri, kit.there._database.name)
    store = DurableStore(mongo, Spool(small_disk / "spool", kit.told.append), log=kit.told.append)
    yield SimpleNamespace(**vars(kit) | {"store": store, "disk": small_disk})
    kit.relay.mend()
    store.close()


def fill(disk: Path) -> None:
    with suppress(OSError), (disk / "filler").open("wb") as stream:
        while True:
            stream.write(bytes(4096))
            stream.flush()


def test_with_the_disk_full_the_database_takes_it(on_small_disk: Any, records: Any) -> None:
    kit = on_small_disk
    kit.store.save_run(records.run("r"))
    fill(kit.disk)
    kit.store.save_run(records.run("r", status="converged"))
    kit.store.save_label(records.label())
    assert kit.there.load_run("r").status == "converged"
    assert len(kit.told) == 1
    assert "cannot be written (No space left on device)" in kit.told[0]


@pytest.mark.parametrize("helped_by", ["disk", "database"])
def test_with_disk_and_database_gone_it_waits_for_either(
    on_small_disk: Any, records: Any, helped_by: str, wait: Any
) -> None:
    kit = on_small_disk
    kit.relay.cut()
    kit.store.save_run(records.run("r"))
    fill(kit.disk)
    writer = threading.Thread(target=lambda: kit.store.save_run(records.run("r", status="converged")))
    writer.start()
    assert wait(lambda: any("a run waits in memory" in line for line in kit.told))
    assert writer.is_alive()
    if helped_by == "disk":
        (kit.disk / "filler").unlink()
    else:
        kit.relay.mend()
    writer.join(PATIENCE_S)
    assert not writer.is_alive()
    if helped_by == "disk":
        assert kit.store.waiting == 2
    kit.relay.mend()
    assert wait(lambda: kit.store.waiting == 0)
    assert kit.there.load_run("r").status == "converged"


def test_a_disk_that_became_read_only_delivers_and_is_not_asked_twice(
    on_small_disk: Any, records: Any, wait: Any
) -> None:
    kit = on_small_disk
    kit.relay.cut()
    kit.store.save_run(records.run("r"))
    subprocess.run(["mount", "-o", "remount,ro", str(kit.disk)], check=True)
    kit.relay.mend()
    assert wait(lambda: kit.there.load_run("r") is not None)
    calls: list[Any] = []
    real = kit.store.mongo.save_run
    kit.store.mongo.save_run = lambda run: (calls.append(run.status), real(run))
    kit.store.save_run(records.run("r", status="converged"))
    assert calls == ["converged"], "the entry that cannot be removed is not delivered again over it"
    assert kit.there.load_run("r").status == "converged"
    kit.store.close()
    assert not [line for line in kit.told if "wait" in line and "on disk in" in line and "next al-loop" in line]


def test_a_data_folder_that_cannot_be_written_is_one_line(embedded_uri: str, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for uri in (None, embedded_uri):
        with pytest.raises(InputError, match="Read-only file system") as caught:
            open_durable_store(uri, small_disk)
        assert "\n" not in str(caught.value)


# any order

DEEDS = st.one_of(
    st.tuples(st.just("run"), st.sampled_from(["running", "failed", "converged"])),
    st.tuples(st.just("label"), st.tuples(st.integers(0, 2), st.sampled_from(["ok", "crashed", "timeout"]))),
    st.tuples(st.just("generation"), st.integers(0, 2)),
    st.tuples(st.just("step"), st.tuples(st.integers(0, 2), st.integers(0, 3))),
    st.tuples(st.just("forget"), st.integers(0, 2)),
    st.tuples(st.just("model"), st.binary(max_size=3)),
    st.tuples(st.sampled_from(["cut", "mend", "restart"]), st.none()),
)


def write(store: Any, deed: str, value: Any, records: Any) -> None:
    match deed:
        case "run":
            store.save_run(records.run("r", status=value))
        case "label":
            store.save_label(records.label(*value), "r")
        case "generation":
            store.save_generation(records.generation("r", value))
        case "step":
            store.save_step("r", value[0], "probe", {"n": value[1]})
        case "forget":
            store.forget_steps("r", value)
        case "model":
            assert store.save_model(value, {"size": len(value)}) == sha256_hex(value)


def content(store: MongoStore) -> dict[str, Any]:
    """Everything in the database that does not depend on when it came there."""
    database, found = store._database, {}
    for name in ("runs", "generations", "bands", "labels", "steps", "models"):
        rows = [dict(row) for row in database[name].find()]
        for row in rows:
            for key in ("created", "used", "file", "_id")[: 3 if name in ("runs", "labels", "models") else 4]:
                row.pop(key, None)
        found[name] = sorted(rows, key=repr)
    return found


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=[Phase.explicit, Phase.generate],
)
@given(deeds=st.lists(DEEDS, max_size=14))
def test_any_writes_with_outages_in_between_end_as_without(
    deeds: list[tuple[str, Any]], kit: Any, plain: MongoStore, records: Any
) -> None:
    for name in ("runs", "generations", "bands", "labels", "steps", "models"):
        for each in (plain, kit.there):
            each._database[name].delete_many({})
    for each in (plain, kit.there):
        each.save_run(records.run("r"))
    store = kit.make()
    try:
        for deed, value in deeds:
            match deed:
                case "cut":
                    kit.relay.cut()
                case "mend":
                    kit.relay.mend()
                case "restart":
                    store.close()
                    kit.relay.mend()
                    store = kit.make()
                case _:
                    write(store, deed, value, records)
                    write(plain, deed, value, records)
        kit.relay.mend()
        store.load_run("r")
        assert store.waiting == 0
        assert content(kit.there) == content(plain)
    finally:
        kit.relay.mend()
        store.close()


def test_two_processes_worth_of_stores_share_a_spool(kit: Any, records: Any, wait: Any) -> None:
    stores = [kit.make(), kit.make()]
    done = threading.Event()

    def trouble() -> None:
        while not done.wait(0.3):
            (kit.relay.cut if kit.relay.open else kit.relay.mend)()

    def work(k: int) -> None:
        for n in range(25):
            stores[k].save_label(records.label(100 * k + n), f"run{k}")
            status = "converged" if n == 24 else "running"
            stores[k].save_run(dataclasses.replace(records.run(f"run{k}", status=status), reason=str(n)))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    troubled = threading.Thread(target=trouble)
    for thread in [*threads, troubled]:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    troubled.join()
    kit.relay.mend()
    for k in range(2):
        run = stores[k].load_run(f"run{k}")
        assert (run.status, run.reason) == ("converged", "24")
        assert kit.there.count_labels_by_status(f"run{k}") == {"ok": 25}
    assert (stores[0].waiting, stores[0].spool.count_aside()) == (0, 0)


def test_it_costs_little(kit: Any, records: Any) -> None:
    """Printed with ``-s``: a label in the database, with and without the spool."""

    def seconds(store: Any, first: int) -> float:
        labels = [records.label(first + n) for n in range(50)]
        began = time.perf_counter()
        for label in labels:
            store.save_label(label, "r")
        return (time.perf_counter() - began) / 50

    durable, plain = seconds(kit.store, 0), seconds(kit.there, 100)
    print(f"\na label: {1e3 * plain:.1f} ms without, {1e3 * durable:.1f} ms with the spool")
    assert durable < 0.5 + plain


def test_ensure_mongod_is_what_revives(own: Any, wait: Any, freeze: Any) -> None:
    """A server that hangs is not started a second time beside itself."""
    before = own.pid()
    freeze(before)
    own.store.release_lease("a", "me")
    assert wait(lambda: own.told)
    time.sleep(1.0)
    os.kill(before, signal.SIGCONT)
    assert own.store.list_runs() == []
    assert own.pid() == before
    assert ensure_mongod(own.folder) == mongod_status(own.folder).uri
