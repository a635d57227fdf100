"""What a run file from somebody else may not do, and what is never written down."""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from ase.io import read
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from typer.testing import CliRunner, Result

from alcore.errors import CalculatorError, InputError, ModelError
from alcore.files import read_file
from alcore.identity import sha256_hex
from alcore.mace.models import build_model
from calculators.registry import resolve
from flows import processes, wiring
from flows.cli import app
from flows.label import read_job
from flows.runfile import load_run_file, resolve_settings
from flows.services import WORKER_MARK
from flows.settings import ModelSettings, PathSettings, checked_name
from storage.mongod import ensure_mongod, find_mongod

Shell = Callable[..., subprocess.CompletedProcess[str]]
SECRET = "s3cret-word"
BAD_NAMES = (
    "../up", "..", ".", ".hidden", "-rf", "--help=x", "/tmp/x", "a/b", "a\\b", "a\0b", "a\nb", "a b", "", "ünï",
    "a\u2025", "\uff0e\uff0e\uff0fup", "\u202ename", "a" * 121, "$(id)", "a;b", "~root", "a%2fb",
)  # fmt: skip


def al_loop(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "160"})


# --- names ------------------------------------------------------------------------------------------------------------


@given(st.text(max_size=140) | st.from_regex(r"[./~\w-]{1,12}") | st.sampled_from(BAD_NAMES))
def test_a_name_that_is_taken_is_one_folder_below_where_it_is_put(name: str) -> None:
    try:
        taken = checked_name(name) == name
    except InputError as error:
        taken, said = False, str(error)
    if taken:
        place = Path("/data/calculations")
        assert Path(os.path.normpath(place / name)).parent == place
        assert name.isascii()
        assert not name.startswith(("-", "."))
        assert wiring.run_folder(Path("/data"), name) == place / name
    else:
        assert "\n" not in said
        assert len(said) < 300
    try:
        PathSettings(name=name, initial="a", final="b")
    except ValidationError:
        assert not taken
    else:
        assert taken


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_bad_name_is_one_line_wherever_it_stands(name: str, hop: Any) -> None:
    for arguments in (("show",), ("report",), ("export",), ("status",), ("cancel",)):
        result = al_loop(*arguments, "--", name)
        assert result.exit_code == 2, (arguments, result.output)
        assert result.stderr.count("\n") == 1, result.stderr
    file = hop.run_file("named")
    for key in ("name", "paths.0.name"):
        result = al_loop("check", file, "--set", f"{key}={json.dumps(name)}")
        assert result.exit_code == 2
        assert result.stderr.count("\n") == 1, result.stderr
    with pytest.raises(InputError, match="name"):
        resolve_settings(str(file), None, name)


def test_a_link_out_of_the_data_folder_is_not_followed(tmp_path: Path) -> None:
    """One to a larger disk, of all calculations, is the user's own choice."""
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    (data / "calculations").mkdir(parents=True)
    elsewhere.mkdir()
    (data / "calculations" / "hop").symlink_to(elsewhere)
    with pytest.raises(InputError, match=r"calculations/hop: is a link that leads out of the data folder"):
        wiring.run_folder(data, "hop")
    (data / "calculations" / "hop").unlink()
    (data / "calculations").rmdir()
    (data / "calculations").symlink_to(elsewhere)
    assert wiring.run_folder(data, "hop") == data / "calculations" / "hop"


# --- files that carry code --------------------------------------------------------------------------------------------


class Evil:
    def __init__(self, target: Path) -> None:
        self._target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (eval, (f"open({str(self._target)!r}, 'w')",))


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "it-ran"
    pickle.loads(pickle.dumps(Evil(path)))
    assert path.exists(), "the pickle does nothing, so these tests see nothing"
    path.unlink()
    yield path
    assert not path.exists(), "code in the file was run"


FILES = (
    "x.traj",
    "x.pckl",
    "x.pickle",
    "x.py",
    "x.bundle",
    "x.db",
    "x.json",
    "x.gpw",
    "x.extxyz",
    "x.npy",
    "x.npz",
    "x",
)


@pytest.mark.parametrize("name", FILES)
def test_no_file_of_structures_runs_code(name: str, target: Path, tmp_path: Path, hop: Any, home: Path) -> None:
    evil = pickle.dumps(Evil(target), protocol=2)
    file = tmp_path / name
    if name.endswith(("npy", "npz")):
        save = np.save if name.endswith("npy") else np.savez
        save(file, np.array([Evil(target)], dtype=object), allow_pickle=True)
    elif name.endswith("py"):
        file.write_text(f"open({str(target)!r}, 'w')\n")
    else:
        file.write_bytes((b"PickleTrajectory" if name.endswith("traj") else b"") + evil)
    with pytest.raises(InputError):
        read_file(file, "data.0", ":")
    run_file = hop.run_file("gift", data=[str(file)], paths=[{"initial": str(file), "final": "final.extxyz"}])
    result = al_loop("check", run_file)
    assert result.exit_code == 2
    assert [line.count(name) > 0 for line in result.stderr.splitlines()] == [True, True], result.stderr
    assert al_loop("label", file, "--calculator", "emt").exit_code == 2


def test_a_malicious_model_file_is_one_line_wherever_it_is_named(target: Path, hop: Any, home: Path) -> None:
    file = hop.folder / "gift.model"
    torch.save(Evil(target), file)
    digest = sha256_hex(file.read_bytes())
    for change in (
        {"model": {"foundation": "gift.model"}},
        {"calculator": {"name": "mace", "settings": {"model": "gift.model"}}},
    ):
        for verb in (("check",), ("run", "--no-server")):
            result = al_loop(*verb, hop.run_file("gift", **change))
            assert result.exit_code == 2, result.output
            assert result.stderr.count("\n") == 1, result.stderr
            for word in ("gift.model", digest, "running the code inside it", "sha256 to that"):
                assert word in result.stderr, result.stderr
    assert hop.calls("gift") == 0


def test_a_model_that_somebody_vouches_for_is_loaded_with_a_warning(hop: Any, home: Path) -> None:
    """By the run file, by the data folder's list, or in the calculator's settings."""
    model = build_model([29], 0)
    model.souvenir = torch.nn.Linear(1, 1).double()
    torch.save(model, hop.folder / "odd.model")
    digest = sha256_hex((hop.folder / "odd.model").read_bytes())
    file = hop.run_file("odd", model={"foundation": "odd.model"})
    assert f"its sha256 is {digest}" in al_loop("check", file).stderr
    listed = home / wiring.TRUSTED_MODELS
    listed.write_text(f"{digest}  by me\n")
    try:
        with pytest.warns(UserWarning, match=rf"odd\.model is loaded by running the code inside it.*{digest}"):
            assert al_loop("check", file).exit_code == 0
    finally:
        listed.unlink()
    odd = ModelSettings(foundation=str(hop.folder / "odd.model"), foundation_sha256=digest, device="cpu")
    with pytest.warns(UserWarning, match="running the code inside it"):
        wiring.make_prior(odd, [29], 0)
    with pytest.raises(ModelError, match="not the one given"):
        wiring.make_prior(odd.model_copy(update={"foundation_sha256": "0" * 64}), [29], 0)
    with pytest.warns(UserWarning, match="running the code inside it"):
        resolve("mace", {"model": odd.foundation, "sha256": digest}).check_available()
    with pytest.raises(CalculatorError, match=r"calculator\.settings\.sha256"):
        resolve("mace", {"model": odd.foundation}).check_available()
    teacher = hop.run_file("taught", calculator={"name": "mace", "settings": {"model": "odd.model"}})
    assert "calculator.settings.sha256" in al_loop("check", teacher).stderr
    listed.write_text(f"{digest}  by me\n")
    try:
        result = al_loop("check", teacher)
        assert result.exit_code == 0, result.output
        job = read_job(hop.folder / "initial.extxyz", None, like=teacher, out=hop.folder / "labelled.extxyz")
        assert job.resolved.fingerprint[:12] in result.stdout, "trusted or not, it is the same reference"
    finally:
        listed.unlink()


# --- passwords --------------------------------------------------------------------------------------------------------


def test_a_password_does_not_pass_the_form_of_a_deployment(hop: Any) -> None:
    """Prefect checks parameters by their schema before it stores them; a run file may hold one."""
    from prefect.utilities.schema_tools.validation import ValidationError as Refused
    from prefect.utilities.schema_tools.validation import validate

    from flows.al_loop import al_loop as flow

    schema = flow.parameters.model_dump()
    for address, taken in (
        (f"mongodb://me:{SECRET}@h/", False),
        (f"mongodb+srv://{SECRET}@h/", False),
        ("mongodb://h:1/", True),
        (None, True),
    ):
        file = hop.run_file("form", store={"mongodb_uri": address})
        settings = load_run_file(file).model_dump(mode="json")
        assert settings["store"]["mongodb_uri"] == address
        with nullcontext() if taken else pytest.raises(Refused):
            validate({"settings": settings}, schema, raise_on_error=True, ignore_required=True)


def test_a_password_is_no_parameter_of_a_deployment() -> None:
    settings = {"name": "x", "store": {"mongodb_uri": f"mongodb://me:{SECRET}@h/"}}
    with pytest.raises(InputError, match="Prefect stores parameters") as caught:
        resolve_settings(None, settings)
    assert SECRET not in str(caught.value)


@pytest.fixture
def guarded_uri(tmp_path: Path) -> Iterator[str]:
    """A MongoDB of the user's that wants a password."""
    from pymongo import MongoClient

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path / "guarded"
    folder.mkdir()
    words = [find_mongod(), "--auth", "--fork", "--nounixsocket", "--bind_ip", "127.0.0.1", "--port", port]
    words += ["--dbpath", folder, "--logpath", folder / "log"]
    subprocess.run([str(word) for word in words], check=True, stdout=subprocess.DEVNULL)
    process = psutil.Process(int((folder / "mongod.lock").read_text()))
    with MongoClient("127.0.0.1", port) as client:
        client.admin.command("createUser", "me", pwd=SECRET, roles=["root"])
    yield f"mongodb://me:{SECRET}@127.0.0.1:{port}/"
    process.terminate()
    process.wait(30)


def ours(home: Path) -> list[psutil.Process]:
    """Every service of a data folder, and what it started."""
    found = {p.pid: p for p in processes.with_variable("PREFECT_HOME", str(home / "prefect"))}
    found |= {p.pid: p for p in processes.with_variable(WORKER_MARK, str(home))}
    for process in psutil.process_iter(["cmdline"]):
        if str(home / "mongodb" / "db") in (process.info["cmdline"] or []):
            found[process.pid] = process
    return list(found.values())


@pytest.mark.slow
def test_the_services_listen_on_the_loopback_alone_and_keep_no_password(
    shell: Shell, hop: Any, guarded_uri: str, tmp_path: Path
) -> None:
    """The real deployment, its database named once by the environment and once by a run file."""
    from pymongo import MongoClient

    home = tmp_path / "home"
    env = {"AL_LOOP_HOME": str(home), "PREFECT_HOME": str(tmp_path / "prefect")}
    small = {"stop": {"max_generations": 1, "max_labels": 2}}
    by_env = hop.run_file("by-env", **small)
    by_file = hop.run_file("by-file", **small, store={"mongodb_uri": guarded_uri})
    said, arguments, listening = [], set(), set()

    def call(*words: str, **more: str) -> None:
        done = shell(*words, **env, **more)
        said.append(done.stdout + done.stderr)
        assert done.returncode == 0, said[-1]

    def look() -> None:
        for process in ours(home):
            try:
                arguments.add(" ".join(process.cmdline()))
                listening.update(c.laddr.ip for c in process.net_connections() if c.status == psutil.CONN_LISTEN)
            except psutil.Error:
                continue

    call("-m", "flows.cli", "up", AL_LOOP_MONGODB_URI=guarded_uri)
    ensure_mongod(home)  # as another run without that variable would
    try:
        with MongoClient(guarded_uri) as client:
            for file, name in ((by_env, "by-env"), (by_file, "by-file")):
                call("prefect", "deployment", "run", "al-loop", "-p", f"config={file}")
                until = time.monotonic() + 120
                while time.monotonic() < until:
                    look()
                    run = client.al_loop.runs.find_one({"_id": name})
                    if run is not None and run["status"] != "running":
                        break
                    time.sleep(0.2)
                assert run is not None, f"{name} never came to the database"
                assert run["status"] == "budget_spent"
            database = client.al_loop
            stored = [str(d) for name in database.list_collection_names() for d in database[name].find()]
        call("-m", "flows.cli", "down")
    finally:
        shell("-m", "flows.cli", "down", **env)
    assert listening == {"127.0.0.1"}
    assert len(arguments) > 3
    files = [file for file in [*home.rglob("*"), *(tmp_path / "prefect").rglob("*")] if file.is_file()]
    assert {"services.json", "prefect.db", "prefect-worker.log"} <= {file.name for file in files}
    leaks = [str(file) for file in files if SECRET.encode() in file.read_bytes()]
    leaks += [text for text in [*said, *stored, *arguments] if SECRET in text]
    assert not leaks


def test_what_al_loop_makes_is_for_its_user_alone(tmp_path: Path) -> None:
    home = tmp_path / "deep" / "home"
    code = (
        "import os, pathlib, sys; os.umask(0)\nfrom flows import services\n"
        "with services._locked(pathlib.Path(sys.argv[1])): pass"
    )
    subprocess.run([sys.executable, "-c", code, str(home)], check=True, timeout=60)
    assert home.stat().st_mode & 0o777 == 0o700


def test_structures_of_a_user_are_still_read(hop: Any) -> None:
    assert len(read_file(hop.folder / "initial.extxyz", "x")) == len(read(hop.folder / "initial.extxyz"))
