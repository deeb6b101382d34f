"""Checkpoints: round trips bit for bit, and every way in which one can be wrong."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import models.checkpoint as checkpoint
from common.errors import UserError
from models.checkpoint import find_directory, load_pretrained, save_pretrained
from models.names import check_models
from models.registry import FAMILIES
from models.tiny import build_tiny
from models.value import load_value_model


def state(model):
    return {name: p.detach().clone() for name, p in model.decoder.named_parameters()}


@pytest.fixture
def saved(tmp_path):
    model = build_tiny(FAMILIES.get("sdar"), seed=1)
    save_pretrained(model, state(model), tmp_path / "model")
    return model, tmp_path / "model"


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}])
def test_what_is_written_is_read_back_bit_for_bit(tmp_path, changes):
    model = build_tiny(FAMILIES.get("sdar"), seed=1, **changes)
    save_pretrained(model, state(model), tmp_path / "model")
    again = load_pretrained(str(tmp_path / "model"), "sdar", torch.float32)
    for (name, a), (_, b) in zip(model.decoder.named_parameters(), again.decoder.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert again.mask_id == model.mask_id and again.eos_ids == model.eos_ids and again.forbidden_ids == model.forbidden_ids
    assert again.tokenizer("s0123=")["input_ids"] == model.tokenizer("s0123=")["input_ids"]


def test_published_names_and_fused_rows(saved):
    model, path = saved
    tensors = load_file(path / "model.safetensors")
    qkv = model.decoder.layers[1].attention.qkv.weight
    assert torch.equal(tensors["model.layers.1.self_attn.k_proj.weight"], qkv[64:96])
    assert torch.equal(tensors["model.layers.0.mlp.up_proj.weight"], model.decoder.layers[0].mlp.gate_up.weight[192:])
    assert "lm_head.weight" in tensors


def test_extra_keys_and_files_survive_and_shards_are_read(saved, tmp_path, monkeypatch):
    model, path = saved
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "fuse_cross_entropy": True, "auto_map": {"AutoModel": "m.M"}}))
    (path / "modeling_sdar.py").write_text("# remote code\n")
    monkeypatch.setattr(checkpoint, "SHARD_SIZE", "100KB")
    again = load_pretrained(str(path), "trado", torch.float32)
    save_pretrained(again, state(again), tmp_path / "second")
    second = tmp_path / "second"
    assert len(list(second.glob("model-*.safetensors"))) > 1
    assert json.loads((second / "config.json").read_text())["auto_map"] == {"AutoModel": "m.M"}
    assert (second / "modeling_sdar.py").is_file() and (second / "tokenizer.json").is_file()
    third = load_pretrained(str(second), "sdar", torch.float32)
    assert torch.equal(third.decoder.lm_head.weight, model.decoder.lm_head.weight)
    next(second.glob("model-00002*")).unlink()
    with pytest.raises(UserError, match="shard model-00002"):
        load_pretrained(str(second), "sdar", torch.float32)


def edit_tensors(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("model.layers.1.self_attn.q_norm.weight"), "missing.*layers.1.self_attn.q_norm"),
        (lambda t: t.update(surplus=torch.zeros(1)), "not part of a sdar model.*surplus"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), r"model.norm.weight has shape \[3\]"),
    ],
)
def test_wrong_tensors_are_named(saved, change, message):
    edit_tensors(saved[1], change)
    with pytest.raises(UserError, match=message):
        load_pretrained(str(saved[1]), "sdar", torch.float32)


def edit_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    config.update(changes)
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_a_family_that_the_checkpoint_is_not(saved):
    edit_config(saved[1], model_type="Dream")
    with pytest.raises(UserError, match="model_base: sdar reads model_type sdar.*'Dream'"):
        load_pretrained(str(saved[1]), "sdar", torch.float32)


def test_the_mask_token(saved):
    edit_config(saved[1], mask_token_id=None)
    with pytest.raises(UserError, match="no mask token"):
        load_pretrained(str(saved[1]), "sdar", torch.float32)
    edit_config(saved[1], mask_token_id=99)
    with pytest.raises(UserError, match="99 lies outside the vocabulary"):
        load_pretrained(str(saved[1]), "sdar", torch.float32)


def test_ids_beyond_the_tokenizer_are_forbidden():
    model = build_tiny(FAMILIES.get("sdar"), vocab_size=32)
    assert model.forbidden_ids == [27, 28, 29, 30, 31]


def test_paths_that_are_no_model(tmp_path):
    for name, message in [("/nowhere/at/all", "no directory"), (str(tmp_path), "no config.json")]:
        with pytest.raises(UserError, match=message):
            load_pretrained(name, "sdar", torch.float32)


def test_a_name_of_the_hub_s_kind_whose_folder_is_here(tmp_path, monkeypatch):
    """runs/x where there is runs: the hub is asked, but what is missing is called a directory."""

    def refuse(name, **options):
        asked.append(name)
        raise OSError("the hub has no such thing")

    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="no directory runs/x: give"):
        find_directory("runs/x")
    with pytest.raises(UserError, match="owner/x is neither a directory here nor to be had from the hub .OSError: the hub has no"):
        find_directory("owner/x")
    assert asked == ["runs/x", "owner/x"]
    with pytest.raises(UserError, match="no directory runs/x/ckpt: give"):
        find_directory("runs/x/ckpt")
    assert len(asked) == 2


def test_models_are_looked_for_before_anything_is_read(tmp_path):
    def config(judge_url=None, **model):
        names = dict.fromkeys(["pretrained_model", "value_base_model", "process_reward_model", "prepare_config"])
        return SimpleNamespace(
            model=SimpleNamespace(**{**names, **model}), reward=SimpleNamespace(judge=SimpleNamespace(base_url=judge_url))
        )

    gone = f"{tmp_path}/gone"
    for good in ["tiny-random", "owner/name", "gpt2", str(tmp_path)]:
        check_models(config(pretrained_model=good, value_base_model=good, process_reward_model=good), uses_judge=True)
    check_models(config(pretrained_model="owner/name", process_reward_model=gone))
    check_models(config("http://judge/v1", pretrained_model="owner/name", process_reward_model=gone), uses_judge=True)
    for key in ["pretrained_model", "value_base_model", "process_reward_model"]:
        with pytest.raises(UserError, match=f"^model.{key}: no directory {gone}: give an existing directory or a hub name"):
            check_models(config(**{"pretrained_model": "owner/name", key: gone}), uses_judge=True)
    for made_by, command in [("configs/rl_tiny.yaml", "rl.py"), ("configs/sft_tiny.yaml", "train/sft.py")]:
        with pytest.raises(UserError, match=f"no directory {gone}: `python {command} config={made_by}` makes it"):
            check_models(config(pretrained_model=gone, prepare_config=made_by))


def test_the_setting_that_named_the_path_is_blamed(tmp_path):
    with pytest.raises(UserError, match="^model.value_base_model: no directory "):
        load_value_model(str(tmp_path / "nowhere" / "x"), "sdar", torch.float32)


def test_a_torn_weight_file(saved):
    file = saved[1] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_pretrained(str(saved[1]), "sdar", torch.float32)


def test_an_interrupted_write_leaves_the_old_checkpoint(saved, monkeypatch):
    model, path = saved
    before = (path / "model.safetensors").read_bytes()
    monkeypatch.setattr(checkpoint, "replace_directory", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(model, {k: v + 1 for k, v in state(model).items()}, path)
    assert (path / "model.safetensors").read_bytes() == before
