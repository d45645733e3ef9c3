"""Reward servers of these tests' own."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy
from PIL import Image

Answer = Callable[[dict[str, Any]], Any]

_APART = """
import json, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        print("asked", flush=True)
        time.sleep(float(sys.argv[2]))
        pairs = zip(asked["prompts"], asked["images"])
        scores = [float(prompt) + float(sys.argv[3]) * len(image) for prompt, image in pairs]
        body = json.dumps({"scores": scores}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass

server = HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


def pixels(asked: dict[str, Any]) -> list[numpy.ndarray[Any, Any]]:
    """The pictures that a server is asked about, in [0, 1]."""
    return [numpy.array(Image.open(io.BytesIO(base64.b64decode(text)))) / 255 for text in asked["images"]]


def brightness(asked: dict[str, Any]) -> dict[str, Any]:
    """Mean of the picture, and what the prompt and the metadata say."""
    numbers = zip(pixels(asked), asked["prompts"], asked["metadata"], strict=True)
    return {"scores": [picture.mean() + int(prompt) + own.get("add", 0) for picture, prompt, own in numbers]}


@contextmanager
def listening(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a server in a thread."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}"
        finally:
            http.shutdown()
            thread.join()


@contextmanager
def server(answer: Answer, fail_first: int = 0, slow_first_s: float = 0.0) -> Iterator[tuple[str, list[int]]]:
    """Its URL, and the sizes of the batches that it was asked for.

    The first requests are answered 503; or the very first takes its time.
    """
    sizes: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            sizes.append(len(asked["images"]))
            count, body = len(sizes), json.dumps(answer(asked)).encode()
            time.sleep(slow_first_s if count == 1 else 0)
            try:
                self.send_response(503 if count <= fail_first else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            except BrokenPipeError:  # who asked has not waited
                pass

        def log_message(self, *arguments: Any) -> None:
            pass

    with listening(Handler) as url:
        yield f"{url}/score", sizes


class ServerApart:
    """A server in a process of its own, which scores a picture with its prompt's number after `delay_s`.

    `of_size`: also with so much for each letter of the picture's code.
    """

    def __init__(self, port: int = 0, delay_s: float = 0.0, of_size: float = 0.0):
        command = [sys.executable, "-c", _APART, str(port), str(delay_s), str(of_size)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.port = int(self._says())
        self.url = f"http://127.0.0.1:{self.port}/score"

    def _says(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def kill(self, once_asked: bool = False) -> None:
        """By SIGKILL, in the midst of a request if `once_asked`."""
        if once_asked:
            assert self._says().strip() == "asked"
        self.process.kill()
        self.process.communicate()
