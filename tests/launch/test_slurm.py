"""What becomes of a job: how often its processes run, on which cards, and whether it is queued again."""

import json

import pytest
from slurm_stand_ins import Slurm, plan
from stand_ins import ROOT

ARGUMENTS = ("configs/imagenet256_d16.py", "runs/d16")


@pytest.fixture
def slurm(tmp_path):
    return Slurm(tmp_path)


def notes(slurm: Slurm, words: str) -> list[str]:
    """The attempts and tasks that noted these words, as "attempt task"."""
    lines = (slurm.copy / "notes").read_text().splitlines()
    return sorted(line.removesuffix(f" {words}") for line in lines if line.endswith(words))


def test_job_is_queued_again_while_it_stops_early(slurm):
    slurm.set_program(plan([75, 75], [75, 75], [0, 0]))
    assert slurm.submit(*ARGUMENTS, options=["--ntasks-per-node=2"]) == 0
    assert slurm.num_requeues == 2
    assert notes(slurm, "ran") == ["0 0", "0 1", "1 0", "1 1", "2 0", "2 1"]
    log = slurm.log.read_text()
    assert all(f"attempt {i} at work" in log for i in range(3)), "the log is continued, not overwritten"


@pytest.mark.parametrize("status", [0, 1, 2, 130, 137])
def test_job_that_is_complete_or_failed_is_not_queued_again(slurm, status):
    slurm.set_program(plan([status, status]))
    assert slurm.submit(*ARGUMENTS, options=["--ntasks-per-node=2"]) == status
    assert slurm.num_requeues == 0


@pytest.mark.parametrize("status", [76, 134])
def test_job_that_lost_a_process_is_queued_again_three_times_if_it_is_lost_at_once(slurm, status):
    slurm.set_program(plan(*[[status, status]] * 6))
    assert slurm.submit(*ARGUMENTS, options=["--ntasks-per-node=2"]) == status
    assert slurm.num_requeues == 3


def test_job_that_lost_a_process_after_long_work_is_queued_again_however_often(slurm):
    script = slurm.copy / "launch/slurm.sbatch"
    script.write_text(script.read_text().replace("set -euo pipefail", "set -euo pipefail; SECONDS=600", 1))
    slurm.set_program(plan(*[[76]] * 6, [0]))
    assert slurm.submit(*ARGUMENTS) == 0 and slurm.num_requeues == 6


def test_process_that_leaves_first_lets_the_others_save(slurm):
    slurm.set_program(plan([75, "slow"], [0, 0]))
    assert slurm.submit(*ARGUMENTS, options=["--ntasks-per-node=2"]) == 0
    assert notes(slurm, "saved") == ["0 1"] and slurm.num_requeues == 1


def test_end_of_time_is_announced_to_the_processes_and_the_job_continues(slurm):
    def warn(slurm, attempt):
        if attempt == 0:
            for task in range(2):
                slurm.wait_for(slurm.copy / f"training-0-{task}")
            slurm.warn_of_time_limit()

    slurm.set_program(plan(["train", "train"], [0, 0]))
    assert slurm.submit(*ARGUMENTS, options=["--ntasks-per-node=2"], on_start=warn) == 0
    assert notes(slurm, "saved") == ["0 0", "0 1"] and slurm.num_requeues == 1


def test_cancelled_job_is_not_queued_again(slurm):
    def cancel(slurm, attempt):
        slurm.wait_for(slurm.copy / "training-0-0")
        slurm.cancel()

    slurm.set_program(plan(["train"], [0]))
    assert slurm.submit(*ARGUMENTS, on_start=cancel) != 0
    assert slurm.num_requeues == 0 and notes(slurm, "ran") == ["0 0"]


def test_job_cancelled_after_it_saved_is_not_queued_again(slurm):
    """The processes may have exited with 75 before SIGTERM reaches the script: scancel must still end the job."""
    wait_and_exit = (
        "import os, signal, sys, time\nos.kill(int(os.environ['SCRIPT']), signal.SIGTERM)\ntime.sleep(0.3)\n"
    )
    slurm.set_program(f"{wait_and_exit}sys.exit(75)\n")
    script = slurm.copy / "launch/slurm.sbatch"
    script.write_text(script.read_text().replace("set -euo pipefail", "set -euo pipefail; export SCRIPT=$$", 1))
    assert slurm.submit(*ARGUMENTS) == 75
    assert slurm.num_requeues == 0


def test_job_that_cannot_be_queued_again_says_so_and_keeps_its_status(slurm):
    slurm.set_program(plan([75]))
    assert slurm.submit(*ARGUMENTS, can_requeue=False) == 75
    assert "error: it could not be queued again; submit it again to continue" in slurm.log.read_text()


CARDS = """
import json, os
from mvar_jax.processes.cluster import find_place
place = find_place(os.environ)
visible = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
used = [visible[i] for i in place.local_device_ids] or visible
with open("cards", "a") as file:
    file.write(json.dumps([place.process_id, place.num_processes, used, os.environ["NUM_CPUS"]]) + "\\n")
"""


@pytest.mark.parametrize(
    ("options", "cards_of_task", "num_cpus"),
    [
        ([], ["01234567"], 64),
        (["--gpus-per-node=4"], ["0123"], 64),
        (["--ntasks-per-node=8", "--cpus-per-task=8"], list("01234567"), 8),
        (["--ntasks-per-node=2", "--cpus-per-task=32"], ["0123", "4567"], 32),
    ],
)
def test_every_card_and_every_processor_is_used(slurm, options, cards_of_task, num_cpus):
    slurm.set_program(CARDS)
    assert slurm.submit(*ARGUMENTS, options=options, JAX_PLATFORMS="") == 0
    lines = sorted(map(json.loads, (slurm.copy / "cards").read_text().splitlines()))
    expected = [[i, len(cards_of_task), list(cards), str(num_cpus)] for i, cards in enumerate(cards_of_task)]
    assert lines == expected


# the loop of `train` with a toy task, which compiles in a moment; started with the words of the script
TOY = f"""
import os, sys
sys.path.insert(0, "{ROOT / "tests"}")
from toy_run import NoWriter, ToyTask, logging, make_settings, run, run_together
from mvar_jax.stopping import STOPPED_STATUS

logging._open_summary_writer = lambda folder: NoWriter()
words = sys.argv[4:]
options = dict(zip(words[::2], words[1::2]))

def train():
    steps = open("steps-" + os.environ["SLURM_PROCID"], "a", buffering=1)
    task = ToyTask(0.05, on_step=lambda step: print(step, file=steps))
    result = run(task, options["--workdir"], make_settings(60), {{"lr": 0.01}})
    return STOPPED_STATUS if result.interrupted else 0

sys.exit(run_together(train, options["--distributed"]))
"""


def test_run_of_two_processes_continues_in_the_next_job_where_it_stopped(slurm):
    """Joined by the variables of Slurm, and stopped by its warning before the end of the time."""

    def warn(slurm, attempt):
        if attempt == 0:
            slurm.wait_for(slurm.copy / "runs/d16/metrics.jsonl")
            slurm.warn_of_time_limit()

    slurm.set_program(TOY)
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    status = slurm.submit(*ARGUMENTS, options=["--ntasks-per-node=2"], on_start=warn, **environment)
    log = slurm.log.read_text()
    assert status == 0 and slurm.num_requeues == 1, log
    for task in range(2):
        steps = (slurm.copy / f"steps-{task}").read_text().split()
        assert steps == [str(step) for step in range(60)], "every step once, over both attempts"
