"""Records of supervised finetuning -> responses as training sees them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import numpy as np

from common.errors import UserError, warn
from data.sft import SFTRecord, encode_sft, response_end
from models.checkpoint import Pretrained
from reward.registry import REWARDS
from train.layout import Layout, warn_of_repeats
from train.methods import METHODS
from train.traces import Response


def as_response(
    prompt_ids: list[int], response_ids: list[int], step_map: list[int] | None, fill_id: int, layout: Layout
) -> Response:
    """Text as training sees it: cut to `training.max_gen_length` tokens, then filled up (`Layout.filled_length`).

    The fill is trained like any token as far as `training.post_num` allows: a model samples whole blocks, or a canvas, so it has to
    know what stands behind a stop token. Where the response was cut there is no stop token before the fill, and it is not trained.
    `step_map` is for the response and may go on over the fill; what it leaves open is revealed one step behind everything else.
    """
    max_response = layout.training.max_gen_length
    given = None if step_map is None else list(step_map)
    is_cut = len(response_ids) > max_response
    if is_cut:
        response_ids, given = response_ids[:max_response], None if given is None else given[:max_response]
    length = layout.filled_length(len(prompt_ids), len(response_ids))
    is_pad = np.arange(length) >= len(response_ids)
    steps = None
    if given is not None:
        assert len(response_ids) <= len(given) <= length, "the caller has compared the lengths"
        steps = np.asarray(given + [max(given, default=0) + 1] * (length - len(given)), dtype=np.int64)
    ids = np.asarray(response_ids + [fill_id] * (length - len(response_ids)), dtype=np.int64)
    num_trained = len(response_ids) if is_cut else length
    return Response(np.asarray(prompt_ids, dtype=np.int64), ids, num_trained, steps, is_pad)


def as_training(record: SFTRecord, prompt_ids: list[int], response_ids: list[int], fill_id: int, layout: Layout) -> Response:
    """One record, encoded, as a response. Raises UserError where its step map is not of its tokens."""
    if record.response_ids is not None:
        # What is not given was never revealed: a mask at every step, as behind the last block of a canvas that stopped early.
        num_fill = layout.filled_length(len(prompt_ids), len(response_ids)) - len(response_ids)
        given = None if record.step_map is None else [*record.step_map, *[0] * num_fill]
        return layout.sampled(replace(record, response_ids=[*response_ids, *[fill_id] * num_fill], step_map=given), fill_id)
    steps = record.step_map
    if steps is not None:
        whole = layout.filled_length(len(prompt_ids), len(response_ids))
        if not len(response_ids) - 1 <= len(steps) <= whole:
            filled, setting = ("canvas", "max_gen_length") if layout.is_canvas else ("last block", "block_size")
            raise UserError(
                f"record {record.id}: step_map has {len(steps)} entries, but the response has {len(response_ids)} tokens with its "
                f"end, {whole} with the fill of its {filled}: it was made with another tokenizer or training.{setting}"
            )
        if len(steps) < len(response_ids):  # the end token comes behind everything that was recorded
            steps = [*steps, max(steps, default=0) + 1]
    return as_response(prompt_ids, response_ids, steps, fill_id, layout)


def check_targets(record: SFTRecord, response: Response, model: Pretrained, is_forbidden: np.ndarray, follows_steps: bool) -> None:
    """Raises UserError where `response` trains a token that is never sampled: its probability is 0, and the loss would be infinite.

    is_forbidden: bool [V]. follows_steps: what the step map says was never revealed is not trained.
    """
    is_target = np.arange(len(response.response_ids)) < response.num_trained
    if response.is_pad is not None:
        is_target &= ~response.is_pad
    if follows_steps and response.step_map is not None:
        is_target &= response.step_map > 0
    wrong = response.response_ids[is_target & is_forbidden[response.response_ids]]
    if len(wrong):
        what = "the mask token" if wrong[0] == model.mask_id else "beyond the tokenizer"
        raise UserError(
            f"record {record.id}: its response holds token id {wrong[0]}, {what}, which is never sampled and cannot be learnt: "
            "take it out, or drop the record"
        )


def build_responses(config: Any, model: Pretrained, records: list[SFTRecord], source: str, tell: bool) -> list[Response]:
    """The responses that are trained on. Longer prompts than training.max_prompt_len are dropped, longer responses than
    training.max_gen_length cut; `tell`: print how many. Raises UserError where nothing is left, naming the data `source`."""
    training, is_chat = config.training, REWARDS.get(config.dataset.data_type).chat
    layout = Layout(model.family.attention, training)
    use_template = config.dataset.use_chat_template
    limits = f"training.max_prompt_len={training.max_prompt_len}", f"training.max_gen_length={training.max_gen_length}"
    responses, num_dropped, num_cut, fill_id = [], 0, 0, model.fill_id
    is_forbidden = np.zeros(model.decoder.config.vocab_size, bool)
    is_forbidden[model.forbidden_ids] = True
    follows_steps = METHODS.get(training.method).trace == "trace"
    for record in records:
        prompt_ids, response_ids = encode_sft(record, model.tokenizer, model.family.chat_style, is_chat, use_template)
        if len(prompt_ids) > training.max_prompt_len:
            num_dropped += 1
            continue
        highest = max([*prompt_ids, *response_ids], default=0)
        if highest >= model.decoder.config.vocab_size:
            raise UserError(f"record {record.id}: token id {highest} is beyond the model's {model.decoder.config.vocab_size}")
        num_cut += len(response_ids) > training.max_gen_length
        responses.append(as_training(record, prompt_ids, response_ids, fill_id, layout))
        check_targets(record, responses[-1], model, is_forbidden, follows_steps)
    if tell and num_dropped:
        print(f"{source}: {num_dropped} of {len(records)} records dropped: prompt longer than {limits[0]}")
    if tell and num_cut:
        print(f"{source}: {num_cut} of {len(records)} responses cut to {limits[1]}")
    if not responses:
        raise UserError(f"{source}: every prompt is longer than {limits[0]}: raise it")
    return responses


def warn_of_end(config: Any, model: Pretrained) -> None:
    """Warn where what ends the responses would not end an answer when the model is sampled from."""
    end = response_end(model.tokenizer, model.family.chat_style, REWARDS.get(config.dataset.data_type).chat)
    stops = {*model.eos_ids, *(model.tokenizer.get_vocab().get(token) for token in config.rollout.stop_token_list)}
    if end not in stops:
        name = "no token, as the tokenizer has none" if end is None else repr(model.tokenizer.convert_ids_to_tokens(end))
        warn(f"responses are ended with {name}, which does not end an answer in sampling: name one in rollout.stop_token_list")


def warn_of_cuts(responses: list[Response], layout: Layout) -> None:
    """Warn where the token budget cuts the longest document into many parts: each of them carries the clean text before it."""
    training = layout.training
    longest = max(responses, key=lambda r: len(r.prompt_ids) + len(r.response_ids))
    document = layout.document(0, longest, np.random.default_rng(training.seed))
    if document is None:
        return
    warn_of_repeats(document, training.max_tokens_per_microbatch)


def fingerprint(responses: list[Response]) -> str:
    """Of the data and of what of it is trained, so that a run does not go on with another."""
    digest = hashlib.blake2b(digest_size=8)
    for r in responses:
        steps, pads = ([] if x is None else x for x in (r.step_map, r.is_pad))
        for values in (r.prompt_ids, r.response_ids, steps, [r.num_trained], pads):
            digest.update(json.dumps(np.asarray(values).tolist()).encode())
    return f"{len(responses)}:{digest.hexdigest()}"
