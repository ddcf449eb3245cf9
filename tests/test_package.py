"""What `pip install .` brings: the requirements, the files of the wheel, and work without TensorFlow."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

import mvar_jax

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


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The wheel of a clean copy of the repository, installed into a folder of its own."""
    root = tmp_path_factory.mktemp("package")
    for folder in ("mvar_jax", "configs"):
        shutil.copytree(ROOT / folder, root / "copy" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root / "copy")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", root, root / "copy"])
    (wheel,) = root.glob("*.whl")
    run([*pip, "install", "--no-deps", "--no-index", "--target", root / "installed", wheel])
    return root / "installed"


def run(command, **options) -> str:
    """The standard output of a command that must succeed."""
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_wheel_holds_every_file_of_the_package_and_the_configs(installed):
    def files_of(folder: Path) -> set[str]:
        paths = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        return {str(path.relative_to(folder)) for path in paths}

    configs = {f"configs/{name}" for name in files_of(ROOT / "configs")}
    assert files_of(installed / "mvar_jax") == files_of(ROOT / "mvar_jax") | configs


def test_one_package_is_installed(installed):
    others = {path.name for path in installed.iterdir() if path.suffix != ".dist-info"}
    assert others == {"mvar_jax", "bin"}


def test_installed_program_reads_shipped_and_own_configs_in_any_folder(installed, tmp_path):
    (tmp_path / "my.py").write_text("from configs import imagenet256_d16 as d16\n\nget_config = d16.get_config\n")
    code = "import mvar_jax; from mvar_jax.cli.configuration import read_config as read; print(mvar_jax.__file__)"
    code += "; print(read('my.py', []) == read('imagenet256_d16', []) == read('configs/imagenet256_d16.py', []))"
    environment = os.environ | {"PYTHONPATH": str(installed)}
    there, is_same = run([sys.executable, "-c", code], cwd=tmp_path, env=environment).split()
    assert Path(there).parent == installed / "mvar_jax" and is_same == "True"
    assert "train" in run([installed / "bin" / "mvar", "--help"], cwd=tmp_path, env=environment)


def test_citation_and_module_have_the_version_of_the_project():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"] == mvar_jax.__version__
    assert citation["license"] == PROJECT["license"]["text"]
    assert "2505.12742" in citation["preferred-citation"]["doi"]


def test_pre_commit_has_the_ruff_of_the_requirements():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert {wanted for hook in repository["hooks"] for wanted in hook["additional_dependencies"]} == {
        f"ruff{bounds_of(EXTRAS['test'][1:])['ruff']}"
    }
