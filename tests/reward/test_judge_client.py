import json
import time
from email.utils import formatdate

import numpy as np
import pytest

from common.errors import UserError
from reward.judge_cache import JudgementCache, judgement_key
from reward.judge_client import ChatClient, Sampling, retry_after, split_url
from tests.reward.judge_run import replies_of, requests
from tests.reward.judge_server import MODEL, JudgeServer, completion, prompt_of

# ---- the cache ---------------------------------------------------------------------------------------------------------


def test_cache_survives_a_kill_at_any_byte(tmp_path):
    cache = JudgementCache(tmp_path)
    for n, score in enumerate([0.5, None, -1.0]):
        cache.put(f"key{n}", score, "x" * 5000 + f"é\ud800 Verdict {n}", 1)
    cache.close()
    content = cache.path.read_bytes()
    assert len(content) < 3 * 2300
    ends = [n + 1 for n, byte in enumerate(content) if byte == ord("\n")]
    for size in {*range(0, 60), *(end + d for end in ends for d in (-1, 0, 1)), *range(0, len(content), 97)}:
        size = min(size, len(content))
        cache.path.write_bytes(content[:size])
        again = JudgementCache(tmp_path)
        whole = sum(end <= size for end in ends)
        assert len(again) == whole and all(f"key{n}" in again for n in range(whole))
        again.put("new", 0.25, "", 1)
        again.close()
        last = JudgementCache(tmp_path)
        assert len(last) == whole + 1 and last["new"] == 0.25
        last.close()


def test_cache_of_other_processes_and_broken_lines(tmp_path, capsys):
    first, second = JudgementCache(tmp_path, rank=0), JudgementCache(tmp_path, rank=1)
    first.put("a", 0.5, "", 1)
    second.put("b", None, "", 3)
    with open(second.path, "a") as file:
        file.write('{"key": "c", "score": 7}\nnonsense\n')
    alone = JudgementCache(tmp_path, rank=0)
    assert alone["a"] == 0.5 and alone["b"] is None and "c" not in alone
    assert "2 lines cannot be read" in capsys.readouterr().err
    memory = JudgementCache(None)
    memory.put("a", 1.0, "", 1)
    assert memory["a"] == 1.0


def test_key_depends_on_all_that_matters():
    keys = [
        judgement_key(*one)
        for one in [
            ("m", "p", {"temperature": 0.6, "max_tokens": 9}, 0),
            ("n", "p", {"temperature": 0.6, "max_tokens": 9}, 0),
            ("m", "q", {"temperature": 0.6, "max_tokens": 9}, 0),
            ("m", "p", {"temperature": 0.7, "max_tokens": 9}, 0),
            ("m", "p", {"temperature": 0.6, "max_tokens": 8}, 0),
            ("m", "p", {"temperature": 0.6, "max_tokens": 9}, 1),
        ]
    ]
    assert len(set(keys)) == 6 and keys[0] == judgement_key("m", "p", {"max_tokens": 9, "temperature": 0.6}, 0)


# ---- the client --------------------------------------------------------------------------------------------------------


def client(url, **settings):
    settings = {"timeout_seconds": 5.0, "retry_seconds": 10.0, "first_pause_seconds": 0.02, "model": MODEL, **settings}
    return ChatClient(url, Sampling(0.6, 100), **settings)


def test_a_good_judge_is_asked_with_the_settings_and_in_parallel(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # not used

    def behave(server, number, body):
        time.sleep(0.2)
        return f"Verdict: {body['seed'] % 11}"

    with JudgeServer(behave) as server:
        started = time.monotonic()
        replies = replies_of(client(server.url, concurrency=8, api_key_env="JUDGE_KEY"), requests(24))
        assert time.monotonic() - started < 4.5  # one after the other: 4.8
    assert replies == {n: f"Verdict: {n % 11}" for n in range(24)}
    assert 2 <= server.most_active <= 8
    body = server.requests[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == (MODEL, 0.6, 100) and body["messages"][0]["role"] == "user"
    assert server.headers[0]["Authorization"] == "Bearer s3cret"


def drip(handler):
    """A byte now and then: never silent for long, never done."""
    try:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        for _ in range(100):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.05)
    except OSError:
        pass


def drip_headers(handler):
    try:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        for _ in range(100):
            handler.wfile.write(b"X: y\r\n")
            time.sleep(0.05)
    except OSError:
        pass


def half_a_body(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"mess')


TROUBLE = {
    "busy": (429, {"Retry-After": "0"}, b'{"error": {"message": "slow down"}}'),
    "broken": (500, {}, b"oh"),
    "unavailable": (503, {"Retry-After": "soon"}, b""),
    "hang-up": None,
    "html": (200, {}, b"<html>"),
    "other json": (200, {}, b'{"hello": 1}'),
    "a list": (200, {}, b"[1]"),
    "not a text": (200, {}, json.dumps(completion([1])).encode()),
    "half a body": half_a_body,
    "drip": drip,
    "drip headers": drip_headers,
}


@pytest.mark.parametrize("trouble", TROUBLE)
def test_trouble_that_passes(trouble):
    slow = trouble.startswith("drip")

    def behave(server, number, body):
        tries = sum(one["seed"] == body["seed"] for one in server.requests)
        return TROUBLE[trouble] if tries <= 2 and body["seed"] % 2 else "Verdict: 3"

    with JudgeServer(behave) as server:
        judge = client(server.url, timeout_seconds=0.7 if slow else 20.0)
        started = time.monotonic()
        assert replies_of(judge, requests(4)) == dict.fromkeys(range(4), "Verdict: 3")
        assert time.monotonic() - started < 4.5  # undisturbed, a drip lasts 5 s
    assert judge.num_retries == 4 and len(server.requests) == 8


def test_retry_after_is_honoured():
    def behave(server, number, body):
        return (429, {"Retry-After": "0.7"}, b"") if number == 0 else "Verdict: 3"

    with JudgeServer(behave) as server:
        replies_of(client(server.url), requests(1))
    assert 0.7 <= server.times[1] - server.times[0] < 5
    assert retry_after("3") == 3 and retry_after(None) == retry_after("soon") == retry_after("-1") == 0
    assert 55 < retry_after(formatdate(time.time() + 60, usegmt=True)) <= 60


def test_pauses_grow():
    def behave(server, number, body):
        return (500, {}, b"") if number < 4 else "Verdict: 3"

    with JudgeServer(behave) as server:
        replies_of(client(server.url, first_pause_seconds=0.1), requests(1))
    pauses = np.diff(server.times)
    assert len(pauses) == 4 and all(pause >= 0.05 * 2**n for n, pause in enumerate(pauses))


@pytest.mark.parametrize(
    "status, body, message",
    [
        (401, b'{"error": {"message": "no key"}}', "HTTP 401 no key.*api_key_env"),
        (404, b'{"object": "error", "message": "no model x"}', "HTTP 404 no model x.*base_url"),
        (400, b'{"detail": "seed?"}', "HTTP 400 .*seed.*max_model_len"),
        (301, b"", "HTTP 301"),
        (400, b'{"message": "maximum context length is 10 tokens"}', "HTTP 400 maximum context length"),
    ],
)
def test_what_trying_again_does_not_mend_ends_at_once(status, body, message):
    with JudgeServer(lambda *_: (status, {}, body)) as server:
        with pytest.raises(UserError, match=message):
            replies_of(client(server.url, concurrency=1), requests(3))
    assert len(server.requests) == 1


def test_a_prompt_that_is_too_long_is_shortened():
    def behave(server, number, body):
        if len(prompt_of(body)) > 1500:
            return 400, {}, b'{"error": {"message": "This model\'s maximum context length is 15000 tokens. However, you"}}'
        return "Verdict: 3"

    with JudgeServer(behave) as server:
        assert replies_of(client(server.url), requests(1, so_far="x" * 2000)) == {0: "Verdict: 3"}
    assert [prompt_of(body).count("x" * 10) > 0 for body in server.requests] == [True] * len(server.requests)
    assert 2 <= len(server.requests) <= 4 and "part 0" in prompt_of(server.requests[-1])


def test_judge_that_is_not_there(capsys):
    with JudgeServer() as server:
        url = server.url
    started = time.monotonic()
    with pytest.raises(UserError, match=r"cannot be reached: connection refused \(\d+ tries.*serve-command"):
        replies_of(client(url, retry_seconds=0.4), requests(5))
    assert 0.4 < time.monotonic() - started < 20
    assert capsys.readouterr().err.count("does not answer (connection refused)") == 1
    assert client(url).problem() == "connection refused"
    with pytest.raises(UserError, match="cannot be reached"):  # also where the model's name has to be asked for
        replies_of(client(url, model=None, retry_seconds=0.1), requests(1))


def test_a_single_failing_request_does_not_wait_while_others_are_answered():
    """Others being answered is a sign of life: the clock of the failing one starts behind them."""

    def behave(server, number, body):
        time.sleep(0.05)
        return (500, {}, b"poison") if body["seed"] == 0 else "Verdict: 3"

    with JudgeServer(behave) as server:
        with pytest.raises(UserError, match="HTTP 500 poison"):
            replies_of(client(server.url, concurrency=2, retry_seconds=0.3), requests(20))
    assert {body["seed"] for body in server.requests} == set(range(20))


def test_model_names_and_addresses(monkeypatch):
    with JudgeServer() as server:
        assert client(server.url, model=None).name() == MODEL
        server.models = ["one", "two"]
        with pytest.raises(UserError, match="reward.judge.model.*one, two"):
            client(server.url, model=None).name()
    assert split_url("http://h:8000") == (False, "h", 8000, "/v1")
    assert split_url("https://h/v1/chat/completions") == (True, "h", 443, "/v1")
    for wrong in ["localhost:8000/v1", "ftp://h/v1", "http://h:port/v1", "http://", "http://user:key@h/v1"]:
        with pytest.raises(UserError, match="reward.judge.base_url"):
            split_url(wrong)
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(UserError, match="NO_SUCH_KEY is not set"):
        client("http://h/v1", api_key_env="NO_SUCH_KEY")


