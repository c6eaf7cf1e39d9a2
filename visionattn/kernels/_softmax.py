"""Softmaxes over columns that come in blocks, and what the backward pass needs to compute their weights again."""

import triton
import triton.language as tl


@triton.jit
def online_softmax(logits, top, total):
    """One step of a softmax over columns that come in blocks.

    Takes ``logits (n, m)`` in units of log 2, the largest so far and the sum of exponentials relative to it ``(n,)``.
    Returns exponentials of the block, the factor that what was summed before shrinks by, and the new two.
    """
    new_top = tl.maximum(top, tl.max(logits, 1))
    weights, shrink = tl.exp2(logits - new_top[:, None]), tl.exp2(top - new_top)
    return weights, shrink, new_top, total * shrink + tl.sum(weights, 1)


@triton.jit
def store_stats(stats, at, valid, top, total):
    """Keep of finished softmaxes what `load_stats` gives, rows ``at`` of ``stats``; return the second of it."""
    tl.store(stats + 2 * at, top, mask=valid)
    inverse = 1.0 / total
    tl.store(stats + 2 * at + 1, inverse, mask=valid)
    return inverse


@triton.jit
def load_stats(stats, at, valid):
    """Largest logits and inverse sums of exponentials; weights are ``exp2(logits - top) * inverse``.

    One log-sum-exp in place of the two would be rounded to its own size, which puts all weights of a row wrong alike:
    by two to three times as much as the softmax itself, from some 30 keys on. Rows that are not valid weigh nothing.
    """
    return tl.load(stats + 2 * at, mask=valid, other=0.0), tl.load(stats + 2 * at + 1, mask=valid, other=0.0)
