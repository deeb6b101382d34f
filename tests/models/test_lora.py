"""LoRA: the fused decoder with an adapter is peft's unfused model with it, and train = sample, files and mistakes."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import UserError
from models.attention import masked_attention
from models.checkpoint import Pretrained, load_pretrained, save_pretrained
from models.lora import LoRA, LoRALinear, lora_layers, prepare_for_training
from models.lora_targets import resolve_targets, target_names
from models.registry import FAMILIES
from models.tiny import build_tiny

SDAR = FAMILIES.get("sdar")
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MODELS: dict[str, dict[str, Any]] = {"plain": {}, "tied": {"tie_word_embeddings": True, "num_key_value_heads": 4}}


def settings(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"rank": 4, "alpha": 6.0, "target_modules": SEVEN, "dropout": 0.0, "save_merged": False, **changes})


def state(model: Pretrained) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.decoder.named_parameters()}


def causal_logits(model: Pretrained, ids: torch.Tensor) -> torch.Tensor:
    attend = masked_attention(torch.ones(len(ids), len(ids), dtype=torch.bool).tril())
    with torch.no_grad():
        return model.decoder.lm_head(model.decoder(ids, torch.arange(len(ids)), attend))


def randomise(model: Pretrained, seed: int = 5) -> None:
    """Adapters that matter: B is not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora_layers(model.decoder).values():
            for pair in layer.adapters.values():
                pair.B.copy_(0.1 * torch.randn(pair.B.shape, generator=generator))


@pytest.fixture
def base(tmp_path):
    """The directory of a tiny model."""
    model = build_tiny(SDAR, seed=1)
    save_pretrained(model, state(model), tmp_path / "base")
    return tmp_path / "base"


def adapted(base, **changes: Any) -> Pretrained:
    model = load_pretrained(str(base), "sdar", torch.float32)
    prepare_for_training(model, settings(**changes), str(base), seed=3)
    randomise(model)
    return model


IDS = torch.tensor([3, 17, 8, 0, 25, 9, 9, 1, 26, 4])


# -- the mathematics


@pytest.mark.parametrize("targets", [SEVEN, ["v_proj"], ["q_proj", "v_proj", "up_proj", "down_proj"]], ids=len)
def test_the_rows_are_those_of_the_unfused_layers(base, targets):
    """Against the definition: every published matrix W becomes W + alpha/r B A."""
    model = adapted(base, target_modules=targets)
    found = causal_logits(model, IDS)
    whole = load_pretrained(str(base), "sdar", torch.float32)
    weights = dict(whole.decoder.named_parameters())
    parameters = dict(model.decoder.named_parameters())
    with torch.no_grad():
        for piece in SDAR.pieces(whole.decoder.config):
            name = piece.published.split(".")[-2]
            if name in targets and ".layers." in piece.published:
                at = piece.parameter.removesuffix("weight") + f"adapters.{name}."
                rows = weights[piece.parameter][piece.start : piece.start + piece.rows]
                rows += 6 / 4 * parameters[at + "B"] @ parameters[at + "A"]
    assert (causal_logits(whole, IDS) - found).abs().max() < 1e-5
    assert (causal_logits(load_pretrained(str(base), "sdar", torch.float32), IDS) - found).abs().max() > 0.1


def test_a_new_adapter_changes_nothing_and_alone_trains(base):
    model = load_pretrained(str(base), "sdar", torch.float32)
    before = causal_logits(model, IDS)
    prepare_for_training(model, settings(), str(base), seed=3)
    assert torch.equal(causal_logits(model, IDS), before)
    trained = {name: p for name, p in model.decoder.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 2 and all(".adapters." in name for name in trained)
    # r (in + out) for each matrix, 64 wide: q 64, k and v 32, o from 64; gate and up 192, down from 192.
    assert sum(p.numel() for p in trained.values()) == 2 * 4 * ((64 + 64) * 2 + (64 + 32) * 2 + (64 + 192) * 3)
    again = load_pretrained(str(base), "sdar", torch.float32)
    prepare_for_training(again, settings(), str(base), seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.decoder.parameters(), again.decoder.parameters(), strict=True))
    bound = [p.abs().max() * p.shape[1] ** 0.5 for name, p in trained.items() if name.endswith(".A")]
    assert 0.9 < min(bound) and max(bound) <= 1, "A is uniform in +-1/sqrt(in)"


@pytest.mark.parametrize("recomputed_layers", [0, 1, 2])
def test_gradients_reach_the_adapters_alone(base, recomputed_layers):
    """Also with recomputation, where the first layer's input (a frozen embedding's output) needs no gradient."""
    model = adapted(base)
    model.decoder.recomputed_layers = recomputed_layers
    attend = masked_attention(torch.ones(10, 10, dtype=torch.bool))
    model.decoder.lm_head(model.decoder(IDS, torch.arange(10), attend)).square().sum().backward()
    gradients = {name: p.grad for name, p in model.decoder.named_parameters() if p.grad is not None}
    assert gradients.keys() == {name for name, p in model.decoder.named_parameters() if p.requires_grad}
    # Along a direction through all adapters at once: what one entry of one changes would be lost in the rounding of the loss.
    torch.manual_seed(4)
    trained = {name: model.decoder.get_parameter(name) for name in gradients}
    direction = {name: g / g.norm() + torch.randn_like(g) / g.numel() ** 0.5 for name, g in gradients.items()}
    step = 1e-3

    def loss(change: float) -> float:
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter += change * direction[name]
            value = model.decoder.lm_head(model.decoder(IDS, torch.arange(10), attend)).double().square().sum()
            for name, parameter in trained.items():
                parameter -= change * direction[name]
        return float(value)

    slope = sum(float((gradients[name] * direction[name]).sum()) for name in gradients)
    assert slope == pytest.approx((loss(step) - loss(-step)) / (2 * step), rel=1e-3)


def test_dropout_is_for_training_only(base):
    model = adapted(base, dropout=0.5)
    layer = model.decoder.layers[0].attention.qkv
    assert isinstance(layer, LoRALinear)
    x = torch.randn(6, 64)
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x))
    assert not torch.equal(layer(x), layer(x))


def test_train_equals_sample(base):
    """The trainer's log-probs of every revealed token are the engine's, with an adapter that matters."""
    from tests.train.steps import requests_of_every_remainder, sample
    from tests.train.test_train_equals_sample import TOLERANCE, gaps

    model = adapted(base)
    decoding = {"strategy": "low_confidence_dynamic", "threshold": 0.3, "temperature": 0.7}
    rollouts = sample(model, requests_of_every_remainder(4, seed=1), block_size=4, max_tokens=12, **decoding)
    found = gaps(model, rollouts, 0.7)
    print(f"largest differences: log-prob {found[0]:.1e}, entropy {found[1]:.1e}")
    assert max(found) < TOLERANCE
    without = load_pretrained(str(base), "sdar", torch.float32)
    assert gaps(without, rollouts, 0.7)[0] > 100 * TOLERANCE, "the engine did not sample with the adapter"


# -- files


def test_what_is_written_is_read_back(base, tmp_path):
    model = adapted(base, target_modules=["q_proj", "down_proj"])
    save_pretrained(model, state(model), tmp_path / "adapter")
    again = load_pretrained(str(tmp_path / "adapter"), "sdar", torch.float32)
    assert again.adapter == LoRA(str(base), 4, 6.0, ("q_proj", "down_proj"))
    assert (again.path, again.source, again.mask_id) == (base, tmp_path / "adapter", model.mask_id)
    for (name, a), (_, b) in zip(model.decoder.named_parameters(), again.decoder.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"].shape == (4, 64)
    assert tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"].shape == (64, 4)
    assert len(tensors) == 8 and (tmp_path / "adapter" / "tokenizer.json").is_file()
    assert not (tmp_path / "adapter" / "model.safetensors").exists()


def test_merged_weights(base, tmp_path):
    model = adapted(base, save_merged=True)
    save_pretrained(model, state(model), tmp_path / "adapter")
    merged = load_pretrained(str(tmp_path / "adapter-merged"), "sdar", torch.float32)
    assert merged.adapter is None
    assert (causal_logits(merged, IDS) - causal_logits(model, IDS)).abs().max() < 1e-5
    # What is not a target is the base's, bit for bit.
    start = load_pretrained(str(base), "sdar", torch.float32)
    assert torch.equal(merged.decoder.embed.weight, start.decoder.embed.weight)
    assert not torch.equal(merged.decoder.layers[0].mlp.down.weight, start.decoder.layers[0].mlp.down.weight)


def test_training_without_a_rank_merges_the_adapter(base, tmp_path):
    model = adapted(base)
    save_pretrained(model, state(model), tmp_path / "adapter")
    again = load_pretrained(str(tmp_path / "adapter"), "sdar", torch.float32)
    prepare_for_training(again, settings(rank=None, alpha=None), str(tmp_path / "adapter"), seed=0)
    assert again.adapter is None and not lora_layers(again.decoder)
    assert all(p.requires_grad for p in again.decoder.parameters())
    assert (causal_logits(again, IDS) - causal_logits(model, IDS)).abs().max() < 1e-5


def test_going_on_with_an_adapter(base, tmp_path):
    model = adapted(base)
    save_pretrained(model, state(model), tmp_path / "adapter")
    again = load_pretrained(str(tmp_path / "adapter"), "sdar", torch.float32)
    prepare_for_training(again, settings(), str(tmp_path / "adapter"), seed=99)
    assert torch.equal(causal_logits(again, IDS), causal_logits(model, IDS))
    assert again.adapter.base == str(base), "its base is the whole model, not the adapter it came from"
    for changes, message in [
        ({"rank": 8}, "training.lora.rank: got 8, the adapter in .* has 4"),
        ({"alpha": 8.0}, "training.lora.alpha: got 8.0, the adapter in .* has 6.0"),
        ({"target_modules": ["q_proj"]}, "training.lora.target_modules: got .'q_proj'., the adapter in"),
    ]:
        with pytest.raises(UserError, match=message):
            prepare_for_training(again, settings(**changes), str(tmp_path / "adapter"), seed=0)


# -- against peft itself


@pytest.mark.parametrize("kind", MODELS)
def test_peft_reads_our_adapter(kind, tmp_path):
    """transformers' Qwen3 has the very tensor names of SDAR; under a causal mask it is the same model."""
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install -e .[dev])")
    hugging = qwen3(tmp_path / "base", kind)
    model = load_pretrained(str(tmp_path / "base"), "sdar", torch.float32)
    prepare_for_training(model, settings(), str(tmp_path / "base"), seed=3)
    randomise(model)
    save_pretrained(model, state(model), tmp_path / "adapter")
    with torch.no_grad():
        before = hugging(IDS[None]).logits[0]
        theirs = peft.PeftModel.from_pretrained(hugging, str(tmp_path / "adapter"))(IDS[None]).logits[0]
    ours = causal_logits(model, IDS)
    gap, moved = (ours - theirs).abs().max(), (before - theirs).abs().max()
    print(f"{kind}: logits differ by {gap:.1e}, the adapter moves them by {moved:.2f}")
    assert gap < 1e-5 < 0.1 < moved


@pytest.mark.parametrize("targets", [SEVEN, ["k_proj", "gate_proj"], "all-linear", r".*\.(q|o)_proj"], ids=str)
def test_we_read_pefts_adapter(targets, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install -e .[dev])")
    hugging = qwen3(tmp_path / "base", "plain")
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(hugging, config)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    with torch.no_grad():
        expected = theirs(IDS[None]).logits[0]
    name_base(tmp_path / "adapter", tmp_path / "base")
    model = load_pretrained(str(tmp_path / "adapter"), "sdar", torch.float32)
    assert model.adapter.rank == 3 and model.adapter.alpha == 5.0
    assert (causal_logits(model, IDS) - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"use_dora": True}, "use_dora is True, only plain LoRA is read"),
        ({"use_rslora": True}, "use_rslora is True, only plain LoRA is read"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is {'q_proj': 2}, only plain LoRA is read"),
        ({"bias": "lora_only"}, "bias is 'lora_only', only plain LoRA is read"),
        ({"target_modules": ["lm_head"]}, "3 tensors are no LoRA of a sdar model.s linear layers, the first is .*lm_head"),
        ({"layers_to_transform": [0]}, "14 tensors are missing, the first is .*layers.1.*every layer needs its own"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_adapters_of_pefts_that_are_another_function(changes, message, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install -e .[dev])")
    hugging = qwen3(tmp_path / "base", "plain")
    peft.get_peft_model(hugging, peft.LoraConfig(**{"target_modules": SEVEN, **changes})).save_pretrained(str(tmp_path / "adapter"))
    name_base(tmp_path / "adapter", tmp_path / "base")
    with pytest.raises(UserError, match=message):
        load_pretrained(str(tmp_path / "adapter"), "sdar", torch.float32)


def qwen3(folder, kind: str) -> Any:
    """transformers' model with random weights, also written to `folder` as an SDAR checkpoint."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(2)
    tiny = build_tiny(SDAR, **MODELS[kind])
    others = ("model_type", "architectures", "rope_theta", "block_size")
    keys = {key: value for key, value in tiny.config.items() if key not in others}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}}
    model = Qwen3ForCausalLM(Qwen3Config(**keys, **rope, initializer_range=0.2)).eval()
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "sdar"}))
    return model


def name_base(adapter, base) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))


# -- mistakes


def test_target_names():
    assert target_names(SDAR) == SEVEN
    assert resolve_targets(SDAR, ["all-linear"]) == tuple(SEVEN)
    assert resolve_targets(SDAR, ["up_proj", "q_proj", "up_proj"]) == ("q_proj", "up_proj")
    with pytest.raises(UserError, match=r"'q_pro' is no linear layer of sdar \(did you mean q_proj\?\): choose from .*linear"):
        resolve_targets(SDAR, ["q_pro"])
    with pytest.raises(UserError, match="got an empty list"):
        resolve_targets(SDAR, [])


def edit(path, **changes):
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"base_model_name_or_path": "/nowhere/at/all"}, "base_model_name_or_path /nowhere/at/all: .*no directory"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path is missing"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', only LORA is read"),
        ({"r": 5}, r"has shape \[4, 64\], rank 5 and the base, .*, make it \[5, 64\]"),
    ],
)
def test_wrong_adapters(changes, message, base, tmp_path):
    model = adapted(base)
    save_pretrained(model, state(model), tmp_path / "adapter")
    edit(tmp_path / "adapter" / "adapter_config.json", **changes)
    with pytest.raises(UserError, match=message):
        load_pretrained(str(tmp_path / "adapter"), "sdar", torch.float32)


def test_torn_and_missing_files(base, tmp_path):
    model = adapted(base)
    save_pretrained(model, state(model), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop("base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight")
    save_file(tensors, file)
    with pytest.raises(UserError, match="1 tensors are missing, the first is .*v_proj.lora_B"):
        load_pretrained(str(tmp_path / "adapter"), "sdar", torch.float32)
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_pretrained(str(tmp_path / "adapter"), "sdar", torch.float32)
    file.unlink()
    with pytest.raises(UserError, match="no adapter_model.safetensors"):
        load_pretrained(str(tmp_path / "adapter"), "sdar", torch.float32)


def test_an_adapter_on_an_adapter(base, tmp_path):
    model = adapted(base)
    save_pretrained(model, state(model), tmp_path / "one")
    save_pretrained(model, state(model), tmp_path / "two")
    edit(tmp_path / "two" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "one"))
    with pytest.raises(UserError, match="is an adapter itself: name a whole model"):
        load_pretrained(str(tmp_path / "two"), "sdar", torch.float32)


def test_names_that_peft_would_mistake(base):
    """A short name that another tensor ends with too is written whole (LLaDA's ff_out is a layer and the head)."""
    import dataclasses

    from models.family import Piece
    from models.lora import exported_targets

    model = load_pretrained(str(base), "sdar", torch.float32)
    c = model.decoder.config
    family = dataclasses.replace(SDAR, pieces=lambda c: [*SDAR.pieces(c), Piece("model.down_proj.weight", "lm_head.weight", 0, 1)])
    assert exported_targets(SDAR, c, ("q_proj", "down_proj")) == ["down_proj", "q_proj"]
    layers = [f"model.layers.{n}.mlp.down_proj" for n in range(2)]
    assert exported_targets(family, c, ("q_proj", "down_proj")) == [*layers, "q_proj"]
