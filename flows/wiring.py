"""From a run file's settings to the loop's parts: hops, specs, the surrogate's trainer, the labeler."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alcore.endpoints import make_pair, read_atoms, read_band
from alcore.errors import EndpointError, InputError
from alcore.identity import sha256_hex
from alcore.neb import NebSpec
from alcore.protocols import StepName
from alcore.selection import SelectSpec
from alcore.state import LoopSpec
from alcore.stopping import StopSpec
from alcore.types import EndpointPair, Label
from flows import environment
from flows.settings import (
    ExecutorSettings,
    ModelSettings,
    PathSettings,
    RunSettings,
    checked_name,
)

if TYPE_CHECKING:
    from ase import Atoms

    from alcore.mace.trainer import MaceTrainer
    from alcore.mace.trust import Trust
    from alcore.protocols import LeaseStore, RecordStore
    from calculators.base import ResolvedCalculator
    from calculators.executors.queues import QueueSpec, Resources
    from calculators.labeling import ExecutorLabeler
    from calculators.pyiron_labeling import PyironLabeler
    from flows.bounded import BoundedLabeler


NODES_WORTH_THREADS = 3000
"""Atoms in one batch from which on several threads gain more than they lose."""
SUBMIT_COMMANDS = {"slurm": "sbatch", "sge": "qsub", "torque": "qsub", "lsf": "bsub", "flux": "flux"}
TRUSTED_MODELS = "trusted-models.txt"
"""In the data folder: sha256 of model files that may run code when they are loaded, one a line."""
QUEUE_LIMIT = 1000
"""Jobs in a queue of all runs together, if the run file does not say."""


@dataclass(frozen=True, kw_only=True)
class Prior:
    """The starting model and where it comes from; ``name`` is what every result that uses it prints."""

    model: Any
    untrained: bool
    name: str


def read_pair(path: PathSettings, where: str) -> EndpointPair:
    """One hop's end states, read and checked.

    Raises:
        InputError: a file that cannot be read.
        EndpointError: end states that do not belong together.
    """
    inner: list[Atoms] = []
    if path.band is not None:
        files = Path(path.band).name
        first, *inner, last = read_band(Path(path.band), f"{where}.band")
    else:
        assert path.initial is not None and path.final is not None
        files = f"{Path(path.initial).name} and {Path(path.final).name}"
        first, last = read_atoms(Path(path.initial), f"{where}.initial"), read_atoms(Path(path.final), f"{where}.final")
    moments = path.magnetic_moments
    if moments is not None and len(moments) != len(first):
        raise EndpointError(
            f"{len(moments)} magnetic moments for {len(first)} atoms",
            where=f"{where}.magnetic_moments",
            mend="give one an atom",
        )
    try:
        return make_pair(
            path.name,
            first,
            last,
            inner=inner,
            charge=path.charge,
            magnetic_moments=moments,
            relax=path.relax_endpoints,
            reference_barrier_ev=path.reference_barrier_ev,
        )
    except EndpointError as error:
        raise EndpointError(error.message, where=f"{where} ({error.where}: {files})", mend=error.mend) from error


def read_pairs(settings: RunSettings) -> list[EndpointPair]:
    """All hops; raises at the first that is wrong (``check`` lists them all)."""
    return [read_pair(path, f"paths.{k}") for k, path in enumerate(settings.paths)]


def loop_spec(settings: RunSettings, sitting: int = 0) -> LoopSpec:
    """The loop's settings as the science takes them."""
    chosen = settings.neb.symmetry
    symmetry = settings.calculator.is_symmetric() if chosen is None else chosen
    return LoopSpec(
        run=settings.name,
        sitting=sitting,
        neb=NebSpec(**settings.neb.model_dump(exclude={"symmetry"}), symmetry=symmetry),
        select=SelectSpec(**settings.select.model_dump(), well_tolerance_ev=settings.stop.barrier_tolerance_ev),
        stop=StopSpec(**settings.stop.model_dump()),
    )


def resolve_calculator(settings: RunSettings, pairs: Sequence[EndpointPair]) -> ResolvedCalculator:
    """The reference calculator, checked against the structures it will be asked about.

    Raises:
        CalculatorError: unknown, wrongly set, not here, lacks an element, or cannot take a charge.
    """
    from calculators.registry import resolve

    resolved = resolve(settings.calculator.name, vouched(settings.calculator.name, settings.calculator.arguments()))
    resolved.check_available()
    for pair in pairs:
        resolved.check_structure(pair.initial, f"path {pair.name}")
    return resolved


def vouched(calculator: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """A calculator's settings as ``given``; a model file of ``mace`` that is in the data folder's list has its sha256
    set, which is how calculators are told that somebody vouches for it."""
    arguments = dict(given)
    if calculator != "mace" or arguments.get("sha256") is not None:
        return arguments
    from alcore.mace.trust import read_list

    with suppress(OSError, TypeError):  # the calculator says what is wrong with the file
        sha256 = sha256_hex(Path(arguments.get("model", "")).read_bytes())
        if sha256 in read_list(environment.data_dir() / TRUSTED_MODELS):
            arguments["sha256"] = sha256
    return arguments


def make_labeler(
    settings: RunSettings,
    resolved: ResolvedCalculator,
    store: LeaseStore,
    data_dir: Path,
    log: Callable[[str], None] | None = None,
) -> BoundedLabeler:
    """Computes reference labels, no more at once over all runs than the executor says; its folders lie under the data
    folder, by run.

    Args:
        store: holds the leases by which labels that run are counted.
        log: takes lines for a person.
    Raises:
        InputError: the executor's settings make no sense, or its queue is not here.
    """
    folder = run_folder(data_dir, settings.name)
    environment.make_private(data_dir)
    return open_labeler(settings.executor, resolved, store, folder, run=settings.name, log=log)


def run_folder(data_dir: Path, run: str) -> Path:
    """Where the calculations of a run lie. ``calculations`` may be a link to another disk; what is in it stays there.

    Raises:
        InputError: that would be elsewhere.
    """
    base = data_dir / "calculations"
    folder = base / checked_name(run)
    if not folder.resolve().is_relative_to(base.resolve()):
        raise InputError("is a link that leads out of the data folder", where=str(folder), mend="remove it")
    return folder


def open_labeler(
    executor: ExecutorSettings,
    resolved: ResolvedCalculator,
    store: LeaseStore,
    folder: Path,
    *,
    run: str,
    log: Callable[[str], None] | None = None,
) -> BoundedLabeler:
    """As ``make_labeler``, outside a run; ``run`` is what others who wait for a slot are told."""
    from flows.bounded import BoundedLabeler

    make = pyiron_labeler if executor.kind == "pyiron" else _local
    inner = make(executor, resolved, folder, log)
    pool, limit = label_pool(executor)
    return BoundedLabeler(inner, store, pool=pool, limit=limit, workers=executor.workers, run=run, log=log)


def _local(
    executor: ExecutorSettings, resolved: ResolvedCalculator, folder: Path, log: Callable[[str], None] | None
) -> ExecutorLabeler:
    from calculators.labeling import LocalLabeler

    return LocalLabeler(
        resolved,
        folder,
        workers=executor.workers,
        timeout_s=executor.timeout_s,
        threads=executor.threads,
        memory_gb=executor.memory_gb,
        retries=executor.retries,
        beside=folder.parent,
        log=log,
    )


def pyiron_labeler(
    executor: ExecutorSettings, resolved: ResolvedCalculator, folder: Path, log: Callable[[str], None] | None = None
) -> PyironLabeler:
    """Of an executor of kind ``pyiron``; nobody else's labels are counted.

    Raises:
        InputError: the settings make no sense, or another process labels in that folder.
        CalculatorError: pyiron or pysqa is not installed.
    """
    from calculators.pyiron_labeling import PyironLabeler

    queue, resources = _jobs(executor)
    return PyironLabeler(
        resolved,
        folder,
        workers=executor.workers,
        queue=queue,
        resources=resources,
        timeout_s=executor.timeout_s,
        retries=executor.retries,
        beside=folder.parent,
        log=log,
    )


def _jobs(executor: ExecutorSettings) -> tuple[QueueSpec | None, Resources]:
    from calculators.executors.queues import QueueSpec, Resources, walltime_s

    queue = None
    if executor.queue is not None and executor.walltime is not None:
        queue = QueueSpec(
            system=executor.queue,
            walltime_s=walltime_s(executor.walltime),
            partition=executor.partition,
            submit_options=tuple(executor.submit_options),
        )
    return queue, Resources(
        cores=cores_of_a_label(executor),
        threads=executor.threads,
        memory_gb=executor.memory_gb,
        modules=tuple(executor.modules),
        prologue=tuple(executor.prologue),
    )


def check_executor(executor: ExecutorSettings) -> None:
    """Raises:
    InputError: what the executor needs is not here, or its settings make no sense together.
    """
    if executor.kind != "pyiron":
        return
    queue, _ = _jobs(executor)
    if find_spec("pyiron_base") is None:
        raise InputError("pyiron_base is not installed", where="executor.kind", mend="pip install pyiron_base pysqa")
    if queue is not None and shutil.which(command := SUBMIT_COMMANDS[queue.system]) is None:
        mend = "run al-loop where jobs are submitted, or remove `queue`"
        raise InputError(f"{command} is not on this machine", where="executor.queue", mend=mend)


def cores_of_a_label(executor: ExecutorSettings) -> int:
    """Cores one calculation keeps busy."""
    return max(executor.cores, executor.threads)


def label_pool(executor: ExecutorSettings) -> tuple[str, int]:
    """What the labels of this executor share with those of all other runs, and how many of them may run there."""
    if executor.queue is not None:
        return f"queue-{executor.queue}", executor.max_running or QUEUE_LIMIT
    carried = max(1, environment.cores() // cores_of_a_label(executor))
    return f"local-{environment.host()}", executor.max_running or carried


def elements(pairs: Sequence[EndpointPair], given: Sequence[Label]) -> list[int]:
    """Atomic numbers the model must know."""
    structures = [pair.initial for pair in pairs] + [label.structure for label in given]
    return sorted({int(z) for structure in structures for z in structure.numbers})


def make_prior(settings: ModelSettings, numbers: Sequence[int], seed: int) -> Prior:
    """The starting model: a foundation model, or an untrained one from the seed.

    Raises:
        ModelError: it cannot be loaded, or does not know an element.
    """
    from alcore.mace.models import build_model, check_elements, open_foundation

    device = pick_device(settings.device)
    if settings.foundation is None:
        name = f"untrained MACE (seed {seed}) on an elastic network of the end states, which has seen no reference data"
        return Prior(model=build_model(numbers, seed).to(device), untrained=True, name=name)
    from alcore.mace.pretraining import prior_line
    from alcore.mace.reshaping import for_elements, one_headed

    found = open_foundation(settings.foundation, device=device, trust=model_trust(settings.foundation_sha256))
    check_elements(found.model, numbers)
    head = settings.training().head
    name = f"foundation model {found.file}, sha256 {found.sha256[:16]}" + (f", head {head}" if head else "")
    model = for_elements(one_headed(found.model, head, "model.options.head"), numbers)
    return Prior(model=model, untrained=False, name=", ".join(filter(None, (name, prior_line(found.model)))))


def model_trust(sha256: str | None) -> Trust:
    """Who vouches for model files that run code: the run file's ``model.foundation_sha256``, the data folder's list."""
    from alcore.mace.trust import Trust

    return Trust(sha256=sha256, listed=environment.data_dir() / TRUSTED_MODELS)


def pick_device(asked: str) -> str:
    """``cpu`` or ``cuda``; ``auto`` takes the GPU where there is one.

    Raises:
        InputError: CUDA was asked for and there is none.
    """
    import torch

    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked.startswith("cuda") and not torch.cuda.is_available():
        raise InputError("there is no CUDA device here", where="model.device", mend="set device: auto or cpu")
    return asked


def make_trainer(settings: RunSettings, prior: Prior, store: RecordStore) -> MaceTrainer:
    """The trainer; weights are kept in the store.

    Raises:
        InputError: the file of what is to be replayed cannot be used.
        ModelError: the strategy needs a foundation model.
    """
    from alcore.mace.sanity import SanitySpec
    from alcore.mace.strategies import StrategySpec
    from alcore.mace.trainer import MaceTrainer, ModelSpec
    from alcore.mace.training import TrainSpec

    model, options = settings.model, settings.model.training()
    check_e0s(options.e0s, prior.model)
    spec = ModelSpec(
        strategy=model.strategy,
        committee=model.committee,
        correction=model.correction,
        train=TrainSpec(**{field.name: getattr(options, field.name) for field in fields(TrainSpec)}),
        learn=StrategySpec(
            lora_rank=options.lora_rank,
            lora_alpha=options.lora_alpha,
            frozen_layers=tuple(options.frozen_layers),
            replay_weight=options.replay_weight,
        ),
        replay_count=options.replay_count,
        sanity=SanitySpec(energy_rmse_ev=options.sane_energy_ev, force_rmse_ev_per_ang=options.sane_force_ev_per_ang),
        seed=settings.seed,
        prior_name=prior.name,
        run=settings.name,
    )
    return MaceTrainer(
        prior.model,
        spec,
        untrained=prior.untrained,
        save_model=store.save_model,
        load_model=store.load_model,
        replay=read_replay(settings, prior.model),
    )


def check_e0s(e0s: Mapping[str, float] | None, model: Any) -> None:
    """Raises:
    InputError: not all elements of the run have one.
    """
    from ase.data import chemical_symbols

    from alcore.mace.models import model_elements

    if e0s is None:
        return
    if missing := [chemical_symbols[z] for z in model_elements(model) if chemical_symbols[z] not in e0s]:
        raise InputError(
            f"no energy of an isolated atom of {', '.join(missing)}",
            where="model.options.e0s",
            mend="give it, or remove e0s: they are fitted then",
        )


def read_replay(settings: RunSettings, model: Any) -> tuple[list[Label], str] | None:
    """What strategy ``multihead`` replays and where it comes from; None if the starting model shall say it itself.

    Raises:
        InputError: unreadable, or of no use to the model.
    """
    import numpy as np

    from alcore.mace.replay import replay_file

    options = settings.model.training()
    if options.replay_file is None:
        return None
    path, rng = Path(options.replay_file), np.random.default_rng([settings.seed, 2])
    labels = replay_file(path, model, options.replay_count, rng, "model.options.replay_file")
    return labels, f"{path.name}, sha256 {sha256_hex(path.read_bytes())[:16]}"


def read_data(settings: RunSettings, resolved: ResolvedCalculator) -> list[Label]:
    """Labels the user brought along.

    Raises:
        InputError: a file or frame that cannot be used.
    """
    return [label for k in range(len(settings.data)) for label in read_data_file(settings, resolved, k)]


def read_data_file(settings: RunSettings, resolved: ResolvedCalculator, k: int) -> list[Label]:
    """The labels of the ``k``-th file; raises as ``read_data``."""
    from alcore.dataset import read_labels

    calculator = settings.calculator.name
    return read_labels(
        Path(settings.data[k]), fingerprint=resolved.fingerprint, calculator=calculator, where=f"data.{k}"
    )


def at_once(settings: RunSettings) -> dict[StepName, int]:
    """How many of each step may run at the same time: labels as asked for, all else one after the other (two threads
    that make TorchScript modules at once break each other: "module is not installed as a submodule")."""
    return {"label": settings.executor.workers}


@contextmanager
def few_threads(pairs: Sequence[EndpointPair], spec: LoopSpec) -> Iterator[None]:
    """One thread an operation while bands are small: several would wait for each other longer than they compute."""
    nodes = max(len(pair.initial) for pair in pairs) * (spec.neb.n_images + 2)
    with threads(1 if nodes < NODES_WORTH_THREADS else environment.cores()):
        yield


@contextmanager
def threads(wanted: int) -> Iterator[None]:
    """So many an operation, whatever the machine has: results depend on it in their last digits."""
    import torch
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    torch.set_num_threads(wanted)
    try:
        with threadpool_limits(limits=wanted):
            yield
    finally:
        torch.set_num_threads(before)
