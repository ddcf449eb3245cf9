"""docs/commands.md and docs/configuration.md say what the code says."""

import ast
import dataclasses
from pathlib import Path

import pytest

from mvar_jax import build
from mvar_jax.cli.configuration import read_config

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("[!_]*.py"))


@pytest.mark.parametrize("name", ["commands.md", "configuration.md"])
def test_page_is_what_the_generator_writes(generate, name):
    assert (ROOT / "docs" / name).read_text() == generate.PAGES[name](), f"run {generate.REGENERATE}"


@pytest.mark.parametrize("name", CONFIGS)
def test_every_key_of_a_config_is_documented(generate, name):
    config = read_config(str(ROOT / "configs" / f"{name}.py"), [])
    documented = {title: {row.name for row in rows} for title, rows in generate.config_sections().items()}
    for key, value in config.items():
        if not isinstance(value, dict):
            assert key in documented["Top level"]
            continue
        (rows,) = [
            rows
            for title, rows in documented.items()
            if title.split()[0].rstrip(",") == key and ("if task is" not in title or title.endswith(config["task"]))
        ]
        assert set(value) <= rows


def test_every_documented_key_outside_sections_is_known_to_build(generate):
    for name in ("debug", "debug_transformer"):
        config = read_config(str(ROOT / "configs" / f"{name}.py"), [])
        for row in generate.top_level_rows():
            if row.name not in ("init_from", "train_parts"):
                default = None if row.default is None else ast.literal_eval(row.default)
                build.check_config({row.name: default} | config)


def test_field_without_a_meaning_is_refused(generate):
    @dataclasses.dataclass
    class Options:
        """Options.

        Attributes:
          known: has a meaning.
        """

        known: int = 1
        unknown: int = 2

    with pytest.raises(generate.Undocumented, match=r"Options\.unknown"):
        generate.field_rows(Options)


def test_default_and_meaning_of_a_field_are_shown(generate):
    @dataclasses.dataclass
    class Options:
        """Options.

        Attributes:
          side: side of the map, which
            goes on here: with a colon.
          name: a name.
        """

        side: int | None
        name: str = "x"

    side, name = generate.field_rows(Options)
    assert side == generate.Row("side", "int | None", None, "side of the map, which goes on here: with a colon.")
    assert name == generate.Row("name", "str", '"x"', "a name.")
