"""Checkpoints: round trips bit for bit, and every way in which one can be wrong."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import models.checkpoint as checkpoint
from common.errors import UserError
from configs.schema import Config
from models.checkpoint import find_directory, load_pretrained, save_pretrained
from models.config_json import decoder_shape, keys_of_shape
from models.names import check_models
from models.registry import FAMILIES
from models.tiny import build_tiny
from models.value import load_value_model
from tests.train.steps import tiny_model


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
            model=SimpleNamespace(**{**names, **model}),
            reward=SimpleNamespace(function=function, judge=SimpleNamespace(base_url=judge_url)),
            dataset=SimpleNamespace(data_type=data_type),
        )

    data_type, function, gone = "math", None, f"{tmp_path}/gone"
    for good in ["tiny-random", "owner/name", str(tmp_path)]:
        check_models("rl", config(pretrained_model=good, value_base_model=good, process_reward_model=good))
    check_models("rl", config("http://judge/v1", pretrained_model="owner/name", process_reward_model=gone))
    for job in ["eval", "sft"]:  # which train no value model, and need no judge where answers are compared
        check_models(job, config(pretrained_model="owner/name", value_base_model=gone, process_reward_model=gone))

    def refused(job, key):
        with pytest.raises(UserError, match=f"^model.{key}: no directory {gone}: give an existing directory or a hub name"):
            check_models(job, config(**{"pretrained_model": "owner/name", key: gone}))

    for key in ["pretrained_model", "value_base_model", "process_reward_model"]:
        refused("rl", key)
    check_models("rl", config(pretrained_model="owner/name", process_reward_model="gpt2"))
    gone = "mymodel"
    for key in ["pretrained_model", "value_base_model"]:
        refused("rl", key)
    gone = f"{tmp_path}/gone"
    refused("eval", "pretrained_model")
    refused("sft", "pretrained_model")
    data_type = "judge"
    refused("eval", "process_reward_model")
    function = "math"
    check_models("eval", config(pretrained_model="owner/name", process_reward_model=gone))
    data_type, function = "math", "judge"
    refused("eval", "process_reward_model")


def test_a_model_that_is_missing_is_said_to_be_made_where_it_is(tmp_path):
    """model.prepare_config is read: which job it is of, and what that makes, whatever its name."""
    start = f"experiment: {{project: {tmp_path}/it}}\nmodel: {{pretrained_model: x, model_base: sdar, optimized_name: best}}\n"
    for name, data in [("rl_of_mine", "optimization_data: a"), ("sft_of_mine", "train_dataset: a"), ("broken", "eval_dataset: a")]:
        (tmp_path / f"{name}.yaml").write_text(f"{start}dataset: {{{data}}}\n")

    def said(model, made_by):
        names = {"value_base_model": None, "process_reward_model": None, "prepare_config": f"{tmp_path}/{made_by}.yaml"}
        config = Config()
        config.model = replace(config.model, pretrained_model=model, **names)
        with pytest.raises(UserError) as error:
            check_models("eval", config)
        return str(error.value)

    made, gone = f"{tmp_path}/it/ckpt/best", f"{tmp_path}/it/ckpt/bset"
    for made_by, script in [("rl_of_mine", "train/sft.py"), ("sft_of_mine", "rl.py")]:
        command = f"`python {script} config={tmp_path}/{made_by}.yaml`"
        for same in [made, f"{made}/", f"{made}/../best"]:
            assert f"no directory {same}: {command} makes it, or give an existing directory" in said(same, made_by)
        assert f"no directory {gone}: {command} makes {made}, or give an existing directory" in said(gone, made_by)
    for made_by in ["broken", "nowhere"]:
        assert said(made, made_by) == (
            f"model.pretrained_model: no directory {made}: give an existing directory or a hub name (owner/name)"
        )


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


# -- damaged files: one line with file and key


SHAPE_KEYS = {
    "sdar": "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size",
    "trado": "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size",
    "dream": "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size",
    "llada": "d_model n_layers n_heads",
    "mmada": "d_model n_layers n_heads",
}
"""What no config.json of the family can do without: LLaDA's may have mlp_ratio and vocab_size in place of two others."""


def refusal(path, family: str) -> str:
    with pytest.raises(UserError) as error:
        load_pretrained(str(path), family, torch.float32)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(params=list(SHAPE_KEYS))
def config_only(request, tmp_path):
    """(a family, a folder with its tiny model's tokenizer and config.json): the shape is read before the weights."""
    model = build_tiny(FAMILIES.get(request.param))
    model.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(model.config))
    return request.param, tmp_path


def test_keys_of_the_shape(config_only):
    family, path = config_only
    whole = (path / "config.json").read_text()
    assert "no .safetensors file" in refusal(path, family), "nothing else is wrong with it"
    for key in SHAPE_KEYS[family].split():
        edit_config(path, **{key: None})
        missing = f"{path}/config.json: {key} is missing: take it from the published checkpoint's"
        assert refusal(path, family) == missing
        (path / "config.json").write_text(json.dumps({**json.loads(whole), key: None}))
        assert refusal(path, family) == missing
        (path / "config.json").write_text(whole)
    keys = {key for names in keys_of_shape(FAMILIES.get(family)).values() for key in names}
    assert keys >= {*SHAPE_KEYS[family].split(), "rope_theta", "rms_norm_eps"}
    for key in sorted(keys):
        for value in ["64", 0, -1, True, [64], {}, float("nan")]:
            (path / "config.json").write_text(json.dumps({**json.loads(whole), key: value}))
            meant = "a number above 0" if key.startswith("r") else "a whole number above 0"
            said = f"{path}/config.json: {key} is {value!r}, must be {meant}: mend it"
            assert refusal(path, family) == said
    (path / "config.json").write_text(json.dumps({**json.loads(whole), "vocab_size": 28.5}))
    assert "config.json: vocab_size is 28.5, must be a whole number" in refusal(path, family)


@pytest.mark.parametrize("key", ["rope_theta", "rms_norm_eps"])
def test_null_numbers(config_only, key):
    """Written out as null: refused where the family has no other word for it."""
    family, path = config_only
    (path / "config.json").write_text(json.dumps({**json.loads((path / "config.json").read_text()), key: None}))
    with_default = key == "rope_theta" and family not in ("llada", "mmada")  # rope_parameters, or the usual one
    said = "no .safetensors file" if with_default else f"{path}/config.json: {key} is None, must be a number above 0: mend it"
    assert said in refusal(path, family)


def test_a_family_that_reads_nulls_and_checks_its_shape():
    """A plugin's functions are asked as their author meant them: of the file as it stands, of shapes that a model may have."""

    def decoder_config(config):
        if config["rope_scaling"] is not None:
            raise UserError("rope_scaling is not supported: set it to null")
        return usual.decoder_config(config)

    def config_json(c):
        assert c.hidden_size == c.num_heads * c.head_dim and c.num_heads % c.num_kv_heads == 0 and c.head_dim % 2 == 0
        if is_picky:
            raise ValueError("of my own sizes alone")
        return usual.config_json(c)

    usual = FAMILIES.get("sdar")
    whole = {**build_tiny(usual).config, "rope_scaling": None}
    for is_picky in (False, True):
        family = replace(usual, name=f"picky-{is_picky}", decoder_config=decoder_config, config_json=config_json)
        assert decoder_shape(family, whole, "x/config.json") == decoder_shape(usual, whole, "x/config.json")
        for changes, said in [
            ({"rope_scaling": {"factor": 2}}, "x/config.json: rope_scaling is not supported: set it to null"),
            ({"num_hidden_layers": 0}, f"x/config.json: {'num_layers' if is_picky else 'num_hidden_layers'} is 0, must be a whole"),
        ]:
            with pytest.raises(UserError, match=f"^{re.escape(said)}"):
                decoder_shape(family, {**whole, **changes}, "x/config.json")
    assert {field: keys_of_shape(usual)[field] for field in ("hidden_size", "num_kv_heads", "head_dim", "rope_theta")} == {
        "hidden_size": ["hidden_size"],
        "num_kv_heads": ["num_key_value_heads"],
        "head_dim": ["head_dim"],
        "rope_theta": ["rope_theta"],
    }


def test_heads_that_do_not_divide(config_only):
    family, path = config_only
    whole = json.loads((path / "config.json").read_text())
    kv, width = ("n_kv_heads", "d_model") if "d_model" in whole else ("num_key_value_heads", "hidden_size")
    for changes, said in [
        ({kv: 3}, "4 heads cannot share 3 of keys and values: the one must divide the other"),
        ({width: 60, "head_dim": 15}, "makes heads 15 wide, must be even"),
        ({width: 3, "head_dim": None}, "head_dim is "),
    ]:
        (path / "config.json").write_text(json.dumps({**whole, **changes}))
        assert said in refusal(path, family)


def test_token_ids(config_only):
    family, path = config_only
    whole = json.loads((path / "config.json").read_text())
    size = whole["vocab_size"]
    for changes, said in [
        ({"mask_token_id": "x"}, "config.json: mask_token_id is 'x', must be a token id: mend it"),
        ({"mask_token_id": [3]}, "config.json: mask_token_id is [3], must be a token id: mend it"),
        ({"pad_token_id": 1.5}, "config.json: pad_token_id is 1.5, must be a token id: mend it"),
        ({"pad_token_id": -1}, f"config.json: pad_token_id -1 lies outside the vocabulary of {size}: mend it, or set it to null"),
        ({"eos_token_id": "<|im_end|>"}, "config.json: eos_token_id is '<|im_end|>', must be a token id: mend it"),
        ({"eos_token_id": [3, "x"]}, "config.json: eos_token_id is [3, 'x'], must be a token id or a list of them: mend it"),
        ({"eos_token_id": -5}, f"config.json: eos_token_id -5 lies outside the vocabulary of {size}: mend it, or set it to null"),
        ({"eos_token_id": [3, size]}, f"config.json: eos_token_id {size} lies outside the vocabulary of {size}: mend it"),
        ({"eos_token_id": [3, 4]}, "no .safetensors file"),
        ({"mask_token_id": size}, f"mask token id {size} lies outside the vocabulary of {size}"),
    ]:
        (path / "config.json").write_text(json.dumps({**whole, **changes}))
        assert said in refusal(path, family), changes


@pytest.mark.parametrize("size", ["4", 0, -4, 4.5, True, [4]])
def test_a_block_size_that_is_none(config_only, size):
    family, path = config_only
    (path / "config.json").write_text(json.dumps({**json.loads((path / "config.json").read_text()), "block_size": size}))
    is_read = FAMILIES.get(family).attention == "block"  # others have no use for the key
    said = f"{path}/config.json: block_size is {size!r}, must be a whole number above 0" if is_read else "no .safetensors file"
    assert said in refusal(path, family)


@pytest.mark.parametrize("text, said", [("[1, 2]", "got a list, expected an object"), ("{", "not JSON"), ("", "not JSON")])
def test_files_that_are_no_objects(saved, text, said):
    path = saved[1]
    for name, advice in [("config.json", "mend it"), ("model.safetensors.index.json", "download it again, or remove it where")]:
        before = (path / name).read_text() if (path / name).exists() else None
        (path / name).write_text(text)
        message = refusal(path, "sdar")
        assert message.startswith(f"{path}/{name}: ") and said in message and advice in message
        (path / name).write_text(before) if before else (path / name).unlink()
    load_pretrained(str(path), "sdar", torch.float32)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": None}, {"weight_map": ["model.safetensors"]},
                                   {"weight_map": {"x": "model.safetensors", "y": 5}}])  # fmt: skip
def test_an_index_without_files(saved, index):
    (saved[1] / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "index.json: no weight_map from tensors to files: download it again, or remove it" in refusal(saved[1], "sdar")


def test_a_shape_that_cannot_be_computed(saved):
    config = json.loads((saved[1] / "config.json").read_text())
    del config["rope_theta"]
    (saved[1] / "config.json").write_text(json.dumps({**config, "rope_parameters": "x"}))
    assert f"{saved[1]}/config.json: no shape of a sdar model (" in refusal(saved[1], "sdar")


def test_no_token_to_fill_up_with():
    model = build_tiny(FAMILIES.get("sdar"))
    model.config = {**model.config, "pad_token_id": None, "eos_token_id": None}
    assert model.fill_id == model.tokenizer.pad_token_id
    model.tokenizer.pad_token = None
    assert model.fill_id == model.tokenizer.eos_token_id
    model.tokenizer.eos_token = None
    with pytest.raises(UserError, match="no token to fill responses up with: .*: add pad_token_id or eos_token_id to config.json"):
        assert model.fill_id


def test_a_pad_that_is_never_sampled_fills_nothing():
    """The fill is trained: as the mask token, or a row beyond the tokenizer, its loss would be infinite."""
    model = tiny_model(0)
    assert {model.mask_id, 31} < set(model.forbidden_ids)
    for forbidden in model.forbidden_ids:
        model.config = {**model.config, "pad_token_id": forbidden}
        assert model.fill_id == model.tokenizer.pad_token_id
    model.tokenizer.pad_token = model.tokenizer.convert_ids_to_tokens(model.mask_id)
    assert model.fill_id == model.eos_ids[0]
