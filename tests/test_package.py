"""What `pip install .` brings: the requirements, the files of the wheel, and work without TensorFlow."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
ACCELERATORS = ("cuda12", "cuda13", "tpu")
# imported by us, brought by another requirement
BROUGHT_BY = {"absl-py": "ml-collections", "jaxlib": "jax", "ml-dtypes": "jax"}


def normalise(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def bounds_of(requirements) -> dict[str, str]:
    """Name and marker of each requirement -> its bounds. Two bounds for one name are an error."""
    bounds: dict[str, str] = {}
    for requirement in requirements:
        wanted, _, marker = requirement.replace('"', "'").partition(";")
        name, bound = re.fullmatch(r"([\w.-]+)(.*)", wanted.strip()).groups()
        key = f"{normalise(name)} {marker.strip()}".strip()
        assert bounds.setdefault(key, bound) == bound, f"{key}: {bound} and {bounds[key]}"
    return bounds


def test_requirements_file_repeats_the_bounds_of_the_project():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    repeated = bounds_of(line for line in lines if line and not line.startswith("#"))
    extras = [wanted for name, extra in EXTRAS.items() if name not in ACCELERATORS for wanted in extra]
    own = [wanted for wanted in extras if not wanted.startswith("mvar_jax[")]
    assert repeated == bounds_of([*PROJECT["dependencies"], *own])


def test_extras_of_accelerators_are_those_of_jax():
    assert {name: EXTRAS[name] for name in ACCELERATORS} == {name: [f"jax[{name}]"] for name in ACCELERATORS}


def imported_by(folder: Path) -> set[str]:
    """Top-level names that the Python files of a folder import."""
    names = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module.partition(".")[0])
    return names - sys.stdlib_module_names - {"mvar_jax"}


def test_every_import_is_a_requirement_and_the_reverse():
    distributions = packages_distributions()
    imported = {normalise(distributions[name][0]) for name in imported_by(ROOT / "mvar_jax")}
    imported = {BROUGHT_BY.get(name, name) for name in imported}
    runtime = {key.partition(" ")[0] for key in bounds_of(PROJECT["dependencies"])}
    assert imported == runtime | {"clu", "tensorflow-datasets"}


def test_everything_but_events_and_tfds_works_without_tensorflow(tiny_model, tmp_path):
    golden = ROOT / "tests" / "golden" / "tiny"
    command = [sys.executable, str(ROOT / "tests" / "package_case.py"), tiny_model, golden, tmp_path]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("TensorBoard events are not written") == 1, result.stderr
    assert "mvar_jax[tensorboard]" in result.stderr and "Traceback" not in result.stderr
