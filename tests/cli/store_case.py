"""What the files of tests on object stores share."""


def contents(folder) -> dict[str, bytes]:
    """Return the visible files of a folder of this machine or of a store."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name[0] != "."}
