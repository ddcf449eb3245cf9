"""Every path option refuses a store whose package is missing, and makes no folder called gs: or anything else."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
STORE = "gs://bucket/there"
DIGITS = [f"--config={ROOT}/configs/digits.py", "--config.data.size=24"]
TOKENIZER = [f"--config={ROOT}/configs/digits_tokenizer.py", "--config.data.size=24"]
FOLDER = [f"--config={ROOT}/configs/folder.py"]
PUBLISHED = ROOT / "tests/golden/tiny"


def commands(model: Path) -> list[list[str]]:
    """Command lines that each have one path in the store; the others are good."""
    sample = ["sample", "--labels=0", "--compilation_cache=off"]
    edit = ["edit", "--label=0", "--expand=2"]
    report = ["report", f"--stages={model}/model.json"]
    whole = {"--transformer": model, "--tokenizer": model, "--samples": model, "--out": "out"}
    lines = [
        ["train", *TOKENIZER, f"--workdir={STORE}"],
        ["train", *TOKENIZER, "--workdir=run", f"--compilation_cache={STORE}"],
        ["train", *DIGITS, "--workdir=run", f"--config.data.cache={STORE}"],
        ["train", *DIGITS, "--workdir=run", "--config.data.cache=", f"--config.data.tokenizer={STORE}"],
        ["data", *DIGITS, f"--out={STORE}"],
        ["data", *FOLDER, f"--config.data.path={STORE}", "--out=out"],
        ["cache_tokens", *DIGITS, f"--tokenizer={STORE}", "--out=out"],
        ["cache_tokens", *DIGITS, f"--tokenizer={model}", f"--out={STORE}"],
        [*sample, f"--checkpoint={STORE}", "--out=out"],
        [*sample, f"--checkpoint={model}", f"--out={STORE}"],
        [*sample, f"--checkpoint={model}", f"--tokenizer={STORE}", "--out=out"],
        [*edit, f"--checkpoint={model}", f"--tokenizer={STORE}", "--image=none.png", "--out=out"],
        [*edit, f"--checkpoint={STORE}", f"--image={ROOT}/docs/figures/none.png", "--out=out"],
        [*edit, f"--checkpoint={model}", f"--image={STORE}", "--out=out"],
        [*edit, f"--checkpoint={model}", f"--image={ROOT}/docs/figures/none.png", f"--out={STORE}"],
        ["reconstruct", f"--checkpoint={model}", f"--images={STORE}", "--out=out"],
        ["reconstruct", f"--checkpoint={model}", "--images=images", f"--out={STORE}"],
        ["convert", f"--tokenizer={STORE}", "--out=out"],
        ["convert", f"--transformer={STORE}", "--out=out"],
        ["convert", f"--tokenizer={PUBLISHED}/vae.pth", f"--out={STORE}"],
        ["convert", f"--checkpoint={STORE}", "--to_torch=out"],
        ["convert", f"--checkpoint={model}", f"--to_torch={STORE}"],
    ]
    for name in whole:
        lines.append([*report, *(f"{other}={STORE if other == name else path}" for other, path in whole.items())])
    return lines


def test_every_path_option_names_the_missing_package_and_writes_nothing(tiny_model, tmp_path):
    lines = commands(tiny_model)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = [sys.executable, str(ROOT / "tests/cli/unreachable.py")]
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 300}
    result = subprocess.run(command, input=json.dumps(lines), **options)
    assert result.returncode == 0, result.stderr
    for line, (status, errors) in zip(lines, json.loads(result.stdout), strict=True):
        assert status == 2 and len(errors.splitlines()) == 1, (line, status, errors)
        assert 'needs the package gcsfs, the extra gcs: pip install ".[gcs]"' in errors, (line, errors)
    assert not os.listdir(tmp_path)
