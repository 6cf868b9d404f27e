"""The cells as the papers define them: NumPy, one sequence and one head at a time, no stabilizer.

Without a stabilizer the formulas are valid for moderate gates only. States are unscaled: the leaves
of our states times exp(m).

Source: Beck et al. 2024, arXiv:2405.04517, sections 2.2 and 2.3; the LSTM: Hochreiter &
Schmidhuber 1997.
"""

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm(state, x, r, b):
    """One step of one head: `x` (4, K), `r` (K, 4, K), `b` (4, K)."""
    c, h = state
    i, f, z, o = x + np.einsum("k,kgj->gj", h, r) + b
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(z)
    h = sigmoid(o) * np.tanh(c)
    return (c, h), h


def slstm(state, x, r, b, forget_gate="sigmoid"):
    """One step of one head, in the form without a stabilizer."""
    c, n, h = state
    i, f, z, o = x + np.einsum("k,kgj->gj", h, r) + b
    forget = np.exp(f) if forget_gate == "exp" else sigmoid(f)
    c = forget * c + np.exp(i) * np.tanh(z)
    n = forget * n + np.exp(i)
    h = sigmoid(o) * c / n
    return (c, n, h), h


def mlstm(state, q, k, v, i, f, input_gate="exp", forget_gate="sigmoid", normalize=True):
    """One step of one head; 1/sqrt(K) is applied to q."""
    C, n = state
    input_factor = np.exp(i) if input_gate == "exp" else sigmoid(i)
    forget = np.exp(f) if forget_gate == "exp" else sigmoid(f)
    C = forget * C + input_factor * np.outer(k, v)
    n = forget * n + input_factor * k
    q = q / np.sqrt(len(q))
    norm = max(abs(q @ n), 1.0) if normalize else 1.0
    return (C, n), q @ C / norm


def run(step, state, inputs, reset, mask):
    """Run a sequence, `inputs` being a list of tuples; returns the list of h and the last state."""
    hs = []
    for x, is_reset, is_valid in zip(inputs, reset, mask, strict=True):
        if not is_valid:
            hs.append(None)
            continue
        if is_reset:
            state = tuple(np.zeros_like(leaf) for leaf in state)
        state, h = step(state, *x)
        hs.append(h)
    return [np.zeros_like(h) if x is None else x for x in hs], state
