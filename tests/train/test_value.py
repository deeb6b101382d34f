"""The critic: its loss by hand, its tables, learning to predict, and the head on the policy's trunk."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from common import dist
from common.records import ScoredRollout
from models.registry import FAMILIES
from models.tiny import build_tiny
from models.value import VALUE_HEAD, VALUE_HEAD_FILE, ValueModel, load_value_model, save_value_model
from tests.train.steps import (
    FULL_ATTENTION,
    forget_accelerator,
    requests_of_every_remainder,
    rl_config,
    sample,
    scored,
    tiny_model,
)
from train.documents import Predictions, number
from train.layout import Layout
from train.offload import RolloutOffload
from train.policy import Policy, policy_trainer
from train.rl import PolicyUpdate
from train.run import Run
from train.shared_value import SharedValueUpdate
from train.value import ValueUpdate, explained_variance, token_returns, token_values, value_loss


def predictions(response, offset):
    n = len(response)
    return Predictions(np.array(response), np.array(offset), np.zeros(n, int), np.arange(n), np.ones(n))


def test_the_loss_takes_the_worse_of_clipped_and_unclipped():
    values, old, returns = torch.tensor([0.5, 0.5, 0.1]), torch.tensor([0.0, 0.0, 0.0]), torch.tensor([1.0, 0.3, 1.0])
    # Clipped to 0.2: (0.2 - 1)^2 > (0.5 - 1)^2; (0.5 - 0.3)^2 > (0.2 - 0.3)^2; inside the bounds both are one.
    assert value_loss(values, old, returns, 0.2).tolist() == pytest.approx([0.32, 0.02, 0.405])


@pytest.mark.parametrize("is_shared", [False, True])
def test_values_of_bfloat16_weights_are_computed_in_float32(is_shared):
    """In both places, and their gradients are those of the product."""
    decoder = build_tiny(FAMILIES.get("sdar"), dtype=torch.bfloat16).decoder
    head = Policy(decoder, [], has_value_head=True).value_head if is_shared else ValueModel(decoder).head
    with torch.no_grad():
        head.weight.copy_(torch.randn(1, 64))
    hidden = torch.randn(200, 64).bfloat16().requires_grad_()
    values = head(hidden)
    weight = head.weight.detach().double()[0]
    assert values.dtype == torch.float32 and values.shape == (200,)
    torch.testing.assert_close(values.double(), hidden.detach().double() @ weight, rtol=1e-5, atol=1e-5)
    values.sum().backward()
    assert torch.equal(hidden.grad, head.weight.detach().expand(200, 64))
    torch.testing.assert_close(head.weight.grad[0], hidden.detach().float().sum(0).bfloat16())


def test_a_token_of_several_masks_has_the_mean_of_its_values():
    p = predictions([0, 0, 1, 0], [0, 1, 0, 0])
    assert token_values(np.array([1.0, 2.0, 3.0, 5.0]), p, np.array([0, 3, 4])).tolist() == [3.0, 2.0, 0.0, 3.0]


def test_explained_variance():
    returns = np.array([0.0, 1.0, 2.0])
    assert explained_variance(returns, returns) == 1
    assert explained_variance(np.zeros(3), returns) == 0
    assert explained_variance(np.ones(3), np.ones(3)) == 0


MAX_TOKENS = {"sdar": 11, **dict.fromkeys(FULL_ATTENTION, 12)}


@pytest.fixture(scope="module")
def rollouts_of():
    @functools.cache
    def make(family: str) -> list[ScoredRollout]:
        requests = requests_of_every_remainder(4, seed=5, num_samples=2)
        out = scored(sample(tiny_model(3, family), requests, block_size=4, max_tokens=MAX_TOKENS[family]))
        for n, rollout in enumerate(out):
            rollout.reward = float(n % 2)
        return out

    return make


@pytest.fixture(scope="module")
def rollouts(rollouts_of):
    return rollouts_of("sdar")


def test_process_and_outcome_rewards_reach_their_tokens(rollouts):
    from train.traces import sampled_response

    layout = Layout("block", rl_config("training.gam=1.0", "training.lam=1.0").training)
    rollout = rollouts[0]
    n = rollout.num_response
    rollout = type(rollout)(**{**vars(rollout), "token_rewards": [0.25] * len(rollout.response_ids), "outcome": 3.0})
    response = sampled_response(rollout, 100, 4, 0)
    starts = np.array([0, len(response.response_ids)])
    returns, advantages = token_returns([rollout], [response], np.zeros(starts[-1]), predictions([0] * n, range(n)), starts, layout)
    # Static unmasking reveals one token a step: the return of step t of n is 0.25 (n - t) + 3, the last token's own included.
    order = np.argsort(np.argsort(rollout.step_map[:n]))
    assert returns[:n] == pytest.approx(0.25 * (n - order) + 3.0)
    assert advantages[:n] == pytest.approx(returns[:n]) and not returns[n:].any()


def save(family: str, folder: Path) -> str:
    from models.checkpoint import save_pretrained
    from tests.models.test_checkpoint import state

    model = tiny_model(3, family)
    save_pretrained(model, state(model), folder)
    return str(folder)


@pytest.fixture
def saved_model(tmp_path):
    return save("sdar", tmp_path / "model")


@pytest.mark.parametrize("family, method", [("sdar", "TraceRL"), ("sdar", "coupled"), ("llada", "coupled"), ("dream", "TraceRL")])
def test_the_critic_learns_what_the_rewards_are(rollouts_of, family, method, tmp_path):
    """On one batch, over and over: the explained variance rises from nothing, and the policy's advantages shrink."""
    forget_accelerator()
    rollouts = rollouts_of(family)
    overrides = [
        f"model.value_base_model={save(family, tmp_path / 'model')}",
        f"training.method={method}",
        f"rollout.max_token={MAX_TOKENS[family]}",
        "optimizer.name=adamw",
    ]
    rates = ["optimizer.params.learning_rate=1e-6", "optimizer.params.value_learning_rate=3e-3"]
    config = rl_config(*overrides, *rates, "training.eps=10", family=family)
    accelerator = dist.make_accelerator(config)
    model = tiny_model(3, family)
    trainer = policy_trainer(model, config, accelerator, 1.0)
    value = ValueUpdate(config, dist.value_accelerator(accelerator))
    update = PolicyUpdate(trainer, config, model.fill_id, value=value)
    explained = [update(rollouts, step=1)["value/explained_variance"] for _ in range(30)]
    assert abs(explained[0]) < 1e-6, "a head of zeros explains nothing"
    assert explained[-1] > 0.8
    assert value.trainer.num_steps == trainer.num_steps == 30

    value.save_checkpoint(tmp_path / "value")
    forget_accelerator()
    _, again = load_value_model(str(tmp_path / "value"), family, torch.float32)
    ours = dict(value.trainer.module.model.named_parameters())
    assert all(torch.equal(p, ours[name]) for name, p in again.named_parameters() if not name.startswith("decoder.lm_head"))


def test_it_is_updated_every_so_many_steps(rollouts, saved_model):
    forget_accelerator()
    config = rl_config(f"model.value_base_model={saved_model}", "experiment.train_value_every=2", "rollout.max_token=11")
    accelerator = dist.make_accelerator(config)
    model = tiny_model(3)
    trainer = policy_trainer(model, config, accelerator, 1.0)
    value = ValueUpdate(config, dist.value_accelerator(accelerator))
    update = PolicyUpdate(trainer, config, model.fill_id, value=value)
    taken = []
    for step in (1, 2, 3):
        update(rollouts, step)
        taken.append(value.trainer.num_steps)
    forget_accelerator()
    assert taken == [0, 1, 1]


@pytest.mark.parametrize("family", ["sdar", *FULL_ATTENTION])
def test_a_head_on_the_trunk_adds_its_loss_to_the_policy_s(rollouts_of, family):
    """The loss is the policy's with the critic's advantages plus the weighted value loss, by hand from the outputs."""
    forget_accelerator()
    rollouts = rollouts_of(family)
    settings = ["model.value_shared=true", "training.value_loss_weight=0.25", "training.eps=0.2"]
    config = rl_config(*settings, f"rollout.max_token={MAX_TOKENS[family]}", family=family)
    accelerator = dist.make_accelerator(config)
    model = tiny_model(3, family)
    trainer = policy_trainer(model, config, accelerator, 1.0)
    with torch.no_grad():
        trainer.module.value_head.weight.fill_(0.05)
    update = PolicyUpdate(trainer, config, model.fill_id, value=SharedValueUpdate(trainer, config))
    documents = update.documents(rollouts, 1)
    p = number(documents)
    old = trainer.outputs(documents, len(p), output=2)
    advantages, critic, _ = update.value.advantages(rollouts, update.responses(rollouts), documents, p)
    weights = 1 / (np.bincount(p.response)[p.response] * len(np.unique(p.response)))
    expected = -(weights * advantages).sum() + 0.25 * (weights * 0.5 * (old - critic.returns) ** 2).sum()
    metrics = update(rollouts, 1)
    forget_accelerator()
    assert metrics["train/loss"] == pytest.approx(expected, rel=1e-4)
    assert not torch.equal(trainer.module.value_head.weight, torch.full_like(trainer.module.value_head.weight, 0.05))


def test_a_run_keeps_and_finds_the_critic_again(tmp_path, saved_model):
    forget_accelerator()
    config = rl_config(f"model.value_base_model={saved_model}", f"model.pretrained_model={saved_model}", "rollout.max_token=11")
    config.experiment.project, config.experiment.save_state_every = str(tmp_path / "run"), 1
    run = Run(config, 4, 1.0)
    run.resume()
    with torch.no_grad():
        run.value.trainer.module.model.head.weight.fill_(0.5)
    run.value.trainer.num_steps = 7
    run.finish_step({}, {})
    run.close()
    forget_accelerator()
    again = Run(config, 4, 1.0)
    again.resume()
    forget_accelerator()
    assert again.value.trainer.num_steps == 7 and (again.value.trainer.module.model.head.weight == 0.5).all()


def test_value_models_are_written_under_published_names(tmp_path, saved_model):
    from safetensors.torch import load_file

    pretrained, module = load_value_model(saved_model, "sdar", torch.float32)
    save_value_model(pretrained, module.state_dict(), tmp_path / "value")
    names = load_file(tmp_path / "value" / "model.safetensors")
    assert names["value_head.weight"].shape == (1, 64) and "lm_head.weight" not in names
    assert "model.layers.1.self_attn.k_proj.weight" in names


def test_a_shared_head_is_found_again_by_the_next_run(rollouts, tmp_path):
    from models.checkpoint import load_pretrained, save_pretrained
    from tests.models.test_checkpoint import state
    from train.policy import build_policy

    forget_accelerator()
    config = rl_config("model.value_shared=true")
    model = tiny_model(3)
    trainer = policy_trainer(model, config, dist.make_accelerator(config), 1.0)
    with torch.no_grad():
        trainer.module.value_head.weight.fill_(0.25)
    SharedValueUpdate(trainer, config).save_checkpoint(tmp_path / "ckpt" / "optimized_value")
    forget_accelerator()
    save_pretrained(model, state(model), tmp_path / "ckpt" / "optimized")
    again = load_pretrained(str(tmp_path / "ckpt" / "optimized"), "sdar", torch.float32)
    assert (build_policy(again, config, 1.0).value_head.weight == 0.25).all()


@pytest.mark.parametrize("rank", [2, None])
def test_a_shared_head_is_found_beside_the_adapter_that_a_run_starts_from(tmp_path, rank):
    """Also where the adapter is merged; not beside its base, where another run's head may be."""
    from models.checkpoint import load_pretrained, save_pretrained
    from models.lora import prepare_for_training
    from tests.models.test_checkpoint import state
    from train.policy import build_policy

    heads = {"base": 0.5, "adapter": 0.25}
    for run, value in heads.items():
        head = tmp_path / run / "optimized_value" / VALUE_HEAD_FILE
        head.parent.mkdir(parents=True)
        save_file({VALUE_HEAD: torch.full((1, 64), value)}, head)
    base, adapter = str(tmp_path / "base" / "optimized"), str(tmp_path / "adapter" / "optimized")
    config = rl_config("model.value_shared=true", "training.lora.rank=2")
    save_pretrained(tiny_model(3), state(tiny_model(3)), Path(base))
    model = load_pretrained(base, "sdar", torch.float32)
    prepare_for_training(model, config.training.lora, base, 0)
    assert (build_policy(model, config, 1.0).value_head.weight == heads["base"]).all()
    save_pretrained(model, state(model), Path(adapter))

    again = load_pretrained(adapter, "sdar", torch.float32)
    config.training.lora.rank = rank
    prepare_for_training(again, config.training.lora, adapter, 0)
    assert (again.adapter is None) == (rank is None)
    assert (build_policy(again, config, 1.0).value_head.weight == heads["adapter"]).all()


def test_offloading_twice_loses_nothing(saved_model):
    """A step with several rounds of rollouts offloads before each; on a CPU its storages stand for the GPU's. The policy, which the
    engine samples with, stays."""
    forget_accelerator()
    config = rl_config(f"model.value_base_model={saved_model}")
    accelerator = dist.make_accelerator(config)
    policy = policy_trainer(tiny_model(3), config, accelerator, 1.0)
    value = ValueUpdate(config, dist.value_accelerator(accelerator))
    offload = RolloutOffload(dist.Stopwatch(accelerator), accelerator.device)
    offload.add(value.trainer, "always", keeps_weights=False)
    offload.add(policy, "always", keeps_weights=True)
    before = {name: p.detach().clone() for name, p in value.trainer.module.named_parameters()}
    offload.offload()
    offload.offload()
    assert all(p.untyped_storage().nbytes() == 0 for p in value.trainer.module.parameters())
    assert all(p.untyped_storage().nbytes() > 0 for p in policy.module.parameters())
    with pytest.raises(AssertionError):
        value.trainer.outputs([], 1)
    offload.reload()
    offload.reload()
    forget_accelerator()
    assert all(torch.equal(p, before[name]) for name, p in value.trainer.module.named_parameters())


@pytest.mark.parametrize("family", ["sdar", "dream"])
def test_advantages_are_over_all_rows_however_few_are_trained(rollouts_of, family):
    """Returns and values run through every step of a response; a draw of its rows leaves them as they are."""
    found = {}
    for max_rows in ("null", "2"):
        forget_accelerator()
        settings = [f"rollout.max_token={MAX_TOKENS[family]}", "model.value_shared=true"]
        config = rl_config(*settings, f"training.max_rows_per_response={max_rows}", family=family)
        model = tiny_model(3, family)
        trainer = policy_trainer(model, config, dist.make_accelerator(config), 1.0)
        with torch.no_grad():
            trainer.module.value_head.weight.fill_(0.05)
        update = PolicyUpdate(trainer, config, model.fill_id, value=SharedValueUpdate(trainer, config))
        found[max_rows] = update(rollouts_of(family), 1)
    forget_accelerator()
    assert found["2"]["train/num_predictions"] < found["null"]["train/num_predictions"]
    for name in ("value/mean", "value/return", "value/explained_variance"):
        assert found["2"][name] == pytest.approx(found["null"][name], rel=1e-6)


def test_returns_of_a_canvas_by_hand():
    """Steps are those of the whole response, and what is behind the stop or was never revealed takes no part."""
    layout = Layout("full", rl_config("training.gam=0.5", "training.lam=1.0", family="llada").training)
    rollout = ScoredRollout("t", 0, [1, 2], [3, 4, 5, 6, 7], [4, 2, 2, 5, 0], [0.0] * 5, [0.0] * 5, 3, "stop", 5, 0, 2, reward=1.0)
    response = layout.sampled(rollout, 0)
    returns, advantages = token_returns(
        [rollout], [response], np.array([0.1, 0.2, 0.4, 9.0, 9.0]), predictions([0, 0, 0], [0, 1, 2]), np.array([0, 5]), layout
    )
    # Step 2 reveals tokens 1 and 2, step 4 token 0, the last one that is trained: it has the reward.
    assert returns == pytest.approx([1.0, 0.5, 0.5, 0, 0])
    assert advantages == pytest.approx([0.9, 0.5 - 0.2, 0.5 - 0.4, 0, 0])


def test_token_rewards_of_a_canvas_that_was_cut():
    layout = Layout("full", rl_config("training.gam=1.0", "training.lam=1.0", "training.max_gen_length=2", family="llada").training)
    rollout = ScoredRollout("t", 0, [1, 2], [3, 4, 5, 6], [2, 1, 3, 4], [0.0] * 4, [0.0] * 4, 3, "stop", 4, 0, 2)
    rollout.token_rewards, rollout.outcome = [0.5, 0.25, 8.0, 8.0], 1.0
    response = layout.sampled(rollout, 0)
    p, starts = predictions([0, 0], [0, 1]), np.array([0, 2])
    returns, _ = token_returns([rollout], [response], np.zeros(2), p, starts, layout)
    assert returns == pytest.approx([0.5 + 1.0, 0.25 + 0.5 + 1.0]), "the outcome falls on the last step that is trained"
