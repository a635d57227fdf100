"""What each training strategy is worth, in distribution, out of it, and by its migration barrier: Cr in Sb2Te3.

    python tests/benchmarks/paradigms.py --prior cr-sb-te-chgnet.model --out FOLDER --markdown

The prior is what ``al-loop pretrain config/pretrain_cr_sb_te.yaml`` makes: it has seen tellurides, but never Cr in the
gap between layers nor any path. Reference is CHGNet, the teacher of ``config/cr_sb2te3.yaml``: its dynamics (Langevin,
outer layers fixed as in the file) give the labels, and its own climbing band the barrier. Labels are kept in
``--cache`` and finished rows in ``--out`` (``rows.jsonl``), so that a second call only does what is left; ``--sets``
and ``--curve`` choose a part. Trainings are in float32, everything else in float64, and as a run trains. ``--seeds``
repeats every training; the labels stay the same.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import yaml
from ase import Atoms, units
from ase.io import write
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution

from alcore.dataset import read_labels
from alcore.endpoints import make_pair, read_band, relax_end_state
from alcore.learning import judge, nested_subsets
from alcore.mace.contacts import anchors
from alcore.mace.models import Architecture, build_model, freeze, load_foundation, model_elements, trainable_copy
from alcore.mace.pretraining import prior_line
from alcore.mace.replay import pseudo_labels
from alcore.mace.sanity import SanitySpec, calm_labels, faults
from alcore.mace.strategies import Learning, StrategySpec
from alcore.mace.surrogate import MaceSurrogate
from alcore.mace.training import TrainedMember, TrainSpec, fine_tune
from alcore.neb import NebSpec, interpolate, relax_band
from alcore.sampling import rattled
from alcore.types import Dataset, EndpointPair, Label, Structure
from calculators import chgnet
from calculators.registry import resolve
from calculators.teacher import InProcess, make_teacher
from flows.report import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONFIG = Path(__file__).parents[2] / "config" / "cr_sb2te3.yaml"
STRATEGIES = ("zero-shot", "scratch", "naive", "multihead", "lora", "frozen")
CURVES = ("scratch", "naive", "multihead", "lora")
TEMPERATURES_K = (300, 600, 1200)
STEP_FS, FRICTION_PER_FS, EQUILIBRATION_STEPS, STRIDE_STEPS = 3.0, 0.02, 100, 20
"""Of the dynamics: frames are 60 fs apart, after 0.3 ps."""
STRAIN, RATTLE_ANG = 0.04, 0.05
TESTS = {
    "600 K": "600 K, another trajectory",
    "1200 K": "1200 K",
    "strained": "600 K, all lengths changed by 4 % up or down",
    "other site": "around the tetrahedral site",
}
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What rows depend on.

    Attributes:
        frames: labels of a training set.
        test_frames: of each test set.
        n_replay: structures that ``multihead`` replays: the prior's own answers around the labels.
        max_steps: of a band.
        train: how every strategy learns.
        seed: of the labels.
    """

    frames: int
    test_frames: int
    n_replay: int
    max_steps: int
    train: TrainSpec
    seed: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """The hop, the prior, and the labels by name of their set."""

    pair: EndpointPair
    neb: NebSpec
    prior: Any
    training: Mapping[str, Dataset]
    tests: Mapping[str, Sequence[Label]]


# --- labels ---------------------------------------------------------------------------------------------------------


def read_hop(max_steps: int) -> tuple[EndpointPair, NebSpec]:
    """The hop of the run file and how its bands are relaxed."""
    run = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    (path,) = run["paths"]
    first, *inner, last = read_band(CONFIG.parent / path["band"], str(CONFIG))
    pair = make_pair(path["name"], first, last, inner=inner, reference_barrier_ev=path["reference_barrier_ev"])
    return pair, NebSpec(**run["neb"], max_steps=max_steps)


def trajectory(start: Structure, temperature_k: float, n_frames: int, seed: int) -> list[Structure]:
    """Frames of Langevin dynamics with the reference."""
    atoms, rng = start.to_atoms(), np.random.default_rng(seed)
    atoms.calc = chgnet.make(chgnet.ChgnetSettings())
    MaxwellBoltzmannDistribution(atoms, temperature_K=2 * temperature_k, rng=rng)  # half of it goes into the potential
    dynamics = Langevin(
        atoms,
        STEP_FS * units.fs,
        temperature_K=temperature_k,
        friction=FRICTION_PER_FS / units.fs,
        fixcm=False,
        rng=rng,
    )
    dynamics.run(EQUILIBRATION_STEPS)
    frames = []
    for _ in range(n_frames):
        dynamics.run(STRIDE_STEPS)
        frames.append(start.moved(atoms.get_positions()))
    return frames


def strained(frames: Sequence[Structure]) -> list[Structure]:
    """Every other frame larger, every other smaller."""
    found = []
    for k, frame in enumerate(frames):
        factor = 1.0 + (STRAIN if k % 2 else -STRAIN)
        found.append(replace(frame, positions=factor * frame.positions, cell=factor * frame.cell))
    return found


def other_site(pair: EndpointPair, n_frames: int, seed: int) -> list[Structure]:
    """Images of the band around its middle, in turn, rattled."""
    rng, inner = np.random.default_rng(seed), pair.images
    near = inner[len(inner) // 4 : len(inner) - len(inner) // 4]
    return [rattled(near[k % len(near)], RATTLE_ANG, rng) for k in range(n_frames)]


def kept(file: Path, teacher: InProcess, make: Callable[[], Sequence[Structure]]) -> list[Label]:
    """Labels from ``file``, or made and written there."""
    if not file.exists():
        began, structures = time.perf_counter(), make()
        frames: list[Atoms] = []
        for structure, answer in zip(structures, teacher(structures), strict=True):
            assert answer is not None, f"{teacher.name} has no answer for a frame of {file.name}"
            frame = structure.to_atoms()
            frame.info |= {"REF_energy": answer[0], "fingerprint": teacher.fingerprint, "calculator": teacher.name}
            frame.arrays["REF_forces"] = answer[1]
            frames.append(frame)
        part = file.with_suffix(".part")
        write(part, frames, format="extxyz")
        part.replace(file)
        print(f"{file.name}: {len(frames)} labels in {time.perf_counter() - began:.0f} s", flush=True)
    return read_labels(file, fingerprint=teacher.fingerprint, calculator=teacher.name, where=str(file))


def prepare(prior: str, cache: Path, setting: Setting) -> Case:
    """Everything that the strategies share."""
    cache.mkdir(parents=True, exist_ok=True)
    pair, neb = read_hop(setting.max_steps)
    teacher = make_teacher(resolve("chgnet"))

    def run(temperature_k: int, n_frames: int, seed: int) -> list[Label]:
        file = cache / f"md-{temperature_k}K-{n_frames}-{seed}.extxyz"
        return kept(file, teacher, partial(trajectory, pair.initial, temperature_k, n_frames, seed))

    n, n_test, seed = setting.frames, setting.test_frames, setting.seed
    shares = [len(part) for part in np.array_split(np.arange(n), len(TEMPERATURES_K))]
    single = run(600, n, seed)
    mixed = [
        label
        for temperature_k, share in zip(TEMPERATURES_K, shares, strict=True)
        for label in (single[:share] if temperature_k == 600 else run(temperature_k, share, seed + 1))
    ]
    held_out = run(600, n_test, seed + 2)
    deformed = cache / f"strained-{n_test}-{seed}.extxyz"
    tetrahedral = cache / f"other-site-{n_test}-{seed}.extxyz"
    tests = {
        "600 K": held_out,
        "1200 K": run(1200, n_test, seed + 3),
        "strained": kept(deformed, teacher, lambda: strained([label.structure for label in held_out])),
        "other site": kept(tetrahedral, teacher, lambda: other_site(pair, n_test, seed + 4)),
    }
    training = {"600 K": Dataset(labels=tuple(single)), "300, 600, 1200 K": Dataset(labels=tuple(mixed))}
    return Case(pair=pair, neb=neb, prior=load_foundation(prior), training=training, tests=tests)


# --- one row --------------------------------------------------------------------------------------------------------


def fresh_model(prior: Any, seed: int) -> Any:
    """Untrained weights in the prior's architecture, as its own report tells it."""
    told = json.loads(prior.pretraining)["spec"]["architecture"]
    return build_model(model_elements(prior), seed, Architecture(**told), torch.float32)


def train(case: Case, strategy: str, dataset: Dataset, setting: Setting, seed: int) -> TrainedMember:
    """A model in float64 that has learned ``dataset``."""
    prior = freeze(trainable_copy(case.prior).to(torch.float32))
    replay: list[Label] = []
    if strategy == "multihead":
        around = [label.structure for label in dataset.labels]
        replay = pseudo_labels(case.prior, around, setting.n_replay, np.random.default_rng([setting.seed, 2]))
    fresh = strategy == "scratch"
    member = fine_tune(
        fresh_model(case.prior, seed) if fresh else prior,
        dataset,
        setting.train,
        weights=np.ones(len(dataset)),
        epochs=setting.train.fresh_epochs if fresh else setting.train.epochs,
        strategy=StrategySpec(learning=cast(Learning, strategy)),
        replay=replay,
        anchors=anchors([x.structure for x in calm_labels(dataset.labels)], MaceSurrogate(prior=case.prior).evaluate),
        seed=seed,
    )
    return replace(member, model=freeze(member.model.to(torch.float64)))


def migrate(case: Case, model: Any) -> Row:
    """The model's own barrier: end states relaxed on it, then the climbing band from the run file's start."""
    began = time.perf_counter()
    potential, band = MaceSurrogate(prior=model), interpolate(case.pair, case.neb)
    ends = [relax_end_state(potential, end, case.neb.fmax_ev_per_ang) for end in (case.pair.initial, case.pair.final)]
    band[0], band[-1] = (end.positions[0] for end in ends)
    relaxed = relax_band(potential, case.pair.initial, band, case.neb)
    profile = relaxed.energies_ev - relaxed.energies_ev[0]
    assert case.pair.reference_barrier_ev is not None
    return {
        "barrier_ev": float(profile.max()),
        "barrier_error_mev": 1000 * (float(profile.max()) - case.pair.reference_barrier_ev),
        "profile_ev": profile.tolist(),
        "ends": [end.status for end in ends],
        "band": relaxed.status,
        "band_steps": relaxed.n_steps,
        "band_fmax_ev_per_ang": relaxed.fmax_ev_per_ang,
        "band_reason": relaxed.reason,
        "band_seconds": time.perf_counter() - began,
    }


def measure(case: Case, strategy: str, name: str, dataset: Dataset, setting: Setting, seed: int) -> Row:
    """A row: what was done, errors on every test set, faults, barrier."""
    row: Row = {"strategy": strategy, "set": name, "seed": seed, "labels": 0, "seconds": 0.0, "told": {}}
    model = case.prior
    if strategy != "zero-shot":
        began = time.process_time()
        member = train(case, strategy, dataset, setting, seed)
        model = member.model
        row |= {"labels": len(dataset), "seconds": time.process_time() - began, "told": dict(member.told)}
        row |= {"own_energy_rmse_ev": member.energy_rmse_ev, "own_force_rmse_ev_per_ang": member.force_rmse_ev_per_ang}
    row["faults"] = faults(model, dataset, SanitySpec(), rng=np.random.default_rng([setting.seed, 3]))
    potential = MaceSurrogate(prior=model)
    row["errors"] = {test: asdict(judge(potential, labels)) for test, labels in case.tests.items()}
    return row | migrate(case, model)


# --- all rows -------------------------------------------------------------------------------------------------------


def plan(case: Case, given: argparse.Namespace) -> list[tuple[str, str, Dataset]]:
    """Strategy, name of the set, labels; the 600 K set and its learning curve come first."""
    sets, strategies, curve = given.sets.split(";"), given.strategies.split(","), given.curve.split(",")
    sizes = [int(size) for size in given.sizes.split(",") if size]
    single = case.training["600 K"]
    subsets = nested_subsets(single, [size for size in sizes if size < len(single)], seed=0)
    todo = [(strategy, "600 K", single) for strategy in strategies if "600 K" in sets]
    todo += [(strategy, "600 K", subset) for strategy in curve if strategy for subset in subsets]
    for name in sets:  # untrained, a model does not depend on the set
        if name not in ("", "600 K"):
            todo += [(strategy, name, case.training[name]) for strategy in strategies if strategy != "zero-shot"]
    return todo


def read_rows(file: Path, setting: Setting) -> dict[tuple[str, str, int, int], Row]:
    """Finished rows of this setting."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    rows = [row for row in map(json.loads, lines) if row["setting"] == asdict(setting)]
    return {(row["strategy"], row["set"], row["labels"], row["seed"]): row for row in rows}


def what_was_kept(row: Row) -> str:
    told = row["told"]
    if row["strategy"] == "zero-shot":
        return "all"
    if "frozen" in told:
        return " + ".join(told["frozen"]) + " frozen"
    if told["n_replay"]:
        return f"{told['n_replay']} structures replayed"
    return f"rank {told['lora_rank']} adapters" if "lora_rank" in told else "nothing"


def grouped(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that differ in their seed only, in order of appearance."""
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["set"], row["strategy"], row["labels"]), []).append(row)
    return list(groups.values())


def markdown(rows: Sequence[Row]) -> str:
    """Means over seeds, and the barrier error of each: in brackets that of a band that did not converge."""
    tests = " | ".join(f"{test}: meV/Å, meV/atom" for test in TESTS)
    lines = [
        f"| trained on | labels | strategy | CPU s | trainable | kept | {tests} | with faults | barrier error meV |",
        "|---" * (8 + len(TESTS)) + "|",
    ]
    for group in grouped(rows):
        row = group[0]
        errors = " | ".join(
            f"{mean_error(group, test, 'force_rmse_ev_per_ang'):.0f}, "
            f"{mean_error(group, test, 'energy_rmse_ev_per_atom'):.1f}"
            for test in TESTS
        )
        barriers = ", ".join(
            f"{r['barrier_error_mev']:+.0f}" if r["band"] == "converged" else f"({r['barrier_error_mev']:+.0f})"
            for r in group
        )
        lines.append(
            f"| {row['set']} | {row['labels']} | {row['strategy']} | {np.mean([r['seconds'] for r in group]):.0f} "
            f"| {row['told'].get('n_trainable', 0)} | {what_was_kept(row)} | {errors} "
            f"| {sum(bool(r['faults']) for r in group)} of {len(group)} | {barriers} |"
        )
    return "\n".join(lines)


def mean_error(group: Sequence[Row], test: str, name: str) -> float:
    """In meV (per Å, per atom)."""
    return 1000 * float(np.mean([row["errors"][test][name] for row in group]))


@style.styled
def draw(rows: Sequence[Row]) -> Figure:
    """Errors over the number of labels of the 600 K set, each seed a point; open: the band did not converge."""
    figure = style.new_figure(9.5, 3.2)
    panels: list[tuple[str, Callable[[Row], float]]] = [
        ("force error at 600 K (meV/Å)", lambda row: 1000 * row["errors"]["600 K"]["force_rmse_ev_per_ang"]),
        ("force error at 1200 K (meV/Å)", lambda row: 1000 * row["errors"]["1200 K"]["force_rmse_ev_per_ang"]),
        ("barrier error (meV)", lambda row: abs(row["barrier_error_mev"])),
    ]
    for k, (axes, (title, value)) in enumerate(zip(figure.subplots(1, len(panels)), panels, strict=True)):
        for colour, strategy in zip(style.CYCLE, CURVES, strict=False):
            mine = [row for row in rows if row["strategy"] == strategy and row["set"] == "600 K"]
            groups = sorted(grouped(mine), key=lambda group: group[0]["labels"])
            means = [np.mean([value(row) for row in group]) for group in groups]
            axes.plot([group[0]["labels"] for group in groups], means, color=colour, label=strategy)
            for row in mine:
                face = colour if row["band"] == "converged" else "white"
                axes.plot(row["labels"], value(row), "o", color=colour, markerfacecolor=face, markersize=4)
        for row in (row for row in rows if row["strategy"] == "zero-shot"):
            axes.axhline(value(row), color=style.GREY, linestyle="--", linewidth=1, label="zero-shot")
        axes.set(xlabel="labels", ylabel=title, xscale="log", yscale="log")
        style.plain_log(axes)
        style.panel(axes, "abc"[k])
    axes.legend()
    return figure


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Training strategies side by side on Cr in Sb2Te3.")
    parser.add_argument("--prior", required=True, help="the .model file of al-loop pretrain")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "al-loop-paradigms")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "al-loop-paradigms" / "labels")
    parser.add_argument("--frames", type=int, default=16, help="labels of a training set")
    parser.add_argument("--test-frames", type=int, default=12, help="labels of each test set")
    parser.add_argument("--replay", type=int, default=16, help="structures that multihead replays")
    parser.add_argument("--max-steps", type=int, default=300, help="of a band")
    parser.add_argument("--seeds", default="0,1,2", help="of the trainings")
    parser.add_argument("--strategies", default=",".join(STRATEGIES), help="that learn the whole sets")
    parser.add_argument("--sets", default="600 K;300, 600, 1200 K", help="training sets, with ; between them")
    parser.add_argument("--curve", default=",".join(CURVES), help="strategies of the learning curve")
    parser.add_argument("--sizes", default="4,8", help="labels of the learning curve; the whole set is its last point")
    parser.add_argument("--markdown", action="store_true", help="print the table")
    return parser.parse_args()


def main() -> None:
    warnings.filterwarnings("ignore")  # of chgnet, pymatgen and e3nn, about each other
    torch.set_num_threads(1)
    given = arguments()
    setting = Setting(
        frames=given.frames,
        test_frames=given.test_frames,
        n_replay=given.replay,
        max_steps=given.max_steps,
        train=TrainSpec(),
    )
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / "rows.jsonl"
    case = prepare(given.prior, given.cache, setting)
    print(prior_line(case.prior), f"\n{setting}", flush=True)
    seeds = [int(seed) for seed in given.seeds.split(",")]
    for seed, (strategy, name, dataset) in itertools.product(seeds, plan(case, given)):
        zero_shot = strategy == "zero-shot"
        if (zero_shot and seed != seeds[0]) or (strategy, name, len(dataset) * (not zero_shot), seed) in read_rows(
            file, setting
        ):
            continue
        row = measure(case, strategy, name, dataset, setting, seed)
        row |= {"setting": asdict(setting), "prior": prior_line(case.prior)}
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        print(markdown([row]).splitlines()[-1], f"{row['band_seconds']:.0f} s", row["faults"], flush=True)
    rows = list(read_rows(file, setting).values())
    (given.out / "paradigms.png").write_bytes(style.render(draw(rows)))
    if given.markdown:
        print(markdown(rows))


if __name__ == "__main__":
    main()
