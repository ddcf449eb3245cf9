"""Stages in torch: the same windows by SDPA and FlexAttention, and the published program, on the device here.

Everything is computed in bfloat16, the published program by autocast over float32 weights, as its demo does.
"""

import functools
import time
from collections.abc import Callable

import numpy as np

from benchmarks.memory import OPTIONS
from benchmarks.published import make_published
from benchmarks.stages.measure import TINY, conditions, modules_of, why
from benchmarks.stages.models import add_cycle
from benchmarks.stages.operations import timed_cases
from benchmarks.stages.report import CONDITIONS, Report, median
from benchmarks.window_cases import Case
from mvar_jax.errors import InputError
from mvar_jax.hardware.compiling import MIB
from mvar_jax.models.transformer import previous_of
from mvar_jax.ops.window.geometry import window_mask
from mvar_jax.scales import WINDOW

NUM_CALLS = 30  # in a timed round of attention


class Device:
    """The device of torch here: cuda if there is one. Raises InputError if torch is missing."""

    def __init__(self):
        try:
            import torch
        except ImportError as error:
            message = f"the stages torch and published need torch ({error}); install it or choose others by --stages"
            raise InputError(message, field="stages", given="torch", expected="torch installed") from None
        self.torch, self.is_cuda = torch, torch.cuda.is_available()
        self.name = "cuda" if self.is_cuda else "cpu"

    def conditions(self) -> dict[str, str]:
        kind = self.torch.cuda.get_device_name() if self.is_cuda else "cpu"
        return {**conditions(kind, "torch", "triton", "numpy"), "XLA_FLAGS": ""}

    def time(self, run: Callable, rounds: int, num: int = 1) -> list[float]:
        """Return the milliseconds of a call in each round of `num` calls, after an untimed round."""
        times = []
        for _ in range(rounds + 1):
            begin = time.perf_counter()
            for _ in range(num):
                run()
            if self.is_cuda:
                self.torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - begin) / num)
        return times[1:]

    def reset_peak(self) -> None:
        if self.is_cuda:
            self.torch.cuda.empty_cache()
            self.torch.cuda.reset_peak_memory_stats()

    def peak_mib(self) -> float | None:
        return self.torch.cuda.max_memory_allocated() / MIB if self.is_cuda else None


def block_mask(case: Case, device: str):
    """Return FlexAttention's mask of the clamped windows."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask

    window, half = min(case.window, case.height), case.window // 2

    def is_seen(b, h, i, j):
        y = torch.clamp(i // case.width - half, 0, case.height - window)
        x = torch.clamp(i % case.width - half, 0, case.width - window)
        row, column = j // case.width, j % case.width
        return (row >= y) & (row < y + window) & (column >= x) & (column < x + window)

    num_tokens = case.height * case.width
    return create_block_mask(is_seen, None, None, num_tokens, num_tokens, device=device)


def attention_forms(case: Case, device: Device) -> dict[str, Callable]:
    """Return functions of q, k, v `[B, H, N, K]` by name."""
    torch, options = device.torch, {"scale": case.head_width**-0.5}
    from torch.nn.attention.flex_attention import flex_attention

    sdpa = torch.nn.functional.scaled_dot_product_attention
    mask = torch.from_numpy(window_mask(case.height, case.width, case.window)).to(device.name)
    forms = {"SDPA with mask": functools.partial(sdpa, attn_mask=mask, **options)}
    flex = torch.compile(flex_attention, dynamic=False)
    forms["FlexAttention"] = functools.partial(flex, block_mask=block_mask(case, device.name), **options)
    return forms


def run_torch(args, report: Report) -> bool:
    """Time both forms at the shapes of the stage `attention`, forward and with all gradients."""
    device, is_good = Device(), True
    torch = device.torch
    report.add(CONDITIONS, **device.conditions())
    for case in timed_cases(args):
        # torch compiles a function at most 8 times by default, and FlexAttention is compiled twice for each case
        torch._dynamo.reset()
        shape = (case.batch, case.num_heads, case.height * case.width, case.head_width)
        q, k, v, cotangent = (torch.randn(shape, device=device.name, dtype=torch.bfloat16) for _ in range(4))
        inputs = [x.requires_grad_() for x in (q, k, v)]
        for name, attend in attention_forms(case, device).items():
            forward = functools.partial(attend, *inputs)
            both = lambda forward=forward, inputs=inputs, dy=cotangent: torch.autograd.grad(forward(), inputs, dy)
            for direction, run in (("forward", forward), ("with gradients", both)):
                cells = {
                    "map": f"{case.height}x{case.width}",
                    "batch": case.batch,
                    "form": name,
                    "direction": direction,
                }
                try:
                    with torch.set_grad_enabled(run is both):
                        times = device.time(run, args.rounds, NUM_CALLS)
                except Exception as error:  # one form's own failure is a row
                    report.add("attention that failed", **cells, reason=why(error))
                    is_good = False
                    continue
                report.add("window attention in torch, bfloat16, a call", **cells, ms=times)
    return is_good


class Published:
    """The published program on the device here: random weights of --size and --depth, NATTEN by SDPA if missing."""

    def __init__(self, args, device: Device):
        tokenizer, self.sizes = modules_of(args)
        if args.size == TINY:
            tokenizer = tokenizer.clone(ch=32)  # its norms have 32 groups
        torch, self.vae, self.mvar, self.notes = make_published(args.published, tokenizer, self.sizes, on_cpu=False)
        for module in (self.vae, self.mvar):
            module.to(device.name)
        self.device, self.torch = device, torch
        self.optimizer = torch.optim.AdamW(self.mvar.parameters(), 1e-5, (0.9, 0.95), weight_decay=0.05, fused=True)

    def autocast(self):
        return self.torch.autocast(self.device.name, self.torch.bfloat16)

    def labels(self, batch: int):
        return self.torch.arange(batch, device=self.device.name) % self.sizes.num_classes

    def sample(self, labels, has_pixels: bool) -> None:
        top_k = min(OPTIONS.top_k, self.sizes.vocab_size)
        draw = {"g_seed": 0, "cfg": OPTIONS.cfg, "top_k": top_k, "top_p": OPTIONS.top_p}
        with self.torch.inference_mode(), self.autocast():
            f_hat = self.mvar.autoregressive_infer(B=len(labels), label_B=labels, **draw)
            if has_pixels:
                self.vae.fhat_to_img(f_hat)

    def step(self, phase, ids, labels, previous) -> None:
        """Take a step of training: forward, backward, clipping, AdamW."""
        is_window = phase.attention == WINDOW
        with self.autocast():
            logits = self.mvar(
                label_B=labels,
                x_BlCv_wo_first_l=previous_of(previous, phase, self.mvar.first_l),
                L_bg=phase.begin,
                L_ed=phase.end,
                using_nattn=is_window,
            )
            logits = logits.float().reshape(-1, logits.shape[-1])
            targets = ids[:, phase.begin : phase.end].reshape(-1)
            loss = self.torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        (loss / ids.numel()).backward()
        self.torch.nn.utils.clip_grad_norm_(self.mvar.parameters(), 2.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def run_published(args, report: Report) -> bool:
    """Time sampling at each batch of --batches, and training at the first of --train_batches."""
    device = Device()
    program = Published(args, device)
    report.add(CONDITIONS, **device.conditions(), note="; ".join(program.notes))
    title, is_good = f"d{args.depth}, {args.size}, published program, bfloat16 autocast", True

    def measure(table: str, cells: dict, run: Callable) -> list[float] | None:
        device.reset_peak()
        try:
            times = device.time(run, args.rounds)
        except Exception as error:  # out of memory: the others go on
            report.add(f"{table} that failed", **cells, reason=why(error))
            return None
        rate = 1e3 * cells["batch"] / median(times)
        report.add(table, **cells, ms=times, **{"images/s": rate, "peak, MiB": device.peak_mib()})
        return times

    for batch in args.batches:
        for what in ("tokens", "pixels"):
            run = functools.partial(program.sample, program.labels(batch), what == "pixels")
            is_good &= measure(f"sampling, {title}", {"batch": batch, "what": what}, run) is not None
    program.mvar.train()
    batch, rng = args.train_batches[0], np.random.default_rng(0)
    num_tokens = program.sizes.pyramid.num_tokens
    to_device = lambda x: program.torch.from_numpy(x).to(device.name)
    ids = to_device(rng.integers(0, program.sizes.vocab_size, (batch, num_tokens)))
    num_start = program.sizes.pyramid.areas[0]
    shape = (batch, num_tokens - num_start, program.sizes.code_width)
    inputs = (ids, program.labels(batch), to_device(rng.standard_normal(shape, np.float32)))
    medians = []
    for phase in program.sizes.phases():
        cells, run = {"batch": batch, "tokens": phase.num_tokens}, functools.partial(program.step, phase, *inputs)
        if (times := measure(f"training, {title}", cells, run)) is not None:
            medians.append(median(times))
    if is_complete := len(medians) == len(program.sizes.phases()):
        add_cycle(batch, medians, report)
    return is_good and is_complete
