"""Imports point down only: a file imports from its own floor or floors below, and never in a circle."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "mvar_jax"

# first match wins; the floor of a file is the floor of everything it may import from
FLOORS = (
    ("errors", 0),
    ("scales", 0),
    ("sharding", 0),
    ("ops", 0),
    ("models", 1),
    ("training.accumulate", 2),
    ("training.optimizer", 2),
    ("training.schedules", 2),
    ("training.state", 2),
    ("training.transformer_step", 2),
    ("training.tokenizer_step", 2),
    ("sampling", 2),
    ("training", 3),
    ("data", 3),
    ("evaluation", 3),
    ("convert", 3),
    ("plan", 3),
    ("store", 3),
    ("model", 3),
    ("build", 4),
    ("cli", 4),
    ("__main__", 4),
)


def floor_of(module: str) -> int:
    for prefix, floor in FLOORS:
        if module == prefix or module.startswith(prefix + "."):
            return floor
    raise AssertionError(f"mvar_jax.{module} has no floor")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> dict[str, bool]:
    """Project modules that a file imports -> whether at its top level."""
    found: dict[str, bool] = {}
    tree = ast.parse(path.read_text())
    top = set(tree.body)
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            base = node.module or ""
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if not name.startswith("mvar_jax."):
                continue
            name = name.removeprefix("mvar_jax.")
            while name and not ((ROOT / Path(*name.split("."))).with_suffix(".py")).exists():
                if (ROOT / Path(*name.split(".")) / "__init__.py").exists():
                    break
                name = name.rpartition(".")[0]
            if name:
                found[name] = found.get(name, False) or node in top
    return found


FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    name = module_name(path)
    too_high = [other for other in imports_of(path) if floor_of(other) > floor_of(name)]
    assert not too_high, f"mvar_jax.{name} (floor {floor_of(name)}) imports from above: {too_high}"


def test_imports_have_no_cycle():
    graph = {module_name(path): set(imports_of(path)) for path in FILES}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import cycle: {' -> '.join((*trail, name))}"
        if name not in done:
            for other in graph.get(name, ()):
                if other != name:
                    visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_config_dicts_stay_in_the_doors():
    below = [path for path in FILES if floor_of(module_name(path)) < 4]
    assert below
    assert not [str(path) for path in below if "ml_collections" in path.read_text()]


def test_mesh_axes_are_named_in_one_file():
    quoted = ('"fsdp"', '"tensor"', "'fsdp'", "'tensor'")
    namers = {module_name(p) for p in FILES if any(word in p.read_text() for word in quoted)}
    assert namers == {"sharding"}
