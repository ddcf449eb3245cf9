"""Scripts that run in a process with eight virtual devices."""

import os
import subprocess
import sys
from pathlib import Path


def run_on_eight_devices(script: str, *arguments: str) -> str:
    """Return what a script of the tests prints."""
    tests = Path(__file__).parent
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(tests / script), *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout
