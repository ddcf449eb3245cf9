import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

STAGE = Path(__file__).parents[2] / "launch" / "stage.py"

# a shell's background jobs ignore Ctrl-C, and so would what the tests start when they are one
HEED_CTRL_C = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""


class Recipe:
    """Runs the stages of one log; each command is a shell line that works in the recipe's folder."""

    def __init__(self, folder: Path):
        self.folder, self.log_path = folder, folder / "runs" / "stages.json"

    def arguments(self, name, line, makes=("out",)):
        command = ["--log", str(self.log_path), "--name", name, "--makes", *makes, "--", "sh", "-c", line]
        return [sys.executable, str(STAGE), *command]

    def run(self, name, line, makes=("out",)):
        return subprocess.run(
            self.arguments(name, line, makes), cwd=self.folder, capture_output=True, text=True, timeout=20
        )

    def start(self, name, line):
        """Start a stage in its own process group and wait until its command has printed a line."""
        process = subprocess.Popen(
            [sys.executable, "-c", HEED_CTRL_C, *self.arguments(name, line)],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert select.select([process.stdout], [], [], 20)[0], "the command printed nothing in 20 s"
        assert process.stdout.readline() == "ready\n"
        return process

    @property
    def log(self):
        return json.loads(self.log_path.read_text())

    @property
    def num_runs(self):
        """How many times a command appended to the file `runs.txt`."""
        return len((self.folder / "runs.txt").read_text().split())


@pytest.fixture
def recipe(tmp_path):
    return Recipe(tmp_path)


LINE = "echo x >> runs.txt; touch out"


def test_stage_is_skipped_when_done_with_the_same_command(recipe):
    first, second = recipe.run("a", LINE), recipe.run("a", LINE)
    assert first.returncode == second.returncode == 0
    assert recipe.num_runs == 1
    assert second.stdout == "a: done before, 0 s\n"
    entry = recipe.log["a"]
    assert entry["finished"] and entry["num_attempts"] == 1
    assert entry["wall_s"] > 0 and entry["cpu_s"] > 0 and 0.5 < entry["peak_rss_mib"] < 1000
    assert [path.name for path in recipe.log_path.parent.iterdir()] == ["stages.json"]


def test_stage_runs_again_when_an_output_is_missing(recipe):
    recipe.run("a", LINE)
    (recipe.folder / "out").unlink()
    assert recipe.run("a", LINE).returncode == 0
    assert recipe.num_runs == 2 and recipe.log["a"]["num_attempts"] == 1


def test_stage_runs_again_when_the_command_changes(recipe):
    recipe.run("a", LINE)
    assert recipe.run("a", LINE + "; true").returncode == 0
    assert recipe.num_runs == 2 and recipe.log["a"]["command"][-1] == LINE + "; true"


def test_stage_that_runs_again_makes_later_stages_run_again(recipe):
    recipe.run("a", LINE)
    recipe.run("b", LINE)
    recipe.run("a", LINE + "; true")
    assert list(recipe.log) == ["a"]
    recipe.run("b", LINE)
    assert recipe.num_runs == 4


def test_cost_accumulates_over_failed_attempts_and_status_is_the_commands(recipe):
    line = "echo x >> runs.txt; sleep 0.2; test -e go || exit 7; touch out"
    first = recipe.run("a", line)
    assert first.returncode == 7
    before = recipe.log["a"]
    assert not before["finished"] and before["wall_s"] >= 0.2
    (recipe.folder / "go").touch()
    assert recipe.run("a", line).returncode == 0
    after = recipe.log["a"]
    assert after["finished"] and after["num_attempts"] == 2
    assert after["wall_s"] >= before["wall_s"] + 0.2 and after["cpu_s"] > before["cpu_s"]
    assert after["peak_rss_mib"] >= before["peak_rss_mib"]


def test_peak_memory_is_the_commands(recipe):
    line = f"{sys.executable} -c 'x = bytearray(200 * 2**20)'; touch out"
    recipe.run("a", line)
    assert 200 < recipe.log["a"]["peak_rss_mib"] < 300


def test_stage_without_its_promised_output_fails_and_is_not_finished(recipe):
    result = recipe.run("a", "touch out", makes=("out", "other"))
    assert result.returncode == 1 and "did not make other" in result.stderr
    assert not recipe.log["a"]["finished"]


def test_status_is_128_plus_the_signal_that_killed_the_command(recipe):
    assert recipe.run("a", "kill -KILL $$").returncode == 128 + signal.SIGKILL
    assert not recipe.log["a"]["finished"]


def test_ctrl_c_waits_for_the_commands_clean_up_and_leaves_the_stage_unfinished(recipe):
    line = "trap 'sleep 0.3; touch out; exit 0' INT; echo ready; while :; do sleep 0.05; done"
    process = recipe.start("a", line)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(20) == 128 + signal.SIGINT
    process.stdout.close()
    assert (recipe.folder / "out").exists()
    assert not recipe.log["a"]["finished"] and recipe.log["a"]["wall_s"] >= 0.3


COUNT_CTRL_C = """
import signal, time
received = []
signal.signal(signal.SIGINT, lambda *_: received.append("x"))
print("ready", flush=True)
time.sleep(0.5)
open("runs.txt", "w").write(" ".join(received))
"""


def test_ctrl_c_is_left_to_the_process_group_and_not_sent_a_second_time(recipe):
    (recipe.folder / "count.py").write_text(COUNT_CTRL_C)
    process = recipe.start("a", f"exec {sys.executable} count.py")
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 128 + signal.SIGINT
    process.stdout.close()
    assert recipe.num_runs == 0


def test_sigterm_to_the_stage_alone_is_passed_on(recipe):
    line = "trap 'touch out; exit 0' TERM; echo ready; while :; do sleep 0.05; done"
    process = recipe.start("a", line)
    process.terminate()
    assert process.wait(20) == 128 + signal.SIGTERM
    process.stdout.close()
    assert (recipe.folder / "out").exists() and not recipe.log["a"]["finished"]


def test_unknown_program_and_broken_log_are_one_line_errors(recipe):
    arguments = recipe.arguments("a", LINE)
    arguments = arguments[: arguments.index("--") + 1] + ["no-such-program"]
    missing = subprocess.run(arguments, cwd=recipe.folder, capture_output=True, text=True, timeout=20)
    assert missing.returncode == 127 and missing.stderr.startswith("error: no-such-program")
    assert not recipe.log_path.exists()
    recipe.log_path.parent.mkdir()
    recipe.log_path.write_text("{ half")
    broken = recipe.run("a", LINE)
    assert broken.returncode == 2 and len(broken.stderr.splitlines()) == 1
    assert recipe.log_path.read_text() == "{ half"
