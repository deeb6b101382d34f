from __future__ import annotations

import sys

import pytest

from common.errors import UserError
from common.plugins import import_file, load_plugins
from configs.load import load_config
from configs.schema import Config
from reward.registry import REWARDS

MINIMAL = """
experiment: {{project: runs/x, plugins: ['{plugin}']}}
model: {{pretrained_model: somewhere, model_base: sdar}}
dataset: {{train_dataset: a, eval_dataset: b, data_type: shout}}
"""


def test_a_plugin_is_imported_before_registries_are_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(REWARDS, "_entries", dict(REWARDS._entries))
    plugin = tmp_path / "shout.py"
    plugin.write_text(
        "from reward.registry import REWARDS, Reward, Score\n"
        "@REWARDS.register('shout')\n"
        "class Shout(Reward):\n"
        "    def score(self, responses, progress=None):\n"
        "        return [Score(float(r.text.isupper())) for r in responses]\n"
    )
    (tmp_path / "x.yaml").write_text(MINIMAL.format(plugin=plugin))
    config = load_config("rl", [f"config={tmp_path / 'x.yaml'}"])
    assert config.dataset.data_type == "shout" and REWARDS.get("shout").__name__ == "Shout"
    load_plugins(config)  # a second time nothing is registered twice


def test_a_file_runs_once_and_dataclasses_work_in_it(tmp_path):
    file = tmp_path / "counts.py"
    file.write_text("from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int = 3\n")
    module = import_file(str(file), "experiment.plugins")
    assert module is import_file(str(file), "experiment.plugins") and module.A().x == 3
    other = tmp_path / "other"
    other.mkdir()
    (other / "counts.py").write_text("y = 4\n")
    assert import_file(str(other / "counts.py"), "experiment.plugins").y == 4, "files of one name are two modules"


@pytest.mark.parametrize(
    "text, message",
    [
        ("x = 1\n1 / 0\n", "line 2 failed: ZeroDivisionError: division by zero"),
        ("x = (\n", "line 1 failed: SyntaxError"),
        ("import nowhere_at_all\n", "line 1 failed: ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("from reward.registry import REWARDS\nREWARDS.register('math', int)\n", "is registered already"),
    ],
)
def test_a_plugin_that_fails_names_the_line(tmp_path, text, message):
    file = tmp_path / "broken.py"
    file.write_text(text)
    before = set(sys.modules)
    with pytest.raises(UserError) as error:
        import_file(str(file), "experiment.plugins")
    assert str(error.value).startswith(f"experiment.plugins: {file}, line ") and message in str(error.value)
    assert "\n" not in str(error.value) and not any(name.startswith("plugin_broken") for name in set(sys.modules) - before)


def test_missing_and_other_files(tmp_path):
    config = Config()
    config.experiment.plugins = ["nowhere.py"]
    with pytest.raises(UserError, match="experiment.plugins: no such file: nowhere.py"):
        load_plugins(config)
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(UserError, match="is not a .py file"):
        import_file(str(tmp_path / "x.txt"), "reward.function")
