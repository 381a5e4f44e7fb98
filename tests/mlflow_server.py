"""A real ``mlflow server`` that can be killed, and a proxy that fails in other ways."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import requests

from launch.launcher_command import free_port

#: Of one connection only: lengths and encodings are those of what is passed on.
HOP = {"connection", "content-encoding", "content-length", "host", "transfer-encoding"}
#: Ends of the paths of requests that would add something again if they were sent twice.
ADDS = ("/create", "/log-batch", "/logged-models", "/outputs")


class Server:
    """A real ``mlflow server`` on loopback that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts"), "--workers", "1"]
        # Without it the server starts seven more processes for jobs.
        environ = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=self.folder, env=environ
            )
        wait_until(self.answers, 120)

    def answers(self) -> bool:
        try:
            return requests.get(f"{self.uri}/health", timeout=2).ok
        except requests.RequestException:
            return False

    def kill(self) -> None:
        assert self.process is not None
        for child in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
            child.kill()
        self.process.wait()


class Proxy:
    """Forwards requests to a server, or fails them.

    Attributes:
        mode: ``passes``; ``hangs``: takes a request and never answers; ``answers 500``;
            ``takes no files``: answers 500 to uploads, passes the rest on; ``hangs on files``:
            never answers uploads; ``stores, answers 500``: passes a request on, but answers 500
            when one that adds data comes for the first time; ``stores, breaks off``: the same, but
            closes the connection without an answer; ``has no models``: as a server older than
            MLflow 3; ``other host``: the server gets another name of its host; or a number, the
            HTTP status of all answers.
        asked: method and path of every request, in order.
    """

    def __init__(self, server: str) -> None:
        self.mode = "passes"
        self.asked: list[str] = []
        self._closed = threading.Event()
        self._written: set[bytes] = set()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                proxy.asked.append(f"{self.command} {self.path}")
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                upload = self.command == "PUT" and "/mlflow-artifacts/" in self.path
                if proxy.mode == "hangs" or (proxy.mode == "hangs on files" and upload):
                    proxy._closed.wait()
                if proxy._closed.is_set():  # connections that are kept alive outlive the listener
                    self.close_connection = True
                    return
                if proxy.mode == "answers 500" or (proxy.mode == "takes no files" and upload):
                    self.reply(500, {}, b"no")
                    return
                if proxy.mode.isdecimal() or proxy.lacks(self.path):
                    self.reply(int(proxy.mode) if proxy.mode.isdecimal() else 404, {}, b"<p>no</p>")
                    return
                kept = {k: v for k, v in self.headers.items() if k.lower() not in HOP}
                if proxy.mode == "other host":
                    kept["Host"] = "mlflow.example.org"
                response = requests.request(
                    self.command, server + self.path, headers=kept, data=body, timeout=60
                )
                if proxy.is_first_write(self.command, self.path, body):
                    self.close_connection = True
                    if proxy.mode == "stores, answers 500":
                        self.reply(500, {}, b"no")
                    return
                self.reply(response.status_code, dict(response.headers), response.content)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

            def reply(self, status: int, headers: dict[str, str], content: bytes) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    if name.lower() not in HOP:
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._http.block_on_close = False
        self.address = f"127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def lacks(self, path: str) -> bool:
        return self.mode == "has no models" and "/logged-models" in path

    def is_first_write(self, command: str, path: str, body: bytes) -> bool:
        """Whether to lose the answer to a request that the server has stored."""
        if not self.mode.startswith("stores, ") or command == "GET" or not path.endswith(ADDS):
            return False
        # A run or model that is created again after a lost answer would have another time.
        request = path.encode() + (b"" if "create" in path else body)
        is_first = request not in self._written
        self._written.add(request)
        return is_first

    def close(self) -> None:
        self._closed.set()
        self._http.shutdown()
        self._http.server_close()


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.1)
