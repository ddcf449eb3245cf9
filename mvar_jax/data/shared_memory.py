"""Memory that processes of one machine share, and messages between them that are not copied on arrival.

The memory has no name: it is not in /dev/shm, whose size a container limits to 64 MiB, and the kernel frees it with
the last process that maps it, however that process ends.
"""

import io
import math
import mmap
import os
import pickle
import socket
import struct
import tempfile
import weakref
from typing import Any

import cloudpickle
import numpy as np

_ALIGNMENT = 64  # bytes; the CPU backend of JAX then takes an array without a copy
_MAX_FILES = 64  # of a message


def _open_nameless() -> int:
    """Return the descriptor of an empty file without a name, in memory if the system can."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("mvar_jax")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class SharedArray:
    """An array that is sent to other processes without a copy.

    Args:
      shape: of the array, which begins as zeros.
      dtype: of its elements.

    Attributes:
      array: a view of the shared memory.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any, file: int | None = None):
        num_bytes = max(1, math.prod(shape) * np.dtype(dtype).itemsize)
        if file is None:
            file = _open_nameless()
            os.ftruncate(file, num_bytes)
        self.file = file
        weakref.finalize(self, os.close, file)
        self.array = np.frombuffer(mmap.mmap(file, num_bytes), dtype, math.prod(shape)).reshape(shape)

    def __reduce__(self):
        # by whatever is not a Message: a copy
        return _share, (np.array(self.array),)


def _share(array: np.ndarray) -> SharedArray:
    shared = SharedArray(array.shape, array.dtype)
    shared.array[...] = array
    return shared


class _Pickler(cloudpickle.Pickler):
    """Pickles arrays as separate buffers and shared arrays as their place among `files`."""

    def __init__(self, file: io.BytesIO, buffers: list[pickle.PickleBuffer]):
        super().__init__(file, protocol=5, buffer_callback=buffers.append)
        self.files: list[int] = []

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, SharedArray):
            return None
        self.files.append(obj.file)
        return obj.array.shape, obj.array.dtype.str, len(self.files) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, buffers: list[memoryview], files: list[int]):
        super().__init__(file, buffers=buffers)
        self._files = files

    def persistent_load(self, pid: Any) -> SharedArray:
        shape, dtype, place = pid
        return SharedArray(shape, dtype, os.dup(self._files[place]))


class Message:
    """A packed object. It may be sent to several processes, which then share its arrays until they change them.

    Args:
      content: anything that cloudpickle takes; arrays and `SharedArray`s stay outside the pickle.

    Attributes:
      num_bytes: its size without the shared arrays.
    """

    def __init__(self, content: Any):
        stream, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
        pickler = _Pickler(stream, buffers)
        pickler.dump(content)
        self._content = content  # holds the shared arrays
        parts = [stream.getbuffer(), *(buffer.raw() for buffer in buffers)]
        self._files = [_open_nameless(), *pickler.files]
        weakref.finalize(self, os.close, self._files[0])
        with open(self._files[0], "wb", closefd=False) as file:
            file.write(struct.pack(f"<{len(parts) + 1}q", len(parts), *(part.nbytes for part in parts)))
            for part in parts:
                file.seek(_aligned(file.tell()))
                file.write(part)
            self.num_bytes = file.tell()

    def send(self, channel: socket.socket) -> None:
        """Send it to the process at the other end of a Unix socket."""
        socket.send_fds(channel, [b"m"], self._files)


def receive(channel: socket.socket) -> Any:
    """Return the content of the next message. Raises EOFError if the other end is closed."""
    try:
        data, files, _, _ = socket.recv_fds(channel, 1, _MAX_FILES)
    except ConnectionResetError:
        data, files = b"", []
    if not data:
        raise EOFError("the other end is closed")
    try:
        whole = memoryview(mmap.mmap(files[0], 0, access=mmap.ACCESS_COPY))
        num_parts = struct.unpack_from("<q", whole)[0]
        end, parts = 8 * (num_parts + 1), []
        for num_bytes in struct.unpack_from(f"<{num_parts}q", whole, 8):
            begin = _aligned(end)
            end = begin + num_bytes
            parts.append(whole[begin:end])
        return _Unpickler(io.BytesIO(parts[0]), parts[1:], files[1:]).load()
    finally:
        for file in files:
            os.close(file)


def _aligned(position: int) -> int:
    return -(-position // _ALIGNMENT) * _ALIGNMENT
