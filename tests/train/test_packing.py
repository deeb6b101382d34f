"""Packs: brute force against one forward per step, and independence of how documents are cut."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from models.attention import TokenIds, attention_backend, dense_mask, masked_attention
from models.registry import FAMILIES
from models.tiny import build_tiny
from train import packing
from train.documents import Predictions, build_document, number, split_long, split_rows
from train.layout import Layout
from train.methods.tracerl import trace_slices
from train.objectives import kl_weights, token_weights
from train.packing import assign, build_pack, fill, slowest
from train.policy import Policy
from train.traces import Response

TRAINING = SimpleNamespace(shrink=1, post_num=None)


def random_documents(block_size, count=6, seed=0, shrink=1, vocab=25):
    rng = np.random.default_rng(seed)
    documents, responses = [], []
    for index in range(count):
        prompt = int(rng.integers(1, 3 * block_size + 2))
        length = -prompt % block_size + block_size * int(rng.integers(1, 4))
        steps = rng.integers(1, 3 * block_size, length)
        r = Response(rng.integers(0, vocab, prompt), rng.integers(0, vocab, length), int(rng.integers(1, length + 1)), steps)
        responses.append(r)
        trace = trace_slices(r, block_size, SimpleNamespace(shrink=shrink, post_num=None), None)
        documents.append(build_document(index, r, trace, block_size))
    return documents, responses


def documents_of_groups(block_size, count=12, seed=0):
    """Responses of few prompts, in any order; among them prompts that fill whole blocks, that do not, and that fill none."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 25, n) for n in (2 * block_size + 1, 3 * block_size, max(1, block_size - 1), block_size)]
    prompts.append(np.concatenate([prompts[1][:-1], [26]]))  # one that parts from another in its last token
    documents = []
    for index in range(count):
        prompt = prompts[int(rng.integers(len(prompts)))]
        length = -len(prompt) % block_size + block_size * int(rng.integers(1, 4))
        steps = rng.integers(1, 3 * block_size, length)
        r = Response(prompt, rng.integers(0, 25, length), int(rng.integers(1, length + 1)), steps)
        documents.append(build_document(index, r, trace_slices(r, block_size, TRAINING, None), block_size))
    return documents


@pytest.fixture(scope="module")
def tiny():
    return build_tiny(FAMILIES.get("sdar"), seed=3)


def one_forward_per_slice(tiny, documents):
    """The log-probs the slow way: for every slice a forward over all that it may see, under a mask written out by hand."""
    decoder, out = tiny.decoder, []
    for d in documents:
        size = d.block_size
        for row in range(len(d.trace.block)):
            start = int(d.trace.block[row]) * size
            ids = d.ids[: start + size].copy()
            ids[start:][d.trace.hidden[row]] = tiny.mask_id
            n = len(ids)
            mask = torch.zeros(n, n, dtype=torch.bool)
            for q in range(n):
                for k in range(n):
                    mask[q, k] = k // size <= q // size
            hidden = decoder(torch.tensor(ids), torch.arange(n), masked_attention(mask))
            logits = decoder.lm_head(hidden)
            logits[:, tiny.forbidden_ids] = -torch.inf
            log_p = logits.log_softmax(-1)
            for column in np.flatnonzero(d.trace.predicted[row]):
                out.append(log_p[start + column, d.ids[start + column]])
    return torch.stack(out)


@pytest.mark.parametrize("block_size", [1, 2, 4, 8])
def test_packed_logprobs_and_gradients_equal_one_forward_per_step(tiny, block_size):
    documents, _ = random_documents(block_size, seed=block_size, shrink=2 if block_size == 4 else 1)
    number(documents)
    pack = build_pack(documents, tiny.mask_id, round_to=16)
    policy = Policy(tiny.decoder, tiny.forbidden_ids, head_chunk=7)
    weights = torch.randn(len(pack.prediction), generator=torch.Generator().manual_seed(0))

    policy.zero_grad()
    logprobs, entropy = policy(pack)
    (logprobs * weights).sum().backward()
    packed = {name: p.grad.clone() for name, p in policy.named_parameters()}

    policy.zero_grad()
    slow = one_forward_per_slice(tiny, documents)
    (slow * weights).sum().backward()
    assert (logprobs - slow).abs().max() < 1e-5
    for name, p in policy.named_parameters():
        assert (packed[name] - p.grad).abs().max() <= 1e-5 * p.grad.abs().max(), name
    assert (entropy > 0).all()


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("block_size", [1, 4])
def test_a_shared_prompt_changes_nothing_but_the_tokens(tiny, block_size, shift):
    """Log-probs, loss and gradient as without sharing; the pack is shorter by every further copy of a prompt's whole blocks."""
    documents = documents_of_groups(block_size, seed=block_size)
    number(documents)
    policy = Policy(tiny.decoder, tiny.forbidden_ids)
    weights = torch.randn(sum(d.num_predictions for d in documents), generator=torch.Generator().manual_seed(0))
    results = []
    for share in (False, True):
        pack = build_pack(documents, tiny.mask_id, logit_shift=shift, share_prompts=share)
        policy.zero_grad()
        logprobs = torch.zeros(len(weights)).index_copy(0, pack.prediction, policy(pack)[0])
        loss = (logprobs * weights).sum()
        loss.backward()
        results.append((pack, logprobs.detach(), loss.detach(), {name: p.grad.clone() for name, p in policy.named_parameters()}))
    (plain, *_), (shared, *_) = results
    prompts = {d.ids[: d.prompt_length].tobytes(): d.prompt_length // block_size * block_size for d in documents}
    copies = sum(d.prompt_length // block_size * block_size for d in documents)
    assert plain.num_shared == 0 and plain.token_ids.prefix is None
    if block_size > 1:  # prompts that differ in their last token share nothing, though a part of their blocks be the same
        assert shared.num_shared == copies - sum(prompts.values()) > 0
    assert len(plain.input_ids) - len(shared.input_ids) == shared.num_shared
    _, ours, loss, gradients = results[1]
    _, theirs, plain_loss, expected = results[0]
    assert (ours - theirs).abs().max() < 1e-5 and abs(loss - plain_loss) < 1e-5 * abs(plain_loss)
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).abs().max() <= 2e-6 * expected[name].abs().max(), name


@pytest.mark.parametrize("block_size", [1, 4])
def test_a_shared_prompt_is_exact(tiny, block_size, monkeypatch):
    """In float64 (norms too, which are in float32 otherwise) nothing is left of the differences: they were rounding."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    decoder = copy.deepcopy(tiny.decoder).double()
    documents = documents_of_groups(block_size, seed=block_size)
    number(documents)
    size = decoder.config.hidden_size
    weights = torch.randn(sum(d.num_predictions for d in documents), size, generator=torch.Generator().manual_seed(0)).double()
    results = []
    for share in (False, True):
        pack = build_pack(documents, tiny.mask_id, share_prompts=share)
        decoder.zero_grad()
        hidden = decoder(pack.input_ids, pack.positions, attention_backend("dense", pack.token_ids))
        loss = (hidden[pack.rows] * weights[pack.prediction]).sum()
        loss.backward()
        results.append((loss.detach(), {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}))
    (plain_loss, expected), (loss, gradients) = results
    worst = max(float((gradients[n] - expected[n]).abs().max() / expected[n].abs().max()) for n in expected)
    print(f"loss {float(abs(loss - plain_loss)):.1e}, gradient {worst:.1e}")
    assert len(gradients) > 10 and abs(loss - plain_loss) < 1e-12 * abs(plain_loss) and worst < 1e-12


def test_mask_of_a_shared_prompt_by_hand(tiny):
    """Block size 2: a prompt of 3 tokens, of which one block is shared; responses that complete one block and fill another."""
    responses = [Response(np.array([7, 8, 9]), np.array([n, n, n]), 3, np.array([1, 2, 2])) for n in (1, 2)]
    documents = [build_document(i, r, trace_slices(r, 2, TRAINING, None), 2) for i, r in enumerate(responses)]
    number(documents)
    pack = build_pack(documents, 27, share_prompts=True)
    # 0-1 the prefix; 2-3 the first response's clean block, 4-5 and 6-7 its slices; 8-13 the same of the second.
    assert pack.input_ids.tolist() == [7, 8, 9, 1, 9, 27, 27, 27, 9, 2, 9, 27, 27, 27]
    assert pack.positions.tolist() == [0, 1, 2, 3, 2, 3, 4, 5, 2, 3, 2, 3, 4, 5]
    visible = [dense_mask(pack.token_ids)[q].nonzero()[:, 0].tolist() for q in range(14)]
    first = [[0, 1]] * 2 + [[0, 1, 2, 3]] * 2 + [[0, 1, 4, 5]] * 2 + [[0, 1, 2, 3, 6, 7]] * 2
    second = [[0, 1, *(k + 6 for k in own[2:])] for own in first[2:]]
    assert visible == first + second


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_responses_of_a_prompt_go_together(num_ranks):
    """Into the packs that hold their prompt as far as these stay even; what is trained is what was given."""
    rng = np.random.default_rng(0)
    documents = []
    for index in range(48):  # 6 prompts of 64 tokens, 8 responses of 8 blocks each, one step a block
        prompt, n = np.full(64, index % 6), 32
        r = Response(prompt, rng.integers(0, 25, n), n, np.repeat(np.arange(1, 9), 4))
        documents.append(build_document(index, r, trace_slices(r, 4, TRAINING, None), 4))
    number(documents)
    size = documents[0].num_tokens
    assert size == 64 + 28 + 32
    ranks = assign(documents, 6 * (64 + 8 * 60) // 3, num_ranks, share_prompts=True)
    assert {len(packs) for packs in ranks} == {3 // num_ranks}
    packs = [build_pack(own, 27, share_prompts=True) for packs in ranks for own in packs]
    assert [len(pack.input_ids) for pack in packs] == [2 * (64 + 8 * 60)] * 3, "two prompts in each"
    assert sorted(n for pack in packs for n in pack.prediction.tolist()) == list(range(48 * 32))
    assert len(assign(documents, 6 * (64 + 8 * 60) // 3, num_ranks)[0]) > 3 // num_ranks, "without sharing they need more"


@pytest.mark.parametrize("share", [False, True])
def test_nothing_to_pack(share):
    assert assign([], 100, 2, share) == [[], []]


@pytest.mark.parametrize("share", [False, True])
def test_packs_keep_the_budget_when_prompts_are_shared(share):
    documents = documents_of_groups(4, count=40, seed=3)
    number(documents)
    ranks = assign(documents, 150, 2, share)
    assert len({len(packs) for packs in ranks}) == 1
    loads = [len(build_pack(own, 27, share_prompts=share).input_ids) for packs in ranks for own in packs if own]
    assert max(loads) <= 150 and min(loads) > 75
    found = np.concatenate([d.numbers for packs in ranks for own in packs for d in own])
    assert sorted(found) == list(range(sum(d.num_predictions for d in documents)))


def test_cutting_documents_and_rows_changes_no_logprob(tiny):
    documents, _ = random_documents(4, count=5, seed=9)
    predictions = number(documents)
    policy = Policy(tiny.decoder, tiny.forbidden_ids)
    with torch.no_grad():
        pack = build_pack(documents, tiny.mask_id)
        whole = torch.zeros(len(predictions)).index_copy(0, pack.prediction, policy(pack)[0])
        table = torch.zeros(len(predictions))
        seen = torch.zeros(len(predictions))
        for packs in assign(documents, 40, num_ranks=3):
            for own in packs:
                pack = build_pack(own, tiny.mask_id, round_to=8)
                real = pack.prediction >= 0
                table[pack.prediction[real]] = policy(pack)[0][real]
                seen[pack.prediction[real]] += 1
    assert (seen == 1).all()
    assert (table - whole).abs().max() < 1e-5


def test_assign_keeps_the_budget_and_gives_every_rank_as_many_packs():
    documents, _ = random_documents(4, count=23, seed=5)
    number(documents)
    ranks = assign(documents, 64, num_ranks=4)
    assert len({len(r) for r in ranks}) == 1
    for packs in ranks:
        for own in packs:
            assert sum(d.num_tokens for d in own) <= 64 or len(own) == 1 and len(own[0].trace.block) == 1
    slices = sum(len(d.trace.block) for packs in ranks for own in packs for d in own)
    assert slices == sum(len(d.trace.block) for d in documents)


def equal_documents(count, num_blocks):
    """`count` responses of so many blocks of 4, one step each: 8 tokens a block, less the last clean one."""
    out = []
    for index in range(count):
        n = 4 * num_blocks
        r = Response(np.zeros(0, np.int64), np.zeros(n, np.int64), n, np.repeat(np.arange(1, num_blocks + 1), 4))
        out.append(build_document(index, r, trace_slices(r, 4, TRAINING, None), 4))
    return out


@pytest.mark.parametrize(
    "count, num_ranks, micro_batches, makespan", [(8, 8, 1, 1), (16, 8, 1, 2), (36, 8, 2, 5), (7, 8, 1, 1), (9, 1, 3, 9)]
)
def test_tokens_are_spread_evenly_over_ranks(count, num_ranks, micro_batches, makespan):
    """makespan: documents on the fullest rank; a pack has room for four."""
    documents = equal_documents(count, num_blocks=5)
    size = documents[0].num_tokens
    assert size == 4 * 4 + 5 * 4
    ranks = assign(documents, 4 * size, num_ranks)
    assert {len(packs) for packs in ranks} == {micro_batches}
    assert max(sum(len(pack) for pack in packs) for packs in ranks) == makespan
    assert sorted(d.response for packs in ranks for pack in packs for d in pack) == list(range(count))


def documents_of_lengths(lengths, block_size=4, prompt=100, steps_per_block=4, seed=0):
    """Responses to prompts of their own, each block revealed in so many steps at most."""
    rng = np.random.default_rng(seed)
    documents = []
    for index, length in enumerate(lengths):
        steps = rng.integers(1, steps_per_block + 1, length)
        r = Response(rng.integers(0, 25, prompt), rng.integers(0, 25, length), length, steps)
        documents.append(build_document(index, r, trace_slices(r, block_size, TRAINING, None), block_size))
    return documents


def loads(ranks):
    """Tokens by rank and micro-batch."""
    return np.array([[sum(d.num_tokens for d in own) for own in packs] for packs in ranks])


def each_prediction_once(ranks, documents):
    found = np.concatenate([d.numbers for packs in ranks for own in packs for d in own])
    return sorted(found) == list(range(sum(d.num_predictions for d in documents)))


# lengths, ranks; the fullest rank's tokens over the mean of uncut documents, without cuts and with them
UNEVEN = {
    "few long among short": ([5000] * 4 + [400] * 48, 8, 1.22, 1.03),
    "one long among short": ([4000] + [300] * 7, 8, 5.1, 1.9),
    "a single one": ([4000], 2, 2.0, 1.45),
    "three long": ([2000] * 3 + [300] * 5, 8, 2.11, 1.45),
}


@pytest.mark.parametrize("name", UNEVEN)
def test_long_documents_are_cut_where_ranks_would_wait(name):
    lengths, num_ranks, without, most = UNEVEN[name]
    documents = documents_of_lengths(lengths)
    number(documents)
    parts = [part for d in documents for part in split_long(d, 16_384)]
    uncut = loads([(bins := fill(parts, 16_384, num_ranks, False))[rank::num_ranks] for rank in range(num_ranks)])
    mean = uncut.sum() / num_ranks
    ranks = assign(documents, 16_384, num_ranks)
    assert each_prediction_once(ranks, documents)
    found = loads(ranks)
    # Ranks wait for each other in every micro-batch.
    assert slowest(bins, num_ranks, False) == uncut.max(0).sum() and uncut.max(0).sum() / mean == pytest.approx(without, rel=0.02)
    assert found.max(0).sum() / mean <= most
    assert found.max() <= 16_384 and found.shape[1] <= uncut.shape[1]
    assert max(sum(d.response == i for packs in ranks for own in packs for d in own) for i in range(len(lengths))) <= num_ranks + 1


def test_cuts_do_not_hang_on_the_last_digit(monkeypatch):
    """Processors differ in it, and every rank computes the cuts by itself."""
    documents, geomspace, cut = documents_of_lengths([6400] + [100] * 7), np.geomspace, packing.shortest_cut
    expected = None
    for factor in (1.0, 1 - 2e-16, 1 + 2e-16):
        limits = []
        monkeypatch.setattr(np, "geomspace", lambda *a, by=factor: geomspace(*a).round() * by)
        monkeypatch.setattr(packing, "shortest_cut", lambda d, limit, n, to=limits: to.append(limit) or cut(d, limit, n))
        assign(documents, 16_384, 8)
        expected = expected or limits
        assert len(limits) == packing.NUM_CUTS * len(documents) and limits == expected


def test_documents_are_cut_only_where_it_pays():
    """A part repeats the clean text before it: nine of one length on eight ranks, or many short ones, are better left whole. On one
    rank, packs are as they always were."""
    for lengths, num_ranks in ([2000] * 9, 8), ([400] * 64, 8), ([5000] * 4 + [400] * 48, 1), ([4000] + [300] * 7, 1):
        documents = documents_of_lengths(lengths)
        ranks = assign(documents, 65_536, num_ranks)
        assert sorted(d.response for packs in ranks for own in packs for d in own) == list(range(len(lengths)))
        bins = fill(documents, 65_536, num_ranks, False)
        assert ranks == [bins[rank::num_ranks] for rank in range(num_ranks)]


@pytest.mark.parametrize("share", [False, True])
def test_cuts_for_the_ranks_change_neither_loss_nor_gradient(tiny, share):
    """One long response among short ones on four ranks, against all in one pack."""
    documents = documents_of_lengths([120, 16, 12, 20, 8], prompt=8)
    predictions = number(documents)
    policy = Policy(copy.deepcopy(tiny.decoder).double(), tiny.forbidden_ids)
    weights = torch.from_numpy(np.random.default_rng(1).normal(size=len(predictions)))

    def loss_and_gradient(packs):
        policy.zero_grad()
        loss = torch.zeros((), dtype=torch.float64)
        for own in packs:
            pack = build_pack(own, tiny.mask_id, share_prompts=share)
            real = pack.prediction >= 0
            part = (policy(pack)[0][real].double() * weights[pack.prediction[real]]).sum()
            part.backward()
            loss += part.detach()
        return loss, {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}

    ranks = assign(documents, 4000, 4, share)
    packs = [own for packs in ranks for own in packs if own]
    assert sum(d.response == 0 for own in packs for d in own) > 1, "nothing was cut"
    loss, gradients = loss_and_gradient(packs)
    right, expected = loss_and_gradient([documents])
    assert abs(float(loss - right)) < 1e-5 * abs(float(right))
    assert gradients.keys() == expected.keys()
    assert max(float((gradients[n] - g).abs().max() / g.abs().max()) for n, g in expected.items()) < 1e-5


def test_a_long_document_is_split_by_slices():
    documents, _ = random_documents(4, count=6, seed=2)
    documents = [max(documents, key=lambda d: len(d.trace.block))]
    number(documents)
    parts = split_long(documents[0], 24)
    assert len(parts) > 1
    assert sum(p.num_predictions for p in parts) == documents[0].num_predictions
    assert np.concatenate([p.numbers for p in parts]).tolist() == list(range(documents[0].num_predictions))


def test_rows_are_split_evenly_and_each_once():
    documents, _ = random_documents(4, count=9, seed=4)
    rows = {(d.response, int(k)) for d in documents for k in np.unique(d.trace.rank)}
    parts = split_rows(documents, 4, np.random.default_rng(0))
    found = [{(d.response, int(k)) for d in part for k in np.unique(d.trace.rank)} for part in parts]
    assert set.union(*found) == rows and sum(map(len, found)) == len(rows)
    assert max(map(len, found)) - min(map(len, found)) <= 1


def test_mask_formula_by_hand():
    # One document of block size 2: clean a b | slice of block 0 | slice of block 1; then another document.
    ids = TokenIds(
        torch.tensor([0, 0, 0, 0, 0, 0, 1]),
        torch.tensor([0, 0, 0, 0, 1, 1, 0]),
        torch.tensor([0, 0, 1, 1, 2, 2, 0]),
    )
    expected = torch.tensor(
        [
            [1, 1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0, 0],
            [0, 0, 1, 1, 0, 0, 0],
            [0, 0, 1, 1, 0, 0, 0],
            [1, 1, 0, 0, 1, 1, 0],
            [1, 1, 0, 0, 1, 1, 0],
            [0, 0, 0, 0, 0, 0, 1],
        ],
        dtype=torch.bool,
    )
    assert torch.equal(dense_mask(ids), expected)


def test_an_empty_micro_batch_counts_nothing(tiny):
    pack = build_pack([], tiny.mask_id, round_to=8)
    logprobs, _ = Policy(tiny.decoder, tiny.forbidden_ids)(pack)
    assert pack.prediction.tolist() == [-1] and torch.isfinite(logprobs).all()
    logprobs, _ = Policy(tiny.decoder, forbidden_ids=[0])(build_pack([], mask_id=0))
    assert torch.isfinite(logprobs).all()


def test_token_weights_by_hand():
    # Response 0: rows k=0 (two tokens, one slice) and k=1 (one token); response 1: one row of three tokens in two slices.
    p = Predictions(
        response=np.array([0, 0, 0, 1, 1, 1]),
        offset=np.array([0, 1, 2, 0, 1, 2]),
        rank=np.array([0, 0, 1, 0, 0, 0]),
        slice=np.array([0, 0, 1, 2, 2, 3]),
        weight=np.ones(6),
    )
    weights = {name: token_weights(p, name, 10, 100).tolist() for name in ("reference", "step", "response", "token", "constant")}
    assert weights["reference"] == pytest.approx([1 / 30] * 6)
    assert weights["step"] == pytest.approx([1 / 4, 1 / 4, 1 / 2, 1 / 4, 1 / 4, 1 / 2])
    assert weights["response"] == pytest.approx([1 / 6] * 6)
    assert weights["token"] == pytest.approx([1 / 6] * 6)
    assert weights["constant"] == pytest.approx([1 / 200] * 6)


# -- full attention: a slice is a canvas


def canvas_documents(count=4, seed=0, shortest_prompt=1, method="TraceRL"):
    rng = np.random.default_rng(seed)
    training = SimpleNamespace(method=method, shrink=1, post_num=None)
    layout, documents = Layout("full", training), []
    for index in range(count):
        length = int(rng.integers(3, 9))
        steps = rng.integers(0, 5, length)
        prompt = rng.integers(0, 25, shortest_prompt + index)
        documents.append(layout.document(index, Response(prompt, rng.integers(0, 25, length), length, steps), None))
    return documents


@pytest.mark.parametrize("shift", [0, 1])
def test_a_canvas_is_a_document_of_its_own(tiny, shift):
    """Each slice by its own plain forward; a shifted token at position 0 is predicted by its own row."""
    documents = canvas_documents(shortest_prompt=0)
    number(documents)
    pack = build_pack(documents, tiny.mask_id, round_to=32, logit_shift=shift)
    widths = [document.block_size for document in documents for _ in document.trace.block]
    _, lengths = torch.unique_consecutive(pack.token_ids.document, return_counts=True)
    assert lengths.tolist() == widths + [pack.num_filler] and sum(widths) + pack.num_filler == len(pack.input_ids) <= 128
    starts = pack.token_ids.whole.starts
    assert starts.tolist() == [0, *lengths.cumsum(0).tolist()] and pack.token_ids.whole.longest == lengths.max()
    document = pack.token_ids.document
    assert torch.equal(dense_mask(pack.token_ids), document[:, None] == document[None, :]), "no mask is needed"
    assert torch.equal(pack.positions[: sum(widths)], torch.cat([torch.arange(width) for width in widths]))
    expected = []
    for document in documents:
        for hidden, predicted in zip(document.trace.hidden, document.trace.predicted, strict=True):
            ids = torch.tensor(np.where(hidden, tiny.mask_id, document.ids))
            n = len(ids)
            states = tiny.decoder(ids, torch.arange(n), masked_attention(torch.ones(n, n, dtype=torch.bool)))
            for position in np.flatnonzero(predicted):
                logits = tiny.decoder.lm_head(states[max(position - shift, 0)])
                logits[tiny.forbidden_ids] = -torch.inf
                expected.append(logits.log_softmax(-1)[document.ids[position]])
    with torch.no_grad():
        logprobs, _ = Policy(tiny.decoder, tiny.forbidden_ids)(pack)
    assert (logprobs - torch.stack(expected)).abs().max() < 1e-5
    assert any(document.trace.predicted[:, 0].any() for document in documents), "position 0 is among them"


def test_the_row_before_a_block_is_clean():
    """Blocks of two behind a prompt of four: with shifted logits a block's first token is predicted by the text before it."""
    r = Response(np.arange(4), np.arange(10, 14), 4, np.array([1, 2, 3, 3]))
    documents = [build_document(0, r, trace_slices(r, 2, TRAINING, None), 2)]
    number(documents)
    # Clean: positions 0-5; slices: 6-7 (both masked), 8-9 (the second masked), 10-11.
    assert build_pack(documents, 27).rows.tolist() == [6, 9, 10, 11]
    assert build_pack(documents, 27, logit_shift=1).rows.tolist() == [3, 8, 5, 10]


def test_next_token_is_the_causal_forward(tiny):
    rng = np.random.default_rng(4)
    layout = Layout("full", SimpleNamespace(method="ar", post_num=None))
    texts = [(0, 5), (3, 6), (9, 2)]
    responses = [Response(rng.integers(0, 25, p), rng.integers(0, 25, n), n) for p, n in texts]
    documents = [layout.document(index, response, None) for index, response in enumerate(responses)]
    number(documents)
    assert [document.num_tokens for document in documents] == [p + n - 1 for p, n in texts], "no slices, and nobody reads the last"
    assert split_long(documents[1], 4) == [documents[1]], "there is nothing to leave out"
    pack = build_pack(documents, tiny.mask_id, logit_shift=1)
    with torch.no_grad():
        logprobs, _ = Policy(tiny.decoder, tiny.forbidden_ids)(pack)
        expected = []
        for response in responses:
            ids = torch.tensor(np.concatenate([response.prompt_ids, response.response_ids]))
            n = len(ids)
            causal = torch.ones(n, n, dtype=torch.bool).tril()
            logits = tiny.decoder.lm_head(tiny.decoder(ids, torch.arange(n), masked_attention(causal)))
            logits[:, tiny.forbidden_ids] = -torch.inf
            log_p = logits.log_softmax(-1)
            expected += [log_p[p - 1, ids[p]] for p in range(max(1, len(response.prompt_ids)), n)]
    assert (logprobs - torch.stack(expected)).abs().max() < 1e-5


@pytest.mark.parametrize("attention, reference", [("block", [1 / 30] * 6), ("full", [1 / 6, 1 / 6, 1 / 3, 1 / 9, 1 / 9, 1 / 9])])
def test_reference_weights_of_both_attention_kinds(attention, reference):
    p = Predictions(
        response=np.array([0, 0, 0, 1, 1, 1]),
        offset=np.array([0, 1, 2, 0, 1, 2]),
        rank=np.array([0, 0, 1, 0, 0, 0]),
        slice=np.array([0, 0, 1, 2, 2, 2]),
        weight=np.array([1.0, 1.0, 1.0, 1.0, 1.0, 2.0]),
    )
    expected = np.array(reference) * p.weight
    weights = token_weights(p, "reference", 10, 100, attention)
    assert weights == pytest.approx(expected)
    of_kl = kl_weights(p, weights, "reference", attention)
    assert of_kl == pytest.approx(np.array([1, 1, 1, 1, 1, 2]) / 3 if attention == "full" else expected)
    token = token_weights(p, "token", 10, 100, attention)
    assert kl_weights(p, token, "token", attention) is token
