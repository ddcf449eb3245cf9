"""Which interpreter and platform the scripts choose, with stand-ins for everything that they start."""

import sys

import pytest
from stand_ins import Machine, make_program

CHOOSE = 'source launch/environment.sh; choose_environment; echo "$PYTHON $VENV"'


def choose(machine: Machine, **environment: str):
    return machine.run("bash", "-c", CHOOSE, **environment)


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        ({}, "python3.12 .venv"),
        ({"PYTHON": "3.12"}, "python3.12 .venv-3.12"),
        ({"PYTHON": "3.13"}, "python3 .venv-3.13"),
        ({"PYTHON": "mine"}, "mine .venv-3.11"),
        ({"PYTHON": "3.12", "VENV": "there"}, "python3.12 there"),
    ],
)
def test_interpreter_is_chosen_by_version_and_by_name(machine, wanted, chosen):
    for name, version in {"python3.12": "3.12", "python3": "3.13", "mine": "3.11"}.items():
        machine.add_python(name, version)
    assert choose(machine, **wanted).stdout == f"{chosen}\n"


def test_relative_path_of_an_interpreter_is_relative_to_where_its_user_is(machine):
    machine.add_python("my/python", "3.12")
    log = machine.folder / "log"
    make_program(machine.copy / ".venv-3.12/bin/python", f'#!/bin/sh\necho "$@" >> {log}\n')
    script = str(machine.copy / "launch/setup.sh")
    result = machine.run("bash", script, cwd=machine.folder / "home", PYTHON="my/python")
    assert result.returncode == 0, result.stderr
    assert "-r requirements.txt" in log.read_text()


@pytest.mark.parametrize("root", ["home/.pyenv", "elsewhere"])
def test_interpreter_of_pyenv_is_found_if_none_is_on_the_path(machine, root):
    machine.add_python("python3", "3.9")
    machine.add_python(f"../{root}/versions/3.11.7/bin/python", "3.11")
    result = choose(machine, PYENV_ROOT=str(machine.folder / root) if root == "elsewhere" else "")
    assert result.stdout == f"{machine.folder / root}/versions/3.11.7/bin/python .venv\n", result.stderr


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({}, "no Python 3.12 3.11 3.13 on the PATH or in pyenv"),
        ({"PYTHON": "3.10"}, "PYTHON=python3 is Python 3.10; supported are 3.12 3.11 3.13"),
        ({"PYTHON": "3.12"}, "PYTHON=python3.12 does not run"),
        ({"PYTHON": "nowhere"}, "PYTHON=nowhere does not run"),
    ],
)
def test_unsupported_interpreter_is_one_line_and_status_2(machine, wanted, words):
    machine.add_python("python3", "3.10")
    result = choose(machine, **wanted)
    assert result.returncode == 2 and not result.stdout
    assert result.stderr.count("\n") == 1 and words in result.stderr


def stand_in(status: int = 0) -> str:
    return f'#!/bin/sh\necho "$0 with $PYTHON: $@"\nexit {status}\n'


@pytest.mark.parametrize(
    ("versions", "status", "lines"),
    [
        (("3.11", "3.12"), 0, ["Python 3.11, tests --ignore=tests/test_sharding", "Python 3.12, tests/ops"]),
        (("3.12",), 0, ["Python 3.11: not found", "Python 3.12, installation: passed"]),
        ((), 1, ["Python 3.11: not found", "Python 3.12: not found"]),
    ],
)
def test_ci_says_which_interpreter_is_missing(machine, versions, status, lines):
    for version in versions:
        machine.add_python(f"python{version}", version)
    for name in ("setup", "test", "test_deviceless"):
        make_program(machine.copy / "launch" / f"{name}.sh", stand_in())
    result = machine.run("bash", ".ci/run")
    assert result.returncode == status, result.stderr
    assert all(any(found.startswith(line) for found in result.stdout.splitlines()) for line in lines), result.stdout


@pytest.mark.parametrize(("code", "status", "words"), [(3, 1, "FAILED with status 3"), (75, 0, "not run, see above")])
def test_ci_fails_with_its_tests_and_not_with_what_could_not_be_installed(machine, code, status, words):
    machine.add_python("python3.12", "3.12")
    for name in ("setup", "test", "test_deviceless"):
        make_program(machine.copy / "launch" / f"{name}.sh", stand_in(code if name == "test_deviceless" else 0))
    result = machine.run("bash", ".ci/run")
    assert result.returncode == status
    assert f"Python 3.12, compiling without devices: {words}" in result.stdout


def test_ci_fails_if_one_of_its_environments_cannot_be_set_up(machine):
    for version in ("3.11", "3.12"):
        machine.add_python(f"python{version}", version)
    for name in ("test", "test_deviceless"):
        make_program(machine.copy / "launch" / f"{name}.sh", stand_in())
    make_program(machine.copy / "launch/setup.sh", "#!/bin/sh\ncase $PYTHON in *3.11) exit 4 ;; esac\n")
    result = machine.run("bash", ".ci/run")
    assert result.returncode == 1
    assert "Python 3.11, installation: FAILED with status 4" in result.stdout
    assert "Python 3.12, installation: passed" in result.stdout


# answers what jax would, keeps its environment and words, and makes what each command should
MVAR = """#!/bin/sh
[ "$1" = -c ] && echo $PLATFORM && exit
echo "${{JAX_PLATFORMS-unset}} ${{XLA_FLAGS-unset}} $3" >> {log}
while [ $# -gt 0 ]; do
  case $1 in --workdir|--out) out=$2 ;; esac
  shift
done
mkdir -p $out
cd $out
for name in model cache report; do echo > $name.json; done
echo > samples.npz; echo > samples.png
"""


def prepare_quickstart(machine: Machine) -> dict[str, str]:
    """Make the environment that quickstart.sh would set up; return the variables that choose it."""
    make_program(machine.copy / ".venv/bin/python", MVAR.format(log=machine.folder / "log"))
    ready = 'echo "$(cat requirements.txt pyproject.toml setup.py | cksum) " > .venv/.ready'
    assert machine.run("bash", "-c", ready).returncode == 0
    return {"PYTHON": sys.executable, "VENV": ".venv"}


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_quickstart_uses_the_accelerator_that_is_there_else_the_cpu(machine, platform):
    chosen = prepare_quickstart(machine)
    result = machine.run("bash", "launch/quickstart.sh", PLATFORM=platform, **chosen)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = (machine.folder / "log").read_text().splitlines()
    stages = ["train", "cache_tokens", "train", "train", "sample", "sample", "report"]
    assert [line.split()[-1] for line in lines] == stages
    cpu = "cpu --xla_force_host_platform_device_count=2 --xla_backend_optimization_level=1"
    expected = cpu if platform == "cpu" else "unset unset"
    assert all(line.startswith(expected) for line in lines), lines


@pytest.mark.parametrize(
    ("where", "run", "made"),
    [
        ("copy", "runs/mine", "copy/runs/mine"),
        ("home", "runs/mine", "home/runs/mine"),
        ("home", "", "copy/runs/quickstart"),
    ],
)
def test_quickstart_writes_into_the_folder_that_its_user_means(machine, where, run, made):
    (machine.folder / "home").mkdir()
    script = str(machine.copy / "launch/quickstart.sh")
    chosen = prepare_quickstart(machine) | ({"RUN": run} if run else {})
    result = machine.run("bash", script, cwd=machine.folder / where, PLATFORM="cpu", **chosen)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [path.parent for path in machine.folder.rglob("stages.json")] == [machine.folder / made]
    if where == "copy":  # a log of stages knows its commands: a run made so far must not be repeated
        assert f'"{run}/tokenizer"' in (machine.folder / made / "stages.json").read_text()


def test_extras_are_installed_with_jax_and_kept_by_later_calls(machine):
    log = machine.folder / "log"
    make_program(machine.copy / ".venv/bin/python", f'#!/bin/sh\necho "$@" >> {log}\n')
    machine.add_python("python3.12", "3.12")

    def words_of_pip(**environment: str) -> str:
        log.write_text("")
        result = machine.run("bash", "launch/setup.sh", **environment)
        assert result.returncode == 0, result.stderr
        return log.read_text()

    first = words_of_pip()
    assert "-r requirements.txt\n" in first and "jax[" not in first
    assert "-r requirements.txt jax[cuda12]\n" in words_of_pip(EXTRAS="cuda12")
    assert words_of_pip() == ""  # up to date, with the extra
    (machine.copy / "requirements.txt").open("a").write("# changed")
    assert "-r requirements.txt jax[cuda12]\n" in words_of_pip()
    assert "-r requirements.txt\n" in words_of_pip(EXTRAS="")
