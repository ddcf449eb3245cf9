"""Imports point down only: one floor per package, and no cycle among modules."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent / "mvar_jax"

# lowest first; a package imports only from packages listed before it, and from itself
FLOORS = [
    "errors",
    "stopping",
    "progress",
    "schema",
    "fields",
    "values",
    "scales",
    "sharding",
    "ops",
    "files",
    "processes",
    "models",
    "data",
    "hardware",
    "checkpoints",
    "tokens",
    "sampling",
    "convert",
    "training",
    "api",
    "evaluation",
    "digits",
    "scorers",
    "build",
    "planning",
    "cli",
    "__main__",
]


def floor_of(module: str) -> int:
    """Return the floor of a module's package. Raises ValueError for a package that has none."""
    return FLOORS.index(module.split(".")[0])


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


def test_packages_import_only_from_the_floors_below_them():
    upward = []
    for path in FILES:
        name = module_name(path)
        upward += [f"{name} -> {other}" for other in imports_of(path) if floor_of(other) > floor_of(name)]
    assert not upward


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
    below = [path for path in FILES if floor_of(module_name(path)) < FLOORS.index("build")]
    assert below
    assert not [str(path) for path in below if "ml_collections" in path.read_text()]


def test_mesh_axes_are_named_in_one_file():
    quoted = ('"fsdp"', '"tensor"', "'fsdp'", "'tensor'")
    namers = {module_name(p) for p in FILES if any(word in p.read_text() for word in quoted)}
    assert namers == {"sharding"}
