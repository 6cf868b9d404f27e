"""Can a trained Transformer be distilled to an xLSTM, with a fraction of its training tokens?

A student has the teacher's width and depth. Each attention is replaced by an mLSTM ("xlstm"), or by
an mLSTM and a short window of attention ("hybrid"). It inherits all other weights, and those of
queries, keys, values and outputs. Two losses train it, one after the other:

    hidden     squared differences of the hidden states after every block, relative to their size
    sparse_kl  divergence from the teacher's most likely tokens, with all others as one

Both are a `loss_fn` of `fit`. The same student is also trained on tokens for as many steps, from
inherited weights ("inherited") and from new ones ("scratch").

Expected: distilled students have a lower validation loss than both, and predict the teacher's
tokens more often. The hybrid one is within 5 % of the teacher. States do not grow with the length.

    python experiments/distillation.py                    # runs/distillation, results, a picture
    python experiments/distillation.py --teacher RUN      # a run of attention blocks (letter a)

A folder of transformers (Llama or Qwen) is converted to a run by `xlstm-jax convert hf-to-run`.

Sources: arXiv:2408.10189 (hidden states, then logits), arXiv:2503.13427 (blocks).
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import record
from experiments.benchmarks import measure
from xlstm_jax import cpu, flops
from xlstm_jax.config import ConfigError, load_config, to_dict
from xlstm_jax.data import DataConfig, eval_batches, load
from xlstm_jax.data.batch import Batch
from xlstm_jax.modules import LM, LMConfig
from xlstm_jax.ops.cross_entropy import CrossEntropy
from xlstm_jax.train import ExperimentConfig, TrainConfig, checkpoint, fit, rundir
from xlstm_jax.typing import Array, Float, PyTree

CPU = ExperimentConfig(
    name="distillation",
    model=LMConfig(vocab_size=257, dim=128, pattern="aaaa", final_norm="rms", final_norm_eps=1e-6),
    data=DataConfig(seq_len=128, batch_size=16),
    train=TrainConfig(
        steps=1600, lr=2e-3, log_every=50, eval_every=200, eval_batches=20, checkpoint_every=0
    ),
)
SMOKE = dataclasses.replace(
    CPU,
    model=dataclasses.replace(CPU.model, dim=32, pattern="aa"),
    data=dataclasses.replace(CPU.data, seq_len=32, batch_size=8),
    train=dataclasses.replace(CPU.train, steps=4, log_every=2, eval_every=4, eval_batches=2),
)
SIZES = {"smoke": SMOKE, "cpu": CPU}
STEPS = {"smoke": {"hidden": 2, "sparse_kl": 2}, "cpu": {"hidden": 100, "sparse_kl": 300}}
STUDENTS = {"xlstm": "M", "hybrid": "h"}
WINDOW = 16
TOP_K = 16

# Names of the teacher's weights -> names of the student's, in a block of each letter.
NAMES = {
    "M": {"attention": "mlstm", "norm_attention": "norm_mlstm"},
    "h": {"attention": "hybrid", "norm_attention": "norm_mixer"},
}

Loss = Callable[..., tuple[Float[Array, ""], CrossEntropy]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(measure.Arguments):
    """What to run, and where."""

    size: Literal["smoke", "cpu"] = "cpu"
    out: pathlib.Path | None = record.RESULTS / "distillation.json"  # the plot is next to it
    runs: pathlib.Path = pathlib.Path("runs/distillation")
    teacher: pathlib.Path | None = None  # a run; None: train one


def config(size: str = "cpu") -> ExperimentConfig:
    """The run that trains the teacher.

    Raises:
        ConfigError: `size` is unknown.
    """
    record.check_size(size, SIZES)
    return SIZES[size]


def student_config(teacher: LMConfig, letter: str) -> LMConfig:
    """A model of the teacher's sizes with blocks of another letter.

    Raises:
        ConfigError: the teacher has other blocks than attention, or fewer heads of keys.
    """
    attention = teacher.attention
    if set(teacher.pattern) != {"a"}:
        raise ConfigError(
            f"the teacher's pattern={teacher.pattern!r} must have attention blocks (letter a) only."
        )
    if attention.num_kv_heads not in (None, attention.num_heads):
        raise ConfigError(
            f"the teacher's num_kv_heads={attention.num_kv_heads} must equal its num_heads="
            f"{attention.num_heads}; repeat the weights of its keys and values first."
        )
    heads, ffn_dim, dim = attention.num_heads, attention.ffn_dim, teacher.dim
    large = dataclasses.replace(
        teacher.large, num_heads=heads, ffn_dim=ffn_dim, qk_dim=dim, v_dim=dim
    )
    hybrid = dataclasses.replace(
        teacher.hybrid, num_heads=heads, ffn_dim=ffn_dim, window=WINDOW, num_sinks=1
    )
    pattern = letter * len(teacher.pattern)
    return dataclasses.replace(teacher, pattern=pattern, large=large, hybrid=hybrid)


def inherit(teacher: PyTree, student: PyTree, letter: str) -> tuple[PyTree, int]:
    """The student's parameters, with the teacher's where names and shapes are equal.

    Returns the parameters, and how many numbers come from the teacher.
    """
    sources = {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(teacher)}
    inherited = 0

    def choose(path, own: jax.Array) -> jax.Array:
        nonlocal inherited
        name = jax.tree_util.keystr(path).replace(f"['{letter}']", "['a']")
        for theirs, ours in NAMES[letter].items():
            name = name.replace(f"['{ours}']", f"['{theirs}']")
        source = sources.get(name)
        if source is None or source.shape != own.shape:
            return own
        inherited += own.size
        return source

    return jax.tree.map_with_path(choose, student), inherited


def hidden_loss(student: LM, teacher: LM, teacher_params: PyTree) -> Loss:
    """Differences of the hidden states after every block, summed over positions."""

    def hidden(model: LM, params: PyTree, batch: Batch) -> Float[Array, "layers B T D"]:
        segments = batch.segment_ids
        outputs = model.apply(
            {"params": params}, batch.inputs, segment_ids=segments, head=False, capture=("hidden",)
        )
        return outputs[2]["hidden"].astype(jnp.float32)

    def loss_fn(params: PyTree, batch: Batch, dropout_key=None):
        del dropout_key
        target = jax.lax.stop_gradient(hidden(teacher, teacher_params, batch))
        error = jnp.sum((hidden(student, params, batch) - target) ** 2, axis=-1)
        relative = jnp.mean(error / jnp.sum(target**2, axis=-1), axis=0)
        return _sums(relative, batch)

    return loss_fn


def sparse_kl_loss(student: LM, teacher: LM, teacher_params: PyTree, top_k: int = TOP_K) -> Loss:
    """`sparse_kl` of the teacher's and the student's logits, summed over positions."""

    def loss_fn(params: PyTree, batch: Batch, dropout_key=None):
        del dropout_key
        segments = batch.segment_ids
        target, _ = teacher.apply({"params": teacher_params}, batch.inputs, segment_ids=segments)
        logits, _ = student.apply({"params": params}, batch.inputs, segment_ids=segments)
        return _sums(sparse_kl(jax.lax.stop_gradient(target), logits, top_k), batch)

    return loss_fn


def sparse_kl(
    teacher: Float[Array, "*B V"], student: Float[Array, "*B V"], top_k: int
) -> Float[Array, "*B"]:
    """Divergence over the teacher's `top_k` tokens, with the rest as one, in nats."""
    tiny = 1e-6
    log_p, log_q = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (teacher, student))
    log_p, tokens = jax.lax.top_k(log_p, top_k)
    log_q = jnp.take_along_axis(log_q, tokens, axis=-1)
    rest_p, rest_q = (jnp.maximum(1 - jnp.exp(x).sum(-1), tiny) for x in (log_p, log_q))
    rest = rest_p * (jnp.log(rest_p) - jnp.log(rest_q))
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1) + rest


def _sums(loss: Float[Array, "B T"], batch: Batch) -> tuple[Float[Array, ""], CrossEntropy]:
    """The sum over targets, as `fit` expects it; its log shows the mean as the loss."""
    total, zero = jnp.sum(loss * batch.weights), jnp.zeros(())
    return total, CrossEntropy(total, zero, jnp.sum(batch.weights), zero)


LOSSES = {"hidden": hidden_loss, "sparse_kl": sparse_kl_loss}


class Evaluation(NamedTuple):
    """What a model predicts on validation text."""

    loss: float  # nats per token
    tokens: np.ndarray  # the most likely one at every position


def evaluate(cfg: ExperimentConfig, params: PyTree) -> Evaluation:
    """Validation loss and predictions."""
    model = LM(cfg.model)

    @jax.jit
    def run(params, batch: Batch):
        logits, _ = model.apply({"params": params}, batch.inputs, segment_ids=batch.segment_ids)
        log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
        losses = -jnp.take_along_axis(log_p, batch.targets[..., None], axis=-1)[..., 0]
        return jnp.sum(losses * batch.weights), jnp.sum(batch.weights), jnp.argmax(logits, axis=-1)

    batches = eval_batches(load(cfg.data, "valid"), cfg.data, cfg.train.eval_batches)
    nats, counts, tokens = zip(
        *(jax.device_get(run(params, batch)) for batch in batches), strict=True
    )
    return Evaluation(float(sum(nats) / sum(counts)), np.concatenate(tokens))


def distill(
    cfg: ExperimentConfig,
    teacher_params: PyTree,
    expected: Evaluation,
    name: str,
    steps: dict[str, int],
    runs: pathlib.Path,
) -> dict[str, Any]:
    """Trains one student by both losses and on tokens; returns losses, sizes and seconds."""
    letter, start = STUDENTS[name], time.perf_counter()
    teacher, model = LM(cfg.model), student_config(cfg.model, letter)
    student, tokens = LM(model), jnp.zeros((1, 8), jnp.int32)
    fresh = jax.jit(student.init)(jax.random.key(cfg.train.seed + 1), tokens)["params"]
    params, inherited = inherit(teacher_params, fresh, letter)
    base = dataclasses.replace(cfg, model=model)
    losses, agreement = {}, {}

    def train(kind: str, source: pathlib.Path | None, count: int, **options) -> pathlib.Path:
        run = dataclasses.replace(
            base,
            name=f"{name}_{kind}",
            init_from=None if source is None else str(source),
            train=dataclasses.replace(cfg.train, steps=count),
        )
        result = evaluate(base, fit(run, runs / run.name, console=True, **options).state.params)
        losses[kind] = result.loss
        agreement[kind] = float(np.mean(result.tokens == expected.tokens))
        return runs / run.name

    first = source = save_run(base, params, runs / f"{name}_first")
    for kind, count in steps.items():
        loss_fn = LOSSES[kind](student, teacher, teacher_params)
        source = train(kind, source, count, loss_fn=loss_fn)
    train("inherited", first, sum(steps.values()))
    train("scratch", None, sum(steps.values()))
    return {
        "config": to_dict(base),
        "valid_loss": losses,
        "agreement": agreement,  # share of positions with the teacher's most likely token
        "inherited": inherited / sum(x.size for x in jax.tree.leaves(params)),
        "state_bytes": {T: flops.state_bytes(model, 1, T) for T in (256, 2048)},
        "seconds": round(time.perf_counter() - start, 1),
    }


def save_run(cfg: ExperimentConfig, params: PyTree, folder: pathlib.Path) -> pathlib.Path:
    """A run that has these parameters and no step, for `init_from`."""
    if not (folder / rundir.CONFIG).exists():
        rundir.prepare(folder, cfg, {}, step=0)
        checkpoint.save_params(folder, params, to_dict(cfg))
    return folder


def train_teacher(cfg: ExperimentConfig, folder: pathlib.Path) -> pathlib.Path:
    """The run of a teacher with the sizes of `cfg`."""
    fit(dataclasses.replace(cfg, name="teacher"), folder, console=True)
    return folder


def main(args: Arguments) -> int:
    """Trains teacher and students; returns 1 if an expectation does not hold."""
    cpu.prepare()
    start, cfg, steps = time.perf_counter(), config(args.size), STEPS[args.size]
    folder = args.teacher or train_teacher(cfg, args.runs / "teacher")
    cfg = dataclasses.replace(cfg, model=load_config(folder, ExperimentConfig).model)
    params = checkpoint.restore_params(folder)[1]
    teacher = evaluate(cfg, params)
    result = measure.run_info("distillation")
    result |= {"size": args.size, "steps": steps, "teacher": {"valid_loss": teacher.loss}}
    result["students"] = {
        name: distill(cfg, params, teacher, name, steps, args.runs) for name in STUDENTS
    }
    result["outcome"] = outcome(result)
    result["seconds"] = round(time.perf_counter() - start, 1)
    measure.write(args.out, result)
    if args.out is not None:
        plot(result, args.out.with_suffix(".png"))
    return record.print_outcome(args.size, result["outcome"])


def outcome(result: dict[str, Any]) -> dict[str, bool]:
    """Whether each expectation holds."""
    expectations = {}
    for name, student in result["students"].items():
        losses = student["valid_loss"]
        for other in ("inherited", "scratch"):
            key = f"{name}: lower loss when distilled than {other}"
            expectations[key] = losses["sparse_kl"] < losses[other]
        agreement = student["agreement"]
        key = f"{name}: predicts the teacher's bytes more often when distilled than inherited"
        expectations[key] = agreement["sparse_kl"] > agreement["inherited"]
    hybrid = result["students"]["hybrid"]["valid_loss"]["sparse_kl"]
    expectations["hybrid: within 5 % of the teacher"] = (
        hybrid < 1.05 * result["teacher"]["valid_loss"]
    )
    return expectations


def plot(result: dict[str, Any], path: pathlib.Path) -> None:
    """Plots validation loss and agreement with the teacher of every student."""
    plt = record.pyplot()
    labels = {"scratch": "tokens,\nnew weights", "inherited": "tokens,\ninherited weights"}
    labels |= {"hidden": "hidden\nstates", "sparse_kl": "hidden states,\nthen sparse KL"}
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4), layout="constrained")
    for number, (name, student) in enumerate(result["students"].items()):
        for axes, key in ((left, "valid_loss"), (right, "agreement")):
            axes.plot(
                list(labels.values()),
                [student[key][kind] for kind in labels],
                "os"[number],
                color=f"C{number}",
                ms=8,
                label=name,
            )
    teacher = result["teacher"]["valid_loss"]
    left.axhline(teacher, color="0.3", lw=1, ls="--", label="teacher")
    left.set_ylabel("validation nats per byte")
    right.set_ylabel("share of the teacher's most likely bytes")
    for axes in (left, right):
        axes.grid(axis="y", alpha=0.3)
        axes.tick_params(axis="x", labelsize=8)
        axes.margins(x=0.12)
    left.legend(frameon=False)
    figure.suptitle("A Transformer distilled to recurrent students")
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    measure.run(main, Arguments, __doc__)
