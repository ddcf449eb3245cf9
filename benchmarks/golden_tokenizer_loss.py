"""Write tests/golden/loss: the tokenizer's losses and gradients as a plain PyTorch program computes them.

    PYTHONPATH=.:tests python benchmarks/golden_tokenizer_loss.py

Needs PyTorch, which is no dependency of the package. In float64, on the weights and images of tests/loss_case.py.
"""

import functools
import itertools

import eval_case
import loss_case
import numpy as np
import torch
import torch.nn.functional as F

MODEL = loss_case.TOKENIZER
LIMIT = 48  # entries of a gradient that are stored
VGG = ((64, (0, 2)), (128, (5, 7)), (256, (10, 12, 14)), (512, (17, 19, 21)), (512, (24, 26, 28)))


def tensors(state: dict, needs_grad: bool = False) -> dict:
    found = {name: torch.tensor(np.asarray(x, np.float64)) for name, x in state.items()}
    return {name: x.requires_grad_(needs_grad) for name, x in found.items()}


def channels_first(x) -> torch.Tensor:
    return torch.tensor(np.asarray(x, np.float64)).permute(0, 3, 1, 2)


def conv(p: dict, name: str, x, stride: int = 1, padding: int | None = None):
    weight = p[f"{name}.weight"]
    return F.conv2d(x, weight, p[f"{name}.bias"], stride, weight.shape[-1] // 2 if padding is None else padding)


def norm(p: dict, name: str, x, groups: int):
    return F.group_norm(x, groups, p[f"{name}.weight"], p[f"{name}.bias"], 1e-6)


def residual(p: dict, name: str, x):
    y = conv(p, f"{name}.conv1", F.silu(norm(p, f"{name}.norm1", x, MODEL.num_groups)))
    y = conv(p, f"{name}.conv2", F.silu(norm(p, f"{name}.norm2", y, MODEL.num_groups)))
    return y + (conv(p, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in p else x)


def attention(p: dict, name: str, x):
    B, C, Y, X = x.shape
    q, k, v = conv(p, f"{name}.qkv", norm(p, f"{name}.norm", x, MODEL.num_groups)).reshape(B, 3, C, Y * X).unbind(1)
    share = torch.softmax(q.transpose(1, 2) @ k * C**-0.5, dim=2)
    return x + conv(p, f"{name}.proj_out", (v @ share.transpose(1, 2)).reshape(B, C, Y, X))


def middle(p: dict, name: str, x):
    x = attention(p, f"{name}.mid.attn_1", residual(p, f"{name}.mid.block_1", x))
    return residual(p, f"{name}.mid.block_2", x)


def level(p: dict, name: str, x, num_blocks: int):
    for i in range(num_blocks):
        x = residual(p, f"{name}.block.{i}", x)
        if f"{name}.attn.{i}.qkv.weight" in p:
            x = attention(p, f"{name}.attn.{i}", x)
    return x


def encode(p: dict, x):
    last = len(MODEL.ch_mult) - 1
    x = conv(p, "encoder.conv_in", x)
    for i in range(last + 1):
        x = level(p, f"encoder.down.{i}", x, MODEL.num_res_blocks)
        if i < last:
            x = conv(p, f"encoder.down.{i}.downsample.conv", F.pad(x, (0, 1, 0, 1)), 2, 0)
    x = middle(p, "encoder", x)
    return conv(
        p, "quant_conv", conv(p, "encoder.conv_out", F.silu(norm(p, "encoder.norm_out", x, MODEL.num_groups)))
    )


def decode(p: dict, x):
    x = middle(p, "decoder", conv(p, "decoder.conv_in", conv(p, "post_quant_conv", x)))
    for i in range(len(MODEL.ch_mult) - 1, -1, -1):
        x = level(p, f"decoder.up.{i}", x, MODEL.num_res_blocks + 1)
        if i > 0:
            x = conv(p, f"decoder.up.{i}.upsample.conv", F.interpolate(x, scale_factor=2, mode="nearest"))
    return conv(p, "decoder.conv_out", F.silu(norm(p, "decoder.norm_out", x, MODEL.num_groups)))


def quantize(p: dict, f):
    """Return (f_hat with straight-through gradient, loss, ids, least difference of squared distances)."""
    codes, side = p["quantize.embedding.weight"], MODEL.sides[-1]
    rest, f_hat, loss, ids, margins = f.detach(), 0.0, 0.0, [], []
    ticks = np.linspace(1 / (2 * MODEL.num_phi), 1 - 1 / (2 * MODEL.num_phi), MODEL.num_phi)
    for scale, size in enumerate(MODEL.sides):
        flat = F.interpolate(rest, (size, size), mode="area").permute(0, 2, 3, 1).reshape(-1, MODEL.code_width)
        distance = (flat[:, None] - codes.detach()).square().sum(-1)
        two = distance.topk(2, largest=False)
        ids.append(two.indices[:, 0].reshape(len(f), -1))
        margins.append((two.values[:, 1] - two.values[:, 0]).min().item())
        h = F.embedding(ids[-1], codes).reshape(len(f), size, size, -1).permute(0, 3, 1, 2)
        h = h if size == side else F.interpolate(h, (side, side), mode="bicubic")
        index = int(np.argmin(np.abs(ticks - scale / (len(MODEL.sides) - 1))))
        h = (1 - MODEL.phi_ratio) * h + MODEL.phi_ratio * conv(p, f"quantize.quant_resi.qresi_ls.{index}", h)
        f_hat, rest = f_hat + h, rest - h.detach()
        loss = loss + MODEL.beta * F.mse_loss(f_hat.detach(), f) + F.mse_loss(f_hat, f.detach())
    straight = (f_hat - f).detach() + f
    return straight, loss / len(MODEL.sides), torch.cat(ids, 1), min(margins)


def lpips(vgg: dict, heads: dict, a, b):
    shift, scale = (torch.tensor(x)[:, None, None] for x in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
    total, pair = 0.0, [(x - shift) / scale for x in (a, b)]
    for i, (_, numbers) in enumerate(VGG):
        pair = pair if i == 0 else [F.max_pool2d(x, 2) for x in pair]
        for n in numbers:
            pair = [F.relu(conv(vgg, f"features.{n}", x)) for x in pair]
        units = [x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in pair]
        total = total + F.conv2d((units[0] - units[1]).square(), heads[f"lin{i}.model.1.weight"]).mean((1, 2, 3))
    return total


def discriminate(d: dict, x):
    for i, stride in enumerate((2, 2, 1)):
        x = conv(d, f"conv{i}", x, stride, 1)
        x = F.leaky_relu(x if i == 0 else norm(d, f"norm{i}", x, 8), 0.2)
    return conv(d, "conv_out", x, 1, 1).flatten(1)


def stored(prefix: str, grads: dict) -> dict:
    """Return norms of gradients, and all or some entries, under the names that tests/golden_case.py compares."""
    found = {
        f"{prefix}_names": np.array(list(grads)),
        f"{prefix}_norms": np.array([g.norm() for g in grads.values()]),
    }
    for name, g in grads.items():
        flat = g.detach().numpy().reshape(-1)
        if flat.size <= LIMIT:
            found[f"{prefix}/{name}"] = g.detach().numpy().astype(np.float32)
        else:
            found[f"{prefix}_idx/{name}"] = np.linspace(0, flat.size - 1, LIMIT).astype(np.int32)
            found[f"{prefix}_val/{name}"] = flat[found[f"{prefix}_idx/{name}"]].astype(np.float32)
    return found


def loss_golden() -> dict:
    """Return every loss, and the gradients of the generator's with lambda by its definition: two backward passes."""
    p, d = tensors(loss_case.tokenizer_state(), True), tensors(loss_case.discriminator_state(), True)
    vgg, heads = tensors(eval_case.vgg_state()), tensors(eval_case.heads_state())
    x, w = channels_first(loss_case.pixels()), loss_case.WEIGHTS
    straight, quantizer, ids, margin = quantize(p, encode(p, x))
    rec = decode(p, straight)
    l1, l2, perceptual = F.l1_loss(rec, x), F.mse_loss(rec, x), lpips(vgg, heads, rec, x).mean()
    pixel = w["l1"] * l1 + w["l2"] * l2 + w["perceptual"] * perceptual
    adversarial = -discriminate(d, rec).mean()
    last = p["decoder.conv_out.weight"]
    norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (pixel, adversarial)]
    lam = (norms[0] / (norms[1] + 1e-6)).clamp(0.015, 1e4)
    loss = pixel + quantizer + w["adversarial"] * lam * adversarial
    grads = dict(zip(p, torch.autograd.grad(loss, list(p.values()), retain_graph=True), strict=True))
    real, fake = discriminate(d, x), discriminate(d, rec.detach())
    hinge = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
    lecam = F.relu(real - loss_case.MEANS["fake"]).square().mean()
    lecam = lecam + F.relu(loss_case.MEANS["real"] - fake).square().mean()
    loss_d = hinge + w["lecam"] * lecam
    grads_d = dict(zip(d, torch.autograd.grad(loss_d, list(d.values())), strict=True))
    numbers = {"l1": l1, "l2": l2, "perceptual": perceptual, "quantizer": quantizer, "adversarial": adversarial}
    numbers |= {"lambda": lam, "norm_rec": norms[0], "norm_adv": norms[1], "generator": loss}
    numbers |= {"hinge": hinge, "lecam": lecam, "discriminator": loss_d, "real": real, "fake": fake, "rec": rec}
    arrays = {name: value.detach().numpy() for name, value in numbers.items()}
    assert margin > 1e-4, margin
    return arrays | {"ids": ids.numpy(), "margin": margin} | stored("grad", grads) | stored("d_grad", grads_d)


def augment_golden() -> dict:
    """Return images with 1, 3 and 4 channels shifted, recoloured and cut by the same numbers."""
    x, draws = loss_case.augmented()
    whole = channels_first(x)
    return {str(C): augment(whole[:, :C], draws).permute(0, 2, 3, 1).numpy().astype(np.float32) for C in (1, 3, 4)}


def augment(x, draws: np.ndarray):
    done = []
    for image, row in zip(x, draws.astype(np.float64), strict=True):
        Y, X = image.shape[1:]
        moved = torch.zeros_like(image)
        by = [
            int(np.floor(u * (2 * round(n * 0.125) + 1))) - round(n * 0.125)
            for u, n in zip(row[:2], (Y, X), strict=True)
        ]
        for y, z in itertools.product(range(Y), range(X)):
            if 0 <= y + by[0] < Y and 0 <= z + by[1] < X:
                moved[:, y, z] = image[:, y + by[0], z + by[1]]
        image = moved + row[2] - 0.5
        image = (image - image.mean(0)) * 2 * row[3] + image.mean(0)
        image = (image - image.mean()) * (row[4] + 0.5) + image.mean()
        cuts = [(u, n, round(n * 0.2)) for u, n in zip(row[5:7], (Y, X), strict=True)]
        begins = [int(np.floor(u * (n + 1 - c % 2))) - c // 2 for u, n, c in cuts]
        rows, columns = (slice(max(b, 0), max(b + c[2], 0)) for b, c in zip(begins, cuts, strict=True))
        image[:, rows, columns] = 0
        done.append(image)
    return torch.stack(done)


def dino_features(p: dict, x):
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x = F.interpolate(x, (224, 224), mode="bicubic")
    x = F.conv2d(((x + 1) / 2 - mean) / std, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], 16)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([p["cls_token"].expand(len(x), -1, -1), x], 1) + p["pos_embed"]
    layer = lambda name, y: F.linear(y, p[f"{name}.weight"], p[f"{name}.bias"])
    scaled = lambda name, y: F.layer_norm(y, (384,), p[f"{name}.weight"], p[f"{name}.bias"], 1e-6)
    found = [x[:, 1:] + x[:, :1]]
    for i in range(12):
        name = f"blocks.{i}"
        qkv = layer(f"{name}.attn.qkv", scaled(f"{name}.norm1", x))
        q, k, v = qkv.reshape(*x.shape[:2], 3, 6, 64).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + layer(f"{name}.attn.proj", y)
        x = x + layer(f"{name}.mlp.fc2", F.gelu(layer(f"{name}.mlp.fc1", scaled(f"{name}.norm2", x))))
        if i in (2, 5, 8, 11):
            found.append(x[:, 1:] + x[:, :1])
    return found


def dino_golden() -> dict:
    """Return the features of five depths and the logits, as subsets, and the logits' gradient at the pixels."""
    from mvar_jax.models.dino import DinoDiscriminator

    p = tensors(loss_case.dino_state())
    heads = tensors(loss_case.head_state(loss_case.head_shapes(DinoDiscriminator())))
    x = channels_first(loss_case.dino_images()).requires_grad_()
    features = dino_features(p, x)

    def spectral(name, y):  # y: [B, C, N]
        kernel = heads[f"{name}/kernel"].permute(2, 1, 0)  # as PyTorch's Conv1d
        matrix, u = kernel.reshape(len(kernel), -1), heads[f"{name}/u"]
        unit = functools.partial(F.normalize, dim=0)
        u = unit(u)
        kernel = kernel / (u @ matrix @ unit(matrix.T @ u))
        half = kernel.shape[-1] // 2
        return F.conv1d(F.pad(y, (half, half), mode="circular") if half else y, kernel, heads[f"{name}/bias"])

    def layer(name, y):
        y = spectral(f"{name[0]}/conv_{name[1]}", y)
        scale, bias = (heads[f"{name[0]}/norm_{name[1]}/{end}"] for end in ("scale", "bias"))
        return F.leaky_relu(F.group_norm(y, 32, scale, bias, 1e-6), 0.2)

    logits = []
    for i, feature in enumerate(features):
        y = layer((f"head{i}", "in"), feature.transpose(1, 2))
        y = (layer((f"head{i}", "middle"), y) + y) / 2**0.5
        logits.append(spectral(f"head{i}/conv_out", y)[:, 0])
    logits = torch.cat(logits, 1)
    (slope,) = torch.autograd.grad(logits.sum(), x)
    arrays = {
        "features": torch.stack(features)[:, :, ::17, ::19],
        "logits": logits,
        "slope": slope.permute(0, 2, 3, 1),
    }
    return {name: value.detach().numpy().astype(np.float32) for name, value in arrays.items()}


def main() -> None:
    loss_case.GOLDEN.mkdir(parents=True, exist_ok=True)
    for name, make in (("loss", loss_golden), ("augment", augment_golden), ("dino", dino_golden)):
        np.savez_compressed(loss_case.GOLDEN / f"{name}.npz", **make())


if __name__ == "__main__":
    main()
