"""How many labels the loop needs: every case, variant and seed, one JSON line each.

To repeat the table of the README (two cores, hours; what is done is not done again)::

    python tests/benchmarks/labels/baselines.py            # true barriers and CI-NEB, kept in the cache folder
    python tests/benchmarks/labels/run.py --half test --seeds 0,1,2 --jobs 2 --out labels.jsonl
    python tests/benchmarks/labels/run.py --half test --seeds 0,1,2 --jobs 2 --out labels.jsonl --prior FILE.model
    python tests/benchmarks/labels/table.py labels.jsonl --markdown

The plain loop runs in one process a case: no Prefect, no database, the registry's own reference calculators in that
process. Every evaluation of the reference counts: end states, the saddle that verifies, failed ones. End states are
relaxed with the reference before (not counted), but for the cases named ``-unrelaxed``. A record's key is case,
variant, prior, seed and the sha256 of the code; ``--keep-code`` takes records of other code as done, too.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import baselines
from ase.data import chemical_symbols
from cases import CASES, DEFAULT_CACHE, ROOT, Case, Half, pairs_of
from reference import InProcessLabeler
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from variants import MAX_LABELS, VARIANTS, Variant

from alcore.barrier import label_fmax
from alcore.identity import label_key, sha256_hex
from alcore.loop import begin, run_loop
from alcore.neb import NebSpec
from alcore.runner import PlainRunner
from alcore.selection import SelectSpec
from alcore.state import LoopSpec, LoopState, Workshop
from alcore.stopping import StopSpec
from alcore.types import Candidate, LabelRequest, PathRecord, Structure
from calculators.registry import resolve
from storage.memory import MemoryStore

warnings.filterwarnings("ignore", message=".*TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD.*")  # e3nn, in every process


@dataclass(frozen=True, kw_only=True)
class Task:
    """One run; all names, so that it travels to a process.

    Attributes:
        case, variant: names.
        seed: of everything random.
        prior: a ``.model`` file, or "" for none.
        cache: folder of relaxed states and true barriers.
        code: sha256 of al-loop's code, of the cases and of the prior's file.
    """

    case: str
    variant: str
    seed: int
    prior: str
    cache: str
    code: str

    @property
    def key(self) -> str:
        """What makes a record of it the record of it."""
        return "|".join((self.case, self.variant, Path(self.prior).name, str(self.seed), self.code))


def code_sha256(prior: str = "") -> str:
    """Of all that decides how many labels are asked: the package ``alcore``, the cases, the variants, the prior."""
    mine = [Path(__file__).with_name(f"{name}.py") for name in ("cases", "structures", "reference", "variants")]
    files = [*sorted((ROOT / "alcore").rglob("*.py")), *mine, *([Path(prior)] if prior else [])]
    return sha256_hex(b"\0".join(file.read_bytes() for file in files))[:12]


def load_prior(file: str, numbers: Sequence[int], seed: int) -> tuple[Any, bool, str]:
    """The starting model, whether it is untrained, and what it is in words."""
    from alcore.mace.models import build_model, load_foundation

    if not file:
        return build_model(numbers, seed), True, f"none: an untrained MACE (seed {seed})"
    model = load_foundation(file)
    size = sum(parameter.numel() for parameter in model.parameters())
    elements = len(model.atomic_numbers)
    return model, False, f"{Path(file).name}: {size} parameters, {elements} elements, cutoff {float(model.r_max):g} Å"


def loop_spec(case: Case, variant: Variant, seed: int) -> LoopSpec:
    """The loop's settings: the defaults, what the case needs, what the variant changes."""
    stop = StopSpec(**{"max_labels": MAX_LABELS * len(case.hops), "max_generations": MAX_LABELS, **variant.stop})
    select = SelectSpec(**{"well_tolerance_ev": stop.barrier_tolerance_ev, "seed": seed, **variant.select})
    return LoopSpec(run=case.name, neb=NebSpec(**{**variant.neb, **case.neb}), select=select, stop=stop)


def run_task(task: Task) -> dict[str, Any]:
    """One run; a record with an ``error`` where it broke down."""
    began = time.perf_counter()
    record: dict[str, Any] = {"key": task.key, **{k: v for k, v in asdict(task).items() if k != "cache"}}
    try:
        record |= _run(task)
    except Exception:
        record["error"] = traceback.format_exc()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)
    return record | {"seconds": time.perf_counter() - began, "peak_memory_mb": round(peak)}


def _run(task: Task) -> dict[str, Any]:
    import torch

    from alcore.mace.reshaping import for_elements
    from alcore.mace.trainer import MaceTrainer, ModelSpec

    torch.set_num_threads(1)
    case, variant = CASES[task.case], VARIANTS[task.variant]
    truths = baselines.truths(case, Path(task.cache))
    pairs = pairs_of(case, Path(task.cache), truths)
    numbers = pairs[0].initial.numbers.tolist()
    prior, untrained, described = load_prior(task.prior, numbers, task.seed)
    prior = for_elements(prior, numbers)
    store = MemoryStore()
    lines: list[str] = []
    trainer = MaceTrainer(
        prior,
        ModelSpec(**{"seed": task.seed, "prior_name": described, **variant.model}),
        untrained=untrained,
        save_model=store.save_model,
        load_model=store.load_model,
    )
    labeler = InProcessLabeler(resolve(case.calculator, case.settings))
    shop = Workshop(labeler=labeler, trainer=trainer, store=store, runner=PlainRunner(), log=lines.append)
    spec = loop_spec(case, variant, task.seed)
    began = time.perf_counter()
    state = run_loop(begin(pairs, spec, shop), spec, shop)
    loop_seconds, asked = time.perf_counter() - began, labeler.n_calls
    result = summary(state, truths) | {
        "n_atoms": case.n_atoms,
        "half": case.half,
        "prior_described": described,
        "n_calls_counted": asked,
        "seconds_loop": loop_seconds,
        "seconds_reference": labeler.seconds,
        "log": lines,
    }
    if result["calls"] != asked:  # labels derived by symmetry cost none, and a fresh store has none to reuse
        raise RuntimeError(f"the loop counts {result['calls']} calls of the reference, which was asked {asked} times")
    result["checks"] = {p.path: recheck(p, labeler) for p in state.records[-1].paths}
    if task.variant == "default" and case.relaxed:
        result["without_learning"] = {
            pair.name: baselines.without_learning(case, pair, prior, truths[pair.name], untrained=untrained)
            for pair in pairs
        }
    labeler.close()
    return result


def summary(state: LoopState, truths: Mapping[str, float]) -> dict[str, Any]:
    """What a record says of a finished run."""
    last = state.records[-1]
    steps = sorted({step for record in state.records for step in record.seconds})
    return {
        "calls": last.n_reference_calls,
        "calls_by_kind": dict(last.calls_by_kind),
        "generations": len(state.records),
        "converged": all(p.decision.code == "converged" for p in last.paths),
        "code_of_decision": last.decision.code,
        "reason": last.decision.reason,
        "seconds_by_step": {step: sum(r.seconds.get(step, 0.0) for r in state.records) for step in steps},
        "calibration": asdict(last.calibration),
        "hops": {p.path: hop_summary(p, truths.get(p.path)) for p in last.paths},
        "residuals": [
            {name: value for name, value in asdict(residual).items() if name not in ("key", "by_lead_ev")}
            for residual in state.residuals
        ],
        "surrogate": json.loads(json.dumps(dict(last.surrogate), default=str)),
    }


def hop_summary(path: PathRecord, truth_ev: float | None) -> dict[str, Any]:
    """What became of one hop."""
    verified = path.verified_barrier_ev
    return {
        "decision": path.decision.code,
        "reason": path.decision.reason,
        "predicted_ev": path.barrier.forward_ev if path.barrier else None,
        "verified_ev": verified,
        "truth_ev": truth_ev,
        "error_ev": None if verified is None or truth_ev is None else verified - truth_ev,
        "std_ev": path.barrier_std_ev,
        "saddle_fmax_ev_per_ang": path.saddle_fmax_ev_per_ang,
    }


def recheck(path: PathRecord, labeler: InProcessLabeler) -> dict[str, Any]:
    """Reference energy and force at the last band's saddle, asked once more and independently; counts for nobody."""
    if path.band is None or path.barrier is None:
        return {}
    places = (path.band.structure(0), path.band.structure(path.barrier.saddle_image))
    first, saddle = labeler.label([_request(path.path, place, labeler) for place in places])
    if first.energy_ev is None or saddle.energy_ev is None:
        return {"failed": f"{first.reason} {saddle.reason}".strip()}
    return {"barrier_ev": saddle.energy_ev - first.energy_ev, "fmax_ev_per_ang": label_fmax(saddle)}


def _request(path: str, place: Structure, labeler: InProcessLabeler) -> LabelRequest:
    candidate = Candidate(path=path, kind="data", image=0, structure=place)
    return LabelRequest(key=label_key(place, labeler.fingerprint), candidate=candidate, generation=0)


def tasks_of(given: argparse.Namespace, console: Console) -> list[Task]:
    """All runs asked for, in the order they are done: quick cases first. Cases with elements the prior does not know
    are left out, and named."""
    names = given.cases.split(",") if given.cases else list(CASES)
    half: Half | str = given.half
    chosen = [CASES[name] for name in names if given.cases or half in ("all", CASES[name].half)]
    prior = "" if given.prior == "none" else str(Path(given.prior).absolute())
    if lacking := unknown_elements(chosen, prior):
        named = ", ".join(f"{name} ({' '.join(symbols)})" for name, symbols in lacking.items())
        console.print(f"left out, {Path(prior).name} does not know their elements: {named}", soft_wrap=True)
        chosen = [case for case in chosen if case.name not in lacking]
    code = code_sha256(prior)
    return [
        Task(case=case.name, variant=variant, seed=int(seed), prior=prior, cache=str(given.cache), code=code)
        for variant in given.variants.split(",")
        for case in chosen
        for seed in given.seeds.split(",")
    ]


def unknown_elements(cases: Sequence[Case], prior: str) -> dict[str, list[str]]:
    """By case, the elements that the model in the file ``prior`` does not know; nothing where it knows all."""
    if not prior:
        return {}
    from alcore.mace.models import load_foundation, model_elements

    known = set(model_elements(load_foundation(prior)))
    found = {case.name: {int(z) for atoms in case.built.values() for z in atoms.numbers} - known for case in cases}
    return {name: [chemical_symbols[z] for z in sorted(numbers)] for name, numbers in found.items() if numbers}


def done_keys(file: Path, *, keep_code: bool) -> set[str]:
    """Keys of the records that need no repetition; those that broke down are tried again."""
    if not file.is_file():
        return set()
    records = [json.loads(line) for line in file.read_text("utf-8").splitlines() if line.strip()]
    keys = [record["key"] for record in records if "error" not in record]
    return {key.rpartition("|")[0] if keep_code else key for key in keys}


def prepare(tasks: Sequence[Task], console: Console) -> None:
    """Relaxed end states and true barriers, before processes would compute them at the same time."""
    for name in dict.fromkeys(task.case for task in tasks):
        began = time.perf_counter()
        found = baselines.truths(CASES[name], Path(tasks[0].cache))
        if (took := time.perf_counter() - began) > 1:
            console.print(f"{name}: true barriers {found} in {took:.0f} s", highlight=False)


def told(record: Mapping[str, Any]) -> str:
    """A record in a line."""
    head = f"{record['case']} {record['variant']} seed {record['seed']}"
    if "error" in record:
        return f"[red]{head}: {record['error'].strip().splitlines()[-1]}[/red]"
    errors = [hop["error_ev"] for hop in record["hops"].values() if hop["error_ev"] is not None]
    error = f"error {1e3 * max(errors, key=abs):+.1f} meV" if errors else "no barrier"
    verdict = "verified" if record["converged"] else f"[yellow]{record['code_of_decision']}[/yellow]"
    return f"{head}: {record['calls']} calls, {verdict}, {error}, {record['seconds_loop']:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="names, comma-separated; empty: all of --half")
    parser.add_argument("--half", choices=["development", "test", "all"], default="all")
    parser.add_argument("--variants", default="default", help=f"comma-separated: {', '.join(VARIANTS)}")
    parser.add_argument("--prior", default="none", help="a .model file, or none")
    parser.add_argument("--seeds", default="0", help="comma-separated")
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--out", type=Path, default=Path("labels.jsonl"), help="records are appended here")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder of relaxed states and true barriers")
    parser.add_argument("--keep-code", action="store_true", help="records of other code count as done, too")
    given = parser.parse_args()
    for name, known in ((given.cases, CASES), (given.variants, VARIANTS)):
        if unknown := [part for part in name.split(",") if part and part not in known]:
            parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    if given.prior != "none" and not Path(given.prior).is_file():
        parser.error(f"no such file: {given.prior}")
    console = Console()
    done = done_keys(given.out, keep_code=given.keep_code)
    tasks = [
        t for t in tasks_of(given, console) if (t.key.rpartition("|")[0] if given.keep_code else t.key) not in done
    ]
    console.print(f"{len(tasks)} runs to do, {len(done)} records in {given.out}")
    if not tasks:
        return
    console.print(load_prior(tasks[0].prior, [1], 0)[2])
    try:
        prepare(tasks, console)
    except baselines.NoTruthError as error:
        raise SystemExit(str(error)) from error
    work(tasks, given.jobs, given.out, console)


def work(tasks: Sequence[Task], jobs: int, out: Path, console: Console) -> None:
    """A fresh process a run, so that peak memory is its own; records are written as they come."""
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool,
        Progress(*columns, console=console) as progress,
        out.open("a", encoding="utf-8") as file,
    ):
        shown = progress.add_task("runs", total=len(tasks))
        for future in as_completed([pool.submit(run_task, task) for task in tasks]):
            try:
                record = future.result()
            except BrokenProcessPool:
                console.print("[red]a process was killed (out of memory?); start again: what is done is kept[/red]")
                return
            file.write(json.dumps(record, allow_nan=True) + "\n")
            file.flush()
            progress.console.print(told(record), highlight=False)
            progress.advance(shown)


if __name__ == "__main__":
    main()
