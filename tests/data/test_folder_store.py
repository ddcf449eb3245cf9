"""Images in an object store: the same source as of the same folder on a disk."""

import shutil

import numpy as np
import pytest
from image_files import write_png

from mvar_jax.data.folder import FolderSource
from mvar_jax.errors import InputError
from mvar_jax.files.directories import upload_folder
from mvar_jax.files.paths import as_path
