"""jvp_attention: attention and its derivative along a direction in one pass, forward and backward, without the matrix of all pairs.

Continuous-time consistency models and MeanFlow want, with the network's output, its derivative along a trajectory. With S = s q k^T,
P = softmax(S) and T = s (dq k^T + q dk^T), the derivative of S,

    out = P v                       dout = (P * (T - mu)) v + P dv,     mu_i = sum_j P_ij T_ij

and mu, like the softmax's denominator, can be summed up block after block of keys (Lu & Song 2024, sCM, app. F). PyTorch has this
only through the quadratic form: its fused attention knows no forward mode.

For N tokens of d channels, s bytes each: eager writes and reads several N x N matrices, say 10 N^2 s bytes; here it is the six
inputs and two outputs, 8 N d s (12 more where the inputs have to be made dense first), and two numbers a token. Operations: 6
products of N x d x N, 12 N^2 d in all (attention alone: 4 N^2 d); at N = 2,048, d = 64 in half precision 1,536 operations a byte: the
multipliers set the time, not the memory. Backward: 12 products for the gradients of keys and values, 9 for those of queries, since
each pass makes S, T and the others again.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from cmlab.checks import floating, same_shape
from cmlab.kernels.dispatch import enabled, forward_mode, interpreting, jit, launching, tl, triton


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(channels)) v, each (B, heads, tokens, channels), that torch.func.jvp can go through.

    PyTorch's fused attention, and jvp_attention where derivatives are carried along. Raises as that does.
    """
    if not forward_mode():
        return F.scaled_dot_product_attention(q, k, v)
    primals, tangents = zip(*(forward_ad.unpack_dual(x) for x in (q, k, v)), strict=True)
    moved = (torch.zeros_like(x) if t is None else t for x, t in zip(primals, tangents, strict=True))
    return forward_ad.make_dual(*jvp_attention(*primals, *moved))


def jvp_attention(
    q: Tensor, k: Tensor, v: Tensor, tangent_q: Tensor, tangent_k: Tensor, tangent_v: Tensor
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(channels)) v and its derivative along the tangents: all (B, heads, tokens, channels), as are both results.

    Gradients flow into all six. Not causal, no mask; queries and keys have the same number of tokens.
    Raises ValueError for shapes that differ, TypeError for integers.
    """
    given = (q, k, v, tangent_q, tangent_k, tangent_v)
    for name, tensor in zip(("q", "k", "v", "tangent_q", "tangent_k", "tangent_v"), given, strict=True):
        floating(name, tensor)
        if q.ndim != 4:
            raise ValueError(f"q must have shape (B, heads, tokens, channels), got {tuple(q.shape)}")
        same_shape(name, tensor, q.shape)
    if q.numel() and q.shape[3] <= 128 and len({t.dtype for t in given}) == 1 and enabled(*given):
        return torch.ops.cmlab.jvp_attention(*given)[:2]
    return reference(*given)


def reference(q, k, v, tangent_q, tangent_k, tangent_v) -> tuple[Tensor, Tensor]:
    """The same by the matrices of all pairs, in float32 (or float64) whatever the inputs' precision."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    with torch.autocast(q.device.type, enabled=False):
        results = _by_pairs(*(x.to(wide) for x in (q, k, v, tangent_q, tangent_k, tangent_v)))
    return tuple(x.to(q.dtype) for x in results[:2])


def _by_pairs(q, k, v, tangent_q, tangent_k, tangent_v) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scale = q.shape[-1] ** -0.5
    scores = scale * q @ k.mT
    moved = scale * (tangent_q @ k.mT + q @ tangent_k.mT)
    shares = scores.softmax(-1)
    mu = (shares * moved).sum(-1, keepdim=True)
    tangent = (shares * (moved - mu)) @ v + shares @ tangent_v
    return shares @ v, tangent, scores.logsumexp(-1), mu.squeeze(-1)


# --- the operations, as torch sees them -------------------------------------------------------------------------------


@torch.library.custom_op("cmlab::jvp_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, tangent_q: Tensor, tangent_k: Tensor, tangent_v: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, its tangent, and of each query log(sum(exp(scores))) and mu: (B, heads, tokens) float32."""
    given = (q, k, v, tangent_q, tangent_k, tangent_v)
    if launching(q):
        with torch.cuda.device_of(q):
            out, tangent, *rows = _launch_forward(*_laid_out(*given))
        return out.to(q.dtype), tangent.to(q.dtype), *rows
    out, tangent, total, mu = _by_pairs(*(x.float() for x in given))
    return out.to(q.dtype), tangent.to(q.dtype), total, mu


@_forward.register_fake
def _(q, k, v, tangent_q, tangent_k, tangent_v):
    rows = q.new_empty(q.shape[:3], dtype=torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape), rows, torch.empty_like(rows)


@torch.library.custom_op("cmlab::jvp_attention_backward", mutates_args=())
def _backward(
    q: Tensor, k: Tensor, v: Tensor, tangent_q: Tensor, tangent_k: Tensor, tangent_v: Tensor,
    d_out: Tensor, d_tangent: Tensor, total: Tensor, mu: Tensor, a: Tensor, e: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of the six inputs. With G = d_out and H = d_tangent: a = H . out and e = G . out + H . tangent - mu a, by query."""
    given = (q, k, v, tangent_q, tangent_k, tangent_v, d_out, d_tangent)
    if launching(q):
        with torch.cuda.device_of(q):
            return tuple(x.to(q.dtype) for x in _launch_backward(*_laid_out(*given), total, mu, a, e))
    q, k, v, tq, tk, tv, g, h = (x.float() for x in given)
    total, mu, a, e = (x.unsqueeze(-1) for x in (total, mu, a, e))
    scale = q.shape[-1] ** -0.5
    shares = (scale * q @ k.mT - total).exp()
    moved = scale * (tq @ k.mT + q @ tk.mT)
    towards = h @ v.mT
    d_moved = shares * (towards - a)
    d_scores = shares * (g @ v.mT + (moved - mu) * towards + h @ tv.mT - moved * a - e)
    gradients = (
        scale * (d_scores @ k + d_moved @ tk), scale * (d_scores.mT @ q + d_moved.mT @ tq),
        shares.mT @ g + (shares * (moved - mu)).mT @ h,
        scale * d_moved @ k, scale * d_moved.mT @ q, shares.mT @ h,
    )  # fmt: skip
    return tuple(x.to(given[0].dtype) for x in gradients)


@_backward.register_fake
def _(q, k, v, tangent_q, tangent_k, tangent_v, d_out, d_tangent, total, mu, a, e):
    return tuple(q.new_empty(q.shape) for _ in range(6))


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output)


def _gradients(ctx, d_out: Tensor, d_tangent: Tensor, *_):
    *given, out, tangent, total, mu = ctx.saved_tensors
    a = (d_tangent.float() * out.float()).sum(-1)
    e = (d_out.float() * out.float() + d_tangent.float() * tangent.float()).sum(-1) - mu * a
    return torch.ops.cmlab.jvp_attention_backward(*given, d_out, d_tangent, total, mu, a, e)


_forward.register_autograd(_gradients, setup_context=_keep)


# --- the kernels ------------------------------------------------------------------------------------------------------

LOG2E = math.log2(math.e)  # powers of two are one instruction
# Tokens that stay with a program, and that pass by. On an H100 the fastest forward and for keys, or nearly (benchmarks/blocks.py).
FORWARD, BACKWARD = (64, 64), (64, 32)


def _laid_out(*given: Tensor) -> tuple[Tensor, ...]:
    """Dense, and in a precision that the interpreter multiplies rightly: bfloat16 is not among them (Triton 3.8)."""
    wide = given[0].dtype == torch.bfloat16 and interpreting(given[0])
    return tuple((x.float() if wide else x).contiguous() for x in given)


def _blocks(q: Tensor, rows: int, columns: int) -> dict:
    size = max(16, triton.next_power_of_2(q.shape[3]))
    narrow = 2 if q.dtype == torch.float32 or size > 64 else 1  # registers hold half as many
    exact = "ieee" if q.dtype == torch.float32 else "tf32"  # the latter has no effect on half precision
    return dict(ROWS=rows // narrow, COLUMNS=columns // narrow, BLOCK_D=size, PRECISION=exact)


def _launch_forward(q, k, v, tq, tk, tv) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, tokens, size = q.shape
    out, tangent = torch.empty_like(q), torch.empty_like(q)
    total, mu = (q.new_empty(q.shape[:3], dtype=torch.float32) for _ in range(2))
    blocks = _blocks(q, *FORWARD)
    grid = (batch * heads, triton.cdiv(tokens, blocks["ROWS"]))
    _attend[grid](q, k, v, tq, tk, tv, out, tangent, total, mu, tokens, size, size**-0.5, LOG2E, **blocks)
    return out, tangent, total, mu


def _launch_backward(q, k, v, tq, tk, tv, g, h, total, mu, a, e) -> tuple[Tensor, ...]:
    batch, heads, tokens, size = q.shape
    d_q, d_k, d_v, d_tq, d_tk, d_tv = gradients = tuple(torch.empty_like(q) for _ in range(6))
    given, sizes, blocks = (
        (q, k, v, tq, tk, tv, g, h, total, mu, a, e),
        (tokens, size, size**-0.5, LOG2E),
        _blocks(q, *BACKWARD),
    )
    grid = (batch * heads, triton.cdiv(tokens, blocks["ROWS"]))
    _key_gradients[grid](*given, d_k, d_tk, d_v, d_tv, *sizes, **blocks)
    _query_gradients[grid](*given, d_q, d_tq, *sizes, **blocks)
    return gradients


@jit
def _rows(x, start, first, N, D, COUNT: tl.constexpr, BLOCK_D: tl.constexpr):
    """Tokens first … first + COUNT of one head, zeros beyond the last: (COUNT, BLOCK_D)."""
    token, channel = first + tl.arange(0, COUNT), tl.arange(0, BLOCK_D)
    known = (token < N)[:, None] & (channel < D)[None, :]
    return tl.load(x + start + token[:, None] * D + channel[None, :], mask=known, other=0)


@jit
def _put(x, start, first, values, N, D, COUNT: tl.constexpr, BLOCK_D: tl.constexpr):
    token, channel = first + tl.arange(0, COUNT), tl.arange(0, BLOCK_D)
    known = (token < N)[:, None] & (channel < D)[None, :]
    tl.store(x + start + token[:, None] * D + channel[None, :], values, mask=known)


@jit
def _attend(
    q, k, v, tq, tk, tv, out, tangent, total, mu, N, D, scale, log2e,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program a block of queries; keys and values pass by in blocks."""
    first, head = tl.program_id(1) * ROWS, tl.program_id(0).to(tl.int64)
    start = head * N * D
    query = _rows(q, start, first, N, D, ROWS, BLOCK_D)
    moved_query = _rows(tq, start, first, N, D, ROWS, BLOCK_D)
    top = tl.full((ROWS,), float("-inf"), tl.float32)  # the largest score so far
    below, mean = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    sum_out, sum_tangent = tl.zeros((ROWS, BLOCK_D), tl.float32), tl.zeros((ROWS, BLOCK_D), tl.float32)
    for at in range(0, N, COLUMNS):
        key, moved_key = _rows(k, start, at, N, D, COLUMNS, BLOCK_D), _rows(tk, start, at, N, D, COLUMNS, BLOCK_D)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * (scale * log2e)
        scores = tl.where((at + tl.arange(0, COLUMNS) < N)[None, :], scores, float("-inf"))
        moved = tl.dot(moved_query, tl.trans(key), input_precision=PRECISION)
        moved = tl.dot(query, tl.trans(moved_key), moved, input_precision=PRECISION) * scale
        higher = tl.maximum(top, tl.max(scores, 1))
        shares, shrink = tl.exp2(scores - higher[:, None]), tl.exp2(top - higher)
        below = below * shrink + tl.sum(shares, 1)
        mean = mean * shrink + tl.sum(shares * moved, 1)
        value, moved_value = _rows(v, start, at, N, D, COLUMNS, BLOCK_D), _rows(tv, start, at, N, D, COLUMNS, BLOCK_D)
        weights = shares.to(value.dtype)
        sum_out = tl.dot(weights, value, sum_out * shrink[:, None], input_precision=PRECISION)
        sum_tangent = tl.dot(weights, moved_value, sum_tangent * shrink[:, None], input_precision=PRECISION)
        sum_tangent = tl.dot((shares * moved).to(value.dtype), value, sum_tangent, input_precision=PRECISION)
        top = higher
    mean, result = mean / below, sum_out / below[:, None]
    _put(out, start, first, result, N, D, ROWS, BLOCK_D)
    _put(tangent, start, first, sum_tangent / below[:, None] - mean[:, None] * result, N, D, ROWS, BLOCK_D)
    token = first + tl.arange(0, ROWS)
    tl.store(total + head * N + token, (top + tl.log2(below)) / log2e, mask=token < N)
    tl.store(mu + head * N + token, mean, mask=token < N)


@jit
def _pairs(
    query, moved_query, g, h, key, moved_key, value, moved_value, total, mu, a, e, both, scale, log2e, PRECISION: tl.constexpr
):  # fmt: skip
    """Of a block of queries by keys: the shares P, T - mu, and the gradients of the scores and of T."""
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
    shares = tl.where(both, tl.exp2((scores - total[:, None]) * log2e), 0)
    moved = tl.dot(moved_query, tl.trans(key), input_precision=PRECISION)
    moved = tl.dot(query, tl.trans(moved_key), moved, input_precision=PRECISION) * scale
    towards = tl.dot(h, tl.trans(value), input_precision=PRECISION)
    direct = tl.dot(g, tl.trans(value), input_precision=PRECISION)
    direct = tl.dot(h, tl.trans(moved_value), direct, input_precision=PRECISION)
    centred = moved - mu[:, None]
    d_moved = shares * (towards - a[:, None])
    d_scores = shares * (direct + centred * towards - moved * a[:, None] - e[:, None])
    return shares, centred, d_scores, d_moved


@jit
def _numbers(x, head, token, N):
    return tl.load(x + head * N + token, mask=token < N, other=0)


@jit
def _key_gradients(
    q, k, v, tq, tk, tv, g, h, total, mu, a, e, d_k, d_tk, d_v, d_tv, N, D, scale, log2e,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program a block of ROWS keys; queries pass by in blocks of COLUMNS."""
    first, head = tl.program_id(1) * ROWS, tl.program_id(0).to(tl.int64)
    start = head * N * D
    key, moved_key = _rows(k, start, first, N, D, ROWS, BLOCK_D), _rows(tk, start, first, N, D, ROWS, BLOCK_D)
    value, moved_value = _rows(v, start, first, N, D, ROWS, BLOCK_D), _rows(tv, start, first, N, D, ROWS, BLOCK_D)
    sum_k, sum_tk = tl.zeros((ROWS, BLOCK_D), tl.float32), tl.zeros((ROWS, BLOCK_D), tl.float32)
    sum_v, sum_tv = tl.zeros((ROWS, BLOCK_D), tl.float32), tl.zeros((ROWS, BLOCK_D), tl.float32)
    for at in range(0, N, COLUMNS):
        query, moved_query = _rows(q, start, at, N, D, COLUMNS, BLOCK_D), _rows(tq, start, at, N, D, COLUMNS, BLOCK_D)
        one, two = _rows(g, start, at, N, D, COLUMNS, BLOCK_D), _rows(h, start, at, N, D, COLUMNS, BLOCK_D)
        token = at + tl.arange(0, COLUMNS)
        both = (token < N)[:, None] & (first + tl.arange(0, ROWS) < N)[None, :]
        shares, centred, d_scores, d_moved = _pairs(
            query, moved_query, one, two, key, moved_key, value, moved_value,
            _numbers(total, head, token, N), _numbers(mu, head, token, N), _numbers(a, head, token, N), _numbers(e, head, token, N),
            both, scale, log2e, PRECISION,
        )  # fmt: skip
        kind = query.dtype
        weights, d_scores, d_moved = tl.trans(shares.to(kind)), tl.trans(d_scores.to(kind)), tl.trans(d_moved.to(kind))
        sum_v = tl.dot(weights, one, sum_v, input_precision=PRECISION)
        sum_v = tl.dot(tl.trans((shares * centred).to(kind)), two, sum_v, input_precision=PRECISION)
        sum_tv = tl.dot(weights, two, sum_tv, input_precision=PRECISION)
        sum_k = tl.dot(d_scores, query, sum_k, input_precision=PRECISION)
        sum_k = tl.dot(d_moved, moved_query, sum_k, input_precision=PRECISION)
        sum_tk = tl.dot(d_moved, query, sum_tk, input_precision=PRECISION)
    _put(d_k, start, first, sum_k * scale, N, D, ROWS, BLOCK_D)
    _put(d_tk, start, first, sum_tk * scale, N, D, ROWS, BLOCK_D)
    _put(d_v, start, first, sum_v, N, D, ROWS, BLOCK_D)
    _put(d_tv, start, first, sum_tv, N, D, ROWS, BLOCK_D)


@jit
def _query_gradients(
    q, k, v, tq, tk, tv, g, h, total, mu, a, e, d_q, d_tq, N, D, scale, log2e,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program a block of ROWS queries; keys pass by in blocks of COLUMNS."""
    first, head = tl.program_id(1) * ROWS, tl.program_id(0).to(tl.int64)
    start, token = head * N * D, first + tl.arange(0, ROWS)
    query, moved_query = _rows(q, start, first, N, D, ROWS, BLOCK_D), _rows(tq, start, first, N, D, ROWS, BLOCK_D)
    one, two = _rows(g, start, first, N, D, ROWS, BLOCK_D), _rows(h, start, first, N, D, ROWS, BLOCK_D)
    total_, mu_ = _numbers(total, head, token, N), _numbers(mu, head, token, N)
    a_, e_ = _numbers(a, head, token, N), _numbers(e, head, token, N)
    sum_q, sum_tq = tl.zeros((ROWS, BLOCK_D), tl.float32), tl.zeros((ROWS, BLOCK_D), tl.float32)
    for at in range(0, N, COLUMNS):
        key, moved_key = _rows(k, start, at, N, D, COLUMNS, BLOCK_D), _rows(tk, start, at, N, D, COLUMNS, BLOCK_D)
        value, moved_value = _rows(v, start, at, N, D, COLUMNS, BLOCK_D), _rows(tv, start, at, N, D, COLUMNS, BLOCK_D)
        both = (token < N)[:, None] & (at + tl.arange(0, COLUMNS) < N)[None, :]
        _, _, d_scores, d_moved = _pairs(
            query,
            moved_query,
            one,
            two,
            key,
            moved_key,
            value,
            moved_value,
            total_,
            mu_,
            a_,
            e_,
            both,
            scale,
            log2e,
            PRECISION,
        )
        kind = query.dtype
        sum_q = tl.dot(d_scores.to(kind), key, sum_q, input_precision=PRECISION)
        sum_q = tl.dot(d_moved.to(kind), moved_key, sum_q, input_precision=PRECISION)
        sum_tq = tl.dot(d_moved.to(kind), key, sum_tq, input_precision=PRECISION)
    _put(d_q, start, first, sum_q * scale, N, D, ROWS, BLOCK_D)
    _put(d_tq, start, first, sum_tq * scale, N, D, ROWS, BLOCK_D)
