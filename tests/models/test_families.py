"""Families: what is published under their names and keys, both ways, bit for bit; what the decoder lacks is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import UserError
from models import checkpoint
from models.attention import masked_attention
from models.checkpoint import Pretrained, load_pretrained, save_pretrained
from models.lora import lora_layers, merge, prepare_for_training
from models.lora_targets import target_names
from models.registry import FAMILIES
from models.tiny import TINY_SHAPE, build_tiny
from models.value import VALUE_HEAD, load_value_model, save_value_model

SHIPPED = ["sdar", "trado", "llada", "dream", "mmada"]
GOLDEN = {"llada": 3, "dream": 3, "mmada": 2}
"""Family -> layers of the model in tests/golden/data."""
DATA = Path(__file__).parent.parent / "golden" / "data"


def state(model: Pretrained) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.decoder.named_parameters()}


def randomised(model: Pretrained) -> Pretrained:
    """Every weight its own: biases and norms too."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for p in model.decoder.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def logits(model: Pretrained, ids: list[int]) -> torch.Tensor:
    attend = masked_attention(torch.ones(len(ids), len(ids), dtype=torch.bool))
    with torch.no_grad():
        return model.decoder.lm_head(model.decoder(torch.tensor(ids), torch.arange(len(ids)), attend))


@pytest.mark.parametrize("name", SHIPPED)
def test_shape_to_config_json_and_back(name):
    family = FAMILIES.get(name)
    shape = dataclasses.replace(
        TINY_SHAPE, vocab_size=31, num_layers=5, num_kv_heads=1, rms_norm_eps=3e-5, rope_theta=77.0, tie_word_embeddings=True
    )
    own = family.decoder_config(family.config_json(shape))
    facts = {"qk_norm": own.qk_norm, "qkv_bias": own.qkv_bias}
    assert own == dataclasses.replace(shape, **facts)
    assert facts == {"qk_norm": name in ("sdar", "trado"), "qkv_bias": name == "dream"}


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"vocab_size": 40, "num_kv_heads": 4}], ids=str)
@pytest.mark.parametrize("name", SHIPPED)
def test_what_is_written_is_read_back_bit_for_bit(name, changes, tmp_path):
    model = randomised(build_tiny(FAMILIES.get(name), seed=1, **changes))
    save_pretrained(model, state(model), tmp_path / "first")
    again = load_pretrained(str(tmp_path / "first"), name, torch.float32)
    assert again.decoder.config == model.decoder.config
    for (parameter, a), (_, b) in zip(model.decoder.named_parameters(), again.decoder.named_parameters(), strict=True):
        assert torch.equal(a, b), parameter
    facts = lambda m: (m.mask_id, m.eos_ids, m.fill_id, m.forbidden_ids)  # noqa: E731
    assert facts(again) == facts(model) and model.mask_id in model.forbidden_ids
    save_pretrained(again, state(again), tmp_path / "second")
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in ("first", "second"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    pieces = model.family.pieces(model.decoder.config)
    assert {piece.published for piece in pieces} == first.keys()
    rows = sum(piece.rows for piece in pieces)
    assert rows == sum(p.shape[0] for p in model.decoder.parameters()), "every row is published once"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["llada", "dream", "mmada"])
def test_shards_out_and_in(name, tied, tmp_path, monkeypatch):
    """As published checkpoints of 8B come: an index that names every tensor's file, none of them above the limit."""
    monkeypatch.setattr(checkpoint, "SHARD_SIZE", "60KB")
    model = randomised(build_tiny(FAMILIES.get(name), seed=1, tie_word_embeddings=tied))
    save_pretrained(model, state(model), tmp_path / "model")
    weight_map = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())["weight_map"]
    files = {file: load_file(tmp_path / "model" / file) for file in set(weight_map.values())}
    assert len(files) > 3 and not (tmp_path / "model" / "model.safetensors").exists()
    assert all(sum(t.nbytes for t in tensors.values()) <= 60_000 for tensors in files.values())
    assert weight_map == {tensor: file for file, tensors in files.items() for tensor in tensors}
    assert set(weight_map) == {piece.published for piece in model.family.pieces(model.decoder.config)}
    again = load_pretrained(str(tmp_path / "model"), name, torch.float32)
    assert state(again).keys() == state(model).keys()
    assert all(torch.equal(p, state(model)[key]) for key, p in state(again).items())
    # Shards cut elsewhere, as another writer would: three files, every third tensor.
    names = sorted(weight_map)
    other = tmp_path / "other"
    other.mkdir()
    for file in ["config.json", "tokenizer.json", "tokenizer_config.json"]:
        (other / file).write_bytes((tmp_path / "model" / file).read_bytes())
    index = {tensor: f"model-{n % 3}.safetensors" for n, tensor in enumerate(names)}
    for n in range(3):
        save_file({tensor: files[weight_map[tensor]][tensor] for tensor in names[n::3]}, other / f"model-{n}.safetensors")
    (other / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    third = load_pretrained(str(other), name, torch.float32)
    assert all(torch.equal(p, state(model)[key]) for key, p in state(third).items())
    save_pretrained(third, state(third), tmp_path / "fourth")
    assert json.loads((tmp_path / "fourth" / "model.safetensors.index.json").read_text())["weight_map"] == weight_map
    (other / "model-1.safetensors").unlink()
    with pytest.raises(UserError, match="shard model-1.safetensors, which its index names, is missing"):
        load_pretrained(str(other), name, torch.float32)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_family_has_a_tiny_model(name):
    """Of the same size and tokenizer, whatever the keys: so that the tiny tasks are the same for all. MMaDA has image codes too."""
    model = load_pretrained("tiny-random", name, torch.float32, seed=3)
    c = model.decoder.config
    assert (c.hidden_size, c.num_layers, c.num_heads, c.num_kv_heads) == (64, 2, 4, 2)
    assert len(model.tokenizer) == 28 and c.vocab_size == (36 if name == "mmada" else 28)
    assert model.forbidden_ids == list(range(27, c.vocab_size)), "the mask and the codes"
    assert (model.mask_id, model.eos_ids, model.fill_id) == (27, [26], 25)
    assert model.config["model_type"] in model.family.model_types
    assert model.family.config_block_size(model.config) == (4 if model.family.attention == "block" else None)


@pytest.mark.parametrize("name, layers", GOLDEN.items())
def test_checkpoints_of_the_published_layout_come_out_as_they_went_in(name, layers, tmp_path):
    source = DATA / name / "model"
    model = load_pretrained(str(source), name, torch.float32)
    assert model.decoder.config.num_layers == layers
    save_pretrained(model, state(model), tmp_path / "copy")
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "copy"))
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in theirs)
    assert json.loads((tmp_path / "copy" / "config.json").read_text()) == json.loads((source / "config.json").read_text())


def test_llada_names_and_fused_rows(tmp_path):
    model = randomised(build_tiny(FAMILIES.get("llada"), seed=1))
    save_pretrained(model, state(model), tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    layer = model.decoder.layers[1]
    for name, expected in {
        "k_proj": layer.attention.qkv.weight[64:96],
        "attn_out": layer.attention.out.weight,
        "ff_proj": layer.mlp.gate_up.weight[:192],
        "up_proj": layer.mlp.gate_up.weight[192:],
        "ff_out": layer.mlp.down.weight,
        "ff_norm": layer.mlp_norm.weight,
    }.items():
        assert torch.equal(tensors[f"model.transformer.blocks.1.{name}.weight"], expected), name
    assert torch.equal(tensors["model.transformer.ff_out.weight"], model.decoder.lm_head.weight)
    wanted = {"d_model": 64, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2, "mlp_hidden_size": 192, "embedding_size": 28}
    assert {key: config[key] for key in wanted} == wanted and config["model_type"] == "llada"


@pytest.mark.parametrize(
    "name, key, value",
    [
        ("llada", "alibi", True),
        ("llada", "layer_norm_type", "default"),
        ("llada", "include_bias", True),
        ("llada", "include_qkv_bias", True),
        ("llada", "attention_layer_norm", True),
        ("mmada", "activation_type", "swiglu"),
        ("mmada", "block_type", "sequential"),
        ("dream", "use_sliding_window", True),
        ("dream", "use_mrope", True),
        ("dream", "rope_scaling", {"type": "yarn"}),
        ("dream", "hidden_act", "gelu"),
    ],
)
def test_what_the_decoder_lacks_is_refused_by_its_key(name, key, value):
    with pytest.raises(UserError, match=f"config.json: {key} .*not supported"):
        build_tiny(FAMILIES.get(name), **{key: value})


@pytest.mark.parametrize("name", ["llada", "mmada"])
def test_an_embedding_of_more_rows_than_words(name, tmp_path):
    """Of a vocabulary that is padded the decoder has every row: the mask may be any of them."""
    model = randomised(build_tiny(FAMILIES.get(name), seed=1, vocab_size=48))
    model.config = {**model.config, "vocab_size": 20, "embedding_size": 48, "mask_token_id": 47}
    save_pretrained(model, state(model), tmp_path / "model")
    again = load_pretrained(str(tmp_path / "model"), name, torch.float32)
    assert again.decoder.config.vocab_size == 48 and again.mask_id == 47
    assert torch.equal(again.decoder.embed.weight, model.decoder.embed.weight)
    (tmp_path / "model" / "config.json").write_text(json.dumps({**model.config, "mask_token_id": 48}))
    with pytest.raises(UserError, match="mask token id 48 lies outside the vocabulary of 48: mend config.json"):
        load_pretrained(str(tmp_path / "model"), name, torch.float32)


def test_llada_config_defaults():
    """Keys that may be null: heads of keys, width of the MLP, rows of a padded embedding."""
    config = {"vocab_size": 50, "embedding_size": 64, "d_model": 32, "n_heads": 4, "n_layers": 1, "mlp_ratio": 4}
    shape = FAMILIES.get("llada").decoder_config({**config, "n_kv_heads": None, "mlp_hidden_size": None})
    assert (shape.vocab_size, shape.num_kv_heads, shape.intermediate_size, shape.head_dim) == (64, 4, 128, 8)
    assert FAMILIES.get("llada").decoder_config({**config, "multi_query_attention": True}).num_kv_heads == 1


def test_stop_tokens_of_the_family_count_where_the_tokenizer_has_them():
    model = build_tiny(FAMILIES.get("llada"))
    stop = model.config["eos_token_id"]
    assert model.eos_ids == [stop]
    model.tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>"]})
    assert model.eos_ids == [stop, model.tokenizer.convert_tokens_to_ids("<|eot_id|>")]


@pytest.mark.parametrize("name", ["llada", "dream"])
def test_lora_on_every_linear_layer_merges_to_the_same_function(name, tmp_path):
    """Adapters and merged weights are written and read under the family's names; Dream's biases stay as they are."""
    family = FAMILIES.get(name)
    base = tmp_path / "base"
    model = randomised(build_tiny(family, seed=1))
    save_pretrained(model, state(model), base)
    settings = SimpleNamespace(rank=2, alpha=3.0, target_modules=["all-linear"], dropout=0.0, save_merged=True)
    model = load_pretrained(str(base), name, torch.float32)
    prepare_for_training(model, settings, str(base), seed=3)
    assert len(target_names(family)) == 7 == len(model.adapter.targets)
    with torch.no_grad():
        for layer in lora_layers(model.decoder).values():
            for pair in layer.adapters.values():
                pair.B.copy_(0.1 * torch.randn(pair.B.shape, generator=torch.Generator().manual_seed(4)))
    ids = [3, 17, 8, 0, 25, 9]
    expected = logits(model, ids)
    save_pretrained(model, state(model), tmp_path / "trained")
    again = load_pretrained(str(tmp_path / "trained"), name, torch.float32)
    assert torch.equal(logits(again, ids), expected)
    if name == "llada":  # the head is called ff_out too: peft, which compares the ends of names, must not take it for one
        exported = json.loads((tmp_path / "trained" / "adapter_config.json").read_text())["target_modules"]
        assert {"attn_out", "model.transformer.blocks.0.ff_out", "model.transformer.blocks.1.ff_out"} < set(exported)
        assert "ff_out" not in exported
    merged = load_pretrained(str(tmp_path / "trained-merged"), name, torch.float32)
    merge(again)
    for other in (merged, again):
        assert (logits(other, ids) - expected).abs().max() < 1e-5
    if name == "dream":
        before, after = (load_file(f / "model.safetensors") for f in (base, tmp_path / "trained-merged"))
        biases = [key for key in before if key.endswith("bias")]
        assert len(biases) == 2 * 3 and all(torch.equal(before[key], after[key]) for key in biases)


@pytest.mark.parametrize("name", ["llada", "dream"])
def test_value_models_come_and_go_without_the_vocabulary_head(name, tmp_path):
    model = randomised(build_tiny(FAMILIES.get(name), seed=1))
    save_pretrained(model, state(model), tmp_path / "policy")
    pretrained, value = load_value_model(str(tmp_path / "policy"), name, torch.float32)
    with torch.no_grad():
        value.head.weight.uniform_(-1, 1)
    save_value_model(pretrained, {key: p.detach() for key, p in value.named_parameters()}, tmp_path / "value")
    names = load_file(tmp_path / "value" / "model.safetensors").keys()
    assert VALUE_HEAD in names and FAMILIES.get(name).head_name not in names
    _, again = load_value_model(str(tmp_path / "value"), name, torch.float32)
    for (parameter, a), (_, b) in zip(value.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), parameter


def test_biases_of_q_k_and_v_train():
    """Their gradients are those of a finite difference."""
    model = randomised(build_tiny(FAMILIES.get("dream"), seed=2)).decoder
    ids, attend = torch.tensor([3, 17, 8, 0]), masked_attention(torch.ones(4, 4, dtype=torch.bool))
    loss = lambda: model.lm_head(model(ids, torch.arange(4), attend)).logsumexp(-1).sum()  # noqa: E731
    loss().backward()
    bias = model.layers[0].attention.qkv.bias
    for row in (5, 70, 100):  # of q, k and v
        with torch.no_grad():
            sides = []
            for change in (1e-2, -2e-2):
                bias[row] += change
                sides.append(float(loss()))
            bias[row] += 1e-2
        assert bias.grad[row] == pytest.approx((sides[0] - sides[1]) / 2e-2, rel=2e-2, abs=2e-3)


def test_a_tied_head_that_was_stored_all_the_same(tmp_path):
    model = build_tiny(FAMILIES.get("llada"), tie_word_embeddings=True)
    save_pretrained(model, state(model), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    for change, fits in [(0.0, True), (1.0, False)]:
        save_file({**tensors, "model.transformer.ff_out.weight": tensors["model.transformer.wte.weight"] + change}, file)
        if fits:
            load_pretrained(str(tmp_path / "model"), "llada", torch.float32)
        else:
            with pytest.raises(UserError, match="ff_out.weight differs from model.transformer.wte.weight"):
                load_pretrained(str(tmp_path / "model"), "llada", torch.float32)
