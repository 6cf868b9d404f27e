"""Draws the pictures of `docs/recurrences.md` with the cells of the library.

    python docs/site/pictures.py

Backgrounds are transparent and text is gray, so that one file suits light and dark pages.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle  # noqa: E402

from xlstm_jax.cells import mlstm_scan, slstm_scan  # noqa: E402
from xlstm_jax.cells.logspace import log_sigmoid  # noqa: E402

FOLDER = Path(__file__).parents[1] / "images"
GRAY, BLUE, ORANGE, GREEN = "#7d858c", "#2a8fb0", "#d9692b", "#4c9a5b"
matplotlib.rcParams.update(
    {
        "svg.hashsalt": "xlstm-jax",
        "svg.fonttype": "path",
        "font.size": 10,
        "text.color": GRAY,
        "axes.edgecolor": GRAY,
        "axes.labelcolor": GRAY,
        "axes.titlesize": 10,
        "axes.titlecolor": GRAY,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": GRAY,
        "ytick.color": GRAY,
        "legend.frameon": False,
    }
)


def save(figure, name: str) -> None:
    """Writes a picture without a date, so that equal pictures are equal files."""
    path = FOLDER / f"{name}.svg"
    figure.savefig(path, transparent=True, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def box(axes, x, y, width, height, text, color):
    shape = FancyBboxPatch((x, y), width, height, "round,pad=0.02,rounding_size=0.06", ec=color)
    shape.set_facecolor((*matplotlib.colors.to_rgb(color), 0.15))
    axes.add_patch(shape)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=color)


def arrow(axes, start, end, color=GRAY, bend=0.0):
    style = dict(arrowstyle="-|>", mutation_scale=11, color=color, shrinkA=1, shrinkB=1)
    axes.add_patch(FancyArrowPatch(start, end, connectionstyle=f"arc3,rad={bend}", **style))


def memory(axes, x, y, height, width, color):
    """A vector or matrix of squares, stronger on the diagonal."""
    size = 0.16
    for i in range(height):
        for j in range(width):
            strength = 0.75 if i == j or width == 1 else 0.25
            face = (*matplotlib.colors.to_rgb(color), strength)
            at = (x + j * size, y + (height - 1 - i) * size)
            axes.add_patch(Rectangle(at, size * 0.9, size * 0.9, facecolor=face))


def cells() -> None:
    """What each cell stores, and what its gates read."""
    figure, plots = plt.subplots(1, 3, figsize=(9.6, 3.3))
    titles = "LSTM", "sLSTM", "mLSTM"
    for axes, title in zip(plots, titles, strict=True):
        axes.set(xlim=(0, 3), ylim=(-0.45, 2.6), aspect="equal")
        axes.axis("off")
        axes.set_title(title, fontsize=13, color=GRAY)
        box(axes, 0.05, 1.05, 0.75, 0.5, "gates", ORANGE)
        arrow(axes, (0.42, 0.45), (0.42, 1.03))
        axes.text(0.42, 0.28, "$x_t$", ha="center", fontsize=12)
        arrow(axes, (0.84, 1.3), (1.25, 1.3))
        arrow(axes, (2.0, 1.3), (2.55, 1.3))
        axes.text(2.75, 1.3, "$h_t$", ha="center", va="center", fontsize=12)
    for axes in plots[:2]:
        arrow(axes, (2.7, 1.55), (0.45, 1.6), BLUE, bend=0.45)
        axes.text(1.6, 2.42, "$h_{t-1}$ mixes the cells of a head", ha="center", color=BLUE)
    memory(plots[0], 1.5, 1.0, 4, 1, GREEN)
    plots[0].text(1.6, -0.02, "cell $c$", ha="center", color=GREEN)
    memory(plots[1], 1.35, 1.0, 4, 1, GREEN)
    memory(plots[1], 1.65, 1.0, 4, 1, BLUE)
    plots[1].text(1.6, -0.02, "cell $c$, normalizer $n$", ha="center", color=GREEN)
    plots[1].text(1.6, -0.34, "exponential input gate", ha="center", color=ORANGE)
    memory(plots[2], 1.3, 1.0, 4, 4, GREEN)
    plots[2].text(1.6, -0.02, "matrix memory $C$, vector $n$", ha="center", color=GREEN)
    plots[2].text(1.6, -0.34, "written with $k_t$, read with $q_t$", ha="center", color=ORANGE)
    plots[2].text(1.6, 2.42, "no $h_{t-1}$: parallel in time", ha="center", color=BLUE)
    save(figure, "cells")


def forms() -> None:
    """The weights of past positions, and the part of them that a chunk computes."""
    T, L = 24, 6
    keys = jax.random.split(jax.random.key(4), 2)
    i = jax.random.normal(keys[0], (T,))
    f = 2.0 + jax.random.normal(keys[1], (T,))
    total = jnp.cumsum(log_sigmoid(f))
    log_weights = jnp.where(jnp.tri(T, dtype=bool), total[:, None] - total[None] + i, -jnp.inf)
    weights = np.asarray(jnp.exp(log_weights - log_weights.max(axis=1, keepdims=True)))
    color = matplotlib.colors.LinearSegmentedColormap.from_list("", ["#2a8fb000", "#2a8fb0ff"])
    figure, plots = plt.subplots(1, 3, figsize=(9.6, 3.2))
    for axes, title in zip(plots, ("recurrent", "parallel", "chunkwise"), strict=True):
        axes.set_title(title, fontsize=12)
        axes.set(xticks=[], yticks=[], xlabel="key position", aspect="equal")
        axes.set(xlim=(-0.5, T - 0.5), ylim=(T - 0.5, -0.5))
    plots[0].set_ylabel("query position")
    plots[0].imshow(np.where(np.eye(T) > 0, weights, 0), cmap=color, vmin=0, vmax=1)
    for t in range(T - 1):
        plots[0].plot([t, t + 1], [t, t + 1], color=GREEN, linewidth=1)
    plots[0].text(T - 1, 2, "one state,\nT steps", ha="right", va="top", color=GREEN)
    plots[1].imshow(weights, cmap=color, vmin=0, vmax=1)
    plots[1].text(T - 1, 2, "T x T weights,\nno state", ha="right", va="top", color=BLUE)
    inside = np.kron(np.eye(T // L), np.ones((L, L))) > 0
    plots[2].imshow(np.where(inside, weights, 0), cmap=color, vmin=0, vmax=1)
    for chunk in range(T // L):
        corner = chunk * L - 0.5
        plots[2].add_patch(Rectangle((corner, corner), L, L, fill=False, ec=BLUE, lw=0.8))
        if chunk:
            past = Rectangle((-0.5, corner), corner + 0.5, L, fc=GREEN, alpha=0.18, lw=0)
            plots[2].add_patch(past)
            middle = (corner - 0.5) / 2
            plots[2].text(middle, corner + L / 2, "$C$", color=GREEN, ha="center", va="center")
    plots[2].text(T - 1, 2, "L x L weights,\nT / L states", ha="right", va="top", color=BLUE)
    save(figure, "forms")


def stabilizer() -> None:
    """Large input gates: the exponential overflows, the scaled factors and h do not."""
    T = 60
    steps = jnp.arange(T)
    i = jnp.where((steps > 15) & (steps < 25), 60.0, 0.0) + 45.0 * (steps > 40)
    i = 30 + i + 2 * jnp.sin(steps)
    f = jnp.full((T,), 2.0)
    x = jnp.stack([i, f, jnp.sin(steps / 3), jnp.full((T,), 4.0)], axis=-1)[None, :, :, None, None]
    r = jnp.zeros((1, 1, 4, 1))
    states = [slstm_scan(x[:, : t + 1], r)[1] for t in range(T)]
    m = jnp.stack([state.m[0, 0, 0] for state in states])
    n = jnp.stack([state.n[0, 0, 0] for state in states])
    h, _ = slstm_scan(x, r)
    log_total = jnp.log(n) + m  # of the normalizer without a stabilizer
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 2.8))
    left.plot(steps, i, color=ORANGE, label="input gate $\\tilde\\imath_t$")
    left.plot(steps, m, color=GREEN, label="stabilizer $m_t$")
    left.plot(steps, log_total, color=BLUE, ls="--", label="log of the sum of weights")
    left.axhline(88.7, color=GRAY, ls=":")
    left.text(0, 86.5, "exp overflows in float32", va="top", fontsize=9)
    left.set(
        xlabel="position",
        ylabel="logarithm",
        title="without the stabilizer: logarithms",
        ylim=(20, 110),
    )
    left.legend(loc="upper right", fontsize=8, ncols=2)
    right.plot(steps, jnp.exp(i - m), color=ORANGE, label="input factor $\\exp(\\tilde\\imath-m)$")
    right.plot(steps, n, color=BLUE, ls="--", label="stored normalizer $n_t$")
    right.plot(steps, h[0, :, 0, 0], color=GREEN, label="hidden state $h_t$")
    right.set(xlabel="position", title="with the stabilizer: stored values", ylim=(-1.3, 10))
    right.legend(loc="upper right", fontsize=8)
    save(figure, "stabilizer")


def check() -> None:
    """The weights that `forms` draws are those of the cell."""
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v = (jax.random.normal(key, (1, 5, 1, 2)) for key in keys[:3])
    i, f = (jax.random.normal(key, (1, 5, 1)) for key in keys[3:])
    total = jnp.cumsum(log_sigmoid(f[0, :, 0]))
    weights = jnp.exp(total[:, None] - total[None] + i[0, :, 0]) * jnp.tri(5)
    weights *= q[0, :, 0] @ k[0, :, 0].T / 2**0.5
    divisor = jnp.maximum(jnp.abs(weights.sum(axis=1)), 1)[:, None]
    h, _ = mlstm_scan(q, k, v, i, f)
    np.testing.assert_allclose(h[0, :, 0], weights @ v[0, :, 0] / divisor, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    check()
    cells()
    forms()
    stabilizer()
