"""Pillow's warnings about image files, which commands hide."""

import warnings


def ignore_pillow_warnings() -> None:
    """Hide Pillow's warnings about odd tags and large images in this process.

    Commands and their worker processes call this: sizes are checked by `open_rgb` and odd tags are harmless, but
    ImageNet alone has a dozen. Filters belong to the process, so no import and no thread that decodes changes them.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
