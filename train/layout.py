"""How responses are laid out for training: one place for what a family's attention kind and a method decide.

    block attention    slices are blocks of `training.block_size`, cut on absolute positions, behind the clean text before them
    full attention     one block holds prompt and response: a slice is the whole canvas at one step, and stands alone
    next-token         blocks of one token: the clean sequence under the causal mask

Shapes as in train/traces.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from common.errors import warn
from train.documents import Document, build_document, split_long
from train.methods import METHODS, Method
from train.traces import TRACES, Grid, Response, lay_out, sampled_response


@dataclass(frozen=True)
class Layout:
    """Responses -> documents, for one attention kind under the config's `training` section."""

    attention: Literal["block", "full"]
    """`Family.attention`."""
    training: Any

    @property
    def method(self) -> Method:
        return METHODS.get(self.training.method, "training.method")

    @property
    def is_canvas(self) -> bool:
        """Whether a slice holds prompt and response whole."""
        return self.attention == "full" and self.method.block_size is None

    def block_size(self, response: Response) -> int:
        """Width of the response's slices."""
        if self.is_canvas:
            return max(1, len(response.prompt_ids) + len(response.response_ids))
        return self.method.block_size or self.training.block_size

    def filled_length(self, num_prompt: int, num_response: int) -> int:
        """How many tokens a given text is filled up to, its prompt not counted.

        Block attention: to the end of its last block. Full attention: to the canvas of `training.max_gen_length` tokens that
        sampling would fill, for on a shorter one the model would see where its answer has to end.
        """
        if self.is_canvas:
            return max(num_response, self.training.max_gen_length)
        size = self.method.block_size or self.training.block_size
        return num_response + -(num_prompt + num_response) % size

    def sampled(self, rollout: Any, fill_id: int) -> Response:
        """What training keeps of a rollout, or of an SFT record made from one (`sampled_response`).

        A canvas longer than `training.max_gen_length` is cut, as the reference does: every row costs all of its tokens.
        """
        size = 1 if self.is_canvas else self.method.block_size or self.training.block_size
        return sampled_response(rollout, self.training.max_gen_length, size, fill_id, is_cut=self.is_canvas)

    def prepared(self, response: Response) -> Response:
        """The response with the pad rule of a canvas.

        Block attention: every row trains its first `training.post_num` pads (`limit_pads`). Full attention: the response's first
        `post_num` pads are trained, wherever they are revealed; those behind are context. Random masks hide all context behind the
        trained part.
        """
        if not self.is_canvas:
            return response
        num_trained, post_num = response.num_trained, self.training.post_num
        if response.is_pad is not None and post_num is not None and response.is_pad.sum() > post_num:
            pads = np.flatnonzero(response.is_pad)
            assert pads[0] + len(pads) == len(response.is_pad), "pads stand behind all else"
            num_trained = min(num_trained, int(pads[post_num]))
        return replace(response, num_trained=num_trained, is_pad=None, hides_tail=True)

    def grid(self, response: Response) -> Grid:
        return lay_out(response, self.block_size(response))

    def document(self, index: int, response: Response, generator: np.random.Generator) -> Document | None:
        """The document of one response, `index` in its batch; None where nothing of it is trained.

        generator: of everything that the method draws.
        """
        size = self.block_size(response)
        trace = TRACES.get(self.method.trace)(self.prepared(response), size, self.training, generator)
        return build_document(index, response, trace, size)


MUCH_REPEATED = 2.0
"""Warn where cutting the longest document up multiplies its tokens by more than this."""


def warn_of_repeats(longest: Document, max_tokens: int) -> bool:
    """Warn, and say so, where the token budget cuts the longest document into many parts, each with the clean text before it."""
    parts = split_long(longest, max_tokens)
    repeated = sum(part.num_tokens for part in parts) / longest.num_tokens
    if repeated > MUCH_REPEATED:
        warn(
            f"training.max_tokens_per_microbatch={max_tokens}: the longest document has {longest.num_tokens} tokens and is cut "
            f"into {len(parts)} parts that repeat its text, {repeated:.1f} times its cost: raise it as far as the memory allows"
        )
    return repeated > MUCH_REPEATED
