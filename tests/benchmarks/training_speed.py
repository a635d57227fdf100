"""One generation's training here, and with mace-torch's own command line, from the same weights to the same error.

    python tests/benchmarks/training_speed.py --prior FILE.model [--system au-al100|cu-vacancy] [--members 3]
        [--committees 1 3 5] [--repeats 1] [--settings E0S:BATCH:LR:ENERGY_WEIGHT:FORCES_WEIGHT ...]
        [--target F] [--max-epochs 400] [--out FILE] [--markdown]

A committee learns 20 EMT labels around a band; 10 more are for validation. Here its members are trained one after the
other in this process, as a run does (checks of the members included). ``mace_run_train`` is started once a member, on
the same labels, in the same precision: once until its validation force error is that of the committee's members (their
mean), and once more, as one who knows this number of epochs would, from start to end, which adds the errors on all sets
and writing the model. Force errors are over all components, energy errors relative to their mean. With repeats its
times are means over seeds. All is single-threaded and nothing is run side by side; on a busy machine look at the CPU
seconds. The two differ in more than the program: batches, the weights of energies and forces, the schedule.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where it is not installed

import numpy as np
import psutil
import torch
from ase import Atoms
from ase.build import add_adsorbate, bulk, fcc100
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.io import write
from ase.optimize import BFGS

from alcore.identity import label_key
from alcore.mace.graphs import graph_of, merge_graphs
from alcore.mace.models import open_foundation
from alcore.mace.reshaping import for_elements
from alcore.mace.trainer import MaceTrainer, ModelSpec
from alcore.mace.training import TrainSpec, fine_tune
from alcore.types import Dataset, Label, Structure
from calculators.registry import resolve

N_TRAIN, N_VALID = 20, 10
RATTLE_ANG = 0.08
VALIDATE_EVERY = 2  # epochs of mace_run_train: half of its default's cost, and still a fine clock
EPOCH = re.compile(r"Epoch (\d+): .*RMSE_F=\s*([\d.]+) meV")
DEFAULT_SETTINGS = ("estimated:5:0.01:1:100", "estimated:2:0.01:1:100", "estimated:2:0.01:1:1")
"""mace-torch's weights of energies and forces, twice, and ours."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement.

    Attributes:
        what: was timed.
        members: how many were trained.
        repeat: number of the measurement; the seed of ``mace_run_train``.
        wall_s, cpu_s: from the start of the process, or of the call.
        epochs: run by then.
        force_rmse_ev_per_ang: on the validation labels; of several members their mean.
        energy_rmse_mev_per_atom: likewise, of energies relative to their mean.
    """

    what: str
    members: int = 1
    repeat: int = 0
    wall_s: float
    cpu_s: float
    epochs: int | None = None
    force_rmse_ev_per_ang: float | None = None
    energy_rmse_mev_per_atom: float | None = None

    def reaches(self, target: float | None) -> bool:
        """Whether its force error is at most that, eV/Å."""
        return target is not None and (self.force_rmse_ev_per_ang or np.inf) <= target


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What of ``mace_run_train`` is varied."""

    e0s: str
    batch_size: int
    learning_rate: float
    energy_weight: float
    forces_weight: float

    @classmethod
    def read(cls, text: str) -> Settings:
        """From ``E0S:BATCH:LR:ENERGY_WEIGHT:FORCES_WEIGHT``; the energies are those an atom."""
        e0s, batch, *others = text.split(":")
        rate, energy, forces = map(float, others)
        return cls(e0s=e0s, batch_size=int(batch), learning_rate=rate, energy_weight=energy, forces_weight=forces)

    def __str__(self) -> str:
        weights = f"weights {self.energy_weight:g}:{self.forces_weight:g}"
        return f"batch {self.batch_size}, lr {self.learning_rate:g}, E0s {self.e0s}, {weights}"


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Seconds, of this process."""

    wall_s: float
    cpu_s: float

    @classmethod
    def now(cls) -> Spent:
        """Since the process was started, its imports included."""
        return cls(wall_s=time.time() - psutil.Process().create_time(), cpu_s=time.process_time())

    def __sub__(self, other: Spent) -> Spent:
        return Spent(wall_s=self.wall_s - other.wall_s, cpu_s=self.cpu_s - other.cpu_s)


def end_states(system: str) -> tuple[Atoms, Atoms]:
    """Au between hollows of Al(100), 13 atoms, or a vacancy of 31 Cu atoms; relaxed with EMT."""
    if system == "au-al100":
        initial = fcc100("Al", size=(2, 2, 3))
        add_adsorbate(initial, "Au", 1.7, "hollow")
        initial.center(axis=2, vacuum=4.0)
        initial.set_constraint(FixAtoms(mask=initial.get_tags() > 1))
        final = initial.copy()
        final.positions[-1, 0] += initial.cell[0, 0] / 2
    else:
        whole = bulk("Cu", cubic=True).repeat(2)
        gaps = whole.get_distances(0, range(len(whole)), mic=True)
        neighbour = int(np.argsort(gaps)[1])
        initial, final = whole.copy(), whole.copy()
        final.positions[neighbour] = whole.positions[0]
        del initial[0], final[0]
    for state in (initial, final):
        state.calc = EMT()
        if not BFGS(state, logfile=None).run(fmax=0.02, steps=300):
            raise RuntimeError(f"a state of {system} is not relaxed")
    return initial, final


def make_labels(system: str) -> tuple[Dataset, Dataset]:
    """Rattled places along the band: to be learned, and to be validated on."""
    initial, final = end_states(system)
    fingerprint, rng = resolve("emt").fingerprint, np.random.default_rng(7)
    fixed = Structure.from_atoms(initial).fixed
    step = final.positions - initial.positions
    step -= np.round(step @ np.linalg.pinv(initial.cell.array)) @ initial.cell.array
    labels = []
    for share in rng.permutation(np.linspace(0, 1, N_TRAIN + N_VALID)):
        atoms = initial.copy()
        noise = np.where(fixed, 0.0, RATTLE_ANG * rng.standard_normal(step.shape))
        atoms.set_positions(initial.positions + share * step + noise, apply_constraint=False)
        atoms.calc = EMT()
        structure = Structure.from_atoms(atoms)
        label = Label(
            key=label_key(structure, fingerprint),
            structure=structure,
            status="ok",
            fingerprint=fingerprint,
            calculator="emt",
            energy_ev=float(atoms.get_potential_energy()),
            forces=atoms.get_forces(apply_constraint=False),
        )
        labels.append(label)
    return Dataset(labels=tuple(labels[:N_TRAIN])), Dataset(labels=tuple(labels[N_TRAIN:]))


def write_extxyz(path: Path, dataset: Dataset) -> None:
    """As ``mace_run_train`` reads it."""
    frames = []
    for label in dataset.labels:
        frame = label.structure.to_atoms()
        frame.set_constraint()
        frame.info["REF_energy"] = label.energy_ev
        frame.arrays["REF_forces"] = np.array(label.forces)
        frames.append(frame)
    write(path, frames, format="extxyz")


def errors(model: Any, valid: Dataset) -> tuple[float, float]:
    """Of a trained member on the validation labels: force (eV/Å) and relative energy (meV/atom) RMSE."""
    out = model(merge_graphs([graph_of(model, label.structure) for label in valid.labels]), compute_force=True)
    forces = np.concatenate([label.forces for label in valid.labels if label.forces is not None])
    energy = out["energy"].detach().numpy() - np.array([label.energy_ev for label in valid.labels])
    n_atoms = len(valid.labels[0].structure)
    return float(np.sqrt(np.mean((out["forces"].detach().numpy() - forces) ** 2))), float(1e3 * energy.std() / n_atoms)


def train_committee(prior: Any, train: Dataset, valid: Dataset, n: int, what: str) -> list[Row]:
    """``n`` members as a run trains them in a generation: one row each."""
    trainer = MaceTrainer(prior, ModelSpec(strategy="naive", committee=n), untrained=False)
    surrogate = trainer.start([label.structure for label in train.labels[:2]])
    rows = []
    for k in range(n):
        began = Spent.now()
        member = trainer.train_member(f"member-{k}", surrogate, train, 0)
        spent = Spent.now() - began
        if member.faults:
            print(f"member {k} would not be used: {member.faults}", file=sys.stderr)
        force, energy = errors(member.model, valid)
        row = Row(
            what=f"{what}, member {k}",
            wall_s=spent.wall_s,
            cpu_s=spent.cpu_s,
            epochs=member.epochs,
            force_rmse_ev_per_ang=force,
            energy_rmse_mev_per_atom=energy,
        )
        rows.append(row)
    return rows


def together(rows: Sequence[Row], what: str, repeat: int = 0) -> Row:
    """Members one after the other, as one row."""

    def mean(name: str) -> float:
        return float(np.mean([getattr(row, name) for row in rows]))

    return replace(
        rows[0],
        what=what,
        members=len(rows),
        repeat=repeat,
        wall_s=sum(row.wall_s for row in rows),
        cpu_s=sum(row.cpu_s for row in rows),
        force_rmse_ev_per_ang=mean("force_rmse_ev_per_ang"),
        energy_rmse_mev_per_atom=mean("energy_rmse_mev_per_atom"),
    )


@contextmanager
def started(command: Sequence[str], folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process whose errors go to a file of ``folder``, and which does not outlive the block."""
    with (
        open(folder / "stderr.txt", "w") as said,
        subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=said, text=True) as process,
    ):
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()


def mace_command(args: argparse.Namespace, how: Settings, seed: int, max_epochs: int) -> list[str]:
    """A naive fine-tuning of all weights; what is not said here stands at mace-torch's defaults (Adam with amsgrad,
    gradient clipped at 10)."""
    options = {
        "foundation_model": args.prior.resolve(),
        "multiheads_finetuning": False,
        "name": "member",
        "work_dir": ".",
        "train_file": "train.xyz",
        "valid_file": "valid.xyz",
        "energy_key": "REF_energy",
        "forces_key": "REF_forces",
        "E0s": how.e0s,
        "batch_size": how.batch_size,
        "valid_batch_size": N_VALID,
        "lr": how.learning_rate,
        "energy_weight": how.energy_weight,
        "forces_weight": how.forces_weight,
        "max_num_epochs": max_epochs,
        "patience": max_epochs,
        "eval_interval": VALIDATE_EVERY,
        "default_dtype": "float64",
        "device": "cpu",
        "plot": False,
        "seed": seed,
    }
    return [sys.executable, "-m", "mace.cli.run_train", *(f"--{key}={value}" for key, value in options.items())]


def run_mace(
    command: Sequence[str], data: Sequence[Dataset], what: str, target_ev_per_ang: float | None = None
) -> list[Row]:
    """Validated epochs with the time since the process was started, until the force error is ``target_ev_per_ang``;
    without one the last row is that of the whole process, to its last line, and of the model it has written.

    Raises:
        RuntimeError: it did not train.
    """
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="al-loop-benchmark-") as name:
        folder = Path(name)
        for file, dataset in zip(("train.xyz", "valid.xyz"), data, strict=True):
            write_extxyz(folder / file, dataset)
        began = time.perf_counter()
        with started(command, folder) as process:
            watch = psutil.Process(process.pid)
            assert process.stdout is not None
            for line in process.stdout:
                used = watch.cpu_times()
                spent = Spent(wall_s=time.perf_counter() - began, cpu_s=used.user + used.system)
                if not (found := EPOCH.search(line)):
                    continue
                row = Row(
                    what=what,
                    wall_s=spent.wall_s,
                    cpu_s=spent.cpu_s,
                    epochs=int(found[1]) + 1,
                    force_rmse_ev_per_ang=float(found[2]) / 1e3,
                )
                rows.append(row)
                if row.reaches(target_ev_per_ang):
                    break
        if not rows:
            raise RuntimeError(f"mace_run_train did not train: {(folder / 'stderr.txt').read_text()[-2000:]}")
        if target_ev_per_ang is None:
            force, energy = errors(torch.load(folder / "member.model", weights_only=False), data[1])
            whole = replace(rows[-1], force_rmse_ev_per_ang=force, energy_rmse_mev_per_atom=energy)
            rows.append(replace(whole, wall_s=spent.wall_s, cpu_s=spent.cpu_s))
    return rows


def first_step(args: argparse.Namespace) -> None:
    """What a fresh process of ours needs for a training of one epoch, as a line of JSON; the labels are not counted."""
    began = Spent.now()
    train, _ = make_labels(args.system)
    not_ours = Spent.now() - began
    prior = for_elements(open_foundation(str(args.prior)).model, train.labels[0].structure.numbers)
    fine_tune(prior, train, TrainSpec(epochs=1), weights=np.ones(len(train)))
    spent = Spent.now() - not_ours
    row = Row(what="here: process start and first epoch", wall_s=spent.wall_s, cpu_s=spent.cpu_s, epochs=1)
    print(json.dumps(asdict(row)))


def ours(args: argparse.Namespace, train: Dataset, valid: Dataset, imports: Spent) -> Iterator[Row]:
    """A fresh process, then this one: cold, and warm."""
    for repeat in range(args.repeats):
        command = [sys.executable, __file__, f"--prior={args.prior}", f"--system={args.system}", "--first-step"]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        yield Row(**{**json.loads(said.splitlines()[-1]), "repeat": repeat})
    began = Spent.now()
    prior = for_elements(open_foundation(str(args.prior)).model, train.labels[0].structure.numbers)
    load = Spent.now() - began
    n, largest = args.members, max(args.members, *args.committees)
    (cold,) = train_committee(prior, train, valid, 1, "here, cold")
    yield cold
    for repeat in range(args.repeats):
        warm = train_committee(prior, train, valid, largest, "here, warm")
        yield from (replace(row, repeat=repeat) for row in warm)
        if not repeat:
            whole = together([cold, *warm[1:n]], f"here: committee of {n}, fresh process, start included")
            wall_s, cpu_s = whole.wall_s + imports.wall_s + load.wall_s, whole.cpu_s + imports.cpu_s + load.cpu_s
            yield replace(whole, wall_s=wall_s, cpu_s=cpu_s)
        for size in sorted({n, *args.committees}):  # the first members are what a smaller one would be
            yield together(warm[:size], f"here: committee of {size}, warm", repeat)


def theirs(args: argparse.Namespace, data: Sequence[Dataset], target_ev_per_ang: float) -> Iterator[Row]:
    """``mace_run_train``: a process of one epoch, then each of the settings until ``target_ev_per_ang``, and again from
    start to end with the number of epochs that this took."""
    settings = [Settings.read(text) for text in args.settings]
    first, whole = run_mace(mace_command(args, settings[0], 0, 1), data, "mace_run_train")
    yield replace(first, what="mace_run_train: process start and first epoch")
    yield replace(whole, what="mace_run_train: whole process of one epoch")
    for how in settings:
        for seed in range(args.repeats):
            name = f"mace_run_train, {how}"
            rows = run_mace(mace_command(args, how, seed, args.max_epochs), data, name, target_ev_per_ang)
            yield from (replace(row, what=f"{name}, on the way", repeat=seed) for row in rows)
            best = min(rows, key=lambda row: row.force_rmse_ev_per_ang or np.inf)
            missed = "" if best.reaches(target_ev_per_ang) else f", NEVER in {rows[-1].epochs} epochs: its best"
            yield replace(best, what=f"{name}: to the target{missed}", repeat=seed)
            *_, whole = run_mace(mace_command(args, how, seed, best.epochs or 1), data, name)
            yield replace(whole, what=f"{name}: whole process{missed}", repeat=seed)


def _mean(rows: Sequence[Row], what: str, times: int = 1) -> str:
    """A line of the table: repeats, their costs multiplied."""
    wall, cpu = (times * float(np.mean([getattr(row, name) for row in rows])) for name in ("wall_s", "cpu_s"))
    epochs = "/".join(str(row.epochs) for row in rows)
    forces = [row.force_rmse_ev_per_ang for row in rows if row.force_rmse_ev_per_ang is not None]
    energies = [row.energy_rmse_mev_per_atom for row in rows if row.energy_rmse_mev_per_atom is not None]
    force = f"{np.mean(forces):.3f}" if forces else ""
    energy = f"{np.mean(energies):.2f}" if energies else ""
    return f"| {what} | {epochs} | {wall:.1f} | {cpu:.1f} | {force} | {energy} |"


def table(rows: Sequence[Row], members: int) -> str:
    """The measurements in Markdown."""
    shown = [row for row in rows if "member " not in row.what and "on the way" not in row.what]
    lines = [
        "| what | epochs | wall s | CPU s | validation force RMSE, eV/Å | energy RMSE, meV/atom |",
        "|---|---|---|---|---|---|",
    ]
    for what in dict.fromkeys(row.what for row in shown):
        group = [row for row in shown if row.what == what]
        lines.append(_mean(group, what))
        if "mace_run_train, " in what:
            lines.append(_mean(group, f"the same × {members}", members))
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prior", type=Path, required=True, help="a .model file that knows the system's elements")
    parser.add_argument("--system", choices=("au-al100", "cu-vacancy"), default="au-al100")
    parser.add_argument("--members", type=int, default=3, help="of the committee that is compared")
    parser.add_argument("--committees", type=int, nargs="*", default=[1, 3, 5], help="sizes that are timed here")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--settings", nargs="*", default=DEFAULT_SETTINGS, help="of mace_run_train, as above")
    parser.add_argument("--target", type=float, help="force RMSE in eV/Å to reach; then nothing is trained here")
    parser.add_argument("--max-epochs", type=int, default=400, help="of mace_run_train")
    parser.add_argument("--out", type=Path, help="file to which each measurement is added as a line of JSON")
    parser.add_argument("--markdown", action="store_true", help="print a table, too")
    parser.add_argument("--first-step", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    imports = Spent.now()
    args = arguments()
    if args.first_step:
        first_step(args)
        return
    train, valid = make_labels(args.system)
    rows: list[Row] = []

    def keep(found: Iterator[Row]) -> None:
        for row in found:
            rows.append(row)
            line = json.dumps({"system": args.system, **asdict(row)})
            if args.out is not None:
                with args.out.open("a") as file:
                    file.write(line + "\n")
            if "on the way" not in row.what:
                print(line, flush=True)

    target = args.target
    if target is None:
        keep(ours(args, train, valid, imports))
        what = f"here: committee of {args.members}, warm"
        target = next(row.force_rmse_ev_per_ang for row in rows if row.what == what)
    keep(theirs(args, (train, valid), target))
    if args.markdown:
        print(table(rows, args.members))


if __name__ == "__main__":
    main()
