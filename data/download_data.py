"""Download data sets of the hub into data/.

    python data/download_data.py --dataset MATH500            one of them, or several names
    python data/download_data.py --all
    python data/download_data.py --list

The usual variables of the hub apply: HF_ENDPOINT (a mirror), HF_TOKEN, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a file: the repo's root, not this folder

import argparse
import os
import socket
import tempfile
import urllib.parse
import urllib.request
from dataclasses import dataclass

from common.errors import UserError, entry_point
from common.registry import did_you_mean
from data.sft import load_sft
from data.tasks import DATA_DIR, load_tasks, read_records
from reward.registry import REWARDS

OWNER = "Gen-Verse"


@dataclass(frozen=True)
class HubDataset:
    split: str
    """Folder within its hub repository: train or test."""
    kind: str
    """A data_type (reward/registry.py), or sft."""
    about: str


DATASETS = {
    "MATH500": HubDataset("test", "math", "500 competition problems"),
    "GSM8K": HubDataset("test", "math", "grade-school word problems"),
    "AIME2024": HubDataset("test", "math", "30 problems of the AIME"),
    "LiveCodeBench": HubDataset("test", "code", "programming contests, stdin and stdout"),
    "LiveBench": HubDataset("test", "code", "programming"),
    "MBPP": HubDataset("test", "code", "short Python functions"),
    "HumanEval": HubDataset("test", "code", "Python functions"),
    "MATH_train": HubDataset("train", "math", "competition problems, for RL"),
    "PrimeIntellect": HubDataset("train", "code", "programming tasks with tests, for RL"),
    "demon_openr1math": HubDataset("train", "sft", "worked solutions, for supervised finetuning"),
}


def check_file(path: Path, kind: str) -> int:
    """Validate a downloaded file; the number of its records. Raises UserError."""
    if kind == "sft":
        return len(load_sft(path))
    if kind in REWARDS:
        return len(load_tasks(path, kind))
    return len(read_records(path))


def _host_is_known(endpoint: str) -> bool:
    """False where the name of the hub's host resolves to nothing: the hub's own client would try for half a minute."""
    if urllib.request.getproxies():
        return True  # then the proxy resolves names
    host = urllib.parse.urlsplit(endpoint).hostname
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def _is_transport_error(error: Exception) -> bool:
    """Whether the hub's HTTP client failed below HTTP; which library that is depends on the hub's version."""
    return type(error).__module__.split(".")[0] in ("httpx", "httpx2", "requests", "urllib3")


def download(name: str, folder: Path = DATA_DIR, force: bool = False) -> str:
    """Fetch a data set to folder/NAME.json, checked before it takes that name; a line that says what was done.

    Raises UserError: unknown name, no connection, no such file on the hub, an invalid file.
    """
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}{did_you_mean(name, list(DATASETS))}; choices: {', '.join(DATASETS)}")
    dataset, target = DATASETS[name], folder / f"{name}.json"
    if target.exists() and not force:
        return f"{target}: there already ({check_file(target, dataset.kind)} records); --force downloads it again"

    from huggingface_hub import constants, hf_hub_download, logging
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    logging.set_verbosity(logging.CRITICAL)  # what fails is told below, in one line

    repo, file = f"{OWNER}/{name}", f"{dataset.split}/{name}.json"
    by_hand = f"put {file} of the hub's dataset {repo} at {target} by hand"
    unreachable = UserError(f"{name}: {constants.ENDPOINT} cannot be reached; {by_hand} (or set HF_ENDPOINT to a mirror)")
    if not _host_is_known(constants.ENDPOINT):
        raise unreachable
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=folder) as partial:  # beside its target: a rename crosses no disk
        try:
            got = Path(hf_hub_download(repo, file, repo_type="dataset", local_dir=partial))
        except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
            raise unreachable from error
        except EntryNotFoundError as error:
            raise UserError(f"{name}: {repo} has no file {file}; look for it on the hub and put it at {target}") from error
        except HfHubHTTPError as error:
            status = getattr(error.response, "status_code", "?")
            raise UserError(f"{name}: the hub answered {status} for {repo}; {by_hand} (HF_TOKEN, where it asks for one)") from error
        except OSError as error:
            raise UserError(f"{name}: cannot write below {folder}: {error}") from error
        except Exception as error:
            if not _is_transport_error(error):
                raise
            raise unreachable from error
        try:
            num_records = check_file(got, dataset.kind)
        except UserError as error:
            raise UserError(f"{name}: the downloaded file is not valid, nothing was changed: {error}") from error
        os.replace(got, target)
    return f"{target}: {num_records} records"


@entry_point
def main() -> None:
    parser = argparse.ArgumentParser(prog="python data/download_data.py", description="Download data sets into data/.")
    parser.add_argument("--dataset", nargs="+", action="extend", default=[], metavar="NAME", help="names, see --list")
    parser.add_argument("--all", action="store_true", help="all of them")
    parser.add_argument("--list", action="store_true", help="show the names and what is there")
    parser.add_argument("--force", action="store_true", help="download again what is there")
    parser.add_argument("--folder", type=Path, default=DATA_DIR, help="where to put them (default: data/)")
    options = parser.parse_args()
    if options.list:
        for name, dataset in DATASETS.items():
            there = "here" if (options.folder / f"{name}.json").exists() else ""
            print(f"{name:18}{dataset.split:7}{dataset.kind:6}{there:6}{dataset.about}")
        return
    names = list(DATASETS) if options.all else options.dataset
    if not names:
        raise UserError("nothing to download: give --dataset NAME, --all or --list")
    for name in names:
        print(download(name, options.folder, options.force), flush=True)


if __name__ == "__main__":
    main()
