"""Files of weights: what every format has in common, and what a file that is none may be instead."""

import abc
import contextlib
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mvar_jax.convert.tensors import Tensor
from mvar_jax.errors import InputError, shorten
from mvar_jax.files.paths import is_store

AGAIN = "download it again"
# (position, bytes) of other files -> what is said of them
OTHER_FILES = {
    (0, b"version https://git-lfs"): "it is a pointer of Git LFS, not the weights; run git lfs pull there",
    (0, b"\x1f\x8b"): "it is a gzip file; unpack it with gunzip and give what is in it",
    (0, b"\xfd7zXZ\x00"): "it is an xz file; unpack it with unxz and give what is in it",
    (0, b"BZh"): "it is a bzip2 file; unpack it with bunzip2 and give what is in it",
    (0, b"\x28\xb5\x2f\xfd"): "it is a Zstandard file; unpack it with unzstd and give what is in it",
    (0, b"7z\xbc\xaf\x27\x1c"): "it is a 7z archive; unpack it and give what is in it",
    (0, b"Rar!"): "it is a rar archive; unpack it and give what is in it",
    (257, b"ustar"): "it is a tar archive; unpack it and give what is in it",
    (0, b"\x93NUMPY"): "it is an array of numpy, not a state dict",
    (0, b"\x89HDF"): "it is an HDF5 file, not PyTorch's weights",
    (0, b"GGUF"): "it is a GGUF file, not PyTorch's weights",
}
HTML = (b"<!doctype", b"<html", b"<?xml", b"<head")
NO_FILES = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
NUM_HEAD_BYTES = 512
# a file that unpacks to more than this, and to more than MAX_RATIO times its size, is taken for a bomb
MAX_UNPACKED_BYTES = 1 << 30
MAX_RATIO = 100


class WeightsFile(abc.ABC):
    """An open file of weights; opening it and reading a tensor raise InputError if it is unreadable or damaged.

    Attributes:
      content: the saved object, with Tensor records for tensors.
      field: name of the option that gave the path, for messages.
      num_bytes: size of the file or files.
    """

    content: Any
    num_bytes: int

    def __init__(self, field: str, path: Path):
        self.field, self.path = field, path
        self._opened = contextlib.ExitStack()

    def __enter__(self) -> "WeightsFile":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._opened.close()

    @abc.abstractmethod
    def read(self, tensor: Tensor) -> np.ndarray:
        """Return the tensor's values in their own dtype and the machine's byte order; the array is read-only."""

    def check_unpacked(self, num_bytes: int) -> None:
        """Raise InputError if what the file holds takes far more bytes than the file."""
        if num_bytes > max(MAX_UNPACKED_BYTES, MAX_RATIO * self.num_bytes):
            raise self.refuse(f"its {self.num_bytes} bytes would unpack to {num_bytes}")

    def refuse(self, reason: str) -> InputError:
        """Return an InputError with the reason why the file cannot be read."""
        return refuse(self.field, self.path, reason)


def refuse(field: str, path: Path, reason: str) -> InputError:
    """Return an InputError with the reason why a file cannot be read."""
    expected = "a file of torch.save or of safetensors"
    message = f"{field}={path} is not a readable file of weights: {reason}"
    return InputError(message, field=field, given=str(path), expected=expected)


def open_regular(field: str, path: Path) -> BinaryIO:
    """Open a file to read it. Raises InputError if it is missing, or what can block or never end, such as a pipe."""
    try:
        if not is_store(path):
            mode = os.stat(path).st_mode
            if not stat.S_ISREG(mode):
                raise refuse(field, path, f"it is {NO_FILES.get(stat.S_IFMT(mode), 'no file')}; give a regular file")
        return path.open("rb")
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise refuse(field, path, shorten(error)) from None


def explain(head: bytes) -> str:
    """Return what a file is that begins with these bytes and is no file of weights."""
    if not head:
        return f"it is empty; {AGAIN}"
    for (start, magic), words in OTHER_FILES.items():
        if head[start:].startswith(magic):
            return words
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(HTML):
        return f"it is an HTML page, such as a login or an error page; {AGAIN} from the link of the file itself"
    if head.startswith(b"\x80"):
        return "it is a pickle that torch.save has not written; save a state dict with torch.save"
    if not head.strip(b"\0"):
        return f"it begins with zeros, as a download that was cut short; {AGAIN}"
    return f"it begins with {head[:8]!r}, which no file of torch.save or of safetensors does"
