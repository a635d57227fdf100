"""When to kill, and what: drawn at random over a run, or aimed at one of its phases."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

POLL_S = 0.05
"""Between two looks; each asks the database, and the machine is busy enough."""
AIMS = {"any": 32, "start-up": 10, "probe": 12, "label": 12, "outcome": 14, "train": 8, "record": 7, "shutdown": 5}
"""Phases and how often each is aimed at; ``any``: no phase, a moment of the whole run."""
AFTER = {
    "probe": ("sittings", "generations"),
    "label": ("starts",),
    "outcome": ("ends",),
    "train": ("labels", "members"),
    "record": ("generations",),
    "shutdown": ("finished",),
}
"""What has to have grown for a phase to have begun."""
FIRST_TRAINING = 4
"""Labels from which on the committee may be trained."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Seconds that things took in the run that was left alone; kill moments are random parts of these.

    Attributes:
        total: the whole command.
        start_up: until it had opened the run.
        step: a typical probe or training.
        label: one label.
    """

    total: float
    start_up: float
    step: float
    label: float

    def rest(self, done: float) -> Pace:
        """Of a run of which the part ``done`` was done before."""
        return replace(self, total=self.start_up + (1 - done) * (self.total - self.start_up))

    def faster(self) -> Pace:
        """Runs take less by now: others have left the machine, or much was done already."""
        return replace(self, total=0.8 * self.total, start_up=0.8 * self.start_up, step=0.8 * self.step)

    def span(self, aim: str) -> float:
        """Up to how long after its trigger an aimed kill comes."""
        spans = {"any": 0.8 * self.total, "start-up": self.start_up, "label": self.label, "outcome": 0.1}
        return spans.get(aim, {"record": 0.05, "shutdown": 1.0}.get(aim, self.step))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One kill.

    Attributes:
        aim: the phase.
        delay_s: after what begins the phase.
        target: roles joined by ``+``, or ``everything``.
        signal: a signal's number.
        looks: whether the user asks for the status after it.
        pause_s: how long the user then waits.
    """

    aim: str
    delay_s: float
    target: str
    signal: int
    looks: bool
    pause_s: float


def draw(rng: random.Random, targets: Mapping[str, int], pace: Pace) -> Plan:
    """The next kill."""
    (aim,) = rng.choices(list(AIMS), list(AIMS.values()))
    (target,) = rng.choices(list(targets), list(targets.values()))
    number = signal.SIGKILL
    if target != "everything" and rng.random() < 0.2:
        number = signal.SIGINT if target == "run" and rng.random() < 0.3 else signal.SIGTERM
    return Plan(
        aim=aim,
        delay_s=rng.uniform(0, pace.span(aim)),
        target=target,
        signal=number,
        looks=rng.random() < 0.5,
        pause_s=rng.uniform(0, 1.5),
    )


def wait_for(plan: Plan, events: Callable[[], Mapping[str, int]], goes_on: Callable[[], bool], limit_s: float) -> bool:
    """Waits for the moment of ``plan``; False if the run ended before it came.

    Args:
        events: what there is of everything, so far; empty while nobody can tell.
        goes_on: whether the run does.
        limit_s: no longer than this.
    Raises:
        TimeoutError: neither happened.
    """
    deadline = time.monotonic() + limit_s
    before: Mapping[str, int] = {}
    while plan.aim in AFTER:
        now = events()
        before = before or now
        if any(now.get(name, 0) > before.get(name, 0) for name in AFTER[plan.aim]):
            if plan.aim != "train" or now.get("labels", 0) >= FIRST_TRAINING:
                break
            before = now
        if not goes_on():
            return False
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {plan.aim} within {limit_s:.0f} s: {dict(now)}")
        time.sleep(POLL_S)
    moment = time.monotonic() + plan.delay_s
    while (left := moment - time.monotonic()) > 0:
        if plan.aim not in ("shutdown", "record") and not goes_on():
            return False
        time.sleep(min(left, POLL_S))
    return True
