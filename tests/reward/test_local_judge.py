
import pytest

from common.errors import UserError
from common.records import Task
from reward.judge_client import JudgeRequest, Sampling
from reward.judge_prompts import GradingPrompt
from reward.scoring import Scorer
from tests.reward.judge_run import Letters, make_config, replies_of, requests, rollout

TASKS = {"a": Task("a", "which?", "12"), "b": Task("b", "who?", "7")}


@pytest.fixture(scope="module")
def tiny_judge(tmp_path_factory):
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("judge")
    letters = [chr(n) for n in range(32, 127)]
    vocabulary = {c: n for n, c in enumerate(["?", "</s>", "\n", *(c for c in letters if c != "?")])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(path)
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    config = LlamaConfig(vocab_size=len(letters) + 2, max_position_embeddings=4096, eos_token_id=1, pad_token_id=None, **shape)
    LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


def test_local_judge_is_independent_of_the_batch(tiny_judge):
    from reward.local_judge import LocalJudge

    asked = [JudgeRequest(GradingPrompt("?", "x" * (5 + 40 * n), "m"), 100 + n) for n in range(4)]
    together = replies_of(LocalJudge(tiny_judge, Sampling(1.0, 12), 2000, batch_size=4), asked)
    alone = LocalJudge(tiny_judge, Sampling(1.0, 12), 2000, batch_size=1)
    assert replies_of(alone, asked) == together and len(set(together.values())) == 4
    again = [JudgeRequest(asked[0].prompt, 7), asked[0], asked[0]]
    replies = replies_of(alone, again)
    assert replies[1] == replies[2] == together[0] != replies[0]
    greedy = replies_of(LocalJudge(tiny_judge, Sampling(0.0, 12), 2000, batch_size=2), again)
    assert len(set(greedy.values())) == 1
    with pytest.raises(UserError, match="rollout.reward_model.max_model_len.*tokens"):
        replies_of(LocalJudge(tiny_judge, Sampling(1.0, 12), 300), asked)
    with pytest.raises(UserError, match="process_reward_model.*no/such"):
        replies_of(LocalJudge("no/such/place", Sampling(1.0, 12), 300), asked)


def test_local_judge_is_not_sharded_with_the_trainer(tiny_judge):
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_zero3_enabled, unset_hf_deepspeed_config

    from reward.local_judge import LocalJudge

    alone = replies_of(LocalJudge(tiny_judge, Sampling(1.0, 5), 2000), requests(2))
    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    try:
        assert replies_of(LocalJudge(tiny_judge, Sampling(1.0, 5), 2000), requests(2)) == alone
        assert is_deepspeed_zero3_enabled() and config.is_zero3()
    finally:
        unset_hf_deepspeed_config()


def test_keyed_sampling_follows_the_distribution():
    import torch

    from reward.local_judge import _KeyedSampling

    logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).repeat(4000, 1)
    chosen = _KeyedSampling(range(4000), 0.7, 3)(torch.zeros(4000, 5, dtype=torch.long), logits).argmax(1)
    share = torch.bincount(chosen, minlength=4) / 4000
    assert torch.allclose(share, (logits[0] / 0.7).softmax(0), atol=0.03)


def test_local_judge_in_the_reward(tiny_judge, tmp_path):
    config = make_config(str(tmp_path), None, k_sample=2)
    config.model.process_reward_model = tiny_judge
    config.rollout.reward_model.max_generation_token = 6
    with Scorer(config, TASKS, Letters()) as scorer:  # a random model: hardly a verdict, but every way is gone
        scored = scorer.score([rollout("a", 0, "12"), rollout("a", 1, "13")])
        assert [s.correct for s in scored] == [True, False] and all(len(s.token_rewards) == 3 for s in scored)
        metrics = scorer.metrics()
        assert metrics["judge/num_judgements"] == 4 and 0 <= metrics["judge/unparsable_share"] <= 1
        scorer.score([rollout("a", 0, "12")])
        assert scorer.metrics()["judge/cache_hit_share"] == 1


