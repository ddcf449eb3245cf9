"""Checkpoints of several processes: how long a save blocks the loop, when it is complete, what a restore reads.

    python benchmarks/checkpoints.py --processes 4 --mib 256                   # a folder of this machine
    python benchmarks/checkpoints.py --processes 4 --mib 64 --delay_ms 200     # an S3 server here (needs moto, s3fs)

The state is four float32 trees (weights, average, two moments) with one CPU device in each process, split over all of
them (fsdp) or held whole by each. With --delay_ms the server waits that long before each answer. "read" is the
bytes that `read` calls returned in each process, or that the server sent, divided by the size of the checkpoint. The
processes share one machine: its bandwidth says nothing about a cluster.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that it runs from a checkout that is not installed

NUM_LAYERS = 8
PAUSE_S = 1.0  # of training between a save and the next


class SlowStore:
    """An S3 server on loopback whose every request waits. num_sent: bytes of bodies that it has sent."""

    def __init__(self, delay_s: float):
        import boto3
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Quiet(WSGIRequestHandler):
            def log(self, *_):
                pass

        self.num_sent = self.num_requests = 0
        self._delay_s, self._app = 0.0, DomainDispatcherApplication(create_backend_app)
        server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=Quiet)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}",
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "nothing",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        os.environ.update(self.environment)
        boto3.client("s3", endpoint_url=self.environment["AWS_ENDPOINT_URL"]).create_bucket(Bucket="bucket")
        self._delay_s = delay_s

    def _answer(self, environ, start_response):
        time.sleep(self._delay_s)
        self.num_requests += 1
        for part in self._app(environ, start_response):
            self.num_sent += len(part)
            yield part


def make_state(step: int, mib: int, is_sharded: bool):
    """Return a state of so many MiB on all devices of all processes, and its description."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    from mvar_jax.training.state import TrainState

    mesh = jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(AxisType.Auto,))
    width = mib * 2**20 // (4 * 4 * NUM_LAYERS * 1024) // jax.device_count() * jax.device_count()

    def init():
        tree = {f"layer_{i}": jnp.full((1024, width), 1.0 * i + step) for i in range(NUM_LAYERS)}
        copy = lambda: jax.tree.map(jnp.copy, tree)
        return TrainState(jnp.int32(step), tree, copy(), (copy(), copy()), {})

    spec = P(None, "fsdp") if is_sharded else P()
    shardings = jax.tree.map(lambda x: NamedSharding(mesh, spec if x.ndim else P()), jax.eval_shape(init))
    state = jax.block_until_ready(jax.jit(init, out_shardings=shardings)())
    describe = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return state, jax.tree.map(describe, state, shardings)


def num_read() -> int:
    """Return the bytes that this process's `read` calls have returned."""
    return int(Path("/proc/self/io").read_text().split()[1])


def run_process(args) -> int:
    """Save and restore as one of the processes; print a line of JSON. Return the exit status."""
    import jax

    from mvar_jax.checkpoints.manager import Checkpoints
    from mvar_jax.processes import group

    blocked_s, complete_s = [], []
    with Checkpoints(args.workdir, 2) as checkpoints:
        for step in range(1, args.saves + 1):
            state, abstract = make_state(step, args.mib, args.sharded)
            group.current().wait_for_all("step")  # as a step of training does
            began = time.perf_counter()
            checkpoints.save(state, {})
            blocked_s.append(time.perf_counter() - began)
            checkpoints.wait()
            complete_s.append(time.perf_counter() - began)
            time.sleep(PAUSE_S)
    with Checkpoints(args.workdir, 2) as checkpoints:
        print("restoring", flush=True)
        sys.stdin.readline()
        before, began = num_read(), time.perf_counter()
        jax.block_until_ready(checkpoints.restore(abstract))
        restore_s = time.perf_counter() - began
        read = num_read() - before
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    row = {"blocked_s": blocked_s, "complete_s": complete_s, "restore_s": restore_s, "read": read / num_bytes}
    print(json.dumps(row | {"bytes": num_bytes}), flush=True)
    return 0


def measure(args, is_sharded: bool) -> dict:
    """Return the figures of one placing of the state."""
    store = SlowStore(args.delay_ms / 1000) if args.delay_ms is not None else None
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
        free.close()
        workdir = f"s3://bucket/{is_sharded}" if store else folder
        command = [sys.executable, __file__, "--workdir", workdir, "--address", address]
        command += ["--processes", str(args.processes), "--mib", str(args.mib), "--saves", str(args.saves)]
        command += ["--sharded"] * is_sharded
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        options = {"env": environment, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        children = [subprocess.Popen([*command, "--index", str(i)], **options) for i in range(args.processes)]
        try:
            for child in children:
                assert "restoring\n" in iter(child.stdout.readline, ""), "a process failed"  # gloo prints lines too
            before = store.num_sent if store else 0
            for child in children:
                child.stdin.write("go\n")
                child.stdin.flush()
            rows = [json.loads(child.communicate(timeout=600)[0]) for child in children]
        finally:
            for child in children:
                child.kill()
    worst = lambda name: max(max(row[name]) for row in rows)
    sent = store and (store.num_sent - before) / args.processes / rows[0]["bytes"]
    return {
        "state": "split" if is_sharded else "whole in each",
        "blocked s": f"{worst('blocked_s'):.3f}",
        "complete s": f"{worst('complete_s'):.2f}",
        "restore s": f"{max(row['restore_s'] for row in rows):.2f}",
        "read by a process": f"{sent if store else max(row['read'] for row in rows):.3f}",
        "requests": store.num_requests if store else "",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--mib", type=int, default=256, help="size of the state")
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--delay_ms", type=float, help="save to an S3 server here that waits so long")
    for name in ("--workdir", "--address", "--index"):  # of a child
        parser.add_argument(name, type=int if name == "--index" else str, help=argparse.SUPPRESS)
    parser.add_argument("--sharded", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.index is not None:
        from mvar_jax.processes.together import run_together

        address = f"{args.address},{args.processes},{args.index}" if args.processes > 1 else "off"
        return run_together(lambda: run_process(args), address)
    where = "a folder" if args.delay_ms is None else f"an S3 server that waits {args.delay_ms:g} ms"
    print(f"{args.processes} processes, {args.mib} MiB, {where}; the worst process of {args.saves} saves")
    for number, row in enumerate([measure(args, is_sharded) for is_sharded in (True, False)]):
        if number == 0:
            print(f"| {' | '.join(row)} |\n|{'---|' * len(row)}")
        print(f"| {' | '.join(map(str, row.values()))} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
