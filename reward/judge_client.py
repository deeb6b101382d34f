"""A judge behind an OpenAI-compatible endpoint (vLLM, SGLang): many requests at a time, patience, and a clear end.

Threads over http.client, one connection per request. HTTP_PROXY is not used: judges run nearby, and a proxy that is set for
downloads would be asked for them.

What happens to an answer: 200 with a chat completion is the reply. Connection refused or broken, the time limit, 408, 425, 429,
5xx, and a 200 that is no chat completion are tried again, with growing pauses, until nothing at all has been answered for
`retry_seconds`. Any other status is a mistake that trying again does not mend, and ends the run at once; except for a prompt
that is too long for the judge, which is shortened.
"""

from __future__ import annotations

import http.client
import json
import os
import queue
import random
import re
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Callable, Protocol, Sequence
from urllib.parse import urlsplit

from common.errors import UserError, warn
from reward.judge_prompts import GradingPrompt

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
FEWEST_TRIES = 3
"""Before the judge counts as unreachable, however long each took."""
LONGEST_ANSWER = 64 << 20
"""Bytes: more is no chat completion."""
TRY_AGAIN = {408, 425, 429}
TOO_LONG = re.compile(r"context.{0,20}(length|window|size)|max_model_len|too long|longer than|maximum.{0,30}tokens", re.I | re.S)
SERVE_HINT = "`python -m reward.judge serve-command --model PATH` prints a command that starts one"


@dataclass(frozen=True)
class Sampling:
    """How the judge decodes."""

    temperature: float
    max_tokens: int


@dataclass(frozen=True)
class JudgeRequest:
    prompt: GradingPrompt
    seed: int
    """Of the judge's sampling; 31 bits."""


class Judge(Protocol):
    """A model that replies to grading prompts: `ChatClient` or `reward.local_judge.LocalJudge`."""

    num_retries: int
    """Requests that had to be sent again, so far."""

    def name(self) -> str:
        """The model's name: judgements are kept under it."""

    def complete(self, requests: Sequence[JudgeRequest], on_reply: Callable[[int, str], None]) -> None:
        """Calls on_reply(index, text) in the calling thread as replies come, in any order. Raises UserError where they do not."""


class _TryAgain(Exception):
    def __init__(self, reason: str, pause_seconds: float = 0.0, is_busy: bool = False) -> None:
        super().__init__(reason)
        self.pause_seconds = pause_seconds
        self.is_busy = is_busy


class _Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Stopped(Exception):
    """Another request ended the whole."""


def split_url(base_url: str, setting: str = "reward.judge.base_url") -> tuple[bool, str, int, str]:
    """(is https, host, port, path). A bare http://host:port means .../v1. Raises UserError."""
    try:
        parts = urlsplit(base_url)
        port = parts.port
    except ValueError as error:
        raise UserError(f"{setting}: got {base_url!r}: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{setting}: got {base_url!r}, meant is an address like http://localhost:8000/v1")
    if parts.username or parts.query or parts.fragment:
        raise UserError(f"{setting}: got more than an address (http://localhost:8000/v1); a key goes into reward.judge.api_key_env")
    path = parts.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
    secure = parts.scheme == "https"
    return secure, parts.hostname, port or (443 if secure else 80), path


class ChatClient:
    """See the module. Safe to use again after any exception."""

    def __init__(
        self,
        base_url: str,
        sampling: Sampling,
        model: str | None = None,
        api_key_env: str | None = None,
        concurrency: int = 32,
        timeout_seconds: float = 600.0,
        retry_seconds: float = 600.0,
        first_pause_seconds: float = FIRST_PAUSE_SECONDS,
    ) -> None:
        self.url = base_url
        self._secure, self._host, self._port, self._path = split_url(base_url)
        self.sampling, self.concurrency = sampling, concurrency
        self.timeout_seconds, self.retry_seconds, self.first_pause_seconds = timeout_seconds, retry_seconds, first_pause_seconds
        self._model = model
        self._api_key = None
        if api_key_env is not None:
            self._api_key = os.environ.get(api_key_env)
            if not self._api_key:
                raise UserError(f"reward.judge.api_key_env: the environment variable {api_key_env} is not set")
        self.num_retries = 0
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._answered_at = float("-inf")
        self._away = False
        self._random = random.Random(os.urandom(8))  # pauses must not move the run's own random state

    # -- what callers use

    def name(self) -> str:
        """`model`, or the one that the endpoint serves."""
        if self._model is None:
            listed = self._patiently(lambda: self._models(self.timeout_seconds), threading.Event())
            if len(listed) != 1:
                raise UserError(f"reward.judge.model: {self.url} serves {', '.join(listed) or 'no model'}: say which is the judge")
            self._model = listed[0]
        return self._model

    def problem(self, timeout_seconds: float = 3.0) -> str | None:
        """Why the judge cannot be used at this moment, asked once; None: it answers."""
        try:
            self._models(timeout_seconds)
        except (_TryAgain, _Refused) as error:
            return str(error)
        return None

    def complete(self, requests: Sequence[JudgeRequest], on_reply: Callable[[int, str], None]) -> None:
        model, stop = self.name() if requests else "", threading.Event()
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[int, str | BaseException]] = queue.SimpleQueue()
        for index in range(len(requests)):
            waiting.put(index)

        def work() -> None:
            while not stop.is_set():
                try:
                    index = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    done.put((index, self._reply(model, requests[index], stop)))
                except BaseException as error:  # raised again in the calling thread
                    done.put((index, error))
                    return

        try:
            for n in range(min(self.concurrency, len(requests))):
                # Daemons: Ctrl-C does not wait for the judge.
                threading.Thread(target=work, name=f"judge-{n}", daemon=True).start()
            for _ in requests:
                index, reply = done.get()
                if isinstance(reply, BaseException):
                    raise reply
                on_reply(index, reply)
        finally:
            stop.set()
            with self._lock:
                unfinished = list(self._open)
            for sock in unfinished:
                _hang_up(sock)  # the judge need not finish what nobody waits for

    # -- one request

    def _reply(self, model: str, request: JudgeRequest, stop: threading.Event) -> str:
        prompt = request.prompt
        while True:
            body = {
                "model": model,
                "messages": [{"role": "user", "content": prompt.text()}],
                "temperature": self.sampling.temperature,
                "max_tokens": self.sampling.max_tokens,
                "seed": request.seed,
            }
            try:
                return self._patiently(lambda body=body: self._chat(body), stop)
            except _Refused as refusal:
                shorter = prompt.shorter() if refusal.status in (400, 413, 422) and TOO_LONG.search(str(refusal)) else None
                if shorter is None:
                    raise UserError(self._refusal_message(refusal)) from None
                prompt = shorter

    def _refusal_message(self, refusal: _Refused) -> str:
        hint = {
            401: "set reward.judge.api_key_env to the name of the variable that holds the key",
            403: "check the key in the variable named by reward.judge.api_key_env",
            404: "check reward.judge.base_url (it usually ends in /v1) and reward.judge.model",
        }.get(refusal.status, "check rollout.reward_model (max_model_len, max_generation_token) against the judge's limits")
        return f"the judge at {self.url} refuses: {refusal}: {hint}"

    def _patiently(self, ask: Callable[[], Any], stop: threading.Event) -> Any:
        """`ask` until it answers. Raises UserError when the judge has been silent for `retry_seconds`, _Refused, _Stopped."""
        first_failure, tries = None, 0
        while True:
            try:
                answer = ask()
            except _TryAgain as failure:
                if stop.is_set():
                    raise _Stopped from None
                now, tries = time.monotonic(), tries + 1
                first_failure = now if first_failure is None else first_failure
                # Others being answered shows that the judge lives and is merely busy.
                silent_since = max(first_failure, self._answered_at)
                left = self.retry_seconds - (now - silent_since)
                if left <= 0 and tries >= FEWEST_TRIES:
                    raise UserError(
                        f"the judge at {self.url} cannot be reached: {failure} ({tries} tries, none answered for "
                        f"{now - silent_since:.0f} s): start it again, then the same command; {SERVE_HINT}"
                    ) from None
                self._say_away(failure, tries)
                pause = min(self.first_pause_seconds * 2 ** min(tries - 1, 30), LONGEST_PAUSE_SECONDS)
                with self._lock:
                    self.num_retries += 1
                    pause *= self._random.uniform(0.5, 1.0)
                pause = max(min(pause, max(left, self.first_pause_seconds)), min(failure.pause_seconds, self.retry_seconds))
                if stop.wait(pause):
                    raise _Stopped from None
            else:
                self._answered_at = time.monotonic()
                if self._away:
                    with self._lock:
                        was_away, self._away = self._away, False
                    if was_away:
                        warn(f"the judge at {self.url} answers again")
                return answer

    def _say_away(self, failure: _TryAgain, tries: int) -> None:
        if tries < 2 or failure.is_busy:
            return
        with self._lock:
            is_news, self._away = not self._away, True
        if is_news:
            warn(f"the judge at {self.url} does not answer ({failure}): trying again for {self.retry_seconds:.0f} s")

    def _chat(self, body: dict[str, Any]) -> str:
        answer = self._http("POST", "/chat/completions", body, self.timeout_seconds)
        try:
            content = answer["choices"][0]["message"]["content"]
            if content is not None and not isinstance(content, str):
                raise TypeError
        except (KeyError, IndexError, TypeError):
            raise _TryAgain(f"its answer is no chat completion: {json.dumps(answer)[:200]}") from None
        return content or ""  # null: a reasoning model that was cut off in its thoughts

    def _models(self, timeout_seconds: float) -> list[str]:
        answer = self._http("GET", "/models", None, timeout_seconds)
        try:
            return [entry["id"] for entry in answer["data"]]
        except (KeyError, TypeError):
            raise _TryAgain(f"its answer is no list of models: {json.dumps(answer)[:200]}") from None

    def _http(self, method: str, path: str, body: dict[str, Any] | None, timeout_seconds: float) -> Any:
        """One exchange, within `timeout_seconds` from beginning to end: a socket's own limit counts from byte to byte."""
        headers = {"Accept": "application/json", "Connection": "close"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if self._api_key is not None:
            headers["Authorization"] = f"Bearer {self._api_key}"
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=timeout_seconds)
        expired, sock, started = threading.Event(), None, time.monotonic()
        timer = None
        try:
            connection.connect()
            sock = connection.sock  # the connection lets go of it as soon as the headers are read
            with self._lock:
                self._open.add(sock)
            left = max(0.0, timeout_seconds - (time.monotonic() - started))
            timer = threading.Timer(left, lambda: (expired.set(), _hang_up(sock)))
            timer.daemon = True
            timer.start()
            data = None if body is None else json.dumps(body).encode()
            connection.request(method, self._path + path, data, headers)
            response = connection.getresponse()
            content = response.read(LONGEST_ANSWER)
            if expired.is_set():
                raise TimeoutError
        except ssl.SSLCertVerificationError as error:
            raise UserError(f"the judge at {self.url}: its certificate is not trusted: {error.verify_message}") from None
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a socket hung up under TLS
            if expired.is_set() or isinstance(error, TimeoutError):
                raise _TryAgain(f"no answer within {timeout_seconds:g} s") from None
            raise _TryAgain(_describe(error)) from None
        finally:
            if timer is not None:
                timer.cancel()
            with self._lock:
                self._open.discard(sock)
            connection.close()
        return self._decode(response, content)

    def _decode(self, response: http.client.HTTPResponse, content: bytes) -> Any:
        status, text = response.status, content[:2000].decode("utf-8", "replace")
        if status != 200:
            reason = f"HTTP {status} {_server_message(text)}".rstrip()
            if status in TRY_AGAIN or status >= 500:
                raise _TryAgain(reason, retry_after(response.headers.get("Retry-After")), is_busy=status in (429, 503))
            raise _Refused(status, reason)
        try:
            return json.loads(content)
        except ValueError:
            raise _TryAgain(f"its answer is not JSON: {text[:200]!r}") from None


def _hang_up(sock: socket.socket) -> None:
    """Wake the thread that waits for it: its reads end at once."""
    try:
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # that of TLS would take its state away from the reader
    except OSError:
        pass  # closed already


def _describe(error: Exception) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, (http.client.HTTPException, ConnectionResetError, BrokenPipeError)):
        return "it closed the connection"
    return f"{type(error).__name__}: {error}"


def _server_message(text: str) -> str:
    """The message in an error's body: vLLM, SGLang and OpenAI put it in different places."""
    try:
        body = json.loads(text)
        inner = body.get("error", body)
        message = inner.get("message", inner) if isinstance(inner, dict) else inner
    except (ValueError, AttributeError):
        message = text
    return " ".join(str(message).split())[:300]


def retry_after(value: str | None) -> float:
    """Seconds that a Retry-After header asks for: a number, or a date; 0 without one, or where it cannot be read."""
    if not value:
        return 0.0
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0
