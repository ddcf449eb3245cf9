"""Pictures of both tasks, drawn with weights sharded over eight virtual devices and with all on one, and evaluation.

Prints JSON: how the pictures differ, and the bytes that one device holds meanwhile.
"""

import json
import types

import jax
import numpy as np
from small_case import seeded_params

from mvar_jax.data.options import LoadOptions
from mvar_jax.data.sources import SyntheticSource
from mvar_jax.data.transforms import PhotoTransform
from mvar_jax.files.images import min_zoom, tile_grid
from mvar_jax.models.networks import Networks
from mvar_jax.models.tokenizer import Tokenizer
from mvar_jax.models.transformer import Transformer
from mvar_jax.sharding import make_mesh, use_mesh
from mvar_jax.training.codebook_options import CodebookOptions
from mvar_jax.training.optimizer import OptimizerOptions
from mvar_jax.training.task import NUM_PICTURES, RunOptions, TaskData
from mvar_jax.training.tokenizer_task import TokenizerTask
from mvar_jax.training.transformer_step import PhaseOptions
from mvar_jax.training.transformer_task import TransformerTask

SIDES = (1, 2)
# weights far larger than activations, spread over many layers
TRANSFORMER = Transformer(SIDES, 1, 3, 16, 4, num_classes=3, depth=8, width=128, num_heads=8)
TOKENIZER = Tokenizer(
    SIDES, vocab_size=16, code_width=4, ch=8, ch_mult=(1,), num_res_blocks=1, num_groups=4, num_phi=1
)
WIDE = TOKENIZER.clone(ch=128, num_groups=8)
FEW = 5  # held-out images, which eight devices do not divide


def tasks(mesh) -> dict:
    sources = {split: SyntheticSource(split, seed=0, size=FEW) for split in ("train", "val")}
    data = TaskData(sources, PhotoTransform(2, flip=False), LoadOptions())
    run = RunOptions(0, 10, 8, OptimizerOptions(), mesh, eval_samples=NUM_PICTURES)
    networks = Networks(TOKENIZER, seeded_params(TOKENIZER, std=0.5))
    return {
        "samples": TransformerTask(run, TRANSFORMER, PhaseOptions(), networks, data),
        "reconstructions": TokenizerTask(run, WIDE, CodebookOptions(), data),
    }


def bytes_of(program) -> dict:
    memory = program.memory_analysis()
    return {"arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes}


def draw(task, module) -> tuple[np.ndarray, dict]:
    """Return the picture, and the bytes of the weights and of one device while it draws and while it evaluates."""
    params = jax.device_put(seeded_params(module, std=0.05), task.shardings.params)
    pictures = task.pictures(types.SimpleNamespace(params=params, ema=None))
    picture = np.concatenate([picture.reshape(-1) for picture in pictures.values()])
    batch = next(task.eval_batches())
    with use_mesh(task.run.mesh):
        if isinstance(task, TransformerTask):
            drawing = task.draw_pictures.lower(params, task.tokenizer)
            evaluation = task.evaluate_batch.lower(params, batch, task.tokenizer)
        else:
            drawing = task.decode_maps.lower(params, task.encode_maps(params, np.zeros((FEW, 2, 2, 3), np.uint8))[0])
            evaluation = task.evaluate_batch.lower(params, batch)
    sizes = {name: bytes_of(part.compile()) for name, part in (("drawing", drawing), ("evaluation", evaluation))}
    return picture, {"weights": sum(x.nbytes for x in jax.tree.leaves(params)), **sizes}


def scored_samples(task: TransformerTask) -> np.ndarray:
    """Return the samples that an evaluation scores, as a picture: they are drawn as those of `draw` are."""
    params = jax.device_put(seeded_params(TRANSFORMER, std=0.05), task.shardings.params)
    ((pixels, _),) = task._samples(types.SimpleNamespace(params=params, ema=None))
    return tile_grid(pixels, 8, zoom=min_zoom(pixels.shape[1]))


def main():
    sharded, single = tasks(make_mesh(data=1, fsdp=8)), tasks(make_mesh(devices=jax.devices()[:1]))
    report = {"devices": len(jax.devices())}
    for name, module in (("samples", TRANSFORMER), ("reconstructions", WIDE)):
        (picture, sizes), (expected, _) = draw(sharded[name], module), draw(single[name], module)
        difference = np.abs(picture.astype(int) - expected.astype(int))
        report[name] = {
            **sizes,
            "same_shape": picture.shape == expected.shape,
            "worst": int(difference.max()),
            "spread": float(expected.std()),
        }
        if name == "samples":
            scored = scored_samples(sharded[name]).reshape(-1)
            report[name]["scored_worst"] = int(np.abs(scored.astype(int) - expected.astype(int)).max())
    print(json.dumps(report))


if __name__ == "__main__":
    main()
