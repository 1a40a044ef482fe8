"""Compiled routines for steps of few tokens on CPU, where calling small operations costs more than what they compute.

    conv_step    the Mamba convolution of decoding steps, with the roll-back of drafts       conv_update.py
    ssm_step     the recurrent state of the same steps                                      ssm_update.py
    moe_rows     router, chosen experts, shared experts                                     latent_moe.py
    head_enter   the MTP head from token and hidden state to queries, keys and values       mtp_draft.py
    head_leave   the MTP head from attention to the next draft and its log-probability      mtp_draft.py
    verify_rows  which drafts stand, and the token behind them                               rejection.py

One token of a small model takes some fifty PyTorch operations where one routine does. What each computes is written out in the module
that calls it, in PyTorch, which also serves what these do not: other types than float32, many tokens, unusual shapes.

Signatures are given, so that all is compiled when this is imported, and nothing later: by an engine's first step, in some fifteen
seconds, and in two once numba has it on disk. Nobody else imports this.
`[:, ::1]` is contiguous, `[:, :]` may be a view. Sums may be reordered, so that they use vector instructions; nothing else is relaxed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import b1, f4, f8, i4, i8, void
from torch import Tensor

SOFTPLUS_LINEAR = np.float32(20.0)
"""Above it softplus(x) is x, as in PyTorch."""


def compiled(signature: Any = None, *, reorder: bool = True) -> Any:
    """Compile a function, and keep it on disk beside this file or in the user's cache; if neither can be written, at each start anew."""
    given = () if signature is None else (signature,)
    options = {"nogil": True, "fastmath": {"reassoc", "contract", "nsz"} if reorder else {"contract"}, "error_model": "numpy"}

    def compile_and_keep(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(*given, cache=True, **options)(function)
        except RuntimeError:  # "no locator available", as numba says
            return numba.njit(*given, **options)(function)

    return compile_and_keep


def views(*tensors: Tensor) -> tuple[Any, ...]:
    """The same memory as NumPy arrays."""
    return tuple(t.detach().numpy() for t in tensors)


LEAST, MOST = np.float32(-87.3), np.float32(88.0)
"""Between them exp(x) is a normal float32."""
LOG2_E, LN_2, LN_2_REST = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)


@compiled(reorder=False)
def _exp(x, out):  # type: ignore[no-untyped-def]
    """exp of x [N] into another array, to 4e-7 of its value, and 0 below LEAST: Cephes' expf without branches, so that it is vectorised.

    x = n ln 2 + r with |r| <= ln 2 / 2, and 2^n is written down as its bits."""
    bits = np.empty(len(x), np.int32)
    for i in range(len(x)):
        bound = min(max(x[i], LEAST), MOST)
        n = np.floor(bound * LOG2_E + np.float32(0.5))
        r = bound - n * LN_2 - n * LN_2_REST
        series = np.float32(1.9875691500e-4) * r + np.float32(1.3981999507e-3)
        series = series * r + np.float32(8.3334519073e-3)
        series = series * r + np.float32(4.1665795894e-2)
        series = series * r + np.float32(1.6666665459e-1)
        series = series * r + np.float32(5.0000001201e-1)
        out[i] = series * r * r + r + np.float32(1)
        bits[i] = (np.int32(n) + np.int32(127)) << np.int32(23)
    scale = bits.view(np.float32)
    for i in range(len(x)):
        value = np.float32(0) if x[i] < LEAST else out[i] * scale[i]
        out[i] = value if x[i] == x[i] else x[i]


# --- Mamba-2, drafts included -----------------------------------------------------------------------------------------


@compiled(void(f4[:, :], f4[:, :, :], f4[:, :], f4[:], b1, i4[:], i4[:], i4[:], f4[:, ::1]))
def conv_step(x, state, weight, bias, silu, slots, accepted, starts, out):  # type: ignore[no-untyped-def]
    """x [T, D], state [slots, D, W - 1 + k] updated, weight [D, W], bias [D], slots and accepted [S], starts [S + 1], out [T, D]."""
    dim, width = weight.shape
    taps, window = np.empty((width, dim), np.float32), np.empty((width + state.shape[2], dim), np.float32)
    negative, power = np.empty(dim, np.float32), np.empty(dim, np.float32)
    for i in range(width):
        for d in range(dim):
            taps[i, d] = weight[d, i]
    for s in range(len(slots)):
        begin, count = starts[s], starts[s + 1] - starts[s]
        if count == 0:
            continue
        held, offset = state[slots[s]], max(accepted[s] - 1, 0)
        for i in range(width - 1):
            for d in range(dim):
                window[i, d] = held[d, offset + i]
        for j in range(count):
            for d in range(dim):
                window[width - 1 + j, d] = x[begin + j, d]
        for j in range(count):
            total = out[begin + j]
            for d in range(dim):
                total[d] = bias[d]
            for i in range(width):
                past, tap = window[j + i], taps[i]
                for d in range(dim):
                    total[d] += past[d] * tap[d]
            if silu:
                for d in range(dim):
                    negative[d] = -total[d]
                _exp(negative, power)
                for d in range(dim):
                    total[d] = total[d] / (np.float32(1) + power[d])
        for i in range(width - 2 + count):
            for d in range(dim):
                held[d, i] = window[1 + i, d]


_TOKENS = f4[:, :, :]


@compiled(void(f4[:, :, :, :], _TOKENS, _TOKENS, _TOKENS, _TOKENS, _TOKENS, f4[:, :], f4[:, :], i4[:, :], i4[:], i4[:], _TOKENS))
def ssm_step(state, x, dt, A, B, C, D, dt_bias, slots, accepted, starts, out):  # type: ignore[no-untyped-def]
    """state [slots, H, P, N] updated, x [T, H, P], dt [T, H, P], A [H, P, N], D and dt_bias [H, P], B and C [T, G, N], slots [S, 1 + k],
    accepted [S], starts [S + 1], out [T, H, P] written. Of dt, A, D and dt_bias there is one value for each head."""
    _, heads, size, width = state.shape
    per_group = heads // B.shape[1]
    now = np.empty((size, width), np.float32)
    b, c = np.empty(width, np.float32), np.empty(width, np.float32)
    for s in range(len(slots)):
        begin, count = starts[s], starts[s + 1] - starts[s]
        if count == 0:
            continue
        source = slots[s, max(accepted[s] - 1, 0)]
        for h in range(heads):
            for p in range(size):
                for n in range(width):
                    now[p, n] = state[source, h, p, n]
            for j in range(count):
                t, target = begin + j, slots[s, j]
                step = dt[t, h, 0] + dt_bias[h, 0]
                if step <= SOFTPLUS_LINEAR:
                    step = np.log1p(np.exp(step))
                decay = np.exp(step * A[h, 0, 0])
                for n in range(width):
                    b[n], c[n] = B[t, h // per_group, n], C[t, h // per_group, n]
                for p in range(size):
                    add, y = step * x[t, h, p], np.float32(0)
                    for n in range(width):
                        value = now[p, n] * decay + add * b[n]
                        now[p, n] = value
                        y += value * c[n]
                    out[t, h, p] = y + D[h, 0] * x[t, h, p]
                for p in range(size):
                    for n in range(width):
                        state[target, h, p, n] = now[p, n]


# --- products with weights --------------------------------------------------------------------------------------------


@compiled()
def _dot(a, b):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for i in range(len(a)):
        total += a[i] * b[i]
    return total


@compiled()
def _linear(x, weight, out):  # type: ignore[no-untyped-def]
    """out [T, N] = x [T, K] weight [N, K]^T; a row of the weight is read once for all tokens, and one of x for four of the weight."""
    whole = len(weight) // 4 * 4
    for n in range(0, whole, 4):
        row0, row1, row2, row3 = weight[n], weight[n + 1], weight[n + 2], weight[n + 3]
        for t in range(len(x)):
            token = x[t]
            total0, total1, total2, total3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            for i in range(x.shape[1]):
                total0 += token[i] * row0[i]
                total1 += token[i] * row1[i]
                total2 += token[i] * row2[i]
                total3 += token[i] * row3[i]
            out[t, n], out[t, n + 1], out[t, n + 2], out[t, n + 3] = total0, total1, total2, total3
    for n in range(whole, len(weight)):
        for t in range(len(x)):
            out[t, n] = _dot(x[t], weight[n])


@compiled()
def _norm(x, weight, epsilon, out):  # type: ignore[no-untyped-def]
    """RMSNorm of rows [T, K]."""
    for t in range(len(x)):
        scale = np.float32(1) / np.sqrt(_dot(x[t], x[t]) / np.float32(x.shape[1]) + epsilon)
        for i in range(x.shape[1]):
            out[t, i] = x[t, i] * scale * weight[i]


@compiled()
def _relu_squared(x):  # type: ignore[no-untyped-def]
    for t in range(len(x)):
        for i in range(x.shape[1]):
            positive = max(x[t, i], np.float32(0))
            x[t, i] = positive * positive


@compiled()
def _moe(x, gate, bias, top_k, normalise, scale, fc1, up, down, fc2, shared_up, shared_down, out):  # type: ignore[no-untyped-def]
    """x [T, D], gate [E, D], bias [E], fc1 [L, D], up [E, I, L], down [L, E, I], fc2 [D, L], shared_up [S, D], shared_down [D, S], out.

    out is [T, D]. S may be 0. Of experts that are equally good, the first is chosen.
    """
    count, experts = len(x), len(gate)
    latent, inner = len(fc1), up.shape[1]
    scores = np.empty((count, experts), np.float32)
    _linear(x, gate, scores)
    z, mixed = np.empty((count, latent), np.float32), np.zeros((count, latent), np.float32)
    _linear(x, fc1, z)
    choice, h = np.empty(experts, np.float32), np.empty(inner, np.float32)
    chosen, weights = np.empty(top_k, np.int64), np.empty(top_k, np.float32)
    for t in range(count):
        for e in range(experts):
            scores[t, e] = np.float32(1) / (np.float32(1) + np.exp(-scores[t, e]))
            choice[e] = scores[t, e] + bias[e]
        total = np.float32(0)
        for k in range(top_k):
            best = 0
            for e in range(experts):
                if choice[e] > choice[best]:
                    best = e
            chosen[k], weights[k] = best, scores[t, best]
            total += scores[t, best]
            choice[best] = -np.inf
        for k in range(top_k):
            e = chosen[k]
            share = weights[k] * scale / (total + np.float32(1e-20)) if normalise else weights[k] * scale
            for i in range(inner):
                positive = max(_dot(z[t], up[e, i]), np.float32(0))
                h[i] = positive * positive * share
            for i in range(latent):
                mixed[t, i] += _dot(h, down[i, e])
    _linear(mixed, fc2, out)
    if len(shared_up):
        inside, outside = np.empty((count, len(shared_up)), np.float32), np.empty_like(out)
        _linear(x, shared_up, inside)
        _relu_squared(inside)
        _linear(inside, shared_down, outside)
        out += outside


_MOE = (f4[:, ::1], f4[::1], i8, b1, f4, f4[:, ::1], f4[:, :, ::1], f4[:, :, ::1], f4[:, ::1], f4[:, ::1], f4[:, ::1])


@compiled(void(f4[:, ::1], *_MOE, f4[:, ::1]))
def moe_rows(x, gate, bias, top_k, normalise, scale, fc1, up, down, fc2, shared_up, shared_down, out):  # type: ignore[no-untyped-def]
    _moe(x, gate, bias, top_k, normalise, scale, fc1, up, down, fc2, shared_up, shared_down, out)


# --- the MTP head -----------------------------------------------------------------------------------------------------


@compiled(void(i8[:], f4[:, ::1], f4[:, ::1], f4[::1], f4[::1], f4[:, ::1], f4[::1], f4[:, ::1], f4, f4[:, ::1], f4[:, ::1]))
def head_enter(ids, hidden, embedding, enorm, hnorm, eh_proj, norm, qkv_proj, epsilon, x, qkv):  # type: ignore[no-untyped-def]
    """Tokens [T] and hidden states [T, D] -> residual x [T, D] and qkv [T, Q + 2 K], both written."""
    count, dim = hidden.shape
    both, normed, token = np.empty((count, 2 * dim), np.float32), np.empty((count, dim), np.float32), np.empty((count, dim), np.float32)
    for t in range(count):
        token[t] = embedding[ids[t]]
    _norm(token, enorm, epsilon, normed)
    both[:, :dim] = normed
    _norm(hidden, hnorm, epsilon, normed)
    both[:, dim:] = normed
    _linear(both, eh_proj, x)
    _norm(x, norm, epsilon, normed)
    _linear(normed, qkv_proj, qkv)


@compiled(void(f4[:, ::1], f4[:, ::1], f4[:, ::1], f4[::1], *_MOE, f4[::1], f4[:, ::1], f4, f4[:, ::1], i8[::1], f4[::1]))
def head_leave(  # type: ignore[no-untyped-def]
    x, attended, o_proj, norm, gate, bias, top_k, normalise, scale, fc1, up, down, fc2, shared_up, shared_down, final_norm, lm_head,
    epsilon, hidden, draft, logprob,
):  # fmt: skip
    """Residual x [T, D] (spoilt) and attention [T, Q] -> hidden [T, D], most likely token [T] and its log-probability [T], written."""
    normed, moved = np.empty_like(x), np.empty_like(x)
    _linear(attended, o_proj, moved)
    x += moved
    _norm(x, norm, epsilon, normed)
    _moe(normed, gate, bias, top_k, normalise, scale, fc1, up, down, fc2, shared_up, shared_down, moved)
    x += moved
    _norm(x, final_norm, epsilon, hidden)
    logits = np.empty((len(x), len(lm_head)), np.float32)
    below, power = np.empty(len(lm_head), np.float32), np.empty(len(lm_head), np.float32)
    _linear(hidden, lm_head, logits)
    for t in range(len(x)):
        best = 0
        for v in range(len(lm_head)):
            if logits[t, v] > logits[t, best]:
                best = v
        total = np.float32(0)
        for v in range(len(lm_head)):
            below[v] = logits[t, v] - logits[t, best]
        _exp(below, power)
        for v in range(len(lm_head)):
            total += power[v]
        draft[t], logprob[t] = best, -np.log(total)


# --- verification -----------------------------------------------------------------------------------------------------


@compiled(void(f4[:, ::1], f4[:], i8[:], i8[:], f8[:], f8[:], i8[:, ::1], f4[:, ::1], i8[:, ::1]))
def verify_rows(logits, temperature, drafts, counts, uniform, draws, tokens, logprobs, ranks):  # type: ignore[no-untyped-def]
    """logits [N, V], temperature [S] with 0 for the most likely token, drafts and uniform [N - S], counts [S] of rows, draws [S].

    Written up to each sequence's last token: tokens, logprobs and ranks [S, longest]. Rows behind a refused draft are not looked at.
    Of what is left of a row each token has its share of [0, 1), and that one is taken in whose share the sequence's draw lies: a number
    for each sequence, where comparing all tokens by noise takes one for each token."""
    vocab, row, draft = logits.shape[1], 0, 0
    below, power = np.empty(vocab, np.float32), np.empty(vocab, np.float32)
    for s in range(len(counts)):
        greedy = temperature[s] == 0
        scale = np.float32(1) if greedy else np.float32(1) / temperature[s]
        for j in range(counts[s]):
            here = logits[row + j]
            best = 0
            for v in range(vocab):
                if here[v] > here[best]:
                    best = v
            total = np.float32(0)
            for v in range(vocab):
                below[v] = (here[v] - here[best]) * scale
            _exp(below, power)
            for v in range(vocab):
                total += power[v]
            refused, token = -1, -1
            if j < counts[s] - 1:
                drafted = drafts[draft + j]
                if (drafted == best) if greedy else (uniform[draft + j] < np.float64(power[drafted]) / np.float64(total)):
                    token = drafted
                else:
                    refused = drafted
            stands = token >= 0
            if not stands and greedy:
                token = best
            elif not stands:
                if refused >= 0:
                    power[refused] = 0
                left, reached = np.float64(0), np.float64(0)
                for v in range(vocab):
                    left += power[v]
                token, left = best, left * draws[s]  # some token also where nothing is a number: a step must bring one
                for v in range(vocab):
                    if power[v] > 0:
                        token, reached = v, reached + power[v]
                        if reached > left:
                            break
            tokens[s, j], logprobs[s, j] = token, below[token] - np.log(total)
            rank = 0
            for v in range(vocab):
                rank += here[v] >= here[token]
            ranks[s, j] = rank
            if not stands:
                break
        row, draft = row + counts[s], draft + counts[s] - 1
