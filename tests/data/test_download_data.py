import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from data import download_data
from data.download_data import DATASETS, download

ROOT = Path(__file__).parents[2]
RECORD = {"question": "q", "ground_truth_answer": "1"}


@pytest.fixture
def hub(monkeypatch):
    """The hub's client, answering from here: `hub.content` is the file that every request gets."""
    import huggingface_hub

    class Hub:
        content = json.dumps([RECORD, RECORD])
        error = None
        asked = []

    def hf_hub_download(repo, file, repo_type, local_dir):
        Hub.asked.append((repo, file, repo_type))
        if Hub.error is not None:
            raise Hub.error
        path = Path(local_dir) / file
        path.parent.mkdir(parents=True)
        path.write_text(Hub.content)
        return str(path)

    Hub.asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(download_data, "_host_is_known", lambda endpoint: True)
    return Hub


def test_download(hub, tmp_path):
    assert download("MATH500", tmp_path) == f"{tmp_path / 'MATH500.json'}: 2 records"
    assert hub.asked == [("Gen-Verse/MATH500", "test/MATH500.json", "dataset")]
    assert [p.name for p in tmp_path.iterdir()] == ["MATH500.json"]

    hub.content = json.dumps([RECORD])
    assert "there already" in download("MATH500", tmp_path) and len(hub.asked) == 1
    assert download("MATH500", tmp_path, force=True).endswith("1 records")
    download("MATH_train", tmp_path)
    assert hub.asked[-1] == ("Gen-Verse/MATH_train", "train/MATH_train.json", "dataset")


def test_an_invalid_file_changes_nothing(hub, tmp_path):
    download("GSM8K", tmp_path)
    before = (tmp_path / "GSM8K.json").read_text()
    hub.content = json.dumps([RECORD, {"question": "q"}])
    with pytest.raises(UserError, match="GSM8K: .*nothing was changed.*record 2.*ground_truth_answer"):
        download("GSM8K", tmp_path, force=True)
    assert (tmp_path / "GSM8K.json").read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["GSM8K.json"]


def test_no_connection(hub, tmp_path):
    from huggingface_hub.errors import LocalEntryNotFoundError

    hub.error = LocalEntryNotFoundError("offline")
    with pytest.raises(UserError, match="cannot be reached; put test/AIME2024.json of .* at .*AIME2024.json by hand"):
        download("AIME2024", tmp_path)
    assert list(tmp_path.iterdir()) == []
    hub.error = OSError(28, "No space left on device")
    with pytest.raises(UserError, match="cannot write.*No space left"):
        download("AIME2024", tmp_path)


def test_command_line(tmp_path):
    def run(*arguments):
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
        command = [sys.executable, str(ROOT / "data" / "download_data.py"), *arguments, "--folder", str(tmp_path)]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    offline = run("--dataset", "MATH500")
    assert offline.returncode == 2
    assert offline.stderr.count("\n") == 1 and f"at {tmp_path / 'MATH500.json'} by hand" in offline.stderr
    unknown = run("--dataset", "MATH50")
    assert unknown.returncode == 2 and "did you mean MATH500" in unknown.stderr
    assert run().returncode == 2
    listed = run("--list")
    assert listed.returncode == 0 and all(name in listed.stdout for name in DATASETS)
