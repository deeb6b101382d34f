"""The attention backends agree: dense, FlexAttention and variable lengths on a GPU; document batches, the tiles of FlexAttention's
mask and one big mask anywhere."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from models import attention
from models.attention import (
    TILE,
    TUNED,
    TokenIds,
    attention_backend,
    best_backend,
    block_mask,
    dense_attention,
    dense_mask,
    flex_attention,
    masked_attention,
    padded_length,
    tile_pairs,
    varlen_attention,
)
from models.kernels import launch
from models.kernels.launch import fused_kernels
from models.registry import FAMILIES
from models.tiny import build_tiny
from tests.train.test_packing import canvas_documents, documents_of_groups, random_documents
from train.documents import number
from train.packing import build_pack
from train.policy import Policy

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="FlexAttention has a backward on CUDA only, and there is no GPU"
)


KINDS = ("blocks", "shared", "canvases", "next-token")


def documents_of(kind, count, seed):
    if kind == "blocks":
        return random_documents(4, count, seed)[0]
    if kind == "shared":
        return documents_of_groups(4, count, seed)
    documents = canvas_documents(count, seed, method="TraceRL" if kind == "canvases" else "ar")
    return [document for document in documents if document is not None]  # a response may have nothing that is trained


def random_ids(num_documents=4, seed=0, kind="blocks"):
    documents = documents_of(kind, num_documents, seed)
    number(documents)
    return build_pack(documents, 27, round_to=16, share_prompts=kind == "shared").token_ids


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


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_of_the_mask(kind):
    """As torch makes them from the whole mask, whatever is left over at the end."""
    from torch.nn.attention.flex_attention import create_block_mask

    ids = random_ids(num_documents=30, seed=2, kind=kind)
    n, mask = len(ids.document), dense_mask(ids)
    assert n > 2 * TILE
    assert int(tile_pairs(ids).sum()) == int(mask.sum())
    ours = block_mask(ids)
    theirs = create_block_mask(lambda b, h, q, k: mask[q, k], None, None, n, n, device="cpu")
    names = ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks")
    for name in names:
        counts, indices = getattr(ours, name), name.replace("num_blocks", "indices")
        assert torch.equal(counts, getattr(theirs, name))
        for row, count in enumerate(counts[0, 0].tolist()):
            assert torch.equal(getattr(ours, indices)[0, 0, row, :count], getattr(theirs, indices)[0, 0, row, :count])
    every = torch.arange(n)
    assert torch.equal(ours.mask_mod(0, 0, every[:, None], every[None, :]), mask)
    with_few_rows = tile_pairs(ids)
    assert with_few_rows.shape == (-(-n // TILE), -(-n // TILE))


def first_tokens(ids, n):
    return TokenIds(*(x if x is None else x[:n] for x in (ids.document, ids.block, ids.slice, ids.prefix)))


def test_another_pack_of_one_size_compiles_nothing(monkeypatch):
    """What is compiled does not hold on to the ids of a pack. (Traced, not compiled: the whole of it takes a GPU, below.)"""
    from torch._dynamo.testing import CompileCounter
    from torch.nn.attention.flex_attention import flex_attention as flex

    counter = CompileCounter()
    compiled = torch.compile(flex, dynamic=False, fullgraph=True, backend=counter)
    monkeypatch.setattr(attention, "_compiled_flex", lambda: compiled)
    for seed in range(3):
        for kind in KINDS:
            ids = random_ids(num_documents=30, seed=seed, kind=kind)
            ids = first_tokens(ids, 128)
            q, k, v = (torch.randn(128, heads, 16) for heads in (4, 2, 2))
            dense = masked_attention(dense_mask(ids))(0, q, k, v)
            assert (flex_attention(ids)(seed, q, k, v) - dense).abs().max() < 1e-5
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", ["shared", "canvases"])
def test_attention_runs_at_few_sizes(monkeypatch, kind):
    """A row of nine tiles is filled up to ten for attention alone; the tiles of the filling are empty."""
    from torch.nn.attention.flex_attention import flex_attention as flex

    sizes = []

    def recorded(q, k, v, block_mask, **options):
        sizes.append(q.shape[2])
        counts = block_mask.kv_num_blocks[0, 0] + block_mask.full_kv_num_blocks[0, 0]
        assert (counts[:9] > 0).all() and not counts[9:].any()
        return flex(q, k, v, block_mask=block_mask, **options)

    monkeypatch.setattr(attention, "_compiled_flex", lambda: recorded)
    ids = first_tokens(random_ids(num_documents=130, seed=4, kind=kind), 9 * TILE)
    q, k, v = (torch.randn(9 * TILE, heads, 16) for heads in (4, 2, 2))
    out = flex_attention(ids)(0, q, k, v)
    assert out.shape == q.shape and (out - dense_attention(ids)(0, q, k, v)).abs().max() < 1e-5
    ids.attended_length = 12 * TILE  # as all packs of a job have it
    assert (flex_attention(ids)(0, q, k, v) - out).abs().max() < 1e-5
    assert sizes == [10 * TILE, 12 * TILE]
    few = {padded_length(n) for n in range(TILE, 16 * TILE * 8 + 1, TILE)}
    assert padded_length(12_845 // TILE * TILE) == 14_336 and padded_length(16_384) == 16_384 and padded_length(TILE) == TILE
    assert all(n <= padded_length(n) < 1.25 * n for n in range(TILE, 16 * TILE * 8 + 1, TILE)) and len(few) == 8 + 4 * 4


def test_rows_of_one_filled_length_have_one_set_of_options(monkeypatch):
    """Another set would compile a second forward and backward: eight tiles and seven, filled up to twelve, and once not."""
    called = []

    def recorded(q, k, v, block_mask, kernel_options, **others):
        called.append((q.shape[2], kernel_options))
        return q

    monkeypatch.setattr(attention, "_compiled_flex", lambda: recorded)
    # As on the GPU that the options were measured on.
    monkeypatch.setattr(attention, "kernel_options", lambda q: TUNED if len(q) >= 1024 else None)
    many = random_ids(num_documents=130, seed=4, kind="shared")
    for num_tiles, attended_tiles in ((8, 12), (7, 12), (7, 0)):
        ids = first_tokens(many, num_tiles * TILE)
        ids.attended_length = attended_tiles * TILE
        q, k, v = (torch.randn(num_tiles * TILE, heads, 16) for heads in (4, 2, 2))
        assert torch.equal(flex_attention(ids)(0, q, k, v), q)
    assert called == [(12 * TILE, TUNED), (12 * TILE, TUNED), (7 * TILE, None)]


def test_which_backend_is_chosen(monkeypatch):
    whole, blocks = random_ids(kind="canvases"), random_ids(kind="blocks")
    assert whole.whole is not None and blocks.whole is None
    assert best_backend(whole, torch.bfloat16) == "dense", "on a CPU"
    on_gpu = SimpleNamespace(document=SimpleNamespace(is_cuda=True), whole=whole.whole)
    monkeypatch.setattr(launch, "_fused", False)
    assert best_backend(on_gpu, torch.bfloat16) == "flex", "fused kernels are off"
    monkeypatch.setattr(launch, "_fused", True)
    for ids, dtype, name in [(whole, torch.bfloat16, "varlen"), (whole, torch.float32, "flex"), (blocks, torch.bfloat16, "flex")]:
        on_gpu.whole = ids.whole
        assert best_backend(on_gpu, dtype) == name
    assert best_backend(SimpleNamespace(document=on_gpu.document, whole=whole.whole), None) == "flex"


def test_flash_attn_is_used_where_it_is_installed(monkeypatch):
    """A stand-in for the package, with its arguments."""

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        assert cu_seqlens_q is cu_seqlens_k and cu_seqlens_q.dtype == torch.int32
        assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
        out = []
        for a, b in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True):
            own = [x[a:b].transpose(0, 1) for x in (q, k, v)]
            out.append(F.scaled_dot_product_attention(*own, enable_gqa=True).transpose(0, 1))
        return torch.cat(out)

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func))
    attention._varlen_function.cache_clear()
    try:
        ids = random_ids(kind="canvases")
        q, k, v = (torch.randn(len(ids.document), heads, 8) for heads in (4, 2, 2))
        assert (varlen_attention(ids)(0, q, k, v) - dense_attention(ids)(0, q, k, v)).abs().max() < 1e-5
    finally:
        attention._varlen_function.cache_clear()


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
    shift = int(kind == "next-token")
    pack = build_pack(documents, model.mask_id, round_to=128, logit_shift=shift, share_prompts=kind == "shared").to("cuda")
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
    ids = random_ids(num_documents=12, seed=7).to("cuda")
    n = len(ids.document)
    assert n % TILE
    q, k, v = (torch.randn(n, heads, 64, device="cuda") for heads in (4, 2, 2))
    dense = masked_attention(dense_mask(ids))(0, q, k, v)
    assert (flex_attention(ids)(0, q, k, v) - dense).abs().max() < 1e-4


@needs_gpu
def test_a_filled_up_row_on_a_gpu():
    """Gradients too: the tiles of the filling see nothing."""
    ids = first_tokens(random_ids(num_documents=130, seed=4, kind="shared").to("cuda"), 9 * TILE)
    results = []
    for backend in ("dense", "flex"):
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randn(9 * TILE, heads, 64, generator=generator).cuda().requires_grad_() for heads in (4, 2, 2)]
        out = attention_backend(backend, ids)(0, *drawn)
        results.append([out, *torch.autograd.grad((out * torch.linspace(-1, 1, 64, device="cuda")).sum(), drawn)])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


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


@needs_gpu
def test_another_pack_of_one_size_compiles_nothing_on_a_gpu():
    from torch._dynamo.utils import counters

    def update(seed):
        ids = first_tokens(random_ids(num_documents=60, seed=seed, kind=("shared", "blocks")[seed % 2]).to("cuda"), 512)
        q, k, v = (torch.randn(512, heads, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2))
        flex_attention(ids)(0, q, k, v).sum().backward()

    update(0)
    before = counters["stats"]["unique_graphs"]
    for seed in (1, 2):
        update(seed)
    assert counters["stats"]["unique_graphs"] == before > 0


@needs_gpu
@pytest.mark.parametrize("heads, size", [((4, 4), 128), ((4, 2), 128), ((4, 2), 64)])
def test_variable_lengths_equal_dense(heads, size):
    if attention._varlen_function() is None:
        pytest.skip("this torch has no varlen_attn, and flash-attn is not installed")
    ids = random_ids(num_documents=20, seed=1, kind="canvases").to("cuda")
    generator = torch.Generator().manual_seed(1)
    shapes = [(heads[0], size), (heads[1], size), (heads[1], size)]
    drawn = [torch.randn(len(ids.document), *shape, generator=generator).cuda() for shape in shapes]
    weights = torch.randn(drawn[0].shape, generator=generator).cuda()
    exact = [x.bfloat16().float().requires_grad_() for x in drawn]
    want = masked_attention(dense_mask(ids))(0, *exact)
    expected = [want, *torch.autograd.grad((want * weights).sum(), exact)]

    def errors(name):
        rounded = [x.bfloat16().requires_grad_() for x in drawn]
        out = attention_backend(name, ids, torch.bfloat16)(0, *rounded)
        found = [out, *torch.autograd.grad((out.float() * weights).sum(), rounded)]
        return [float((a.float() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]

    print("varlen", errors("varlen"), "dense", errors("dense"))
    assert all(ours <= 1.5 * theirs for ours, theirs in zip(errors("varlen"), errors("dense"), strict=True))


def cosine(ours, exact):
    dot = sum(float((ours[n].double() * exact[n].double()).sum()) for n in exact)
    norms = [sum(float(g[n].double().square().sum()) for n in exact) ** 0.5 for g in (ours, exact)]
    return dot / (norms[0] * norms[1])


@needs_gpu
@pytest.mark.parametrize("kind", ["shared", "canvases"])
def test_every_variant_of_the_update_has_the_gradient_of_float32(kind):
    """Backends, recomputation, and fused against plain layers and head, at heads of 128: float32 to 1e-4 of a tensor's largest
    entry, bfloat16 in its direction."""
    torch.set_float32_matmul_precision("highest")
    shape = dict(head_dim=128, hidden_size=512, num_hidden_layers=3, intermediate_size=1024, vocab_size=1000)
    model = build_tiny(FAMILIES.get("sdar"), seed=5, **shape)
    documents = documents_of(kind, count=40, seed=3)
    number(documents)
    pack = build_pack(documents, model.mask_id, round_to=128, share_prompts=kind == "shared").to("cuda")
    rounded = build_tiny(FAMILIES.get("sdar"), seed=5, **shape)
    rounded.decoder.bfloat16().float()  # one set of weights in both precisions
    with fused_kernels(False):
        loss, exact = loss_and_gradients(rounded, "dense", torch.float32, pack)
    for dtype, backends in [(torch.float32, ("dense", "flex")), (torch.bfloat16, ("dense", "flex", "auto"))]:
        for backend in backends:
            for recompute in (False, True):
                for plain in (False, True):
                    model = build_tiny(FAMILIES.get("sdar"), seed=5, **shape)
                    model.decoder.bfloat16()
                    model.decoder.recomputed_layers = 2 if recompute else 0  # of 3
                    with fused_kernels(not plain):
                        own_loss, own = loss_and_gradients(model, backend, dtype, pack)
                    worst = max(float((own[n] - exact[n]).abs().max() / exact[n].abs().max()) for n in exact)
                    similarity = cosine(own, exact)
                    name = f"{kind} {dtype} {backend} recompute={recompute} plain={plain}"
                    print(f"{name}: cosine {similarity:.6f}, worst {worst:.1e}")
                    assert similarity >= 0.999, name
                    if dtype == torch.float32:
                        assert worst <= 1e-4 and abs(own_loss - loss) <= 1e-4 * abs(loss), name
