"""Object stores on this machine: an S3 server (moto's) and a GCS emulator, each with one empty bucket.

A plugin of pytest, so that its fixtures need no import. Environment variables lead this process and its children to
the servers.
"""

import functools
import importlib.util
from collections.abc import Iterator
from typing import NamedTuple

import pytest

BUCKET = "bucket"
_S3_PACKAGES = ("moto", "s3fs", "flask")
_GCS_PACKAGES = ("gcp_storage_emulator", "gcsfs")


class Store(NamedTuple):
    """A store that answers on loopback. url: of its bucket, such as s3://bucket; stop: end the server."""

    url: str
    stop: object
    environment: dict[str, str]


def need(packages: tuple[str, ...]) -> None:
    """Skip the test, saying why, if a package of the extra `test` is missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: pip install -e '.[test]'")


def forget_connections() -> None:
    """Let the next path connect anew: a process keeps one connection to each kind of store."""
    from mvar_jax.files import paths, stores

    stores.filesystem.cache_clear()
    paths._reached.clear()


def remember_hosts() -> None:
    """Let moto find the service of a host once: it lists its folder and tries 200 patterns for every request."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication as Dispatcher

    if not hasattr(Dispatcher.get_backend_for_host, "cache_info"):
        Dispatcher.get_backend_for_host = functools.cache(Dispatcher.get_backend_for_host)


def start_s3() -> Store:
    """Start an S3 server with a bucket; the caller sets the environment."""
    import logging

    import boto3
    from moto.server import ThreadedMotoServer

    remember_hosts()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    login = {"aws_access_key_id": "nobody", "aws_secret_access_key": "nothing", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=environment["AWS_ENDPOINT_URL"], **login).create_bucket(Bucket=BUCKET)
    return Store(f"s3://{BUCKET}", server.stop, environment)


def start_gcs() -> Store:
    """Start a GCS emulator with a bucket; the caller sets the environment."""
    import logging

    from gcp_storage_emulator.server import create_server

    logging.getLogger("gcp_storage_emulator").setLevel(logging.ERROR)
    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
    server.start()
    port = server._api._httpd.socket.getsockname()[1]
    environment = {
        "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}",
        "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{port}",  # tensorstore's name for it
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "nothing",
        # gcsfs asks Google for the kind of the bucket otherwise, which no emulator answers
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "NO_GCE_CHECK": "true",  # no credentials from Google's own machines
    }
    return Store(f"gs://{BUCKET}", server.stop, environment)


def _serve(start, prepare=lambda patch: None) -> Iterator[Store]:
    store = start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        prepare(patch)
        forget_connections()
        yield store
        forget_connections()
    store.stop()


@pytest.fixture(scope="session")
def s3() -> Iterator[Store]:
    """An S3 server for the whole session; a test takes a folder of its own in the bucket."""
    need(_S3_PACKAGES)
    yield from _serve(start_s3)


@pytest.fixture(scope="session")
def gcs() -> Iterator[Store]:
    """A GCS emulator for the whole session."""
    need(_GCS_PACKAGES)
    yield from _serve(start_gcs, _copy_instead_of_moving)


def _copy_instead_of_moving(patch: pytest.MonkeyPatch) -> None:
    """Replace GCS's move of an object, which the emulator lacks: gcsfs tries for half a minute, then copies."""
    import gcsfs  # reads the environment
    from fsspec.asyn import AsyncFileSystem

    patch.setattr(gcsfs.GCSFileSystem, "_mv_file", AsyncFileSystem._mv_file)


@pytest.fixture(params=["s3", "gcs"])
def store(request) -> Store:
    """Each of the two stores."""
    return request.getfixturevalue(request.param)
