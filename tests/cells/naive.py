"""The cells as the papers write them: NumPy, one sequence and one head at a time, no stabiliser.

Exponential gates are exponentiated as they are, so this holds for moderate gates only. The memory
is the true one: what our states hold times exp(m).

Source: Beck et al. 2024, arXiv:2405.04517, sections 2.2 and 2.3; the LSTM: Hochreiter &
Schmidhuber 1997.
"""

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm(memory, x, r, b):
    """One step of one head: `x` (4, K), `r` (K, 4, K), `b` (4, K)."""
    c, h = memory
    i, f, z, o = x + np.einsum("k,kgj->gj", h, r) + b
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(z)
    h = sigmoid(o) * np.tanh(c)
    return (c, h), h


def slstm(memory, x, r, b, forget_gate="sigmoid"):
    """One step of one head, in the unstabilised form."""
    c, n, h = memory
    i, f, z, o = x + np.einsum("k,kgj->gj", h, r) + b
    forget = np.exp(f) if forget_gate == "exp" else sigmoid(f)
    c = forget * c + np.exp(i) * np.tanh(z)
    n = forget * n + np.exp(i)
    h = sigmoid(o) * c / n
    return (c, n, h), h


def mlstm(memory, q, k, v, i, f, input_gate="exp", normalize=True):
    """One step of one head; the factor 1/sqrt(K) is on q."""
    C, n = memory
    write = np.exp(i) if input_gate == "exp" else sigmoid(i)
    C = sigmoid(f) * C + write * np.outer(k, v)
    n = sigmoid(f) * n + write * k
    q = q / np.sqrt(len(q))
    norm = max(abs(q @ n), 1.0) if normalize else 1.0
    return (C, n), q @ C / norm


def run(step, memory, inputs, reset, mask):
    """A sequence: `inputs` a list of tuples, flags a list each; returns h and the last memory."""
    hs = []
    for x, forget, valid in zip(inputs, reset, mask, strict=True):
        if not valid:
            hs.append(None)
            continue
        if forget:
            memory = tuple(np.zeros_like(leaf) for leaf in memory)
        memory, h = step(memory, *x)
        hs.append(h)
    return [np.zeros_like(h) if x is None else x for x in hs], memory
