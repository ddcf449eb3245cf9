"""Files from the Hugging Face hub; its package is imported only if it is needed."""

import logging
import os
import sys
from pathlib import Path

from mvar_jax.convert.reader import shards_of
from mvar_jax.convert.safetensors_files import INDEX_SUFFIX
from mvar_jax.errors import InputError, shorten

BY_HAND = "download the file by hand and give its path without --from_hub"


def download(repo: str, filename: str) -> Path:
    """Return the local path of a file of a hub repository, downloading it unless it is cached.

    The shards that an index names are downloaded too. Raises InputError if the package, the network or the file is
    missing.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # its bars would fill a log with carriage returns
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        message = f"--from_hub {repo} needs a package: run `pip install huggingface_hub`, or {BY_HAND}"
        raise InputError(message, field="from_hub", given=repo, expected="huggingface_hub installed") from None
    logger = logging.getLogger("huggingface_hub")  # silenced, since it logs every retry before the error
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        path = Path(hf_hub_download(repo_id=repo, filename=filename))
        if filename.endswith(INDEX_SUFFIX):
            for shard in shards_of("from_hub", path):
                hf_hub_download(repo_id=repo, filename=f"{filename.rpartition('/')[0]}/{shard}".lstrip("/"))
        return path
    except InputError:
        raise
    except Exception as error:  # the package raises its own errors and those of its HTTP library
        given, reason = f"{repo} {filename}", f"{type(error).__name__}: {shorten(error)}"
        message = f"--from_hub cannot download {given} ({reason}); {BY_HAND}"
        raise InputError(message, field="from_hub", given=given, expected="a file of the repository") from None
    finally:
        logger.setLevel(level)
