"""What the ranks of test_engine_weights run."""

from __future__ import annotations

from typing import Any

import deepspeed.runtime.zero
import torch

from common import dist
from common.records import Rollout
from sample.block import BlockEngine
from sample.engine import SamplingSettings, build_engine
from tests.train.steps import STOP_IDS, forget_accelerator, requests_of_every_remainder, rl_config, scored, tiny_model, weights
from train.engine_weights import EngineWeights
from train.policy import policy_trainer
from train.rl import PolicyUpdate


def steps(modes: dict[str, tuple[list[str], bool]]) -> dict[str, list[dict[str, Any]]]:
    """By name: overrides of the config, and whether the head is tied to the embedding. Three steps of each."""
    return {name: steps_of(*arguments) for name, arguments in modes.items()}


def steps_of(overrides: list[str], tied: bool) -> list[dict[str, Any]]:
    forget_accelerator()
    config = rl_config(*overrides)
    accelerator = dist.make_accelerator(config)
    model = tiny_model(7, tie_word_embeddings=tied)
    trainer = policy_trainer(model, config, accelerator, 1.0)
    update, engine_weights = PolicyUpdate(trainer, config, model.fill_id), EngineWeights(accelerator, model)
    decoder = engine_weights.decoder
    paged, eager = build_engine(decoder, model.family, 4, "triton"), BlockEngine(decoder, model.family, 4)
    settings = SamplingSettings(
        max_tokens=9, mask_id=model.mask_id, stop_ids=STOP_IDS, forbidden_ids=tuple(model.forbidden_ids), threshold=0.4,
        strategy="low_confidence_dynamic",
    )  # fmt: skip
    requests = requests_of_every_remainder(4, seed=8, num_samples=3)
    records = []
    for step in range(1, 4):
        with gathered_sizes() as sizes:
            engine_weights.refresh(trainer.num_steps)
            engine_weights.refresh(trainer.num_steps)  # the same version: nothing to do
        model.decoder, whole = decoder, model.decoder
        engine_copy, model.decoder = weights(model), whole
        # A rank of its own number of requests: no forward of it waits for another rank.
        own = requests[accelerator.process_index :]
        found, expected = ([plain(r) for r in engine.generate(own, settings, step)] for engine in (paged, eager))
        paged.release()
        rollouts = scored([r for share in dist.gather_objects(accelerator, paged.generate(requests, settings)) for r in share][:15])
        metrics = update(rollouts, step)
        records.append(
            {
                "paged": found,
                "eager": expected,
                "weights": engine_copy,
                "addresses": [p.data_ptr() for p in decoder.parameters()],
                "held": paged.captured_over,
                "gathered": sizes,
                "largest_part": max(sum(p.numel() for p in part.parameters()) for part in (decoder.embed, *decoder.layers)),
                "gap": metrics["gap/logprob_max"],
                "is_the_trainers": decoder is model.decoder,
            }
        )
    return records


def plain(rollout: Rollout) -> dict[str, Any]:
    return {name: getattr(rollout, name) for name in ("task_id", "sample", "response_ids", "step_map", "logprobs")}


class gathered_sizes:
    """Inside, every `GatheredParameters` notes how many parameters it makes whole."""

    def __enter__(self) -> list[int]:
        sizes: list[int] = []
        self.original = original = deepspeed.runtime.zero.GatheredParameters

        class Noted(original):  # type: ignore[misc, valid-type]
            def __init__(self, params: list[torch.nn.Parameter], *arguments: Any, **options: Any) -> None:
                sizes.append(sum(p.ds_numel for p in {id(p): p for p in params}.values()))
                super().__init__(params, *arguments, **options)

        deepspeed.runtime.zero.GatheredParameters = Noted
        return sizes

    def __exit__(self, *error: object) -> None:
        deepspeed.runtime.zero.GatheredParameters = self.original
