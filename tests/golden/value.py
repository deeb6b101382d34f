"""value/: old and new values, returns, advantages, clipped value loss and its gradient, reproduced from packed traces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.attention import dense_attention
from models.checkpoint import piece_view
from models.value import VALUE_HEAD, ValueModel, load_value_model
from tests.golden.objective import GRADIENT, LOSS, Case, select_row, slices_of
from tests.golden.result import SetResult
from train.documents import Document, number
from train.packing import build_pack
from train.returns import outcome_rewards, response_times, step_returns
from train.traces import lay_out
from train.value import value_loss

VALUE = 1e-4
"""Absolute, of values, returns and advantages."""


def values_of(model: ValueModel, documents: list[Document], mask_id: int) -> Tensor:
    pack = build_pack(documents, mask_id)
    values = model(pack.input_ids, pack.positions, dense_attention(pack.token_ids), pack.rows)
    return torch.zeros(len(values)).index_copy(0, pack.prediction, values)


class ValueChecker:
    def __init__(self, folder: Path) -> None:
        self.pretrained, self.new = load_value_model(str(folder / "value"), "sdar", torch.float32)
        _, self.old = load_value_model(str(folder / "old_value"), "sdar", torch.float32)

    def check(self, case: Case, path: str) -> SetResult:
        """`max_error` is the worst error as a share of its own tolerance."""
        training, tensors, mask_id = case.training, case.tensors, case.meta["mask_id"]
        responses = case.responses()
        documents = slices_of(case)
        predictions = number(documents)
        with torch.no_grad():
            old = values_of(self.old, documents, mask_id)
        worst = 0.0
        length = len(responses[0].response_ids)
        returns, advantages, old_values = (np.zeros((len(responses), length)) for _ in range(3))
        old_values[predictions.response, predictions.offset] = old
        for index, response in enumerate(responses):
            # Trainable: real tokens, and the first post_num pads (none where post_num is null).
            is_pad = response.is_pad
            trained = ~is_pad | (is_pad & (is_pad.cumsum() <= (training.post_num or 0)))
            times = response_times(lay_out(response, training.block_size), response.step_map, trained, training.shrink)
            reward = case.rollouts[index]["reward"]
            if isinstance(reward, list):
                rewards = np.array(reward + [max(reward) + 1] * (length - len(reward)))
            else:
                rewards = outcome_rewards(reward, times)
            returns[index], advantages[index] = step_returns(rewards, old_values[index], times, training.gam, training.lam)
            error = np.abs(returns[index] - tensors["returns"][index].numpy())[trained].max()
            error = max(error, np.abs(advantages[index] - tensors["advantages"][index].numpy())[trained].max())
            worst = max(worst, float(error) / VALUE)
        self.new.decoder.embed.padding_idx = case.meta["pad_id"]
        self.new.zero_grad(set_to_none=False)
        rows = [(d.response, int(k)) for d in documents for k in np.unique(d.trace.rank)]
        theirs = tensors["row_loss"].double()
        if len(rows) != len(theirs):
            return SetResult(path, "FAIL", len(rows), float("inf"), 1.0, [f"{len(rows)} rows, the set has {len(theirs)}"])
        losses = []
        for index, (response, k) in enumerate(rows):
            document = select_row(documents, response, k)
            offset = number([document]).offset
            values = values_of(self.new, [document], mask_id)
            order = np.argsort(offset)
            positions = np.sort(offset) + len(case.rollouts[response]["prompt_ids"])
            if not np.array_equal(tensors["p_mask"][index].numpy().nonzero()[0], positions):
                return SetResult(path, "FAIL", len(rows), float("inf"), 1.0, [f"row {index} trains other tokens"])
            worst = max(worst, float((values.detach()[order] - tensors["new_values_rows"][index][positions]).abs().max()) / VALUE)
            targets, before = (torch.tensor(x[response, offset], dtype=torch.float32) for x in (returns, old_values))
            loss = value_loss(values, before, targets, training.eps).sum() / length
            loss.backward()
            losses.append(loss.item())
        ours, scale = torch.tensor(losses, dtype=torch.float64), float(theirs.abs().sum())
        worst = max(
            worst,
            float((ours - theirs).abs().max()) / (LOSS * scale),
            abs(float(ours.sum() - tensors["loss_sum"])) / (LOSS * scale),
        )
        worst = max(worst, abs(float(ours.mean() - tensors["loss_mean"])) / (LOSS * float(theirs.abs().mean())))
        worst = max(worst, *self.gradient_errors(tensors))
        self.new.decoder.embed.padding_idx = None
        return SetResult(path, "PASS" if worst <= 1 else "FAIL", len(rows), worst, 1.0, [])

    def gradient_errors(self, tensors: dict[str, Tensor]) -> list[float]:
        gradients = {name: p.grad for name, p in self.new.decoder.named_parameters()}
        pieces = [p for p in self.pretrained.family.pieces(self.new.decoder.config) if p.parameter in gradients]
        ours = {piece.published: piece_view(gradients, piece) for piece in pieces} | {VALUE_HEAD: self.new.head.weight.grad}
        errors = []
        for name, gradient in ours.items():
            for kind, value in [("grad_sum", gradient), ("grad_l2", gradient.norm())]:
                if (recorded := tensors.get(f"{kind}.{name}")) is not None:
                    errors.append(float((value - recorded).abs().max() / (GRADIENT * recorded.abs().max() + 1e-6)))
        return errors


def check(folder: Path, name: str) -> list[SetResult]:
    checker = ValueChecker(folder)
    return [checker.check(Case.read(file), f"{name}/{file.stem}") for file in sorted(folder.glob("*.json"))]
