"""The crash test: kills a run at random moments, over and over, and counts what was lost and what was done twice.

    python tests/crash/campaign.py --kills 100 --seed 0

First a run is left alone. Then the same run is made again in a fresh data folder and killed some times on the way to
its end, until there were so many kills. Exit 0: nothing was lost, nothing done twice, the results are the same.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

from book import Book, differences, result  # noqa: E402
from ledger import Calculation, Counts, Survey, count, read  # noqa: E402
from plans import Pace, Plan, draw, wait_for  # noqa: E402
from users import Deployed, Foreground, User  # noqa: E402
from world import World, kill  # noqa: E402

from storage.mongod import ensure_mongod  # noqa: E402

STUCK_FACTOR, STUCK_MIN_S = 8.0, 180.0
"""A run that takes so many times longer than the one left alone, or so long, is stuck."""
ENDS_WITHIN_S = 5.0
"""What belongs to a run is gone so soon after it."""


@dataclass(kw_only=True)
class Tally:
    """Over all rounds: what happened, and everything that must not have.

    Attributes:
        kills: target -> how often.
        aims: phase -> how often.
        flying: calculations in flight at the kills that could have cut them off.
        survived, died: kills after which the same process went on, or had to be started again.
        gave_up: how often a run ended with an error later on, as one may whose services are gone.
        looks: how often the status was asked for.
        left_leases: leases of dead processes that had not run out at the end of a run.
        wrong: sentences, one a thing that must not happen.
    """

    counts: Counts = field(default_factory=Counts)
    kills: Counter[str] = field(default_factory=Counter)
    aims: Counter[str] = field(default_factory=Counter)
    signals: Counter[str] = field(default_factory=Counter)
    flying: int = 0
    survived: Counter[str] = field(default_factory=Counter)
    died: Counter[str] = field(default_factory=Counter)
    gave_up: int = 0
    looks: int = 0
    rounds: int = 0
    left_leases: int = 0
    wrong: list[str] = field(default_factory=list)


def leave_alone(folder: Path, label_s: float) -> tuple[Pace, dict[str, Any]]:
    """The run without a kill: how long things take, and what comes out."""
    world = World(folder, label_s)
    try:
        return _left_alone(world, label_s)
    finally:
        world.end()


def _left_alone(world: World, label_s: float) -> tuple[Pace, dict[str, Any]]:
    uri = ensure_mongod(world.home)
    user, book = Foreground(world), Book(world.home)
    began = time.monotonic()
    user.start()
    opened = 0.0
    while user.runs():
        if not opened and book.events().get("sittings"):
            opened = time.monotonic() - began
        time.sleep(0.02)
    total = time.monotonic() - began
    if not user.finished():
        raise RuntimeError(f"the run that was left alone failed, see {world.folder / 'said.txt'}")
    found = result(uri)
    book.close()
    user.leave()
    n_labels = sum(c.ended is not None for c in read(world.log))
    steps = max(total - opened - label_s * n_labels / 2, 1.0)
    return Pace(total=total, start_up=opened, step=steps / 8, label=label_s), found


class Round:
    """One run from its start to its end, with kills on the way.

    Args:
        world: where it lives.
        user: how it is run.
        rng: of everything random.
        pace: how long things take; afterwards, how long they take by now.
        tally: where everything is counted.
        n_generations: the run has.
    """

    def __init__(
        self, world: World, user: User, rng: random.Random, pace: Pace, tally: Tally, *, n_generations: int
    ) -> None:
        self._world, self._user, self._rng, self.pace, self._tally = world, user, rng, pace, tally
        self._book = Book(world.home)
        self._surveys: list[Survey] = []
        self._sittings = 0  # that the run had before the process that works on it now
        self._n_generations = n_generations
        self._limit_s = max(STUCK_FACTOR * pace.total, STUCK_MIN_S)

    def kill_often(self, kills: int) -> int:
        """Up to ``kills`` kills, fewer if the run ends before; how many there were."""
        done = 0
        while done < kills:
            part = min(1.0, self._book.events().get("generations", 0) / self._n_generations)
            plan = draw(self._rng, self._user.targets, self.pace.rest(part))
            if not self._user.runs():
                self._sittings = self._book.events().get("sittings", self._sittings)
                self._user.start()
            if not wait_for(plan, self._events, self._user.runs, self._limit_s):
                if self._user.finished():
                    self.pace = self.pace.faster() if plan.aim in ("any", "start-up") else self.pace
                    return done
                self._tally.gave_up += 1
                continue
            if self._strike(plan):
                self._react(plan)
                done += 1
        return done

    def finish(self, expected: dict[str, Any]) -> None:
        """Lets the run come to its end and checks everything."""
        deadline = time.monotonic() + self._limit_s
        while not self._user.finished():
            if time.monotonic() > deadline:
                self._tally.wrong.append(f"the run does not come to its end ({self._world.folder})")
                break
            if not self._user.runs():
                self._user.start()
            time.sleep(0.2)
        self._check(expected)
        self._book.close()

    def _events(self) -> dict[str, int]:
        calculations = read(self._world.log)
        ends = sum(c.ended is not None for c in calculations)
        return self._book.events() | {"starts": len(calculations), "ends": ends}

    def _strike(self, plan: Plan) -> bool:
        """Whether there was anything to kill."""
        alive = self._world.processes()
        roles = list(alive) if plan.target == "everything" else plan.target.split("+")
        chosen = [process for role in roles if role != "other" for process in alive.get(role, [])]
        if plan.target == "label":  # one of the workers
            chosen = self._rng.sample(chosen, min(1, len(chosen)))
        flying = sum(c.ended is None and any(p.pid == c.pid for g in alive.values() for p in g) for c in self._log())
        if not chosen:
            return False
        kill(chosen, plan.signal, at_once=plan.target == "everything")
        self._tally.kills[plan.target] += 1
        self._tally.aims[plan.aim] += 1
        self._tally.signals[signal.Signals(plan.signal).name] += 1
        self._tally.flying += flying
        total = sum(self._tally.kills.values())
        print(
            f"kill {total:4d}  round {self._tally.rounds + 1:3d}  {plan.aim:9s} {plan.target:15s} "
            f"{signal.Signals(plan.signal).name:8s} {len(chosen)} killed, {flying} in flight, "
            f"{len(self._log())} calculations so far",
            flush=True,
        )
        return True

    def _react(self, plan: Plan) -> None:
        """What a user does: look or not, wait a little, put the services right, start the run again if it is over."""
        was_going_on = self._user.runs()
        self._survey()
        if plan.looks:
            self._look(was_going_on)
        time.sleep(plan.pause_s)
        self._user.mend()
        self._survey()
        (self._tally.survived if self._user.runs() else self._tally.died)[plan.target] += 1

    def _look(self, goes_on: bool) -> None:
        opened = self._book.events().get("sittings", 0) > self._sittings
        said = self._world.status()
        self._tally.looks += 1
        if said == "running" and not goes_on:
            self._tally.wrong.append("`al-loop status` calls a run that was killed running")
        if said == "abandoned" and goes_on and opened and self._user.runs():
            self._tally.wrong.append("`al-loop status` calls a run that goes on abandoned")

    def _survey(self) -> None:
        keys = sorted({c.key for c in self._log() if c.ended is not None})
        # First the disk: answers go from there to the database, never back.
        began, on_disk = time.time(), self._world.kept_on_disk(keys)
        stored = self._book.look()
        self._surveys.append(Survey(time=began, kept=None if stored is None else stored | on_disk))

    def _log(self) -> Sequence[Calculation]:
        return read(self._world.log)

    def _check(self, expected: dict[str, Any]) -> None:
        wrong = self._tally.wrong
        uri = ensure_mongod(self._world.home)
        good = self._book.look() or set()
        counts = count(read(self._world.log), good, self._surveys)
        self._tally.counts += counts
        wrong += [f"round {self._tally.rounds + 1}: {line}" for line in self._book.gone_back]
        wrong += [f"completed, and computed again: {key[:16]}" for key in counts.repeated]
        wrong += [f"computed by two at once: {key[:16]}" for key in counts.at_once]
        wrong += [f"completed, and not in the database: {key[:16]}" for key in counts.lost]
        wrong += [f"not as in the run left alone: {line}" for line in differences(expected, result(uri))[:5]]
        deadline = time.monotonic() + ENDS_WITHIN_S
        while (left := self._left()) and time.monotonic() < deadline:
            time.sleep(0.2)
        wrong += [f"left running: {line}" for line in left]
        living, dead = self._book.leases()
        wrong += [f"lease still held: {name}" for name in living]
        self._tally.left_leases += len(dead)
        wrong += [f"left in the spool: {name}" for name in self._world.spooled()]
        self._user.leave()
        wrong += [
            f"left running after `al-loop down`: {p}" for group in self._world.processes().values() for p in group
        ]

    def _left(self) -> list[str]:
        alive = self._world.processes()
        return [f"{role}: {p.pid}" for role in ("run", "flow", "label") for p in alive.get(role, [])]


def campaign(folder: Path, kills: int, deployed: int, seed: int, label_s: float) -> Tally:
    """``kills`` kills, ``deployed`` of them through the deployment, in as many rounds as it takes."""
    rng = random.Random(seed)
    tally = Tally()
    pace, expected = leave_alone(folder / "alone", label_s)
    print(f"left alone: {pace.total:.1f} s, of which {pace.start_up:.1f} s until the run was open", flush=True)
    for kind, wanted in ((Foreground, kills - deployed), (Deployed, deployed)):
        left = wanted
        while left > 0:
            world = World(folder / f"round-{tally.rounds + 1}", label_s)
            n_wrong = len(tally.wrong)
            try:
                turn = Round(world, kind(world), rng, pace, tally, n_generations=len(expected["generations"]))
                left -= turn.kill_often(min(left, rng.randint(6, 14)))
                turn.finish(expected)
                pace = turn.pace
            except (TimeoutError, RuntimeError) as error:
                tally.wrong.append(f"round {tally.rounds + 1}: {error}")
                left -= 1
            finally:
                world.end()
            tally.rounds += 1
            for line in tally.wrong[n_wrong:]:
                print(f"WRONG: {line}", flush=True)
            if len(tally.wrong) == n_wrong:
                shutil.rmtree(world.folder)
    return tally


def report(tally: Tally, seconds: float) -> str:
    """The table and the verdict."""
    counts, kills = tally.counts, sum(tally.kills.values())
    rows: list[tuple[str, object]] = [
        ("kills", f"{kills} in {tally.rounds} runs, {seconds / 60:.0f} min"),
        ("  what", ", ".join(f"{name} {n}" for name, n in tally.kills.most_common())),
        ("  aimed at", ", ".join(f"{name} {n}" for name, n in tally.aims.most_common())),
        ("  signals", ", ".join(f"{name} {n}" for name, n in tally.signals.most_common())),
        ("  the run went on by itself", sum(tally.survived.values())),
        ("  it was over and was started again", sum(tally.died.values())),
        ("  it gave up later, without a kill", tally.gave_up),
        ("calculations started", counts.started),
        ("  completed", counts.completed),
        ("  cut off (in flight at a kill)", counts.cut_off),
        ("  ended, but killed before the answer was on disk", len(counts.unkept)),
        ("completed ones computed again", len(counts.repeated)),
        ("computed by two at once", len(counts.at_once)),
        ("completed labels lost", len(counts.lost)),
        ("looks at the status", tally.looks),
        ("things wrong in all", len(tally.wrong)),
    ]
    table = "\n".join(f"{name:52s} {value}" for name, value in rows)
    wrong = "".join(f"\n  {line}: {n} times" for line, n in Counter(tally.wrong).most_common())
    verdict = "FAILED" if wrong else "PASSED: nothing lost, nothing done twice, the same results"
    return f"\n{table}\n{verdict}{wrong}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--deployed", type=int, help="how many of them through the deployment; default: a fifth")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--label-s", type=float, default=1.0, help="seconds a label takes")
    parser.add_argument("--folder", type=Path, help="where; default: a temporary folder, removed if all went well")
    parser.add_argument("--json", type=Path, help="write the figures there")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))  # so that nothing is left running
    folder = asked.folder or Path(tempfile.mkdtemp(prefix="al-loop-crash-"))
    deployed = asked.kills // 5 if asked.deployed is None else asked.deployed
    began = time.monotonic()
    tally = campaign(folder, asked.kills, deployed, asked.seed, asked.label_s)
    print(report(tally, time.monotonic() - began))
    if asked.json:
        asked.json.write_text(json.dumps({**vars(tally), "counts": vars(tally.counts)}, indent=1))
    if tally.wrong:
        print(f"everything is kept in {folder}")
    elif not asked.folder:
        shutil.rmtree(folder)
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
