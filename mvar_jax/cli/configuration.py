"""Config files of ml_collections with `--config.KEY=VALUE` overrides."""

import ast
import difflib
from typing import Any

from mvar_jax.errors import InputError


def add_config_argument(parser) -> None:
    """Add `--config FILE`; the main parser collects the overrides."""
    words = "config file or a shipped one, such as digits; FILE:ARG takes what its get_config(ARG) returns"
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]", help=words)
    parser.epilog = "Any key of the config is set by --config.KEY=VALUE, such as --config.optimizer.weight_decay=0.1"


def read_config(config: str, overrides: list[str]) -> dict:
    """Load a config as nested dicts, with overrides applied; `build` checks keys, types and values.

    Raises InputError if the file is missing or broken, or an override names no key of a section.
    """
    from ml_collections.config_dict import RequiredValueError

    from mvar_jax.cli.config_files import find_config, load_config, split_argument

    texts: dict[str, list[str]] = {}
    for override in overrides:
        key, has_value, text = override.removeprefix("--config.").partition("=")
        if not has_value:
            raise InputError(f"{override} needs a value: {override}=VALUE", field=override.removeprefix("--"))
        texts.setdefault(key, []).append(text)
    path, argument = split_argument(config)
    values = load_config(find_config(path), argument)
    with values.unlocked(), values.ignore_type():
        for key in sorted(texts, key=lambda key: key.count(".")):  # a section before its keys
            section, name = _section_of(values, key)
            section[name] = _parse(texts[key], section.get_type(name) if name in section else object)
    try:
        return _plain(values.to_dict())
    except RequiredValueError as error:
        words = f"config {config} has a key without a value, which --config.KEY=VALUE must give: {error}"
        raise InputError(words, field="config", given=config, expected="a value for every key") from None


def _plain(value: Any) -> Any:
    """Return a value of a config with Python's numbers instead of numpy's, which config.json cannot hold."""
    import numpy as np

    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else value


def _section_of(config, key: str) -> tuple[Any, str]:
    """Return (section, name) of a key such as "optimizer.beta1". Raises InputError unless its sections are there."""
    from ml_collections import ConfigDict

    *parents, name = key.split(".")
    where = "config"
    for parent in parents:
        sections = [name for name, value in config.items() if isinstance(value, ConfigDict)]
        if parent not in sections:
            near = difflib.get_close_matches(parent, sections, n=1)
            hint = f". Did you mean {where}.{near[0]}?" if near else f"; sections are {', '.join(sections) or 'none'}"
            words = f"{where}.{parent} is no section of the config, got --config.{key}{hint}"
            raise InputError(words, field=f"{where}.{parent}", given=key, expected=", ".join(sections))
        config, where = config[parent], f"{where}.{parent}"
    if not name.isidentifier():
        raise InputError(f"--config.{key} must name a key of {where}", field=f"config.{key}", given=key)
    return config, name


def _parse(texts: list[str], wanted: type) -> Any:
    """Return the value that an option gives to a key; several options of a tuple are joined.

    wanted: type of the key's value in the file. What is not text of that type is any Python literal, else text.
    """
    from absl import flags
    from ml_collections.config_flags.tuple_parser import TupleParser

    if wanted is str:
        return texts[-1]
    parsers = {int: flags.IntegerParser(), float: flags.FloatParser(), bool: flags.BooleanParser()}
    try:
        if wanted is tuple:
            return sum((TupleParser().parse(text) for text in texts), ())
        if wanted in parsers:
            return parsers[wanted].parse(texts[-1])
    except (ValueError, TypeError):
        pass  # `build` says what is wrong with it
    text = {"true": "True", "false": "False"}.get(texts[-1], texts[-1])
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
