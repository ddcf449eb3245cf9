"""Opening the tokens that a transformer or a refiner trains on: of a token cache, or of images and a tokenizer."""

from typing import Any

from mvar_jax.checkpoints.model_directory import load_model
from mvar_jax.data.options import DataOptions
from mvar_jax.errors import InputError
from mvar_jax.files.paths import as_path
from mvar_jax.models.networks import Networks, check_fit, check_same, fit_of
from mvar_jax.tokens.cache_reader import TokenCache, describe_tokenizer, has_ids_of, read_meta


def open_tokens(data: DataOptions, transformer: Any):
    """Return (tokenizer with its weights, sources by split, transform or None) of a token cache or of images.

    The tokenizer computes in the precision of `transformer`, which may be a refiner.
    Raises InputError if the config names neither, or unless tokenizer, transformer and data fit together.
    """
    if not (data.cache or data.tokenizer):
        raise InputError(
            "config.data must name a token cache or a tokenizer that encodes images, got cache='' and tokenizer=''",
            field="config.data",
            given="cache='' and tokenizer=''",
            expected="cache or tokenizer",
        )
    if not data.cache:
        networks = load_tokenizer(data.tokenizer).with_precision(transformer.precision)
        sizes = image_size_of(networks.tokenizer, data)
        check_same(sizes | fit_of(networks.tokenizer, transformer, "config.model."))
        return networks, data.open_all(), data.transform(networks.tokenizer.channels)
    networks = load_tokenizer_of_cache(data).with_precision(transformer.precision)
    check_fit(networks.tokenizer, transformer, "config.model.")
    expected = {
        "expect_sides": networks.tokenizer.sides,
        "expect_vocab_size": networks.tokenizer.vocab_size,
        "max_memory_bytes": data.cache_memory_mib * 2**20,
        "disk_folder": data.cache_folder or None,
        "max_disk_bytes": data.cache_disk_mib * 2**20,
    }
    splits = ("train", "val") if "val" in read_meta(data.cache)["splits"] else ("train",)
    return networks, {split: TokenCache(data.cache, split, **expected) for split in splits}, None


def load_tokenizer_of_cache(data: DataOptions):
    """Load the tokenizer that made a cache, or one with another decoder: `data.tokenizer`, else the cache's own.

    An older cache has none and names a path instead. Raises InputError if the tokenizer cannot be read or did not
    make the cache.
    """
    meta = read_meta(data.cache)
    inside = meta.get("tokenizer")
    path = data.tokenizer or (
        str(as_path(data.cache, "config.data.cache") / inside) if inside else meta["tokenizer_path"]
    )
    advice = "pass config.data.tokenizer=DIR with the tokenizer that made it, or encode again with cache_tokens"
    try:
        networks = load_tokenizer(path)
    except InputError as error:
        if data.tokenizer:
            raise
        words = f"the tokenizer of token cache {data.cache} cannot be read: {error}; {advice}"
        raise InputError(
            words, field="config.data.cache", given=data.cache, expected="a readable tokenizer"
        ) from None
    if has_ids_of(data.cache, networks):
        return networks
    if data.tokenizer:
        what = f"config.data.tokenizer={path} is not the tokenizer that made token cache {data.cache}"
    elif inside:
        what = f"token cache {data.cache} holds another tokenizer than the one that made it"
    else:
        what = f"the tokenizer {path} has changed since it made token cache {data.cache}, perhaps by more training"
    words = f"{what}: its fingerprint is {describe_tokenizer(meta, networks)}; {advice}"
    field = "config.data.tokenizer" if data.tokenizer else "config.data.cache"
    raise InputError(words, field=field, given=path, expected="the tokenizer that made the cache")


def load_tokenizer(directory: str):
    """Load the tokenizer of a model directory or a workdir, as `Networks` without a transformer."""
    path = as_path(directory, "tokenizer")
    modules, params = load_model(path)
    if "tokenizer" not in modules:
        words = f"{path} holds no tokenizer"
        raise InputError(words, field="tokenizer", given=str(path), expected="a directory with a tokenizer")
    return Networks(modules["tokenizer"], params["tokenizer"])


def image_size_of(tokenizer: Any, data: DataOptions) -> dict[str, tuple[int, int]]:
    """Return the config key of the images' size -> (the config's value, the tokenizer's), for `check_same`."""
    return {"config.data.image_size": (data.image_size, tokenizer.image_size)}
