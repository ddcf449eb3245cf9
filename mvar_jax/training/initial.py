"""The weights that a run starts from: those of a model whose classes may be others."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mvar_jax.checkpoints.class_names import (
    NUM_IMAGENET_CLASSES,
    ClassNames,
    class_names_of,
    imagenet_spellings,
    read_classes,
)
from mvar_jax.checkpoints.model_directory import (
    IDS_FREE,
    check_shapes,
    ids_fingerprint,
    load_model,
    module_from_dict,
    module_to_dict,
)
from mvar_jax.convert.weights import load_published, load_published_tokenizer
from mvar_jax.errors import InputError
from mvar_jax.fields import put_below
from mvar_jax.files.paths import as_path
from mvar_jax.models.networks import Networks
from mvar_jax.models.refiner import Refiner, check_base
from mvar_jax.models.transformer import Transformer
from mvar_jax.scales import KNOWN_SIDES

CLASS_TABLE = "class_embed"


class Initial(NamedTuple):
    """Initial weights.

    Attributes:
      params: the parameter tree, or its top-level entries that are given; the others are the run's own.
      fresh_rows: rows of the class table that the run initializes itself, `[C + 1] bool`; None for none.
      note: what is said when they are used, "" for nothing.
    """

    params: Any
    fresh_rows: np.ndarray | None = None
    note: str = ""


def load_initial(
    path: str, transformer: Transformer, label_names: Sequence[str], tokenizer: Networks | None = None
) -> Initial | None:
    """Load the weights to start from: a model directory, a workdir or a published file (MVAR or VAR); None for "".

    If the other model has another number of classes, its class table gives the row of "no class" and those of the
    classes that have a name of `label_names` there. The other rows are the run's own. If it has the same classes in
    another order, its rows go by name; as many other classes take over the rows as they are. A model of a tokenizer
    with other ids is taken too, and the note says so.

    Args:
      path: of the weights.
      transformer: the model of the run.
      label_names: names of its classes.
      tokenizer: networks of the data's tokenizer; None compares no ids.

    Raises InputError if another parameter has another shape than the transformer's.
    """
    if not path:
        return None
    directory, note = as_path(path, "config.init_from"), ""
    if directory.is_dir():
        modules, trees = load_model(directory)
        params = trees.get("transformer")
        if tokenizer is not None and (differing := _differing_ids(modules, trees, tokenizer)):
            note = f"config.init_from={path} was trained with a tokenizer of other ids than the data's "
            note += f"({differing[0]} and {differing[1]}): its weights have to learn the new ids"
        if params is None:
            raise InputError(
                f"config.init_from={path} holds no transformer",
                field="config.init_from",
                given=path,
                expected="a directory with a transformer",
            )
    else:
        params = load_published(path, transformer.sides, "config.init_from")[1]
    num_classes = len(params[CLASS_TABLE]) - 1
    check_shapes(directory, "transformer", transformer.clone(num_classes=num_classes), params)
    names = _names_of(directory, num_classes)
    found = [names.numbers_named(name) for name in label_names]
    sources = [numbers[0] if len(numbers) == 1 else None for numbers in found]  # unknown there, or of several classes
    initial, own = Initial(params), list(range(num_classes))
    if num_classes != transformer.num_classes:
        initial = _with_classes(path, params, sources)
    elif None not in sources and sorted(sources) == own != sources:
        initial = _in_order(path, params, sources)
    return initial._replace(note="; ".join(filter(None, [initial.note, note])))


def _differing_ids(modules: dict, trees: dict, tokenizer: Networks) -> tuple[str, str] | None:
    """Return the fingerprints of the ids of a model's own tokenizer and of the data's, None if they are equal.

    None too if the model has no tokenizer.
    """
    if "tokenizer" not in modules:
        return None
    there = ids_fingerprint(modules["tokenizer"], trees["tokenizer"])
    ours = ids_fingerprint(tokenizer.tokenizer, tokenizer.tokenizer_params)
    return None if there == ours else (there, ours)


def load_initial_tokenizer(
    path: str, given: dict[str, Any], image_size: int, train_parts: str
) -> tuple[dict[str, Any], Initial]:
    """Load the tokenizer to start from: a model directory, a workdir or a published file (VAR).

    Args:
      path: of the weights.
      given: the fields that the config's model section gives; the others are those of the tokenizer.
      image_size: side of the images, which tells the sides of a published file if they are not given.
      train_parts: "decoder" must keep all fields that the ids depend on, but `sides`.

    Returns (all fields of the model section, initial weights). Raises InputError if there is no tokenizer, or its
    weights have other shapes than the model.
    """
    directory = as_path(path, "config.init_from")
    sides = given.get("sides") or KNOWN_SIDES.get(image_size)
    if directory.is_dir():
        modules, trees = load_model(directory)
        if "tokenizer" not in modules:
            words = f"config.init_from={path} holds no tokenizer"
            raise InputError(words, field="config.init_from", given=path, expected="a directory with a tokenizer")
        found, params = modules["tokenizer"], trees["tokenizer"]
    elif sides is None:
        words = f"config.model.sides must be given for {image_size} px: they do not follow from "
        words += f"config.init_from={path}"
        raise InputError(words, field="config.model.sides", given=None, expected="the side of each token map")
    else:
        found, params = load_published_tokenizer(path, tuple(sides), "config.init_from")
    fields = module_to_dict(found) | given
    module = module_from_dict("tokenizer", fields, "config.model")
    check_shapes(directory, "tokenizer", module, params)
    if train_parts != "decoder":
        words = f"config.init_from={path} is trained further with config.train_parts=all, which changes its ids: "
        return fields, Initial(params, note=f"{words}token caches and transformers of it do not fit the result")
    ids_of = lambda module: ids_fingerprint(module.clone(sides=found.sides), params)
    if ids_of(module) != ids_of(found):
        before, now = module_to_dict(found), module_to_dict(module)
        name = next(n for n in given if n not in ("sides", *IDS_FREE) and before[n] != now[n])
        words = f"config.model.{name} must be {before[name]!r} as in config.init_from={path} with "
        words += f"config.train_parts=decoder, which keeps the ids, got {now[name]!r}"
        raise InputError(words, field=f"config.model.{name}", given=now[name], expected=repr(before[name]))
    return fields, Initial(params)


def load_base(path: str, refiner: Refiner, tokenizer: Networks, label_names: Sequence[str]) -> Networks:
    """Load the transformer that a refiner refines; return it with the tokenizer of the data.

    Args:
      path: of its model directory or workdir.
      refiner: the module of the run.
      tokenizer: networks of the data's tokenizer alone.
      label_names: names of the data's classes.

    Raises InputError if there is no transformer, or one of other sizes, classes or tokens.
    """
    field = "config.init_from"
    expected = "a model directory or workdir with a transformer"
    if not path:
        words = f"{field} must name {expected}, which the refiner refines, got ''"
        raise InputError(words, field=field, given=path, expected=expected)
    directory = as_path(path, field)
    modules, params = load_model(directory)
    if "transformer" not in modules:
        raise InputError(f"{field}={path} holds no transformer", field=field, given=path, expected=expected)
    transformer = modules["transformer"]
    try:
        check_base(refiner, transformer)
    except InputError as error:
        raise put_below(error, "config.model") from None
    if differing := _differing_ids(modules, params, tokenizer):
        there, ours = differing
        words = f"{field}={path} was trained with a tokenizer of other ids than the data's: their fingerprints "
        words += f"are {there} and {ours}; name the transformer of these data"
        raise InputError(words, field=field, given=there, expected=ours)
    num_classes, own = transformer.num_classes, read_classes(directory, field)
    if num_classes != len(label_names) or own not in ((), tuple(label_names)):
        words = f"{field}={path} must have the {len(label_names)} classes of the data in their order, "
        words += f"got {num_classes} classes" + " of other names or order" * (num_classes == len(label_names))
        raise InputError(words, field=field, given=num_classes, expected="the classes of the data")
    return tokenizer.replace(transformer=transformer, params=params["transformer"], refiner=refiner)


def _names_of(path: Path, num_classes: int) -> ClassNames:
    if path.is_dir():
        return class_names_of(path)
    return ClassNames(imagenet_spellings() if num_classes == NUM_IMAGENET_CLASSES else ())


def _with_classes(path: str, params: Any, sources: list[int | None]) -> Initial:
    table = np.asarray(params[CLASS_TABLE])
    rows, fresh = np.zeros((len(sources) + 1, table.shape[1]), table.dtype), np.ones(len(sources) + 1, bool)
    rows[-1], fresh[-1] = table[-1], False
    for label, source in enumerate(sources):
        if source is not None:
            rows[label], fresh[label] = table[source], False
    num_kept = len(fresh) - 1 - int(fresh.sum())
    note = f"config.init_from={path} has {len(table) - 1} classes and the data have {len(sources)}: "
    note += f"the class table keeps the row of no class and those of {num_kept} classes of equal name, "
    note += f"its other rows ({fresh.sum()}) are new; "
    return Initial({**params, CLASS_TABLE: rows}, fresh, f"{note}all other weights are kept")


def _in_order(path: str, params: Any, sources: list[int]) -> Initial:
    rows = np.asarray(params[CLASS_TABLE])[[*sources, -1]]
    note = f"config.init_from={path} has the classes of the data in another order: rows of the class table go by name"
    return Initial({**params, CLASS_TABLE: rows}, note=note)
