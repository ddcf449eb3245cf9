"""Train a tokenizer, a transformer or its refiner from a config; resumes the run that WORKDIR holds."""

import dataclasses
import functools
import signal
from pathlib import Path

from mvar_jax.cli.configuration import add_config_argument, read_config
from mvar_jax.cli.machine import add_machine_arguments, print_machine, use_compilation_cache
from mvar_jax.errors import InputError
from mvar_jax.fields import flatten
from mvar_jax.files.paths import as_path
from mvar_jax.processes import group
from mvar_jax.stopping import STOPPED_STATUS

SUMMARY = "train a tokenizer, a transformer or its refiner from a config"


def add_arguments(parser) -> None:
    """Add --config, --workdir and the options of the machine."""
    add_config_argument(parser)
    add_machine_arguments(parser)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="checkpoints, metrics and pictures go here")
    words = "refuse a damaged newest checkpoint instead of resuming from the newest good one"
    parser.add_argument("--strict", action="store_true", help=words)
    parser.add_argument(
        "--no_lock",
        action="store_true",
        help="do not check that no other run uses WORKDIR: for storage that can neither lock nor keep a lease",
    )
    parser.add_argument(
        "--allow_change",
        action="append",
        default=[],
        metavar="KEY[,KEY]",
        help="let the run in WORKDIR go on with other values of these config keys, such as "
        "optimizer.base_learning_rate; config.json keeps what changed and when; may be repeated",
    )


def run(args) -> int:
    """Return 0 if the run is complete, 1 if it failed, 130 after Ctrl-C, STOPPED_STATUS after another signal."""
    config = read_config(args.config, args.overrides)
    workdir = as_path(args.workdir, "workdir")
    use_compilation_cache(args.compilation_cache)

    from mvar_jax import build
    from mvar_jax.checkpoints.class_names import read_classes
    from mvar_jax.checkpoints.manager import has_checkpoint
    from mvar_jax.cli.config_files import split_argument
    from mvar_jax.training import loop
    from mvar_jax.training.resume_rules import check_allowed
    from mvar_jax.training.saving import say

    settings = build.build_settings(config)
    given = (key.strip() for keys in args.allow_change for key in keys.split(","))
    allowed = {key.removeprefix("config.") for key in given if key}
    check_allowed(allowed, config["task"])
    resumes = has_checkpoint(workdir)
    kept = read_classes(workdir, "workdir") if resumes else ()
    config = build.with_class_order(config, kept)
    config, initial = build.with_initial_model(config, workdir)
    task, modules, frozen = build.build_task(config, initial, resumes)
    check_same_in_all(config, task)
    print_machine(task.run.mesh)
    for note in notes_on(task):
        say(note)
    if described := build.describe_epochs(config, task):
        say(described)
    settings = dataclasses.replace(settings, num_steps=task.run.num_steps)
    config = build.with_steps(config, task.run)
    if (config_arg := split_argument(args.config)[1]) is not None:
        config["config_arg"] = config_arg
    check_classes(workdir, kept, task.data["train"].label_names)
    prepare = functools.partial(describe, workdir, modules, frozen, config["task"], task)
    options = {"has_lock": not args.no_lock, "strict": args.strict, "allow_change": allowed}
    result = loop.run(task, workdir, settings, config, prepare, **options)
    if result.interrupted is None:
        return 0
    return 130 if result.interrupted == signal.SIGINT else STOPPED_STATUS


def notes_on(task) -> list[str]:
    """Return what is unusual about the data and the mesh, a line each."""
    notes = [note for source in task.data.values() for note in source.notes]
    if whole := task.whole_dimensions():
        notes.append(f"the mesh does not divide these dimensions; each device holds them whole: {'; '.join(whole)}")
    return notes if task.has_evaluation else [*notes, "there is no evaluation: the data have no validation split"]


def check_same_in_all(config: dict, task) -> None:
    """Raise InputError in every process of the run unless all were given the same config and data."""
    here = group.current()
    here.check_same("config", "config", dict(flatten(config)))
    here.check_same("data", "data with", dict(flatten(task.data_identity)))


def check_classes(workdir: Path, kept: tuple[str, ...], names: tuple[str, ...]) -> None:
    """Raise InputError if the run in the workdir was begun with other classes. kept: its classes, () if unknown."""
    if kept in ((), names):
        return
    changed = ", ".join(sorted(set(kept) ^ set(names))[:5]) or "their order"
    words = f"classes must be the {len(kept)} that {workdir} was trained on, got {len(names)}; different: {changed}"
    raise InputError(words, field="classes", given=len(names), expected=f"the {len(kept)} of {workdir}")


def describe(workdir: Path, modules: dict, frozen: dict, trains: str, task) -> None:
    """Make the workdir a whole model on its own, and the place of the lists of skipped files.

    Args:
      workdir: the run's folder, held by this run.
      modules: what model.json describes.
      frozen: weights of the modules that are not trained, by kind.
      trains: the module whose weights are in the checkpoints.
      task: the task; it knows classes and skipped files.
    """
    import jax

    from mvar_jax.checkpoints.manager import has_checkpoint
    from mvar_jax.checkpoints.model_directory import CLASSES_FILE, MODEL_FILE, write_model_file
    from mvar_jax.checkpoints.trees import save_tree
    from mvar_jax.data.pipeline import is_bad
    from mvar_jax.files.atomic import write_json

    for split, skipped in task.skipped.items():
        source, transform = task.data[split], task.transform
        is_still_bad = lambda entry: is_bad(source, transform, entry["number"], entry["name"])  # noqa: B023
        skipped.keep_in(workdir / f"skipped_{split}{jax.process_index() or ''}.json", is_still_bad)
    if jax.process_index():
        return
    write_json(workdir / CLASSES_FILE, list(task.data["train"].label_names))
    if (workdir / MODEL_FILE).exists() and has_checkpoint(workdir):
        return  # without a checkpoint it may be of another config
    for kind, params in frozen.items():
        save_tree(workdir / kind, params)
    write_model_file(workdir, modules, trains=trains, base=task.base)
