"""How long the store takes to answer when it holds 100,000 labels and 10,000 generations.

    python tests/benchmarks/store_queries.py [--labels 100000] [--generations 10000] [--repeats 20]

Fills a database of its own on an embedded server of its own with realistic documents, asks each question of the README
and those behind ``al-loop status``, ``show`` and ``gc``, and prints milliseconds and the stages of each plan. Exits
with 1 if a plan scans a collection or a median is above 50 ms.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from mongoengine import Q, connect
from pymongo import MongoClient
from pymongo.database import Database

from alcore import types
from flows.status import run_labels
from storage import mapping, queries
from storage.documents import GenerationDocument, LabelDocument
from storage.mongod import ensure_mongod, stop_mongod
from storage.store import MongoStore

LIMIT_MS = 50.0
N_ATOMS, N_IMAGES = 32, 9
PER_RUN = 20
BATCH = 2000
RUNNING: Literal["running"] = "running"
DONE: Literal["converged"] = "converged"


def structures(rng: np.random.Generator) -> list[types.Structure]:
    """One each of many formulas."""
    made = []
    for k in range(100):
        numbers = np.array([29] * (N_ATOMS - 1 - k % 10) + [13 + k // 10] * (1 + k % 10))
        made.append(
            types.Structure(
                numbers=numbers,
                positions=rng.normal(size=(N_ATOMS, 3)),
                cell=8.0 * np.eye(3),
                pbc=np.array([True] * 3),
                fixed=np.zeros((N_ATOMS, 3), bool),
            )
        )
    return made


def key_of(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def labels(n: int, n_runs: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Documents; one in fifty failed."""
    templates = []
    for structure in structures(rng):
        forces = 0.1 * rng.normal(size=(N_ATOMS, 3))
        label = types.Label(
            key="",
            structure=structure,
            status="ok",
            fingerprint="f" * 64,
            calculator="emt",
            energy_ev=1.0,
            forces=forces,
        )
        templates.append(mapping.to_son(mapping.label_to_document(label)))
    calculators = ("emt", "vasp", "espresso", "gpaw")
    start = datetime(2026, 1, 1, tzinfo=UTC)
    for k in range(n):
        son = dict(templates[(k // PER_RUN) % len(templates)])
        son |= {"_id": key_of(k), "runs": [f"run-{k % n_runs}"], "created": start + timedelta(minutes=k)}
        son |= {"calculator": calculators[k % 4], "fmax_ev_per_ang": float(rng.exponential(0.05))}
        if k % 50 == 0:
            son = {name: value for name, value in son.items() if name not in ("energy_ev", "forces")}
            son |= {"status": "crashed", "reason": "SCF did not converge"}
        yield son


def generations(n_labels: int, n_runs: int, per_run: int, rng: np.random.Generator) -> Iterator[Any]:
    """Documents of generations and their bands."""
    (structure, *_) = structures(rng)
    shape = (N_IMAGES, N_ATOMS, 3)
    numbers: dict[str, Any] = dict.fromkeys(
        ("energies_ev", "sigma_committee_ev", "sigma_posterior_ev", "sigma_ev", "coordinate_ang"), np.zeros(N_IMAGES)
    )
    band = types.Band(
        path="hop",
        template=structure,
        positions=rng.normal(size=shape),
        forces=rng.normal(size=shape),
        status="converged",
        **numbers,
    )
    for run in range(n_runs):
        mine = [key_of(k) for k in range(run, n_labels, n_runs)]
        for index in range(per_run):
            keys = tuple(mine[: max(2, len(mine) * (index + 1) // per_run)])
            error = float(rng.normal(0, 0.4 / (1 + index)))
            barrier = types.BarrierEstimate(
                forward_ev=0.7 + error,
                reverse_ev=0.6,
                reaction_energy_ev=0.1,
                spline_forward_ev=0.7,
                sigma_ev=0.02,
                sigma_committee_ev=0.01,
                sigma_posterior_ev=0.01,
                saddle_image=4,
            )
            done = index == per_run - 1
            decision = types.Decision(stop=done, code="converged" if done else "continue", reason="as predicted" * 5)
            path = types.PathRecord(
                path="hop",
                initial=structure,
                final=structure,
                band=band,
                barrier=barrier,
                label_keys=keys[-2:],
                verified_barrier_ev=0.7,
                error_to_verified_ev=error,
                barrier_std_ev=0.01,
                decision=decision,
            )
            record = types.GenerationRecord(
                run=f"run-{run}",
                index=index,
                paths=(path,),
                label_keys=keys,
                kinds=dict.fromkeys(keys, "saddle"),
                n_reference_calls=len(keys),
                decision=decision,
                surrogate={"strategy": "naive", "members": [key_of(-run * per_run - index)]},
            )
            yield mapping.generation_to_documents(record)


def fill(store: MongoStore, database: Database[Any], n_labels: int, n_generations: int) -> int:
    """Straight into the collections; the number of runs."""
    rng, n_runs = np.random.default_rng(0), max(1, n_generations // PER_RUN)
    made = labels(n_labels, n_runs, rng)
    while batch := list(islice(made, BATCH)):
        database["labels"].insert_many(batch, ordered=False)
    counts = {"crashed": 4, "ok": n_labels // n_runs - 4}
    both = generations(n_labels, n_runs, PER_RUN, rng)
    while rows := list(islice(both, 500)):
        sons = [mapping.to_son(generation) | {"labels_by_status": counts} for generation, _ in rows]
        database["generations"].insert_many(sons, ordered=False)
        database["bands"].insert_many([mapping.to_son(band) for _, bands in rows for band in bands], ordered=False)
    for run in range(n_runs):
        name, status = f"run-{run}", RUNNING if run == 0 else DONE
        store.save_run(
            types.RunRecord(
                name=name, settings={"seed": run}, settings_sha256="0", status=status, started=f"2026-{run:05d}"
            )
        )
    return n_runs


def questions(store: MongoStore, n_runs: int) -> dict[str, Callable[[], Any]]:
    """Each by the name it has in the table."""
    one = f"run-{n_runs // 2}"
    records = store.load_generations(one)
    off = Q(paths__error_to_verified_ev__gt=0.01) | Q(paths__error_to_verified_ev__lt=-0.01)
    forces = {"formula": "Al5Cu27", "calculator": "emt", "fmax_ev_per_ang__gt": 0.05}

    def barriers() -> Any:
        rows = GenerationDocument.objects(run=one).order_by("index")
        return [(g.index, g.dataset_size, p.barrier.forward_ev, p.error_to_verified_ev) for g in rows for p in g.paths]

    return {
        "README: barrier and error of a run": barriers,
        "README: labels of a formula, large forces": lambda: list(LabelDocument.objects(**forces)),
        "README: runs more than 10 meV off": lambda: GenerationDocument.objects(off).distinct("run"),
        "status: all runs": store.run_rows,
        "status: one run": lambda: store.run_rows(one),
        "show: run, generations and bands": lambda: (store.load_run(one), store.load_generations(one)),
        "show: its labels": lambda: run_labels(store, records),
        "loop: is a label known": lambda: store.load_labels([key_of(5), "0" * 64]),
        "gc: are a folder's labels stored": lambda: store.ask(
            lambda d: queries.settled_labels(d, one, [key_of(5)[:16]])
        ),
        "labels of a run by status": lambda: store.count_labels_by_status(one),
    }


def stages(plan: Any) -> set[str]:
    """Every stage anywhere in an explained plan."""
    if isinstance(plan, dict):
        own = {plan["stage"]} if isinstance(plan.get("stage"), str) else set()
        return own.union(*(stages(v) for k, v in plan.items() if k != "rejectedPlans"))
    return set().union(*(stages(item) for item in plan)) if isinstance(plan, list) else set()


def plans(database: Database[Any], ask: Callable[[], Any]) -> set[str]:
    """Stages of the plans of all that ``ask`` asks, by the server's profiler."""
    database.command("profile", 2)
    try:
        ask()
    finally:
        database.command("profile", 0)
    found = {
        entry.get("planSummary", "") for entry in database["system.profile"].find({"op": {"$in": ["query", "command"]}})
    }
    database.drop_collection("system.profile")
    return {summary.split(" ")[0] for summary in found if summary}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--labels", type=int, default=100_000)
    parser.add_argument("--generations", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--folder", type=Path, help="keeps the database there, and finds it there again")
    given = parser.parse_args()
    bad = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        uri = ensure_mongod(folder)
        store = MongoStore(uri)
        try:
            database = MongoClient[Any](uri)["al_loop"]
            began = time.perf_counter()
            n_runs = len(store.list_runs()) or fill(store, database, given.labels, given.generations)
            print(f"{n_runs} runs, filled in {time.perf_counter() - began:.0f} s")
            connect("al_loop", host=uri, uuidRepresentation="standard")
            print(f"{'':44s}{'median ms':>10s}{'worst ms':>10s}{'rows':>7s}  plans")
            for name, ask in questions(store, n_runs).items():
                answer, times = ask(), []
                for _ in range(given.repeats):
                    began = time.perf_counter()
                    ask()
                    times.append(1000 * (time.perf_counter() - began))
                used, median = plans(database, ask), statistics.median(times)
                ok = median <= LIMIT_MS and not (used & {"COLLSCAN"} and name != "status: all runs")
                bad += not ok
                said = "" if ok else "  <--"
                size = len(answer) if hasattr(answer, "__len__") else 1
                print(f"{name:44s}{median:10.1f}{max(times):10.1f}{size:7d}  {' '.join(sorted(used))}{said}")
        finally:
            store.close()
            stop_mongod(folder)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
