"""The trace page: what a real browser shows at a step against the step map; bad input; token texts."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from common.records import Rollout, ScoredRollout, write_jsonl
from sample.trace_viewer import main, read_trace_file, tokenizer_candidates, tokenizer_text, write_trace_page
from tests.browser import dump_dom, needs_browser

EVIL = "</script><script>document.title='broken out'</script><!--"
TEXTS = {0: "a", 1: "\n", 2: EVIL, 3: "{{data}}", 4: "<|im_end|>", 5: " é\u2028", 6: "\ud800", 9: "&amp;"}


def rollout(task: str, steps: list[int], num: int, prompt: int = 5, block: int = 4, **scores) -> ScoredRollout:
    n = len(steps)
    return ScoredRollout(
        task_id=task,
        sample=1,
        prompt_ids=[9] * prompt,
        response_ids=[i % 7 for i in range(n)],
        step_map=steps,
        logprobs=[-0.1 * i for i in range(n)],
        entropy=[0.2 * i for i in range(n)],
        num_response=num,
        finish="stop",
        num_forwards=max(steps),
        weights_version=3,
        block_size=block,
        **scores,
    )


ROLLOUTS = [
    rollout("plain", [1, 1, 2, 3, 4, 4, 6], 7, reward=1.0, correct=True),
    rollout(f"evil {EVIL}", [2, 1, 1, 3, 5, 4, 4, 6, 7, 7, 7], 8, reward=-1.0, correct=False, dropped="too hard"),
    rollout("canvas", [3, 0, 1, 2, 5, 0, 4, 4], 6, prompt=6, reward=0.5),  # full attention: two were never revealed
]


def page_of(tmp_path: Path, rollouts=ROLLOUTS) -> Path:
    write_trace_page(rollouts, TEXTS.__getitem__, tmp_path / "trace.html", source="step_000003.jsonl")
    return tmp_path / "trace.html"


@needs_browser
@pytest.mark.parametrize(("index", "step"), [(0, 0), (0, 3), (0, 6), (1, 4), (1, 7), (2, 0), (2, 4), (2, 999)])
def test_the_browser_reveals_what_the_step_map_says(tmp_path, index, step):
    shown = dump_dom(page_of(tmp_path), f"rollout={index}&step={step}&color=entropy")
    record = ROLLOUTS[index]
    tokens = [token for token in shown.find("tok") if "data-i" in token.attributes]
    assert [int(token.attributes["data-i"]) for token in tokens] == list(range(len(record.step_map)))
    revealed = ["masked" not in token.classes for token in tokens]
    assert revealed == [0 < at <= step for at in record.step_map]
    last = max(record.step_map)
    now = [index for index, token in enumerate(tokens) if "now" in token.classes]
    assert now == [i for i, at in enumerate(record.step_map) if at == step and 0 < step < last]
    assert ["after" in token.classes for token in tokens] == [i >= record.num_response for i in range(len(tokens))]

    blocks: dict[str, int] = {}
    for token in tokens:
        number = token.parent.attributes["data-block"]
        blocks[number] = blocks.get(number, 0) + 1
        before = 0 if record.task_id == "canvas" else len(record.prompt_ids)  # a canvas counts from the prompt's end
        assert int(number) == (before + int(token.attributes["data-i"])) // record.block_size
    assert len(shown.find("prompt", "span")) == before % record.block_size  # they stand in the first block

    (now_line,) = shown.find(id="now")
    assert f"forward {min(step, last)} of {last}" in now_line.text and f"{sum(revealed)} of {len(tokens)}" in now_line.text
    assert len(shown.find(id="list")[0].text) and len([b for b in shown.find(tag="button") if "data-index" in b.attributes]) == 3
    (title,) = shown.find(tag="title")
    assert title.text == "step_000003.jsonl · unmasking trace"  # no text broke out of the data
    assert len(shown.find(tag="script")) == 2


@needs_browser
def test_colours_and_texts_in_the_browser(tmp_path):
    page = page_of(tmp_path)
    styles = {}
    for color in ("step", "confidence", "entropy"):
        shown = dump_dom(page, f"rollout=0&color={color}")
        tokens = [token for token in shown.find("tok") if "data-i" in token.attributes]
        styles[color] = [token.attributes["style"] for token in tokens]
        pressed = [
            b.attributes["data-color"]
            for b in shown.find(tag="button")
            if "data-color" in b.attributes and b.attributes["aria-pressed"] == "true"
        ]
        assert pressed == [color]
        assert [token.text for token in tokens] == [
            "a",
            "↵\n",
            EVIL,
            "{{data}}",
            "<|im_end|>",
            " é\u2028",
            "\ufffd",
        ]  # the lone surrogate is replaced
    assert styles["step"][0] == styles["step"][1] and len(set(styles["step"])) == 5  # tokens of one step share their colour
    assert len(set(styles["confidence"])) == len(set(styles["entropy"])) == 7
    assert len({tuple(style) for style in styles.values()}) == 3


@needs_browser
def test_without_a_hash_the_finished_first_response_is_shown(tmp_path):
    shown = dump_dom(page_of(tmp_path))
    assert not [token for token in shown.find("masked") if "data-i" in token.attributes]
    assert "forward 6 of 6" in shown.find(id="now")[0].text
    facts = shown.find(id="facts")[0].text
    assert "Tokens per forward1.17" in facts and "Answerright" in facts  # 7 tokens in 6 forwards


def test_the_page_is_one_file_without_a_network(tmp_path):
    text = page_of(tmp_path).read_text(encoding="utf-8")
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "") and "https://" not in text
    assert text.count("</script>") == 2 and "default-src 'none'" in text
    data = json.loads(text.split('<script type="application/json" id="data">')[1].split("</script>")[0])
    assert data["texts"]["2"] == EVIL and data["prompts"] == [[9] * 5, [9] * 6]
    assert [row["steps"] for row in data["rollouts"]] == [record.step_map for record in ROLLOUTS]


def test_numbers_that_are_not_finite_are_nulls(tmp_path):
    broken = dataclasses.replace(ROLLOUTS[0], logprobs=[float("-inf")] * 7, reward=float("nan"))
    text = page_of(tmp_path, [broken]).read_text(encoding="utf-8")
    assert '"logprobs":[null,null' in text and '"reward":null' in text


def plain_row() -> dict:
    names = [field.name for field in dataclasses.fields(Rollout)]
    return {name: getattr(ROLLOUTS[0], name) for name in names}


def test_scored_and_plain_rollouts_are_read(tmp_path):
    file = tmp_path / "r.jsonl"
    write_jsonl(file, [plain_row(), ROLLOUTS[1], ROLLOUTS[2]])
    rollouts, total = read_trace_file(file, limit=2)
    assert total == 3 and rollouts[1] == ROLLOUTS[1]
    assert rollouts[0].correct is None and rollouts[0].reward != rollouts[0].reward  # unknown


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: a rollout is a JSON object, got list"),
        (json.dumps({"task_id": "a"}), "line 2: no field 'sample': not a file of rollouts: give one of RUN_DIR/rollouts/"),
        (json.dumps({"step": 1, "train/loss": 0.5}), "line 2: no field 'task_id': not a file of rollouts"),
        (json.dumps(plain_row() | {"colour": 1}), "line 2: not a rollout .*'colour'"),
        (json.dumps(plain_row() | {"entropy": [1.0]}), "line 2: per-token lists of plain/1 differ in length"),
        (json.dumps(plain_row() | {"num_response": 70}), "line 2: num_response is outside"),
        (json.dumps(plain_row() | {"entropy": ["x"] * 7}), "line 2: entropy must be a list of numbers"),
        (json.dumps(plain_row() | {"step_map": None}), "line 2: "),
        (json.dumps(plain_row() | {"block_size": 0}), "line 2: block_size must be 1 or more, got 0"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    file = tmp_path / "r.jsonl"
    file.write_text(json.dumps(plain_row()) + "\n" + line + "\n")
    with pytest.raises(UserError, match=f"r.jsonl {message}"):
        read_trace_file(file)


@pytest.mark.parametrize("content", [None, "", "\n\n", "{\n", b"\xff\xfe\x00"])
def test_the_program_ends_with_one_line_and_code_2(tmp_path, capsys, content):
    file, page = tmp_path / "r.jsonl", tmp_path / "trace.html"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit) as exit:
        main([str(file), "-o", str(page)])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.startswith(f"error: {file}") and error.count("\n") == 1 and not page.exists()


def test_the_rollouts_are_never_overwritten(tmp_path, capsys):
    file = tmp_path / "r.jsonl"
    write_jsonl(file, ROLLOUTS)
    before = file.read_bytes()
    with pytest.raises(SystemExit):
        main([str(file), "-o", str(file)])
    assert "choose another name" in capsys.readouterr().err and file.read_bytes() == before


def test_token_texts_of_a_byte_level_tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    # byte-level letters: Ġ is a space, ä½ł the three bytes E4 BD A0 of 你
    vocabulary = {"Ġhi": 0, "ä½ł": 1, "ä½": 2, "ł": 3, "Ċ": 4, "<|im_end|>": 5}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    text = tokenizer_text(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>"))
    assert [text(token) for token in range(7)] == [" hi", "你", "‹E4 BD›", "‹A0›", "\n", "<|im_end|>", "‹6›"]


def test_the_tokenizer_is_that_of_the_run(tmp_path):
    run = tmp_path / "run"
    (run / "rollouts").mkdir(parents=True)
    file = run / "rollouts" / "step_000001.jsonl"
    assert tokenizer_candidates(file) == []
    (run / "config.yaml").write_text("model:\n  pretrained_model: some/model\n")
    assert tokenizer_candidates(file) == ["some/model"]
    for name in ("step-2", "optimized"):
        (run / "ckpt" / name).mkdir(parents=True)
        (run / "ckpt" / name / "tokenizer_config.json").write_text("{}")
    assert tokenizer_candidates(file) == [str(run / "ckpt" / "optimized"), "some/model"]


def test_the_program_finds_the_tiny_tokenizer(tmp_path):
    from models.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    run = tmp_path / "run"
    (run / "rollouts").mkdir(parents=True)
    (run / "config.yaml").write_text(f"model:\n  pretrained_model: {run / 'model'}\n")
    tokenizer.save_pretrained(run / "model")
    ids = tokenizer.convert_tokens_to_ids(list("s52910="))
    write_jsonl(run / "rollouts" / "a.jsonl", [dataclasses.replace(ROLLOUTS[0], response_ids=ids, prompt_ids=ids)])
    command = [sys.executable, "-m", "sample.trace_viewer", str(run / "rollouts" / "a.jsonl"), "-o", str(tmp_path / "t.html")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert result.returncode == 0, result.stderr
    data = (tmp_path / "t.html").read_text(encoding="utf-8").split('id="data">')[1].split("</script>")[0]
    assert set(json.loads(data)["texts"].values()) == set("s52910=") and "1 responses" not in result.stdout


def driven(page: Path, script: str) -> Path:
    """A copy of the page with a hand on its keyboard: `script` runs after the page's own."""
    copy = page.with_name("driven.html")
    press = "const press = (key) => dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true, cancelable: true}));"
    # Dispatched on the body: the page asks the event's target what it is.
    press = press.replace("dispatchEvent", "document.body.dispatchEvent")
    copy.write_text(
        page.read_text(encoding="utf-8").replace("</body>", f"<script>{press}{script}</script></body>"), encoding="utf-8"
    )
    return copy


@needs_browser
def test_keys_step_back_and_forth_and_choose_responses(tmp_path):
    page = page_of(tmp_path)

    def state(script: str) -> tuple[str, str, list[int]]:
        shown = dump_dom(driven(page, script), "rollout=0&step=3")
        (body,) = shown.find(tag="body")
        revealed = [
            int(t.attributes["data-i"]) for t in shown.find("tok") if "data-i" in t.attributes and "masked" not in t.classes
        ]
        return body.attributes["data-rollout"], body.attributes["data-step"], revealed

    assert state("press('ArrowLeft');") == ("0", "2", [0, 1, 2])
    assert state("press('End'); press('ArrowLeft'); press('ArrowLeft'); press('ArrowRight');") == ("0", "5", [0, 1, 2, 3, 4, 5])
    assert state("press('Home'); press('ArrowLeft');") == ("0", "0", [])
    assert state("press('ArrowDown'); press('ArrowDown'); press('ArrowDown'); press('Home'); press('ArrowRight');") == (
        "2",
        "1",
        [2],
    )
    assert state("document.querySelector('[data-i=\"2\"]').click();") == ("0", "2", [0, 1, 2])  # a click goes to the token's step
    assert state("location.hash = '#rollout=1&step=1';") == ("1", "1", [1, 2])
    assert state(
        "$('filter').value = 'dropped'; $('filter').dispatchEvent(new Event('input')); press('ArrowDown'); press('Home');"
    ) == ("1", "0", [])


@needs_browser
def test_space_plays_to_the_end_and_stops(tmp_path):
    page = driven(page_of(tmp_path), "$('speed').value = '16'; press(' '); document.body.dataset.playing = state.playing;")
    (body,) = dump_dom(page, "rollout=0&step=0", milliseconds=5000).find(tag="body")
    assert body.attributes["data-playing"] == "true" and body.attributes["data-step"] == "6" and "playing" not in body.classes
