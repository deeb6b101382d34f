"""The attention backends agree: dense and FlexAttention on a GPU, document batches and one big mask anywhere."""

from __future__ import annotations

import pytest
import torch

from models.attention import TokenIds, dense_attention, dense_mask, flex_attention, masked_attention
from models.registry import FAMILIES
from models.tiny import build_tiny
from tests.train.test_packing import canvas_documents, random_documents
from train.packing import build_pack, number
from train.policy import Policy

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="FlexAttention has a backward on CUDA only, and there is no GPU"
)


KINDS = ("blocks", "canvases", "next-token")


def documents_of(kind, count, seed):
    if kind == "blocks":
        return random_documents(4, count, seed)[0]
    return canvas_documents(count, seed, method="TraceRL" if kind == "canvases" else "ar")


def random_ids(num_documents=4, seed=0, kind="blocks"):
    documents = documents_of(kind, num_documents, seed)
    number(documents)
    return build_pack(documents, 27, round_to=16).token_ids


@pytest.mark.parametrize("kind", KINDS)
def test_document_batches_equal_one_mask_over_the_pack(kind):
    ids = random_ids(kind=kind)
    n = len(ids.document)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(n, heads, 8, generator=generator, requires_grad=True) for heads in (4, 2, 2))
    results = []
    for attend in (dense_attention(ids), masked_attention(dense_mask(ids))):
        out = attend(0, q, k, v)
        results.append([out.detach(), *torch.autograd.grad((out * torch.linspace(-1, 1, 8)).sum(), [q, k, v])])
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() < 1e-5


def loss_and_gradients(model, backend, dtype, pack):
    policy = Policy(model.decoder.to(dtype), model.forbidden_ids, backend=backend).cuda()
    policy.zero_grad()
    weights = torch.randn(len(pack.prediction), generator=torch.Generator().manual_seed(0)).cuda()
    logprobs, _ = policy(pack)
    loss = (logprobs * weights).sum()
    loss.backward()
    return loss.item(), {name: p.grad.float().clone() for name, p in policy.named_parameters()}


@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_flex_equals_dense_and_is_no_further_from_float32_in_bf16(kind):
    torch.set_float32_matmul_precision("highest")
    # Heads of 64: FlexAttention wants at least 16.
    model = build_tiny(FAMILIES.get("sdar"), seed=5, head_dim=64, hidden_size=256, num_hidden_layers=3, intermediate_size=512)
    documents = documents_of(kind, count=40, seed=3)
    number(documents)
    pack = build_pack(documents, model.mask_id, round_to=128, logit_shift=int(kind == "next-token")).to("cuda")
    loss, exact = loss_and_gradients(model, "dense", torch.float32, pack)
    flex_loss, flex = loss_and_gradients(model, "flex", torch.float32, pack)
    assert abs(loss - flex_loss) <= 1e-4 * abs(loss)
    worst = max(float((flex[n] - exact[n]).abs().max() / exact[n].abs().max()) for n in exact)
    print(f"float32, flex against dense: largest error of a gradient {worst:.2e} of its largest entry")
    assert worst <= 1e-4

    def distance(gradients):
        return sum(float((gradients[n] - exact[n]).square().sum()) for n in exact) ** 0.5

    dense_bf16, flex_bf16 = (loss_and_gradients(model, backend, torch.bfloat16, pack)[1] for backend in ("dense", "flex"))
    # The weights are rounded alike in both, so the distance to float32 is that rounding plus the backend's own.
    print(f"bf16, distance to float32: dense {distance(dense_bf16):.4f}, flex {distance(flex_bf16):.4f}")
    assert distance(flex_bf16) <= 1.5 * distance(dense_bf16)


@needs_gpu
def test_flex_sees_what_the_formula_allows():
    ids = random_ids(num_documents=12, seed=7)
    ids = TokenIds(*(x[: len(x) // 128 * 128].cuda() for x in (ids.document, ids.block, ids.slice)))
    n = len(ids.document)
    q, k, v = (torch.randn(n, heads, 64, device="cuda") for heads in (4, 2, 2))
    dense = masked_attention(dense_mask(ids))(0, q, k, v)
    assert (flex_attention(ids)(0, q, k, v) - dense).abs().max() < 1e-4


@needs_gpu
def test_many_pack_sizes_stay_compiled():
    """Five sizes, each with and without gradient, are more compilations than dynamo's usual limit of eight: none may fall back."""
    for size in range(128, 128 * 6, 128):
        ids = random_ids(num_documents=40, seed=size)
        ids = TokenIds(*(x[:size].cuda() for x in (ids.document, ids.block, ids.slice)))
        q, k, v = (torch.randn(size, heads, 64, device="cuda", requires_grad=True) for heads in (4, 2, 2))
        with torch.no_grad():
            dense = masked_attention(dense_mask(ids))(0, q, k, v)
            assert (flex_attention(ids)(0, q, k, v) - dense).abs().max() < 1e-4
        flex_attention(ids)(0, q, k, v).sum().backward()
        assert q.grad.isfinite().all()
