"""Image files for tests, as bytes, and folder trees of them."""

import io
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def encode(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Smooth uint8 [height, width, 3]: what JPEG keeps."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def bomb(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def write_tree(
    root: Path, classes=("ant", "bee", "cat"), num_train: int = 5, num_val: int = 2, size=(14, 12)
) -> Path:
    """root/train/CLASS/N.jpg and root/val/CLASS/N.jpg, all different."""
    seed = 0
    for split, num in (("train", num_train), ("val", num_val)):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for number in range(num):
                seed += 1
                picture = Image.fromarray(noise(*size, seed=seed))
                (root / split / name / f"{number}.jpg").write_bytes(encode(picture, "JPEG", quality=95))
    return root


def write_tar(path: Path, members) -> None:
    """A tar of (name, bytes), or (name, the name that a hard link leads to)."""
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            if isinstance(data, str):
                entry.type, entry.linkname = tarfile.LNKTYPE, data
            entry.size = len(data) if isinstance(data, bytes) else 0
            archive.addfile(entry, io.BytesIO(data) if isinstance(data, bytes) else None)
