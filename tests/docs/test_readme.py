"""What README.md and docs/*.md show can be run: commands, files, links and Python."""

import ast
import inspect
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

import mvar_jax
from mvar_jax.__main__ import COMMANDS, make_parser
from mvar_jax.api import Model
from mvar_jax.cli.configuration import read_config

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELL = ("", "bash", "sh", "shell")
OVERRIDE = "--config."
WITH_OVERRIDES = ("train", "plan", "data", "cache_tokens")


def blocks(page: Path, language: str) -> list[str]:
    return [text for found, text in FENCE.findall(page.read_text()) if found == language]


def commands(page: Path) -> list[list[str]]:
    """Return the words of each command in the page's shell blocks, without comments and leading VAR=value."""
    lines = "\n".join(text for language in SHELL for text in blocks(page, language)).replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            del words[0]
        if words:
            found.append(words)
    return found


def mvar_arguments(words: list[str]) -> list[str] | None:
    """Return the arguments of a `mvar` or `python -m mvar_jax` command, None for another command."""
    if words[0] == "mvar":
        return words[1:]
    return words[3:] if words[:3] == ["python", "-m", "mvar_jax"] else None


MVAR_LINES = [
    (page.name, shlex.join(words)) for page in PAGES for words in commands(page) if mvar_arguments(words) is not None
]
PYTHON_BLOCKS = [(page.name, text) for page in PAGES for text in blocks(page, "python")]


def documented_keys(generate, config: dict) -> set[str]:
    """Return the keys, such as data.path, that the reference lists for a config's task."""
    keys = set()
    for title, rows in generate.config_sections().items():
        if "if task is" in title and not title.endswith(config["task"]):
            continue
        section = "" if title == "Top level" else re.match(r"\w+", title)[0] + "."
        keys |= {section + row.name for row in rows}
    return keys


@pytest.mark.parametrize("page, line", MVAR_LINES)
def test_command_parses(generate, page, line):
    words = mvar_arguments(shlex.split(line))
    args, rest = make_parser().parse_known_args(words)
    assert all(word.startswith(OVERRIDE) and "=" in word for word in rest)
    assert args.command in WITH_OVERRIDES or not rest
    if args.command in WITH_OVERRIDES:
        config = read_config(str(ROOT / args.config), rest)
        given = {word.removeprefix(OVERRIDE).partition("=")[0] for word in rest}
        assert given <= documented_keys(generate, config)


def test_every_model_directory_that_is_used_is_made_by_a_shown_command():
    """In pages and configs; files such as models/var_d16.pth are downloads."""
    text = "\n".join(page.read_text() for page in [*PAGES, *(ROOT / "configs").glob("*.py")])
    named = set(re.findall(r"(?<![\w/])models/[\w.-]*\w", text))
    made = set(re.findall(r"--out (models/[\w.-]*\w)", text))
    assert made and not [name for name in named - made if not name.endswith(".pth")]


def test_a_tokenizer_that_is_converted_alone_is_given_its_scales():
    """The published file serves 256 and 512 px, so `convert` refuses to guess."""
    of_configs = [path.read_text().replace("\\\\\n", " ") for path in (ROOT / "configs").glob("*.py")]
    lines = [line for _, line in MVAR_LINES] + [line for text in of_configs for line in text.splitlines()]
    alone = [line for line in lines if "convert " in line and "--tokenizer " in line and "--transformer" not in line]
    assert len(alone) >= 2 and all("--patch_nums" in line for line in alone)


def test_front_page_shows_every_command():
    table = (ROOT / "README.md").read_text()
    assert not [name for name in COMMANDS if f"| `{name}` |" not in table]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    files = re.findall(r"\b(?:configs|launch|benchmarks|notebooks|tests)/[\w./-]*\.\w+", page.read_text())
    assert not [file for file in files if not (ROOT / file).is_file()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_links_to_headings_lead_to_one():
    slug = lambda title: re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
    for page in PAGES:
        for link, anchor in re.findall(r"\]\(([^)#\s]*)#([^)]+)\)", page.read_text()):
            target = (page.parent / link) if link else page
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page}: {anchor}"


@pytest.mark.parametrize("page, text", PYTHON_BLOCKS)
def test_python_uses_what_the_model_has(page, text):
    """Each `m.name` must be an attribute of `Model`, its keywords must be parameters, and each import must exist."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module == "mvar_jax":
            packages = [alias.name for alias in node.names if not hasattr(mvar_jax, alias.name)]
            assert all(find_spec(f"mvar_jax.{name}") for name in packages)
        match node:
            case ast.Attribute(value=ast.Name(id="m"), attr=name):
                assert hasattr(Model, name), name
            case ast.Attribute(value=ast.Name(id="mvar_jax"), attr=name):
                assert hasattr(mvar_jax, name), name
        match getattr(node, "func", None):
            case ast.Attribute(value=ast.Name(id="m"), attr=name):
                function, num_given = getattr(Model, name), 1 + len(node.args)
            case ast.Attribute(value=ast.Name(id="mvar_jax"), attr=name) | ast.Name(id=name):
                function, num_given = getattr(mvar_jax, name), len(node.args)
            case _:
                continue
        keywords = {keyword.arg: None for keyword in node.keywords}
        inspect.signature(function).bind(*[None] * num_given, **keywords)


def test_table_of_array_axes_is_the_one_of_the_code():
    from mvar_jax.sharding import MESH_AXES, RULES

    text = (ROOT / "docs" / "scaling.md").read_text()
    lines = text.split("| array axis | mesh axes |")[1].split("\n\n")[0].splitlines()[2:]
    shown = {}
    for line in lines:
        names, axes = line.strip("| ").split(" | ")
        found = tuple(axis for axis in axes.split(", ") if axis in MESH_AXES)
        shown |= {name: found for name in re.findall(r"`(\w+)`", names)}
    as_tuple = lambda entry: (entry,) if isinstance(entry, str) else tuple(entry or ())
    assert shown == {name: as_tuple(entry) for name, entry in RULES.items()}
