"""Write docs/commands.md and docs/configuration.md from the parser and the options classes.

Run `python docs/generate.py` after changing an option or its description; tests/docs/test_reference.py compares.
The meaning of a config key is its line in the `Attributes:` (or `Args:`, `Keys`) section of a docstring.
"""

import argparse
import dataclasses
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

REGENERATE = "python docs/generate.py"
HEADER = f"<!-- Written by `{REGENERATE}`; edit the docstrings and help texts instead. -->\n\n"


class Undocumented(Exception):
    """A config key or an option without a meaning."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of a table: a key or option, its type, its default (None if it is required) and its meaning."""

    name: str
    type: str
    default: str | None
    meaning: str


def section_of(thing: type | Callable, title: str) -> dict[str, str]:
    """Return name -> meaning of the "name: meaning" lines in the docstring section that begins with `title`."""
    lines = iter((inspect.getdoc(thing) or "").splitlines())
    found, name, indent = {}, None, 0
    for line in lines:
        if re.match(rf"{title}\b.*:$", line):
            break
    for line in lines:
        if not line.strip():
            continue
        depth = len(line) - len(line.lstrip())
        if depth == 0:
            break
        indent = indent or depth
        if depth == indent:
            name, _, line = line.strip().partition(":")
            found[name] = ""
        if name is not None:
            found[name] = f"{found[name]} {line.strip()}".strip()
    return found


def type_name(annotation) -> str:
    """Return an annotation as it is written in a config: `Any` is only used for dtypes, which are given by name."""
    if annotation is typing.Any:
        return "str"
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " | ".join("None" if one is types.NoneType else type_name(one) for one in typing.get_args(annotation))
    is_plain = isinstance(annotation, type) and not typing.get_args(annotation)
    return annotation.__name__ if is_plain else str(annotation)


def show(value) -> str:
    """Return a default as it is written in a config."""
    if isinstance(value, type) or hasattr(value, "dtype"):
        import jax.numpy as jnp

        value = jnp.dtype(value).name
    return json.dumps(value) if isinstance(value, str) else repr(value)


def field_rows(cls: type, leave_out: Iterable[str] = ()) -> list[Row]:
    """Return a row for each field of an options class or linen module. Raise Undocumented for one without meaning."""
    meanings, hints, rows = section_of(cls, "Attributes"), typing.get_type_hints(cls), []
    for field in dataclasses.fields(cls):
        if field.name in leave_out:
            continue
        if not meanings.get(field.name):
            raise Undocumented(f"{cls.__name__}.{field.name} has no line in the Attributes section of its docstring")
        default = None if field.default is dataclasses.MISSING else show(field.default)
        rows.append(Row(field.name, type_name(hints[field.name]), default, meanings[field.name]))
    return rows


def argument_rows(function: Callable, leave_out: Iterable[str] = ()) -> list[Row]:
    """Return a row for each argument of a function. Raise Undocumented for one without meaning."""
    meanings, hints, rows = section_of(function, "Args"), typing.get_type_hints(function), []
    for name, parameter in inspect.signature(function).parameters.items():
        if name in leave_out:
            continue
        if not meanings.get(name):
            raise Undocumented(f"{function.__name__}({name}) has no line in the Args section of its docstring")
        default = None if parameter.default is inspect.Parameter.empty else show(parameter.default)
        rows.append(Row(name, type_name(hints[name]), default, meanings[name]))
    return rows


def top_level_rows() -> list[Row]:
    """Return the keys outside any section, each once."""
    from mvar_jax import build
    from mvar_jax.training.loop import LoopSettings
    from mvar_jax.training.task import RunOptions

    rows = [Row(name, "str", None, meaning) for name, meaning in section_of(build.check_config, "Keys").items()]
    rows += field_rows(RunOptions, leave_out=("optimizer", "mesh"))
    known = {row.name for row in rows}
    return rows + [row for row in field_rows(LoopSettings) if row.name not in known]


def config_sections() -> dict[str, list[Row]]:
    """Return the title of each part of docs/configuration.md -> its keys, in order."""
    from mvar_jax.data.options import DataOptions
    from mvar_jax.models.refiner import Refiner
    from mvar_jax.models.tokenizer import Tokenizer
    from mvar_jax.models.transformer import Transformer
    from mvar_jax.sharding import make_mesh
    from mvar_jax.training.adversary import AdversaryOptions
    from mvar_jax.training.codebook_options import CodebookOptions
    from mvar_jax.training.optimizer import OptimizerOptions
    from mvar_jax.training.transformer_step import PhaseOptions

    linen = ("parent", "name")
    return {
        "Top level": top_level_rows(),
        "data": field_rows(DataOptions),
        "model, if task is tokenizer": field_rows(Tokenizer, linen),
        "model, if task is transformer": field_rows(Transformer, linen),
        "model, if task is refiner": field_rows(Refiner, linen),
        "codebook (tokenizer)": field_rows(CodebookOptions),
        "adversary (tokenizer)": field_rows(AdversaryOptions),
        "phases (transformer and refiner)": field_rows(PhaseOptions),
        "optimizer": field_rows(OptimizerOptions),
        "mesh": argument_rows(make_mesh, ("devices", "dimensions")),
    }


CONFIGURATION_INTRO = """# Configuration

A config file is Python with a function `get_config()` that returns an `ml_collections.ConfigDict`; `configs/` holds
examples, each with its command. `train`, `plan`, `data` and `cache_tokens` read one by `--config`, and any key can be
set on the command line: `--config.optimizer.weight_decay=0.1`. `--config FILE:ARG` calls `get_config(ARG)`, ARG being
all the text after the colon; `config.json` in the workdir keeps it as `config_arg`. An unknown key is an error, and
so is a value of another type than the table's or out of range.

A default is what a config without the key means. A key without a default must be in every config of its task; of
`num_steps` and `epochs` exactly one is above 0.

A run that has a checkpoint resumes with the keys it began with. The keys marked `free` may change: they do not change
what is learned. `data.path`, `data.cache` and `data.tokenizer` are free because the data themselves are compared:
`data_identity.json` in the workdir has the number of images, the classes and a digest of the file names of a split,
the fingerprints of the tokenizer and of a refiner's transformer, and what a token cache was made of. `epochs` and
`optimizer.warmup_epochs` are free because the steps that follow from them are compared. A key that a newer version
added counts as its default in an older run.

A run that has reached its end goes on if `num_steps` or `epochs` is larger now. `train --allow_change KEY` lets a run
go on with another value of a key marked `allow`; the other keys never change. `config.json` notes both kinds of
change as `history`: time, step, key, old and new value. The stream of images goes on at step times `batch_size`, so a
larger batch skips images and a smaller one repeats some. After extending a run, its rates are those of a run started
with the new length.
"""


def escape(cell: str) -> str:
    """Return a cell whose `|` and, outside code, `<` Markdown does not take for its own."""
    parts = cell.replace("|", r"\|").split("`")
    return "`".join(part if i % 2 else part.replace("<", "&lt;") for i, part in enumerate(parts))


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    lines = [head, ("---",) * len(head), *([escape(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def code(text: str | None) -> str:
    return f"`{text}`" if text else ""


def resume_rule(rule) -> str:
    return "free" if rule.is_free else "allow" if rule.may_change else ""


def configuration_page() -> str:
    """Return docs/configuration.md."""
    from mvar_jax.training.resume_rules import rules_of

    parts = [CONFIGURATION_INTRO]
    for title, rows in config_sections().items():
        section, *condition = title.removesuffix(")").split()
        task = next((kind for kind in ("tokenizer", "transformer", "refiner") if kind in condition), "transformer")
        rules = rules_of(task)
        prefix = "" if title == "Top level" else section.rstrip(",") + "."
        free = {row.name: resume_rule(rules[prefix + row.name]) for row in rows}
        cells = [(code(row.name), code(row.type), code(row.default), free[row.name], row.meaning) for row in rows]
        parts.append(f"## {title}\n\n" + table(("key", "type", "default", "resume", "meaning"), cells))
    return HEADER + "\n".join(parts)


def option_row(action: argparse.Action) -> Row:
    """Return the row of an option. Raise Undocumented if it has no help text."""
    if not action.help:
        raise Undocumented(f"option {action.option_strings[0]} has no help text")
    value = action.metavar or ("{" + ",".join(map(str, action.choices)) + "}" if action.choices else "")
    if action.nargs != 0:
        value = value or (action.type.__name__ if action.type else action.dest.upper())
        value = f"{value} [{value}]" if action.nargs == "+" else value
    default = "required" if action.required else None
    if action.default is not None and action.nargs != 0:
        default = str(action.default)
    told = f"{action.default:g}" if isinstance(action.default, float) else str(action.default)
    meaning = re.sub(rf" \(default:? {re.escape(told)}\)$", "", action.help.replace("%(default)s", told))
    return Row(f"{action.option_strings[0]} {value}".strip(), "", default, meaning)


def commands_page() -> str:
    """Return docs/commands.md."""
    from mvar_jax.__main__ import EXIT_STATUSES, make_parser

    (commands,) = [a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    parts = [
        "# Commands\n\n`mvar COMMAND` and `python -m mvar_jax COMMAND` are the same; `--help` prints this too.\n",
        EXIT_STATUSES + "\n",
    ]
    summaries = [f"- [{choice.dest}](#{choice.dest}): {choice.help}" for choice in commands._choices_actions]
    parts.append("\n".join(summaries) + "\n")
    for name, parser in commands.choices.items():
        rows = [option_row(action) for action in parser._actions if action.dest != "help"]
        cells = [(code(row.name), row.default or "", row.meaning) for row in rows]
        text = [f"## {name}", parser.description.strip(), table(("option", "default", "meaning"), cells).strip()]
        parts.append("\n\n".join([*text, *([parser.epilog.strip() + "."] if parser.epilog else [])]) + "\n")
    return HEADER + "\n".join(parts)


PAGES = {"commands.md": commands_page, "configuration.md": configuration_page}


def main() -> None:
    for name, page in PAGES.items():
        (DOCS / name).write_text(page())
        print(f"wrote {DOCS / name}")


if __name__ == "__main__":
    main()
