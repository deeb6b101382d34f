"""An OpenAI-compatible judge for tests, over real HTTP on loopback: in a thread, or as a process that can be killed.

    python -m tests.reward.judge_server PORT LOG SECONDS     port 0: any; the first line of output is the port
"""

from __future__ import annotations

import json
import sys
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODEL = "tiny-judge"


def verdict_of(prompt: str, seed: int) -> int:
    """0..10, a function of the request alone."""
    return zlib.crc32(f"{seed}{prompt}".encode()) % 11


def completion(content: str | None) -> dict:
    return {"choices": [{"message": {"role": "assistant", "content": content}}]}


class JudgeServer(ThreadingHTTPServer):
    """`behave(server, number, body)` -> the reply's text, or (status, headers, body bytes), or None: hang up without a word."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, behave=None, port: int = 0, log: str | None = None) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.behave = behave or (lambda server, number, body: f"Fine.\nVerdict: {verdict_of(prompt_of(body), body['seed'])}")
        self.lock = threading.Lock()
        self.requests: list[dict] = []
        self.headers: list[dict] = []
        self.times: list[float] = []
        self.active = self.most_active = 0
        self.log = log

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address) -> None:
        """A client that hung up is what some tests are about."""

    def __enter__(self) -> JudgeServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


def prompt_of(body: dict) -> str:
    return body["messages"][0]["content"]


class _Handler(BaseHTTPRequestHandler):
    server: JudgeServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        models = getattr(self.server, "models", [MODEL])
        self._send(200, {}, json.dumps({"data": [{"id": model} for model in models]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            number = len(server.requests)
            server.requests.append(body)
            server.headers.append(dict(self.headers))
            server.times.append(time.monotonic())
            server.active += 1
            server.most_active = max(server.most_active, server.active)
        try:
            answer = server.behave(server, number, body)
        finally:
            with server.lock:
                server.active -= 1
        if callable(answer):
            answer(self)
        elif isinstance(answer, str):
            self._send(200, {}, json.dumps(completion(answer)).encode())
        elif answer is not None:
            self._send(*answer)
        if server.log is not None:
            with server.lock, open(server.log, "a") as file:
                file.write(json.dumps([prompt_of(body), body["seed"]]) + "\n")

    def _send(self, status: int, headers: dict, content: bytes) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


def main() -> None:
    port, log, seconds = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])

    def behave(server: JudgeServer, number: int, body: dict) -> str:
        time.sleep(seconds)
        return f"Verdict: {verdict_of(prompt_of(body), body['seed'])}"

    server = JudgeServer(behave, port, log)
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
