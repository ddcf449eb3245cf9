import importlib.util
from pathlib import Path

import pytest

from mvar_jax import build
from mvar_jax.cli.configuration import read_config
from mvar_jax.fields import from_dict
from mvar_jax.training.codebook_options import CodebookOptions

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "tokenizer_ablation.py"
spec = importlib.util.spec_from_file_location("tokenizer_ablation", SCRIPT)
ablation = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ablation)


@pytest.mark.parametrize("name", ablation.RUNS)
def test_run_is_a_valid_config_with_its_changes(tmp_path, monkeypatch, name):
    """The command is read as `train` reads it, and its sections check themselves and each other."""
    commands = []
    monkeypatch.setattr(ablation, "run_command", lambda command: commands.append(command))
    monkeypatch.setattr(ablation, "read_metrics", lambda workdir, kind: [{}])
    ablation.train(tmp_path, 24, ablation.RUNS[name])
    ((_, _, path, _, _, *overrides),) = commands
    config = read_config(path, overrides)
    run, module = build.build_run(config), build.build_module(config)
    options = from_dict(CodebookOptions, config["codebook"], "config.codebook")
    adversary = build.build_adversary(config, module)
    if adversary is not None:
        adversary.check(run, (64, 64, 3), options.last_redraw)
    assert run.num_steps == config["eval_every_steps"] == 24
    assert (adversary is None) == (ablation.RUNS[name].get("adversary.kind") == "none")
    for key, value in ablation.RUNS[name].items():
        section, field = key.split(".")
        assert config[section][field] == value
