"""The command `plan`: its report, what it keeps, and what it refuses."""

import json

import pytest

from mvar_jax.__main__ import main
from mvar_jax.hardware import machines
from mvar_jax.hardware.machines import machine_of, parse_target
from mvar_jax.planning import figures
from mvar_jax.planning.calibration import Rates

TOKENIZER = ["--tokenizer", "debug"]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The folder that keeps what was compiled."""
    return tmp_path_factory.mktemp("kept")


def plan(capfd, *arguments: str) -> tuple[int, str, str]:
    capfd.readouterr()
    try:
        status = main(["plan", *arguments])
    except SystemExit as error:
        status = error.code
    out, err = capfd.readouterr()
    return status, out, err


@pytest.fixture(autouse=True)
def fixed_rates(monkeypatch):
    """Rates of the machine here that need no measurement."""
    rates = Rates({"float32": 1e9, "bfloat16": 1e9}, 1e9, 1e-6, 1e-12)
    monkeypatch.setattr("mvar_jax.planning.calibration.measure_rates", lambda: rates)


def test_every_program_of_a_transformers_run_is_planned_once(capfd, tmp_path, kept, monkeypatch):
    """One row for each phase, the sampler and cache_tokens; a second call compiles nothing and reports the same."""
    files = ["--json", str(tmp_path / "plan.json"), "--chart", str(tmp_path / "plan.png")]
    command = ["--config", "debug_transformer", "--topology", "here", *TOKENIZER, "--samples", "2", *files]
    command += ["--compilation_cache", str(kept)]
    status, out, err = plan(capfd, *command)
    names = ["step, 5 tokens", "step, 16 tokens", "sample 2", "cache tokens of 64"]
    assert status == 0
    assert [line.split("  ")[0] for line in out.splitlines()[3:7]] == names
    assert "\nwhole run: 12 steps, " in out and "\nfits: " in out
    assert [line for line in err.splitlines() if " took " not in line] == [
        f"plan: compiling {name} for here, {3 - i} more" + line.partition(" more")[2]
        for i, (name, line) in enumerate(zip(names, [x for x in err.splitlines() if " took " not in x], strict=True))
    ]
    report = json.loads((tmp_path / "plan.json").read_text())
    coarse, fine = report["programs"][:2]
    assert (coarse["runs"], fine["runs"]) == (8, 4)  # two of three steps
    # Adam keeps two moments and the average is a third copy
    assert coarse["optimizer_bytes"] == pytest.approx(3 * coarse["params_bytes"], rel=0.01)
    assert coarse["flops"] >= coarse["model_flops"] / 2
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(figures, "compile_program", lambda *_: pytest.fail("compiled again"))
    assert plan(capfd, *command) == (0, out, "")


def test_a_damaged_file_of_what_was_compiled_is_compiled_again(tmp_path):
    path = tmp_path / "figures.json"
    for text in ("", "[]", "{}", '{"work": [], "collectives": []}'):
        path.write_text(text)
        assert figures._read(path) is None


REFUSED = {
    "an unknown machine": (
        ["--topology", "v5x:4x4"],
        "target must be one of here, a100-80, ",
        "did you mean v5",
    ),
    "a shape of this machine": (["--topology", "here:8"], "here has no shape", "got 'here:8'"),
    "a damaged shape": (["--topology", "h100:8x"], "target must be a machine and a shape", "got 'h100:8x'"),
    "a mesh that is not these devices": (
        ["--config.mesh.data=3"],
        "config.mesh must have axes whose product is 1",
    ),
    "a batch that does not divide": (["--config.accumulate_steps=3"], "config.batch_size must be", "got 8"),
    "no program of the parts": (
        ["--config", "debug", "--parts", "sample"],
        "--parts must be some of train, cache, the programs of debug, got sample",
    ),
    "hosts, cards and more": (["--topology", "h100:2x2x8"], "target must be a machine and a shape"),
    "a folder for a file": (["--json", "."], "--json must be a file, got the folder ."),
    "unknown parts": (["--parts", "train,test"], "--parts must be some of train, sample, cache, got test"),
    "no classes": (["--config.model.num_classes=0"], "config.model.num_classes must be given to plan without data"),
    "another tokenizer": (["--tokenizer", "digits_tokenizer"], "tokenizer.sides must be", "pass --tokenizer"),
    "a tokenizer's config": (["--tokenizer", "debug_transformer"], "--tokenizer must be the config of a tokenizer"),
    "epochs of unknown data": (
        ["--config.epochs=2", "--config.num_steps=0", "--config.data.size=0", "--config.data.source=digits"],
        "--images must be given",
    ),
    "no images": (["--images", "0"], "--images must be 1 or more, got 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_in_a_sentence(capfd, name):
    flags, *words = REFUSED[name]
    defaults = [] if "--tokenizer" in flags else TOKENIZER
    defaults += [] if "--topology" in flags else ["--topology", "here"]
    defaults += [] if "--config" in flags else ["--config", "debug_transformer"]
    status, out, err = plan(capfd, *defaults, *flags)
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert all(word in err for word in words), err


def test_a_config_that_trains_no_transformer_has_no_var(capfd):
    status, _, err = plan(capfd, "--config", "debug", "--topology", "here", "--compare", "var")
    assert status == 2
    assert err == "error: --compare needs a config of a transformer, got config.task=tokenizer\n"


def described(**changes) -> str:
    """Return the text of a target description."""
    values = {"name": "V9", "source": "", "platform": "tpu", "device_kinds": [], "memory_bytes": 1e9}
    rates = dict.fromkeys(("usable_bytes", "memory_bandwidth", "link_bandwidth", "network_bandwidth"), 1e9)
    return json.dumps(values | rates | {"flops": {"bfloat16": 1e9, "float32": 1e9}} | changes)


def test_a_card_without_its_description_names_the_file(monkeypatch, tmp_path, capfd):
    (tmp_path / "v9.json").write_text(described(platform="gpu"))
    monkeypatch.setattr(machines, "_folder", lambda: tmp_path)
    for function in (machines.machine_names, machine_of):
        monkeypatch.setattr(machines, function.__name__, function.__wrapped__)
    monkeypatch.setattr("mvar_jax.hardware.compiling.machine_of", machine_of.__wrapped__)
    status, _, err = plan(capfd, "--config", "debug", "--topology", "v9:2")
    assert status == 2 and err.count("\n") == 1
    assert "target v9 needs " in err and "v9.txtpb, XLA's description of the card" in err


@pytest.mark.parametrize(("target", "extra"), [("h100:8", "cuda12"), ("v5e:4x4", "tpu")])
def test_a_missing_compiler_names_its_extra(monkeypatch, capfd, target, extra):
    def missing(*_, **__):
        raise RuntimeError("no such plugin")

    monkeypatch.setattr("mvar_jax.hardware.compiling.topologies.get_topology_desc", missing)
    monkeypatch.setattr("mvar_jax.hardware.compiling.importlib.util.find_spec", lambda name: None)
    status, _, err = plan(capfd, "--config", "debug", "--topology", target)
    assert status == 2
    assert f'target {target} needs its compiler installed by `pip install "mvar_jax[{extra}]"`' in err


def test_figures_that_cannot_be_kept_are_reported_all_the_same(capfd, tmp_path):
    (tmp_path / "file").touch()
    command = ["--config", "debug", "--topology", "here", "--parts", "cache"]
    status, out, err = plan(capfd, *command, "--compilation_cache", str(tmp_path / "file"))
    assert status == 0 and "\nfits: " in out
    assert "plan: cache tokens of 64 is not kept for the next call: " in err


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "Expecting property name"),
        ("[1]", "cannot convert"),
        ('{"platform": "tpu"}', "v9.name is missing"),
        (described(flops={"bfloat16": "fast", "float32": 1e9}), "v9.flops.bfloat16 must be a number"),
        (described(flops={"bfloat16": 1e9}), "flops lacks float32"),
        (described(flops={"bfloat16": 1e9, "float32": 0}), "flops must be above 0"),
        (described(platform="gpuu"), "platform must be gpu, tpu, cpu, got gpuu"),
        (described(usable_bytes=2e9), "usable_bytes must be at most memory_bytes"),
        (described(memory_bandwidth=0), "memory_bandwidth must be a number above 0"),
    ],
)
def test_a_damaged_description_is_refused_with_its_file(monkeypatch, tmp_path, text, words):
    (tmp_path / "v9.json").write_text(text)
    monkeypatch.setattr(machines, "_folder", lambda: tmp_path)
    with pytest.raises(machines.InputError, match=f"the description of target v9 is damaged.*{words}"):
        machine_of.__wrapped__("v9")


def test_every_shipped_description_is_whole():
    for name in machines.machine_names():
        machine = machine_of(name)
        assert machine.usable_bytes <= machine.memory_bytes
        assert parse_target(f"{name}:8") == (name, "8")
        assert machine.platform == "tpu" or machines.gpu_description(name)
