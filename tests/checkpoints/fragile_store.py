"""An S3 server on loopback that can be silent or gone: what it holds outlives that."""

import socket
import threading

import boto3
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from stores import remember_hosts
from werkzeug.serving import WSGIRequestHandler, make_server


class Quiet(WSGIRequestHandler):
    def log(self, *_):
        pass


class FragileStore:
    """answers: requests wait while it is not set. writes: number of objects put so far."""

    def __init__(self):
        self.answers = threading.Event()
        self.answers.set()
        self.writes, self._on_write = [], lambda name: None
        self._is_gone = False
        remember_hosts()
        app = DomainDispatcherApplication(create_backend_app)

        def answer(environ, start_response):
            if environ["REQUEST_METHOD"] == "PUT":
                self.writes.append(environ["PATH_INFO"])
                self._on_write(environ["PATH_INFO"])
            if self._is_gone:
                environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
                raise ConnectionError("the store is gone")
            assert self.answers.wait(60), "nobody lets the store answer"
            return app(environ, start_response)

        self._server = make_server("127.0.0.1", 0, answer, threaded=True, request_handler=Quiet)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._server.port}",
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "nothing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "1",  # s3fs tries five times on top of it
        }
        login = {"aws_access_key_id": "nobody", "aws_secret_access_key": "nothing", "region_name": "us-east-1"}
        boto3.client("s3", endpoint_url=self.environment["AWS_ENDPOINT_URL"], **login).create_bucket(Bucket="fragile")

    def die_at(self, part: str) -> None:
        """Drop every connection from the first write on whose name holds `part`."""

        def check(name):
            if part in name:
                self._is_gone = True

        self._on_write = check

    def live(self) -> None:
        """Answer again."""
        self._on_write, self._is_gone = lambda name: None, False

    def close(self) -> None:
        """End for good."""
        self.answers.set()
        self._server.shutdown()
