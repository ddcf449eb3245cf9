"""Files from the Hugging Face hub; the package is imported only when it is asked for."""

import logging
from pathlib import Path

from mvar_jax.errors import InputError, shorten

BY_HAND = "or the file downloaded by hand and given by its path without --from_hub"


def download(repo: str, filename: str) -> Path:
    """Local path of a file of a hub repository, from the cache where it is there.

    Raises InputError, saying what to do, without the package, a network, or such a file.
    """
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise InputError("from_hub", repo, f"`pip install huggingface_hub` first, {BY_HAND}") from None
    logger = logging.getLogger("huggingface_hub")  # it reports every retry; the last failure says it all
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return Path(hf_hub_download(repo_id=repo, filename=filename))
    except Exception as error:  # its own errors and those of whatever it talks HTTP with
        given = f"{repo} {filename}"
        expected = f"a file that this machine can download, {BY_HAND} ({type(error).__name__}: {shorten(error)})"
        raise InputError("from_hub", given, expected) from None
    finally:
        logger.setLevel(level)
