"""benchmarks/accelerator.py on a CPU: its processes by a stand-in for the script, its stages at tiny sizes."""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import accelerator
from benchmarks.stages import models, operations, runs, torch_programs, traces
from benchmarks.stages.measure import TINY
from benchmarks.stages.report import Report, read_rows, to_markdown
from benchmarks.window_cases import CASES

ARGS = argparse.Namespace(size=TINY, depth=1, backend="auto", loops=[("dots", 1)], rounds=2)
# what a stage prints and writes, in place of the script: rows, status and seconds that its name asks for
STAND_IN = """
import json, os, sys, time
argv = sys.argv[1:]
name, rows = argv[argv.index("--stages", argv.index("--out")) + 1], argv[argv.index("--rows") + 1]
print("hello from", name, flush=True)
row = {"table": "flags", "flags": os.environ["XLA_FLAGS"].split()[-1], "ms": [3.0, 1.0, 2.0]}
open(rows, "a").write(json.dumps(row) + chr(10))
if name == "resume":
    time.sleep(600)
sys.exit(1 if name == "kernels" else 0)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the script with stand-ins for its stages; return (status, results, the folder)."""
    (script := tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr(accelerator, "__file__", str(script))

    def main(*argv):
        out = tmp_path / "out"
        status = accelerator.main([*argv, "--out", str(out)])
        return status, json.loads((out / "accelerator.json").read_text()), out

    return main


def test_a_failing_and_a_stopped_stage_leave_the_others_and_their_rows(run, tmp_path, monkeypatch, capsys):
    class TimerOfResume(threading.Thread):
        """A timer whose time is up as soon as the stand-in of `resume` has written its row and hangs."""

        def __init__(self, limit_s, stop):
            self.limit_s, self.stop = limit_s, stop
            super().__init__(daemon=True)

        def run(self):
            if self.limit_s == 2 * accelerator.STAGES["resume"].limit_s:
                with contextlib.suppress(AssertionError):
                    wait_for(lambda: read_rows(tmp_path / "out" / "rows.jsonl")[-2:-1] == [{"stage": "resume"}])
                self.stop()

        def cancel(self):
            self.join()

    monkeypatch.setattr(threading, "Timer", TimerOfResume)
    status, results, out = run("--stages", "kernels,resume,golden", "--limit_factor", "2")
    assert status == 1
    assert [(x["stage"], x["status"]) for x in results] == [("kernels", 1), ("resume", -9), ("golden", 0)]
    assert [len(x["rows"]) for x in results] == [1, 1, 1]
    assert {path.name for path in out.iterdir()} == {"accelerator.json", "rows.jsonl", "log.txt"}
    assert "\n== resume: expected 90 s on an H100, limit 400 s\nhello from resume\n" in (out / "log.txt").read_text()
    stages = [row["stage"] for row in read_rows(out / "rows.jsonl") if "stage" in row]
    assert stages == ["kernels", "resume", "golden"]
    assert "1 of 3 passed; not: kernels; resume" in capsys.readouterr().out


def test_the_stages_share_the_total_and_those_that_no_longer_fit_are_named(run, tmp_path, monkeypatch, capsys):
    now, limits = [0.0], []

    def spend(command, show, limit_s, environment):
        limits.append(limit_s)
        now[0] += {"golden": 150, "sampler": 100}.get(command[command.index("--rows") - 1], 55)
        return 0

    monkeypatch.setattr(accelerator.apart, "run", spend)
    monkeypatch.setattr(accelerator.time, "monotonic", lambda: now[0])
    chosen = ("--stages", "golden,sampler,training,attention", "--total_s", "315")
    status, results, _ = run(*chosen, "--record", str(tmp_path / "RESULTS.md"))
    assert status == 1 and limits == [180, 165, 65]
    assert [x["status"] for x in results] == [0, 0, None, 0]
    assert "3 of 4 passed; not run: training, Triton products off" in capsys.readouterr().out
    assert "Not run: too little of --total_s was left." in (tmp_path / "RESULTS.md").read_text()


# the script in a process of its own, with the stand-in for its stages
PARENT = "import sys; from benchmarks import accelerator; accelerator.__file__ = {!r}; sys.exit(accelerator.start())"


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Start the script with a stand-in for `resume`, which writes its row and hangs; return (process, out)."""
    monkeypatch.setenv("PYTHONPATH", str(accelerator.ROOT))
    started = []

    def start_script(text: str, *argv):
        (script := tmp_path / "stand_in.py").write_text(text)
        command = [sys.executable, "-c", PARENT.format(str(script)), "--stages", "resume", *argv]
        started.append(subprocess.Popen([*command, "--out", str(tmp_path / "out")], stdout=subprocess.DEVNULL))
        wait_for(lambda: len(read_rows(tmp_path / "out" / "rows.jsonl")) > 1)
        return started[0], tmp_path / "out"

    yield start_script
    started[0].kill()
    started[0].wait(timeout=10)


def wait_for(is_done, seconds: float = 60.0) -> None:
    """Wait until `is_done()`; fail after some seconds."""
    end = time.monotonic() + seconds
    while not is_done():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_what_is_known_is_written_if_the_script_is_told_to_stop(start, tmp_path):
    process, out = start(STAND_IN, "--record", str(tmp_path / "RESULTS.md"))
    process.terminate()
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    (result,) = json.loads((out / "accelerator.json").read_text())
    assert result["stage"] == "resume" and result["status"] == -9 and len(result["rows"]) == 1
    text = (tmp_path / "RESULTS.md").read_text()
    assert "### resume\n\nStopped after" in text and "| 2 (1..3) |" in text


# a stage that is the script itself, hangs and writes its number as a row
HANGING = """
import json, os, sys, time
from benchmarks import accelerator

def hang(name, args):
    with open(args.rows, "a") as file:
        file.write(json.dumps({"pid": os.getpid()}) + chr(10))
    time.sleep(600)

accelerator.run_here = hang
accelerator.main(sys.argv[1:])
"""


def test_a_stage_ends_with_a_script_that_is_killed(start):
    process, out = start(HANGING)
    pid = read_rows(out / "rows.jsonl")[-1]["pid"]
    process.kill()
    process.wait(timeout=10)
    try:
        wait_for(lambda: not is_running(pid), 20)
        assert not is_running(pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_row_is_written_before_it_is_printed(tmp_path, monkeypatch):
    """Printing fails if the reader of a pipe is gone."""
    monkeypatch.setattr("builtins.print", lambda *_, **__: (_ for _ in ()).throw(BrokenPipeError()))
    with pytest.raises(BrokenPipeError):
        Report(tmp_path / "rows.jsonl").add("a", x=1)
    assert read_rows(tmp_path / "rows.jsonl") == [{"table": "a", "x": 1}]


def test_products_by_triton_are_compared_where_stages_have_products(run):
    _, results, _ = run("--stages", "sampler,golden", "--triton_gemm", "both")
    flags = [(x["stage"], x["rows"][0]["flags"].rpartition("=")[2]) for x in results]
    assert flags == [
        ("sampler, Triton products off", "false"),
        ("sampler, Triton products on", "true"),
        ("golden", "false"),
    ]


def test_record_appends_dated_tables(run, tmp_path):
    (results := tmp_path / "RESULTS.md").write_text("# Results\n")
    status, _, _ = run("--stages", "golden", "--record", str(results))
    lines = results.read_text().splitlines()
    assert status == 0 and lines[0] == "# Results"
    assert f"## {accelerator.datetime.date.today()}: benchmarks/accelerator.py" in lines
    assert lines[-3:] == ["| flags | ms |", "| --- | --- |", "| --xla_gpu_enable_triton_gemm=false | 2 (1..3) |"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--stages", "published"], "--published DIR"),
        (["--stages", "kernels,magic"], "got magic"),
        (["--batches", "1,0"], "1 or more"),
        (["--profile", "sampler,decoder"], "got decoder"),
        (["--published", "nowhere"], "models/mvar.py, got nowhere"),
    ],
)
def test_bad_arguments_start_nothing(argv, words, capsys):
    with pytest.raises(SystemExit) as ended:
        accelerator.main(argv)
    assert ended.value.code == 2 and words in capsys.readouterr().err


def test_kernels_stage_writes_a_row_for_each_form_and_fails_beyond_its_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(operations, "parity_cases", lambda args: CASES[:1])
    monkeypatch.setattr(operations, "BACKENDS", ("reference", "dense"))
    monkeypatch.setattr(operations, "LIMITS", {"float32": 2e-5})
    monkeypatch.setattr(operations, "FILTERS", ((4, 0.9),))
    argv = ["--size", TINY, "--stages", "kernels", "--rows", str(tmp_path / "rows.jsonl")]
    assert accelerator.main(argv) == 0
    conditions, window, scales, raw_scales, raw_window, draws = read_rows(tmp_path / "rows.jsonl")
    assert conditions["jax"] == jax.__version__ and conditions["device"] == "cpu"
    assert draws["draws"] == 6 and draws["ok"]
    assert (window["form"], scales["form"]) == ("dense", "auto")
    assert window["ok"] and scales["ok"] and 0 < window["dq"] < 2e-5
    assert raw_scales["form"] == raw_window["form"] == "kernels"
    assert raw_scales["ok"] and raw_window["ok"] and 0 < raw_window["dq"] < 2e-5
    monkeypatch.setattr(operations, "add_draws", lambda *_: True)
    monkeypatch.setattr(operations, "subjects", lambda args: [wrong_subject(float("nan"))])
    assert accelerator.main(argv) == 1
    assert read_rows(tmp_path / "rows.jsonl")[-1]["ok"] is False


def test_draws_that_fail_leave_the_rows_of_attention(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no kernel here")

    monkeypatch.setattr(operations, "add_draws", fail)
    monkeypatch.setattr(operations, "subjects", lambda args: [wrong_subject(0.0)])
    report = Report()
    assert operations.run_kernels(ARGS, report) is False
    _, form, failed = report.rows
    assert form["ok"] and failed["case"] == "filters and draw" and failed["reason"] == "RuntimeError: no kernel here"


def test_the_gathered_form_is_compared_in_float32_only():
    """Its gradients add 49 numbers in bfloat16, so its error there is not that of a kernel."""
    window = [one for one in operations.subjects(ARGS) if not any(word in one.name for word in ("scales", "raw"))]
    forms = {one.arrays[0].dtype.name: one.forms for one in window}
    assert "gather" in forms["float32"] and "gather" not in forms["bfloat16"] and "tiled" in forms["bfloat16"]


def wrong_subject(offset: float) -> operations.Subject:
    """A form whose output is off, with the right gradients."""
    forms = {"reference": lambda q, k, v: q * k - v, "wrong": lambda q, k, v: q * k - v + offset}
    return operations.Subject("wrong", [jnp.full(3, x) for x in (1.0, 2.0, 3.0, 4.0)], forms)


def test_commands_of_a_stage_run_this_checkout_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    root = str(accelerator.ROOT)
    runs.succeed([sys.executable, "-c", "import mvar_jax; open('found', 'w').write(mvar_jax.__file__)"])
    assert (tmp_path / "found").read_text().startswith(root)


@pytest.fixture
def torch(monkeypatch):
    """A stand-in for torch, which notes what is asked of it and times nothing."""
    noted = []

    class Array:
        def requires_grad_(self):
            return self

    def randn(shape, **_):
        noted.append(shape)
        return Array()

    class Device:
        name = "cpu"
        torch = types.SimpleNamespace(
            randn=randn,
            bfloat16="bfloat16",
            set_grad_enabled=lambda _: contextlib.nullcontext(),
            _dynamo=types.SimpleNamespace(reset=lambda: noted.append("reset")),
        )
        conditions = staticmethod(dict)
        time = staticmethod(lambda run, rounds, num: [1.0] * rounds)

    monkeypatch.setattr(torch_programs, "Device", Device)
    monkeypatch.setattr(torch_programs, "attention_forms", lambda *_: {"a": lambda *_: None})
    return noted


def test_torch_compiles_each_map_anew_and_takes_the_maps_that_are_chosen(torch):
    """A function that torch compiled for eight shapes is interpreted from the ninth on."""
    args = argparse.Namespace(size="256", maps=[16, 64], rounds=2)
    report = Report()
    assert torch_programs.run_torch(args, report)
    assert torch == ["reset", *[(64, 16, 256, 64)] * 4, "reset", *[(16, 16, 4096, 64)] * 4]
    assert [row["map"] for row in report.rows[1:]] == ["16x16"] * 2 + ["64x64"] * 2


def test_maps_are_chosen_by_their_sides(capsys):
    assert accelerator.make_parser().parse_args(["--maps", "16,13"]).maps == [16, 13]
    assert [case.height for case in operations.timed_cases(accelerator.make_parser().parse_args([]))] == [
        *(13, 16, 32, 64)
    ]
    with pytest.raises(SystemExit):
        accelerator.make_parser().parse_args(["--maps", "17"])
    assert "13, 16, 32, 64, got 17" in capsys.readouterr().err


def test_a_loop_of_attention_is_that_many_calls():
    """Each call's output is the next one's q, so a loop of two equals two calls by hand."""
    attend = lambda q, k, v: 0.5 * q * k - v
    arrays = [jnp.asarray(x) for x in (1.5, 2.0, -3.0, 4.0)]
    out, q, k, *gradients = operations.looped(attend, "with gradients", 2)(*arrays)
    first = operations.with_gradients(attend, *arrays)
    second = operations.with_gradients(attend, first[0], *arrays[:2], arrays[3])
    assert (out, q, k) == (second[0], first[0], arrays[0]) and gradients == list(second[1:])


@pytest.fixture
def products():
    """Two programs that are compiled at once, and one that fails."""

    def named(x):
        with jax.named_scope("blocks"), jax.named_scope("ffn"):
            return x @ x

    def program(size, lower=None):
        x, jitted = jnp.ones((size, size)), jax.jit(named)
        lower = lower or (lambda: jitted.lower(x))
        return models.Program({"batch": size}, size, lower, lambda compiled: compiled(x), 2.0 * size**3)

    def fail():
        raise RuntimeError("out of\nmemory | here")

    return {"large": program(64), "small": program(32), "wrong": program(16, fail)}


def test_programs_are_timed_from_small_to_large_and_a_failure_is_a_row(products):
    report = Report()
    times = models.measure_programs("products", products, 3, report)
    assert list(times) == ["small", "large"] and all(len(x) == 3 and min(x) > 0 for x in times.values())
    failed, *rows = report.rows
    assert failed["reason"] == "RuntimeError: out of memory / here" and failed["table"] == "products that failed"
    assert [row["batch"] for row in rows] == [32, 64]
    for row in rows:
        assert row["compiled, MiB"] == pytest.approx(8 * row["batch"] ** 2 / 2**20)
        assert row["images/s"] == pytest.approx(1e3 * row["batch"] / np.median(row["ms"]))
        assert row["MFU"] is None  # a CPU has none
        assert "peak, MiB" not in row  # that of a process that compiled is not the program's


def test_profile_counts_the_kernels_of_a_call_by_kind_part_and_name(products, tmp_path):
    report, program = Report(), products["large"]
    traces.add_profile("product", program, program.lower().compile(), tmp_path, 2, report)
    rows = {row["table"]: row for row in report.rows}
    assert rows["programs"]["kernels a call"] == 1 and rows["programs"]["ms of kernels"] > 0
    assert rows["product: by kind"]["kind"] == "matrix products" and rows["product: by kind"]["share"] == 1
    assert rows["product: by part"]["part"] == "blocks ffn"


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("jit(step)/transpose(jvp(Net))/while/body/blocks/blocks.add/up/rd,f->df/dot", "backward: Net blocks add up"),
        ("jit(sample)/Net/while/body/eval_jaxpr/checkpoint/blocks/reduce_sum", "Net blocks"),
        ("jit(step)/jvp(jit(log_softmax))/exp", "(exp)"),
        ("jit(sample)/gather", "(gather)"),
    ],
)
def test_part_of_the_model_by_an_instructions_name(name, part):
    assert traces.part_of(name) == part


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("attention_backward", "attention, ours"),
        ("wrapped_reduce-window", "fusions that reduce"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention, cuDNN"),
        ("sm90_xmma_fprop_implicit_gemm_f32f32_nhwc", "convolutions"),
        ("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_bias_TNT", "matrix products"),
        ("gemm_fusion_dot_12", "matrix products, Triton"),
        ("MemcpyD2D", "copies and fills of the driver"),
        ("input_transpose_fusion_3", "transposes and copies"),
        ("loop_convert_fusion", "other fusions"),
    ],
)
def test_kind_of_a_kernel_by_its_name(kernel, kind):
    assert traces.kind_of(kernel) == kind


def test_recorded_tables_are_those_on_the_screen(capsys):
    report = Report()
    report.add("conditions", device="cpu", driver="")
    report.add("a", ms=[2.0, 1.0], ok=True)
    report.add("a", ms=[1234.5], ok=False)
    report.add("b", mib=None)
    shown = capsys.readouterr().out
    assert to_markdown(report.rows).strip() == shown.strip()
    assert shown.splitlines() == [
        "device cpu.",
        *["", "**a**", "", "| ms | ok |", "| --- | --- |", "| 1.5 (1..2) | yes |", "| 1234 (1234..1234) | **no** |"],
        *["", "**b**", "", "| mib |", "| --- |", "|  |"],
    ]
