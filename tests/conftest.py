"""Fixtures that several files share. What is slow to compile is computed once for the whole session."""

import functools
import gc
import inspect
import os
import signal
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

# most of the time goes into compiling small programs; before JAX starts, and for child processes too
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"  # small programs are not worth 32 parts
# later versions, and libtpu, which reads these flags too, have no other emitters and refuse the flag
if version("jaxlib").startswith("0.10.") and find_spec("libtpu") is None:
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"  # they set up MLIR anew for every fusion

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_case
from golden_case import (
    MVAR,
    TOKENIZER,
    TOKENIZER_ENTRIES,
    TRANSFORMER_ENTRIES,
    VAR,
    Compiled,
    load,
    quick_jit,
)

from mvar_jax import api
from mvar_jax.checkpoints.model_directory import save_model
from mvar_jax.convert.names import to_tree
from mvar_jax.models.networks import Networks
from mvar_jax.models.transformer import previous_of
from mvar_jax.ops.sampling import gumbel_noise
from mvar_jax.sampling import analysis, editing, sampler
from mvar_jax.sampling.sampler import SampleOptions, guided_logits, sample_pyramid
from mvar_jax.training.transformer_step import phase_loss

pytest_plugins = ["stores"]  # fixtures s3, gcs and store

# child processes inherit what nohup or a shell's `&` ignores, and a run then ignores it too
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

# what tests trace lives on, and walking it often takes a tenth of the time
gc.set_threshold(200_000, 20, 100)


# Whole files go to one of three processes: the long ones first, or one of them runs alone at the end. The first makes
# the run that later files need; another process would wait for it.
LONG_FILES = ["test_commands", "test_window", "test_store_checkpoints", "test_run_in_store"]
LONG_FILES += ["test_stored_models", "test_errors", "test_cache_commands", "test_sampler", "test_processes"]
LONG_FILES += ["test_sharding", "test_ends", "test_locks", "test_store_cache", "test_toy_run_in_store"]
LONG_FILES += ["test_refiner_mesh", "test_finetuned_tokenizer", "test_channels", "test_plan_command"]
LONG_FILES += ["test_tokenizer", "test_package", "test_transformer", "test_default_flags", "test_loop"]
LONG_FILES += ["test_kill", "test_notebooks", "test_encode", "test_resume", "test_weights"]
LONG_FILES += ["test_worker_scripts", "test_accumulate", "test_pictures", "test_slurm"]
LONG_FILES += ["test_window_sharding", "test_manager", "test_parity", "test_tokenizer_step"]
LONG_FILES += ["test_deviceless_d16", "test_folder", "test_transformer_step", "test_join", "test_sample"]
LONG_FILES += ["test_four_processes", "test_joined_models", "test_devices", "test_attention", "test_bfloat16"]
LONG_FILES += ["test_precision", "test_decoder_chunks"]


def pytest_collection_modifyitems(items):
    """With `--no-loadscope-reorder`, or pytest-xdist takes the files with most tests first."""
    rank = {name: i for i, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


TEST_SECONDS = 600


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    """Every wait of a test and of its fixtures ends: after TEST_SECONDS it fails, with a traceback of the wait."""

    def give_up(number, frame):
        raise TimeoutError(f"the test took more than {TEST_SECONDS} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(TEST_SECONDS)
    try:
        return (yield)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Path:
    """One folder for all test processes of this run."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def own_program_cache(shared_folder):
    """Compiled programs go where all test processes and their children find them, and no later run."""
    settings = {
        "compilation_cache_dir": str(shared_folder / "programs"),
        "persistent_cache_min_compile_time_secs": 0.1,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(f"JAX_{name.upper()}", str(value))
            jax.config.update(f"jax_{name}", value)
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A model directory of `small_case.TINY_MODULES`."""
    folder = tmp_path_factory.mktemp("tiny_model")
    save_model(folder, small_case.TINY_MODULES, small_case.tiny_params())
    return folder


@pytest.fixture(scope="module")
def quick_programs():
    """`Model`'s programs, compiled in half the time."""
    programs = [(api, name) for name in ("apply_tokenizer", "decode_features")]
    programs += [(analysis, name) for name in ("sample_swept", "score_classes", "teacher_forced_logits")]
    with pytest.MonkeyPatch.context() as patch:
        for module, name in [*programs, (editing, "redraw")]:
            function = getattr(module, name).__wrapped__
            static = {"options", "method"} & set(inspect.signature(function).parameters)
            patch.setattr(module, name, quick_jit(function, static_argnames=sorted(static)))
        yield


@pytest.fixture(scope="session")
def tokenizer_params():
    return jax.tree.map(jnp.asarray, to_tree(TOKENIZER_ENTRIES, load("vae")))


@pytest.fixture(scope="session")
def transformer_params():
    return jax.tree.map(jnp.asarray, to_tree(TRANSFORMER_ENTRIES, load("mvar")))


@pytest.fixture(scope="session")
def golden_images():
    """float32 [2, 256, 256, 3] in [-1, 1]."""
    images_u8 = load("tokenizer")["image_u8"].astype(np.float32)
    return jnp.asarray((2 * images_u8 / 255 - 1).transpose(0, 2, 3, 1))


@pytest.fixture(scope="session")
def golden_batch():
    """What a training step sees of the golden images, but the label."""
    golden = load("tokenizer")
    return {"ids": jnp.asarray(golden["ids"]), "previous": jnp.asarray(golden["mvar_input"])}


@pytest.fixture(scope="session")
def encoded_images(tokenizer_params, golden_images):
    """(f, ids) of `Tokenizer.features` and `Tokenizer.encode`."""
    both = lambda module, images: (module.features(images), module.encode(images))
    encode = jax.jit(lambda params, images: TOKENIZER.apply({"params": params}, images, method=both))
    return encode(tokenizer_params, golden_images)


@pytest.fixture(scope="session")
def accumulated_ids(tokenizer_params):
    """(f_hat after each scale, teacher-forcing input) from the golden ids alone."""
    both = lambda module, ids: (module.f_hats(ids), module.teacher_forcing(ids))
    accumulate = quick_jit(lambda params, ids: TOKENIZER.apply({"params": params}, ids, method=both))
    return accumulate(tokenizer_params, load("tokenizer")["ids"])


@pytest.fixture(scope="session")
def decode(tokenizer_params):
    """Latent maps [B, y, x, c] -> images in [-1, 1]; one program for every batch, padded to 2 maps a call."""
    run = jax.jit(lambda params, f_hat: TOKENIZER.apply({"params": params}, f_hat, method="decode"))

    def in_pairs(f_hat_BYXc):
        f_hat = np.asarray(f_hat_BYXc)
        padded = np.concatenate([f_hat, f_hat[-1:]])
        parts = [run(tokenizer_params, padded[i : i + 2]) for i in range(0, len(f_hat), 2)]
        return np.concatenate(parts)[: len(f_hat)]

    return in_pairs


@pytest.fixture(scope="session")
def tokenizer_training(tokenizer_params, golden_images):
    """The training forward and the gradients of vq_loss + mse(reconstruction, x)."""

    def loss_fn(params, images):
        rec, vq_loss, encoded = TOKENIZER.apply({"params": params}, images)
        rec_mse = jnp.mean(jnp.square(rec - images))
        return vq_loss + rec_mse, {"rec": rec, "vq_loss": vq_loss, "rec_mse": rec_mse, "encoded": encoded}

    (_, result), grads = quick_jit(jax.value_and_grad(loss_fn, has_aux=True))(tokenizer_params, golden_images)
    return {**result, "grads": grads}


def compile_pass(model, phase):
    """(params, batch) -> logits, loss, sums per scale and gradients of one phase."""

    def run(params, batch):
        previous = previous_of(batch["previous"], phase, num_start=1)
        logits, _ = model.apply({"params": params}, previous, batch["label"], phase)
        grad_fn = jax.value_and_grad(lambda params: phase_loss(model, params, batch, phase), has_aux=True)
        (loss, (nll_BS, hits_BS)), grads = grad_fn(params)
        return {"logits": logits, "loss": loss, "nll": nll_BS, "hits": hits_BS, "grads": grads}

    return quick_jit(run)


@pytest.fixture(scope="session")
def phase_programs():
    """One compiled pass for each of MVAR's three phases, shared by the parity and the optimizer tests."""
    return [compile_pass(MVAR, phase) for phase in MVAR.phases()]


@pytest.fixture(scope="session")
def run_phases(phase_programs, transformer_params, golden_batch):
    """labels -> the passes of all three phases."""

    @functools.cache
    def run(labels):
        batch = {**golden_batch, "label": jnp.asarray(labels)}
        return [program(transformer_params, batch) for program in phase_programs]

    return run


@pytest.fixture(scope="session")
def run_var(transformer_params, golden_batch):
    """labels -> VAR's one block-causal pass."""
    program = compile_pass(VAR, VAR.phases()[0])
    return functools.cache(lambda labels: program(transformer_params, {**golden_batch, "label": jnp.asarray(labels)}))


@pytest.fixture(scope="session")
def draw_golden(transformer_params, tokenizer_params):
    """(model name, labels, options, noise) -> (ids, f_hat, guided logits of each scale)."""
    tokenizer = Compiled(TOKENIZER)
    models = {"mvar": Compiled(MVAR), "var": Compiled(VAR)}
    networks = {
        name: Networks(tokenizer, tokenizer_params, model, transformer_params) for name, model in models.items()
    }
    keys_B = jax.random.split(jax.random.key(0, impl="rbg"), 2)  # quicker to compile; no golden draw depends on them
    programs = {
        "draw_scale": quick_jit(sampler.draw_scale, static_argnums=(3, 4, 5, 6)),
        "next_input": quick_jit(sampler.next_input, static_argnums=(1, 2)),
        "modulate": quick_jit(sampler.modulate, static_argnums=0),
    }

    def draw_scale(logits_BNV, keys_B, codebook, options, *rest):
        """Guidance is no matter of the draw from guided logits: all strengths share its programs."""
        return programs["draw_scale"](logits_BNV, keys_B, codebook, replace(options, cfg=0.0), *rest)

    def draw(name: str, labels, options: SampleOptions, noise=gumbel_noise):
        with pytest.MonkeyPatch.context() as patch:
            for function, program in (programs | {"draw_scale": draw_scale}).items():
                patch.setattr(sampler, function, program)
            logits_fn = guided_logits(networks[name], jnp.asarray(labels), options.cfg)
            return sample_pyramid(logits_fn, networks[name], keys_B, options, noise)

    return draw
