"""objective/<family>: the reference's RL rows, log-probs, losses, gradients and AdamW steps, reproduced from packed traces.

One set per case. What is compared: for every row what it hides and trains, the log-probs of both policies there and its loss; the
sum of gradients; for the multi-step case the losses, gradient norms and final weights.

Cases whose name starts with `optional_` describe the reference's own grid and left padding. Those of block attention are not ours.
Full attention: pads that the reference hides are left out; pads that it lets the model see are given to ours as prompt tokens.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Iterator

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from models.checkpoint import Pretrained, load_pretrained, piece_view
from tests.golden.result import SetResult
from train.documents import Document, build_document, number
from train.layout import Layout
from train.methods import METHODS
from train.objectives import CLAMP, OBJECTIVES, ObjectiveInput, kl_weights, token_weights
from train.packing import build_pack
from train.policy import Policy
from train.traces import Response, Trace, limit_pads

LOGPROB, LOSS, GRADIENT, WEIGHT = 1e-4, 1e-5, 1e-4, 1e-4
"""Tolerances of the golden README: absolute; of the sum of |row losses|; of a tensor's largest entry (+1e-6); absolute."""


@dataclass
class Case:
    name: str
    settings: dict[str, Any]
    rollouts: list[dict[str, Any]]
    meta: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, file: Path) -> Case:
        meta = json.loads(file.read_text())
        with safe_open(file.with_suffix(".safetensors"), "pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}
        return cls(meta["name"], meta["settings"], meta["rollouts"], meta, tensors)

    @property
    def is_canvas(self) -> bool:
        """Whether its rows are whole canvases (full attention)."""
        return "input_ids" in self.tensors

    @property
    def method(self) -> str:
        return self.settings.get("method", "TraceRL")

    @property
    def training(self) -> SimpleNamespace:
        """The case's settings under the names of the config's `training` section."""
        masks = {"mask_times_per_sample": 1, "mask_ratio": "per_block"}
        return SimpleNamespace(**{"eps_high": None, "importance_cap": None, "method": "TraceRL", **masks, **self.settings})

    @property
    def has_seen_pads(self) -> bool:
        """Whether prompts are padded on the left with tokens that the model sees."""
        return "key_visible" not in self.tensors and len({len(r["prompt_ids"]) for r in self.rollouts}) > 1

    def prompt(self, rollout: dict[str, Any]) -> list[int]:
        pads = self.meta["prompt_len"] - len(rollout["prompt_ids"]) if self.has_seen_pads else 0
        return [self.meta["pad_id"]] * pads + rollout["prompt_ids"]

    def responses(self) -> list[Response]:
        """Padded to the longest response with pads, cut at max_gen_length; a shorter step map is extended by its maximum + 1."""
        length = max(len(r["response_ids"]) for r in self.rollouts)
        kept = slice(self.settings.get("max_gen_length"))
        # Some sets count steps from 0, which is "never revealed" here; only their order matters.
        shift = 1 - min((s for r in self.rollouts for s in r.get("step_map") or [1]), default=1)
        out = []
        for r in self.rollouts:
            missing = length - len(r["response_ids"])
            ids = np.array(r["response_ids"] + [self.meta["pad_id"]] * missing)[kept]
            steps = None
            if given := r.get("step_map"):
                steps = (np.array(given + [max(given) + 1] * (length - len(given))) + max(shift, 0))[kept]
            is_pad = np.arange(len(ids)) >= len(r["response_ids"])
            out.append(Response(np.array(self.prompt(r)), ids, len(ids), steps, is_pad))
        return out


def recorded_masks(case: Case, prompt_length: int) -> list[list[np.ndarray]]:
    """Random masks cannot be drawn again: per rollout, the rows that the set recorded as hidden positions [L], in row order."""
    if case.is_canvas:
        prompts = case.tensors["labels"][:, :prompt_length].numpy()
        clean, noisy = (case.tensors[name][:, prompt_length:].numpy() for name in ("labels", "input_ids"))
    else:
        extended = case.tensors["extended_input_ids"].numpy()
        length = (extended.shape[1] - prompt_length) // 2
        prompts = extended[:, :prompt_length]
        clean, noisy = extended[:, prompt_length : prompt_length + length], extended[:, prompt_length + length :]
    rows: list[list[np.ndarray]] = [[] for _ in case.rollouts]
    for ids, prompt, hidden in zip(clean, prompts, noisy == case.meta["mask_id"], strict=True):
        owners = [
            i
            for i, (rollout, response) in enumerate(zip(case.rollouts, case.responses(), strict=True))
            if np.array_equal(response.response_ids, ids) and np.array_equal(rollout["prompt_ids"], prompt)
        ]
        # Equal rollouts would be ambiguous; the one with the fewest rows so far takes it.
        rows[min(owners, key=lambda i: len(rows[i]))].append(hidden)
    return rows


def masked_trace(response: Response, layout: Layout, masks: list[np.ndarray]) -> Trace:
    """The slices of given masks, one rank each."""
    grid, training = layout.grid(response), layout.training
    hidden = np.concatenate([grid.lay(mask, False) for mask in masks])
    num_blocks = len(grid.is_response)
    rank = np.repeat(np.arange(len(masks)), num_blocks)
    block = np.tile(np.arange(num_blocks), len(masks))
    predicted = limit_pads(hidden & grid.trained[block], rank, grid.is_pad[block], training.post_num)
    return Trace(block + grid.first_block, hidden, predicted, rank).nonempty()


def slices_of(case: Case) -> list[Document]:
    """The documents of a case, one per rollout that trains something."""
    layout = Layout("full" if case.is_canvas else "block", case.training)
    masks = recorded_masks(case, len(case.rollouts[0]["prompt_ids"])) if case.method != "TraceRL" else None
    documents = []
    for index, response in enumerate(case.responses()):
        if masks is None:
            document = layout.document(index, response, np.random.default_rng(0))
        else:
            response = layout.prepared(response)
            document = build_document(index, response, masked_trace(response, layout, masks[index]), layout.block_size(response))
        if document is not None:
            documents.append(document)
    return documents


class ObjectiveChecker:
    """The objective of one folder of cases."""

    def __init__(self, folder: Path, family: str) -> None:
        self.new = load_pretrained(str(folder / "policy"), family, torch.float32)
        self.old = load_pretrained(str(folder / "old_policy"), family, torch.float32)
        self.logit_shift = self.new.family.logit_shift
        self.has_padding_index = family in PADDING_INDEX

    def policy(self, model: Pretrained) -> Policy:
        # The sets keep the mask id in the softmax, so nothing is forbidden.
        return Policy(model.decoder, forbidden_ids=[])

    def rows(self, case: Case, documents: list[Document]) -> list[tuple[int, int]]:
        """The rows (response, k) in the reference's order: rollout by rollout; random masks of block models, all first ones and
        then all second ones."""
        rows = [(d.response, int(k)) for d in documents for k in np.unique(d.trace.rank)]
        return rows if case.method == "TraceRL" or case.is_canvas else sorted(rows, key=lambda row: row[1])


def select_row(documents: list[Document], response: int, k: int) -> Document:
    document = next(d for d in documents if d.response == response)
    return document.select(document.trace.rank == k)


def objective_input(case: Case, documents: list[Document], old: Policy, new: Policy, shift: int) -> tuple[ObjectiveInput, Any]:
    """Log-probs of both policies for every prediction of `documents` (one batch), weighted as the reference does."""
    predictions = number(documents)
    pack = build_pack(documents, case.meta["mask_id"], logit_shift=shift)
    with torch.no_grad():
        old_logprobs, _ = old(pack)
    logprobs, _ = new(pack)
    length, attention = max(len(r["response_ids"]) for r in case.rollouts), "full" if case.is_canvas else "block"
    loss = token_weights(predictions, "reference", length, length, attention)
    weights, of_kl = (
        torch.as_tensor(values, dtype=torch.float32)[pack.prediction]
        for values in (loss, kl_weights(predictions, loss, "reference", attention))
    )
    advantages = torch.tensor([r["reward"] for r in case.rollouts])[torch.as_tensor(predictions.response)][pack.prediction]
    x = ObjectiveInput(logprobs, old_logprobs, old_logprobs, old_logprobs, advantages, weights, of_kl)
    return x, predictions


def gradient_errors(model: Pretrained, tensors: dict[str, Tensor]) -> Iterator[float]:
    """Error of every recorded gradient (or gradient norm) as a share of its tolerance."""
    gradients = {name: p.grad for name, p in model.decoder.named_parameters()}
    for piece in model.family.pieces(model.decoder.config):
        ours = piece_view(gradients, piece)
        if f"grad_sum.{piece.published}" in tensors:
            theirs = tensors[f"grad_sum.{piece.published}"]
            yield float((ours - theirs).abs().max() / (GRADIENT * theirs.abs().max() + 1e-6))
        if f"grad_l2.{piece.published}" in tensors:
            theirs = tensors[f"grad_l2.{piece.published}"].float()
            yield float((ours.norm() - theirs).abs() / (GRADIENT * theirs.abs() + 1e-6))


def check_case(checker: ObjectiveChecker, case: Case, path: str) -> SetResult:
    """Row by row, then all rows as one batch. `max_error` is the worst error as a share of its own tolerance."""
    new, old = checker.policy(checker.new), checker.policy(checker.old)
    checker.new.decoder.embed.padding_idx = case.meta["pad_id"] if checker.has_padding_index else None
    new.zero_grad(set_to_none=False)
    clipped, tensors, notes = OBJECTIVES.get("clipped"), case.tensors, []
    documents = slices_of(case)
    rows = checker.rows(case, documents)
    if case.name.startswith("optional_leftpad"):
        pads = sum(case.meta["prompt_len"] - len(r["prompt_ids"]) for r in case.rollouts)
        seen = "seen by the model there, are prompt tokens here" if case.has_seen_pads else "hidden there, are left out here"
        notes.append(f"{pads} pads on the left of {len(case.rollouts)} prompts, {seen}")
    theirs = tensors["row_loss"].double()
    worst = 0.0
    if len(rows) != len(theirs):
        return SetResult(path, "FAIL", len(rows), math.inf, 1.0, [f"{len(rows)} rows, the set has {len(theirs)}"])
    row_losses, num_clamped = [], 0
    for index, (response, k) in enumerate(rows):
        row = select_row(documents, response, k)
        x, predictions = objective_input(case, [row], old, new, checker.logit_shift)
        columns = torch.as_tensor(predictions.offset + case.meta["prompt_len"])  # prompts stand at the right of their part
        order = columns.argsort()
        columns = columns[order]
        if not torch.equal(tensors["p_mask"][index].nonzero()[:, 0], columns):
            return SetResult(path, "FAIL", len(rows), math.inf, 1.0, [f"row {index} trains other tokens"])
        if case.is_canvas:
            hidden = tensors["input_ids"][index, case.meta["prompt_len"] :] == case.meta["mask_id"]
            if not np.array_equal(row.trace.hidden[0, row.prompt_length :], hidden.numpy()):
                return SetResult(path, "FAIL", len(rows), math.inf, 1.0, [f"row {index} hides other tokens"])
        for ours, name in [(x.logprobs, "logp_new"), (x.old_logprobs, "logp_old")]:
            if name in tensors:
                recorded = tensors[name][index, columns - checker.logit_shift]
                worst = max(worst, float((ours.detach()[order] - recorded).abs().max()) / LOGPROB)
        num_clamped += int(((x.logprobs - x.old_logprobs).abs() > CLAMP).sum())
        loss = clipped(x, case.training).loss
        loss.backward()  # the set's gradient is that of the sum of row losses
        row_losses.append(loss.item())
    ours = torch.tensor(row_losses, dtype=torch.float64)
    scale = float(theirs.abs().sum())
    worst = max(
        worst, float((ours - theirs).abs().max()) / (LOSS * scale), abs(float(ours.sum() - tensors["loss_sum"])) / (LOSS * scale)
    )
    worst = max([worst, *gradient_errors(checker.new, tensors)])
    new.zero_grad(set_to_none=False)
    # One batch of all rows: global normalisation must give their mean.
    x, _ = objective_input(case, documents, old, new, checker.logit_shift)
    mean_error = abs(float(clipped(x, case.training).loss.detach() - tensors["loss_mean"]))
    worst = max(worst, mean_error / (LOSS * float(theirs.abs().mean())))
    checker.new.decoder.embed.padding_idx = None
    if case.is_canvas and num_clamped:
        notes.append(f"log-ratios beyond {CLAMP:g} are clamped here and not there: {num_clamped} tokens")
    return SetResult(path, "PASS" if worst <= 1 else "FAIL", len(rows), worst, 1.0, notes)


def check_multi_step(checker: ObjectiveChecker, case: Case, path: str) -> SetResult:
    """Real training: rows in order in batches, AdamW, clipping, a cosine learning rate; losses, norms and final weights."""
    settings, optimizer_settings = case.settings, case.meta["optimizer"]
    before = {name: p.detach().clone() for name, p in checker.new.decoder.named_parameters()}
    new, start = checker.policy(checker.new), checker.policy(checker.new)
    documents = slices_of(case)
    rows = checker.rows(case, documents)
    size = settings["batch_size_lm"]
    batches = [rows[i : i + size] for i in range(0, len(rows), size)]
    parts = [[select_row(documents, *row) for row in batch] for batch in batches]
    # The old log-probs are those of the initial weights, computed once.
    with torch.no_grad():
        olds = [objective_input(case, part, start, start, checker.logit_shift)[0].old_logprobs for part in parts]
    optimizer = torch.optim.AdamW(
        new.parameters(),
        lr=optimizer_settings["learning_rate"],
        betas=(optimizer_settings["beta1"], optimizer_settings["beta2"]),
        eps=optimizer_settings["epsilon"],
        weight_decay=optimizer_settings["weight_decay"],
    )
    losses, norms = [], []
    num_updates = len(parts) * settings["num_train_epochs"]
    for update in range(num_updates):
        part, old = parts[update % len(parts)], olds[update % len(parts)]
        rate = optimizer_settings["learning_rate"] * (1 + math.cos(math.pi * update / (num_updates + 1))) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        x, _ = objective_input(case, part, start, new, checker.logit_shift)
        x.old_logprobs = x.kl_logprobs = old
        loss = OBJECTIVES.get("clipped")(x, case.training).loss
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(new.parameters(), settings["max_grad_norm"])))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    tensors, worst = case.tensors, 0.0
    theirs = tensors["step_losses"].double()
    scale = float(theirs.abs().sum())
    worst = max(worst, float((torch.tensor(losses, dtype=torch.float64) - theirs).abs().max()) / (LOSS * scale))
    recorded = tensors["grad_norms_before_clip"].double()
    worst = max(worst, float(((torch.tensor(norms, dtype=torch.float64) - recorded).abs() / recorded).max()) / GRADIENT)
    state = dict(checker.new.decoder.named_parameters())
    for piece in checker.new.family.pieces(checker.new.decoder.config):
        final = tensors.get(f"final.{piece.published}")
        if final is not None:
            worst = max(worst, float((piece_view(state, piece).detach() - final).abs().max()) / WEIGHT)
    with torch.no_grad():
        for name, p in checker.new.decoder.named_parameters():
            p.copy_(before[name])
    return SetResult(path, "PASS" if worst <= 1 else "FAIL", num_updates, worst, 1.0, [])


FAMILIES_SUPPORTED = {"sdar", "llada", "dream"}
PADDING_INDEX = {"sdar", "dream"}
"""Families whose embedding gives the pad id no gradient in the reference."""


def check(folder: Path, name: str, family: str) -> list[SetResult]:
    """All cases of `folder` (which holds policy/ and old_policy/); `name` is its path under the golden directory."""
    checker = ObjectiveChecker(folder, family)
    results = []
    for file in sorted(folder.glob("*.json")):
        case, path = Case.read(file), f"{name}/{file.stem}"
        if case.name.startswith("optional_") and not case.is_canvas:
            results.append(SetResult(path, "UNSUPPORTED", 0, 0.0, 0.0, ["describes the reference's own grid or left padding"]))
        elif case.settings["method"] not in METHODS:
            results.append(SetResult(path, "UNSUPPORTED", 0, 0.0, 0.0, [f"method {case.settings['method']}"]))
        elif "step_losses" in case.tensors:
            results.append(check_multi_step(checker, case, path))
        else:
            results.append(check_case(checker, case, path))
    return results
