"""Figures of compiled programs, kept between calls."""

import collections
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

import mvar_jax
from mvar_jax.errors import InputError, shorten
from mvar_jax.fields import from_dict
from mvar_jax.files.atomic import write_json
from mvar_jax.files.json_files import parse_json
from mvar_jax.hardware.compiling import OutOfMemory
from mvar_jax.hardware.machines import HERE, platform_of
from mvar_jax.hardware.program_text import Array
from mvar_jax.hardware.scratch import num_cores, scratch_bytes
from mvar_jax.hardware.work import Collective, Work, work_of
from mvar_jax.ops.cost import attention_kernel_flops
from mvar_jax.planning.tasks import bytes_on_device, compile_program
from mvar_jax.training.programs import Program
from mvar_jax.training.task import DataTask

NUM_TOGETHER = 2  # programs that are compiled at once: a compiler works on one mostly with one core
COMPILER_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")


@dataclasses.dataclass(frozen=True)
class Figures:
    """What a compiled program needs, for one device.

    Attributes:
      part, name, runs, images, model_flops: of the `Program`; the last over all devices.
      params_bytes: of the trained parameters; of a program without a training state, of all arguments.
      optimizer_bytes: of the rest of the training state.
      argument_bytes: of all arguments, these included.
      activation_bytes: of what lives only while the program runs, on a CPU with what its libraries hold.
      is_refused: the compiler found the program too large for the device: its work is not known, and its activations
        are 0 unless the compiler named what it needs.
      compile_s: seconds of compilation.
      work, collectives: of the program.
    """

    part: str
    name: str
    runs: float
    images: int
    model_flops: float
    params_bytes: int
    optimizer_bytes: int
    argument_bytes: int
    activation_bytes: int
    is_refused: bool
    compile_s: float
    work: tuple[Work, ...] = ()
    collectives: tuple[Collective, ...] = ()

    @property
    def peak_bytes(self) -> int:
        """Return the memory while the program runs."""
        return self.argument_bytes + self.activation_bytes

    @property
    def flops(self) -> float:
        """Return the FLOPs of the products of one run, recomputation included."""
        return sum(work.times * work.flops for work in self.work)

    @property
    def num_bytes(self) -> float:
        """Return the bytes that one run reads and writes in memory."""
        return sum(work.times * work.num_bytes for work in self.work)


def measure(task: DataTask, programs: list[Program], target: str, config: dict, folder: Path | None) -> list[Figures]:
    """Return the figures of a task's programs, compiled for a target if they are not in the folder.

    Args:
      task, programs: of `tasks.make_task` and `tasks.programs_of`.
      target: their machine, see `compiling.devices_of`.
      config: of the task: what the folder's names are made of, with versions and code.
      folder: keeps the figures between calls; None keeps none.

    What is compiled is said on stderr, with its time and what is left.
    """
    files = [None if folder is None else folder / f"{_digest(config, target, one)}.json" for one in programs]
    found = [file and _read(file) for file in files]
    waiting = collections.deque(i for i, figures in enumerate(found) if figures is None)
    compiled_s: list[float] = []
    lock = threading.Lock()

    def compile_waiting() -> None:
        while True:
            with lock:
                if not waiting:
                    return
                number = waiting.popleft()
                left = f", {len(waiting)} more"
                if compiled_s:
                    seconds = sum(compiled_s) / len(compiled_s) * (len(waiting) + 1) / NUM_TOGETHER
                    left += f" (about {seconds:.0f} s in all)"
                say(f"compiling {programs[number].name} for {target}{left}")
            figures = compile_figures(task, programs[number], target)
            with lock:
                found[number] = figures
                compiled_s.append(figures.compile_s)
                say(f"{figures.name} took {figures.compile_s:.0f} s")
                _keep(files[number], figures)

    run_together(compile_waiting, waiting.clear)
    # how often it runs is no matter of the compiler
    pairs = zip(programs, found, strict=True)
    return [dataclasses.replace(figures, runs=one.runs, model_flops=one.flops) for one, figures in pairs if figures]


def say(words: str) -> None:
    """Print a line of progress."""
    print(f"plan: {words}", file=sys.stderr, flush=True)


def run_together(work: Callable[[], None], stop: Callable[[], Any]) -> None:
    """Run `work` in NUM_TOGETHER threads; `stop` must end their queue, and is called after an error or a signal."""

    def guarded() -> None:
        try:
            work()
        except BaseException:
            stop()
            raise

    with ThreadPoolExecutor(NUM_TOGETHER) as pool:
        try:
            for future in [pool.submit(guarded) for _ in range(NUM_TOGETHER)]:
                future.result()
        except BaseException:
            stop()
            raise


def _keep(file: Path | None, figures: Figures) -> None:
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, dataclasses.asdict(figures))
    except OSError as error:  # the plan itself needs no file
        say(f"{figures.name} is not kept for the next call: {shorten(error)}")


def compile_figures(task: DataTask, program: Program, target: str) -> Figures:
    """Compile one program and return its figures."""
    argument_bytes = bytes_on_device(program.arguments)
    params_bytes = argument_bytes if program.state is None else bytes_on_device(program.state.params)
    state_bytes = argument_bytes if program.state is None else bytes_on_device(program.state)
    begin = time.perf_counter()
    work, collectives, is_refused = [], [], False
    hosts = tuple(device.process_index for device in task.run.mesh.devices.flat)
    try:
        compiled = compile_program(task, program, target)
        work, collectives = work_of(compiled.text, hosts, functools.partial(_kernel_flops, task))
        argument_bytes, activation_bytes = compiled.argument_bytes, compiled.total_bytes - compiled.argument_bytes
        if platform_of(target) == "cpu":
            activation_bytes += scratch_bytes(compiled.text, num_cores())
    except OutOfMemory as error:
        is_refused, activation_bytes = True, max(0, error.needed_bytes - argument_bytes)
    return Figures(
        part=program.part,
        name=program.name,
        runs=program.runs,
        images=program.images,
        model_flops=program.flops,
        params_bytes=params_bytes,
        optimizer_bytes=state_bytes - params_bytes,
        argument_bytes=argument_bytes,
        activation_bytes=activation_bytes,
        is_refused=is_refused,
        compile_s=time.perf_counter() - begin,
        work=tuple(_merged(work)),
        collectives=tuple(_merged(collectives)),
    )


def _kernel_flops(task: DataTask, name: str, operands: list[Array]) -> float:
    """Return the FLOPs of an attention kernel by ops/cost; 0 for other kernels, which have no products."""
    transformer = getattr(task, "transformer", None)
    # a TPU's kernels have tables of the mask's blocks before the queries
    sides = next((one.sides for one in operands if len(one.sides) > 3 and one.dtype in ("bf16", "f16", "f32")), None)
    if not transformer or not sides:
        return 0
    if len(sides) == 5:  # a raw product `[B, N, 3, H, K]`
        sides = sides[:2] + sides[3:]
    return attention_kernel_flops(transformer.pyramid, name, sides)


def _merged(items: list) -> Iterator[Any]:
    """Yield equal items once, with the sum of their times."""
    times: collections.Counter = collections.Counter()
    for item in items:
        times[dataclasses.replace(item, times=0)] += item.times
    for item, total in times.items():
        yield dataclasses.replace(item, times=total)


def _digest(config: dict, target: str, program: Program) -> str:
    """Return a name for what decides on a program's figures."""
    arguments = jax.tree.map(str, program.arguments)
    versions = {name: _version(name) for name in COMPILERS}
    flags = {name: os.environ.get(name, "") for name in COMPILER_FLAGS}
    here = [(device.device_kind, device.client.platform_version) for device in jax.devices()[:1]]
    machine = [*here, num_cores()] if target == HERE else []
    parts = [config, target, machine, program.name, str(arguments), versions, flags, _code_digest()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


@functools.cache
def _code_digest() -> str:
    digest = hashlib.sha256()
    root = Path(mvar_jax.__file__).parent
    for path in sorted([*root.rglob("*.py"), *root.rglob("*.txtpb")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _read(file: Path) -> Figures | None:
    """Return the figures of a file, None if it is missing or damaged: they are compiled again."""
    try:
        values = dict(parse_json(file.read_text()))
        values["work"] = tuple(from_dict(Work, part, "work") for part in values["work"])
        values["collectives"] = tuple(from_dict(Collective, part, "collectives") for part in values["collectives"])
        return Figures(**values)
    except (OSError, ValueError, TypeError, KeyError, InputError):
        return None
