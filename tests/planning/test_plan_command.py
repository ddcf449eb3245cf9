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
    rates = Rates({"float32": 1e9, "bfloat16": 1e9}, 1e9, 1e-6)
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
    status, out, err = plan(capfd, "--config", "debug_transformer", *defaults, *flags)
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert all(word in err for word in words), err


def test_a_config_that_trains_no_transformer_has_no_var(capfd):
    status, _, err = plan(capfd, "--config", "debug", "--topology", "here", "--compare", "var")
    assert status == 2
    assert err == "error: --compare needs a config of a transformer, got config.task=tokenizer\n"


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "Expecting property name"),
        ("[1]", "cannot convert"),
        ('{"platform": "tpu"}', "v9.name is missing"),
        ('{"flops": {"bfloat16": "fast"}}', "is missing"),
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
