"""Runs on several machines apart from the terminal: what each machine does, and what follows from how it ends."""

import os
import shutil
import signal
import subprocess
import time

import pytest
from command_case import check_command
from stand_ins import make_program
from worker_stand_ins import Workers, make_checkout

CONFIG = "configs/imagenet256_d30.py"
TRAINING = ("start", CONFIG, "/mnt/my runs", "--config.num_steps=7", "--config.data.cache=a folder")
SLICE = {"TPU": "slice", "ZONE": "here"}


@pytest.fixture
def machines(tmp_path):
    made = []

    def make(*names: str) -> Workers:
        made.append(Workers(tmp_path, *names))
        return made[-1]

    yield make
    for workers in made:
        workers.end()


def check_training(words: list[str], distributed: str) -> None:
    read = check_command(words, CONFIG, "/mnt/my runs", distributed)
    assert read["num_steps"] == 7 and read["data"]["cache"] == "a folder"


def test_slice_trains_on_every_worker_apart_from_the_terminal(machines):
    names = ("worker0", "worker1", "worker2")
    workers = machines(*names)
    result = workers.call("tpu_pod.sh", *TRAINING, **SLICE)
    assert result.returncode == 0, result.stderr
    for name in names:
        workers.wait_for(lambda name=name: "at work" in workers.log(name), f"the training of {name}")
        (words,) = workers.trained(name)
        check_training(words, "auto")
    running = workers.call("tpu_pod.sh", "status", **SLICE)
    assert running.stdout.count("running: attempt 1") == 3
    stopped = workers.call("tpu_pod.sh", "stop", **SLICE)
    assert stopped.stdout.count("stopped: ended with status 75") == 3
    assert all(workers.log(name).count("saved\n") == 1 for name in names)


def test_slice_that_stopped_early_goes_on_by_itself(machines):
    workers = machines("worker0", "worker1")
    for name in workers.names:
        (workers.folder / name / "statuses").write_text("75 75 0")
    assert workers.call("tpu_pod.sh", *TRAINING, **SLICE).returncode == 0
    for name in workers.names:
        workers.wait_for(lambda name=name: "status 0" in workers.log(name), f"the end of {name}")
        assert len(workers.trained(name)) == 3 and workers.log(name).count("at work") == 3
    assert (
        workers.call("tpu_pod.sh", "status", **SLICE).stdout.count("complete: ended with status 0 in attempt 3") == 2
    )


def test_log_of_one_worker_is_followed(machines):
    workers = machines("worker0", "worker1")
    (workers.folder / "worker1/statuses").write_text("1")
    assert workers.call("tpu_pod.sh", *TRAINING, **SLICE).returncode == 0
    with workers.start("tpu_pod.sh", "log", WORKER="1", **SLICE) as process:
        try:
            lines = [process.stdout.readline() for _ in range(2)]
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    assert lines[0] == "at work\n" and "ended with status 1 (failed)" in lines[1]


def test_hosts_are_the_processes_of_one_run(machines):
    workers = machines("node1", "node2")
    result = workers.call("ssh.sh", *TRAINING, HOSTS="me@node1 node2")
    assert result.returncode == 0, result.stderr
    for index, name in enumerate(workers.names):
        workers.wait_for(lambda name=name: workers.trained(name), f"the training of {name}")
        check_training(workers.trained(name)[0], f"node1:8476,2,{index}")
    status = workers.call("ssh.sh", "status", HOSTS="me@node1 node2")
    assert [line.split(":")[:2] for line in status.stdout.splitlines()] == [
        ["me@node1", " running"],
        ["node2", " running"],
    ]
    again = workers.call("ssh.sh", *TRAINING, HOSTS="me@node1 node2")
    assert again.returncode == 1 and "a command already runs" in again.stderr
    stopped = workers.call("ssh.sh", "stop", HOSTS="me@node1 node2")
    assert stopped.returncode == 0 and stopped.stdout.count("stopped: ended with status 75") == 2


def test_hosts_are_stopped_together(machines):
    """The processes of a run end together: if each host were asked after the one before, the first would not end."""
    workers = machines("node1", "node2")
    save = """def save(*_):
    (home.parent / f"asked-{name}").touch()
    deadline = time.monotonic() + 20
    while len(list(home.parent.glob("asked-*"))) < 2:
        if time.monotonic() > deadline:
            sys.exit(1)
        time.sleep(0.05)
"""
    for name in workers.names:
        python = workers.folder / name / "mvar_jax/.venv/bin/python"
        python.write_text(python.read_text().replace("def save(*_):\n", save))
    assert workers.call("ssh.sh", *TRAINING, HOSTS="node1 node2").returncode == 0
    for name in workers.names:
        workers.wait_for(lambda name=name: "at work" in workers.log(name), f"the training of {name}")
    stopped = workers.call("ssh.sh", "stop", HOSTS="node1 node2")
    ends = [f"{name}: stopped: ended with status 75 in attempt 1" for name in workers.names]
    assert stopped.returncode == 0 and stopped.stdout.splitlines() == ends


def test_hosts_with_one_home_keep_their_logs_apart(machines):
    workers = machines("node1")
    (workers.folder / "node2").symlink_to(workers.folder / "node1")
    result = workers.call("ssh.sh", *TRAINING, HOSTS="node1 node2", COORDINATOR="10.0.0.1:99")
    assert result.returncode == 0, result.stderr
    for index, name in enumerate(("node1", "node2")):
        workers.wait_for(lambda name=name: "at work" in workers.log(name), f"the training of {name}")
        assert workers.trained(name)[0][-1] == f"10.0.0.1:99,2,{index}"
    assert workers.call("ssh.sh", "stop", HOSTS="node1 node2").returncode == 0


def test_run_that_lacks_a_host_is_not_left_half_started(machines):
    workers = machines("node1")
    result = workers.call("ssh.sh", *TRAINING, HOSTS="node1 nowhere")
    assert result.returncode == 1
    assert "Could not resolve hostname nowhere" in result.stderr
    assert result.stderr.endswith("error: start did not succeed on nowhere; see above\n")
    assert "running" not in workers.call("ssh.sh", "status", HOSTS="node1").stdout


def test_host_without_its_environment_names_the_setup(machines):
    workers = machines("node1")
    (workers.folder / "node1/mvar_jax/.venv/bin/python").unlink()
    result = workers.call("ssh.sh", *TRAINING, HOSTS="node1")
    assert result.returncode == 1
    assert result.stderr.startswith("node1: error: .venv is missing: run `bash launch/setup.sh` first")


class Queue:
    """One worker of a queued slice, whose code comes from a git repository."""

    def __init__(self, workers: Workers):
        self.workers, folder = workers, workers.folder
        self.home, self.checkout, repository = folder / "worker0", folder / "worker0/opt", folder / "repository"
        self.home.mkdir(exist_ok=True)
        make_checkout(repository)
        make_program(repository / "launch/setup.sh", "#!/usr/bin/env bash\necho $EXTRAS >> $WORKER_HOME/extras\n")
        git = ["git", "-C", repository, "-c", "user.name=me", "-c", "user.email=me@here"]
        for words in (["init", "--quiet"], ["add", "--force", "."], ["commit", "--quiet", "--message", "code"]):
            subprocess.run([*git, *words], check=True, timeout=60)
        self.environment = SLICE | {
            "TYPE": "v5litepod-16",
            "VERSION": "v2-alpha-tpuv5-lite",
            "REPOSITORY": str(repository),
            "CHECKOUT": str(self.checkout),
            "INTERVAL": "1",
        }

    @property
    def requests(self) -> list[str]:
        path = self.workers.folder / "requests"
        return path.read_text().splitlines() if path.exists() else []

    def start(self, *words: str, **more: str) -> subprocess.Popen:
        return self.workers.start("queued_resource.sh", *words, **self.environment | more)

    def preempt(self) -> None:
        """The slice is gone, with all that was on it."""
        self.workers.kill("worker0")
        shutil.rmtree(self.home)
        self.home.mkdir()
        (self.workers.folder / "request.json").write_text("SUSPENDED")


@pytest.fixture
def queue(machines):
    return Queue(machines())


def test_slice_that_is_taken_away_is_requested_again_until_the_run_is_complete(queue):
    with queue.start(*TRAINING) as process:
        queue.workers.wait_for(lambda: queue.workers.trained("worker0"), "the first training")
        check_training(queue.workers.trained("worker0")[0], "auto")
        (queue.home / "statuses").write_text("75")
        queue.preempt()
        (queue.home / "statuses").write_text("75 0")
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    create = "create v5litepod-16 v2-alpha-tpuv5-lite spot"
    assert queue.requests == [create, "delete", create]
    assert len(queue.workers.trained("worker0")) == 2 and "slice was taken away" in out
    assert out.splitlines()[-1].startswith("complete: ended with status 0 in attempt 2; delete the slice")
    assert (queue.home / "extras").read_text() == "tpu\n"


def test_watch_survives_failures_of_the_network_while_it_requests_again(queue):
    """Each call fails once. Without the request and without a watch nobody would request the slice again."""
    with queue.start(*TRAINING) as process:
        queue.workers.wait_for(lambda: queue.workers.trained("worker0"), "the first training")
        (queue.workers.folder / "failures").write_text("delete create describe")
        queue.preempt()
        (queue.home / "statuses").write_text("0")
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    create = "create v5litepod-16 v2-alpha-tpuv5-lite spot"
    assert queue.requests == [create, "delete", create]
    assert all(f"gcloud crashed in {verb}" in err for verb in ("delete", "create", "describe"))
    assert err.count("is tried again in 1 s") == 2


def test_request_that_somebody_deleted_is_not_made_again(queue):
    """After a request of the watch's own, too."""
    with queue.start(*TRAINING) as process:
        queue.workers.wait_for(lambda: queue.workers.trained("worker0"), "the first training")
        queue.preempt()
        queue.workers.wait_for(lambda: queue.workers.trained("worker0"), "the second training")
        time.sleep(2)  # gcloud has returned
        queue.workers.kill("worker0")
        (queue.workers.folder / "request.json").unlink()
        out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "error: the request of slice is gone" in err
    assert len(queue.requests) == 3


def test_start_without_network_does_not_request(queue):
    (queue.workers.folder / "failures").write_text("describe")
    with queue.start(*TRAINING) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "gcloud crashed in describe" in err
    assert queue.requests == []


def test_existing_request_of_another_run_is_refused(queue):
    (queue.home / "statuses").write_text("0")
    with queue.start(*TRAINING) as first:
        first.communicate(timeout=120)
    for words in (("start", CONFIG, "/mnt/others"), (*TRAINING, "--config.seed=1")):
        with queue.start(*words) as second:
            out, err = second.communicate(timeout=120)
        assert second.returncode == 2 and not out
        (error,) = [line for line in err.splitlines() if not line.startswith("WARNING")]
        assert (
            error.startswith(f"error: slice was requested for: start {CONFIG} /mnt/my\\ runs ")
            and words[2][:5] in error
        )
    with queue.start(*TRAINING) as third:
        assert third.communicate(timeout=120)[0].startswith("complete")
    assert len(queue.requests) == 1


def test_existing_request_that_does_not_say_its_run_is_watched_with_a_notice(queue):
    """One made by hand, or before requests said it."""
    (queue.home / "statuses").write_text("0")
    with queue.start(*TRAINING) as first:
        first.communicate(timeout=120)
    (queue.workers.folder / "metadata").write_text("")
    with queue.start("start", CONFIG, "/mnt/others") as second:
        out, err = second.communicate(timeout=120)
    assert second.returncode == 0, err
    assert "the existing request of slice is watched; until it is taken away it trains what it was created for" in err


@pytest.mark.parametrize(("status", "words"), [(1, "failed"), (2, "refused"), (134, "failed")])
def test_run_that_failed_on_a_queued_slice_is_not_repeated(queue, status, words):
    attempts = 4 if status == 134 else 1
    (queue.home / "statuses").write_text(f"{status} " * attempts)
    with queue.start(*TRAINING) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == (2 if status == 2 else 1)
    assert f"error: {words}: ended with status {status} in attempt {attempts}" in err
    assert len(queue.workers.trained("worker0")) == attempts and len(queue.requests) == 1


def test_queued_slice_that_cannot_be_set_up_is_reported(queue):
    with queue.start(*TRAINING, REPOSITORY=str(queue.home / "nothing"), SETUP_SECONDS="2") as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "error: worker 0 does not start" in err


def test_watch_ends_and_a_second_one_takes_over(queue):
    with queue.start(*TRAINING) as first:
        queue.workers.wait_for(lambda: queue.workers.trained("worker0"), "the training")
        os.killpg(first.pid, signal.SIGKILL)
    with queue.start(*TRAINING) as second:
        stop = queue.workers.call("queued_resource.sh", "stop", **queue.environment)
        assert stop.returncode == 0, stop.stderr
        out, err = second.communicate(timeout=120)
    assert second.returncode in (1, 75), "the request is gone, or the watch saw the run stop first"
    assert queue.requests[-1] == "delete" and len(queue.workers.trained("worker0")) == 1
    assert "saved" in queue.workers.log("worker0")


def test_worker_without_a_supported_python_gets_one(queue):
    environment = queue.workers.folder / "repository/launch/environment.sh"
    environment.write_text(environment.read_text().replace("SUPPORTED=(3.12 3.11 3.13)", "SUPPORTED=(3.99)"))
    git = ["git", "-C", environment.parent, "-c", "user.name=me", "-c", "user.email=me@here"]
    subprocess.run([*git, "commit", "--all", "--quiet", "--message", "no python"], check=True, timeout=60)
    (queue.home / "statuses").write_text("0")
    with queue.start(*TRAINING) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert (queue.home / "installed").read_text().splitlines()[-1] == "apt-get install -y python3.12-venv"


NEEDS = {
    "tpu_pod.sh": "TPU and ZONE are required",
    "ssh.sh": "HOSTS is required",
    "queued_resource.sh": "TPU is required",
}


@pytest.mark.parametrize("script", NEEDS)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("start", "configs/debug.py"), "CONFIG and WORKDIR are required"),
        ((), "must be start, status, log or stop, got none"),
        (("begin",), "must be start, status, log or stop, got begin"),
        (("stop", "now"), "stop takes no more words, got now"),
        (("stop",), None),
    ],
)
def test_words_that_mean_nothing_are_one_line_and_status_2(machines, script, words, message):
    result = machines().call(script, *words)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and (message or NEEDS[script]) in result.stderr
