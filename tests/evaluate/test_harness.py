"""The adapter gives the results of lm-eval's own backend for transformers, on local tasks."""

import json

import numpy as np
import pytest

from xlstm_jax import convert
from xlstm_jax.data import tokenizers
from xlstm_jax.data.train_tokenizer import train_bpe
from xlstm_jax.errors import ConfigError
from xlstm_jax.evaluate.tasks import Tasks, missing_field
from xlstm_jax.modules import LM

VOCAB_SIZE = 300
TASKS = ("tiny_choice", "tiny_rolling", "tiny_generate")

CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files: {test: choice.jsonl}
output_type: multiple_choice
test_split: test
fewshot_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{label}}"
doc_to_choice: "{{choices}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
ROLLING = """
task: tiny_rolling
dataset_path: json
dataset_kwargs:
  data_files: {test: text.jsonl}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
"""
GENERATE = """
task: tiny_generate
dataset_path: json
dataset_kwargs:
  data_files: {test: text.jsonl}
output_type: generate_until
test_split: test
doc_to_text: "{{text[:40]}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["e"], max_gen_toks: 24, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture(scope="module")
def texts():
    words = "state gate scan cell memory norm forget input output head block".split()
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(words, n)) for n in rng.integers(20, 160, 12)]


@pytest.fixture(scope="module")
def task_path(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("tasks")
    for name, text in zip(TASKS, (CHOICE, ROLLING, GENERATE), strict=True):
        (folder / f"{name}.yaml").write_text(text)
    records = [
        {"question": text[:50], "choices": [text[50:58], "norm", "a gate of it"], "label": i % 3}
        for i, text in enumerate(texts)
    ]
    (folder / "choice.jsonl").write_text("\n".join(map(json.dumps, records)))
    records = [{"text": text, "answer": text[40:44]} for text in texts]
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


@pytest.fixture(scope="module", params=["llama", "xlstm"])
def checkpoint(request, tmp_path_factory, texts):
    """A folder of transformers with random weights and a tokenizer."""
    pytest.importorskip("lm_eval")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp(request.param)
    train_bpe(iter([" ".join(texts).encode()]), VOCAB_SIZE, folder)
    tokenizer = tokenizers.get(str(folder))
    ids = dict(eos_token_id=tokenizer.eos_id, bos_token_id=None, pad_token_id=tokenizer.eos_id)
    torch.manual_seed(0)
    if request.param == "llama":
        cfg = transformers.LlamaConfig(
            vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=64, initializer_range=0.2, **ids,
        )  # fmt: skip
    else:
        cfg = transformers.xLSTMConfig(
            vocab_size=VOCAB_SIZE, hidden_size=64, num_hidden_layers=2, num_heads=2,
            qk_dim_factor=1.0, chunkwise_kernel="chunkwise--native_autograd", step_kernel="native",
            sequence_kernel="native_sequence__native", mode="inference", chunk_size=64,
            autocast_kernel_dtype="float32", **ids,
        )  # fmt: skip
    reference = transformers.AutoModelForCausalLM.from_config(cfg).eval()
    for parameter in reference.parameters():
        # With the initial weights all logits are near 0, and rounding would decide the argmax.
        parameter.data += 0.05 * torch.randn_like(parameter)
    reference.save_pretrained(folder)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|endoftext|>"
    )
    fast.pad_token = fast.eos_token
    fast.save_pretrained(folder / "reference")
    return folder, reference, fast


def backend_for_transformers(checkpoint):
    from lm_eval.models.huggingface import HFLM

    _, model, tokenizer = checkpoint
    # Padding on the left of a prompt changes the state of its xLSTM.
    size = 1 if model.config.model_type == "xlstm" else 4
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size, max_length=64, device="cpu")


@pytest.fixture(scope="module")
def adapter(checkpoint):
    from xlstm_jax.evaluate.harness import XLSTM

    folder, _, _ = checkpoint
    cfg, params = convert.load_hf(folder)
    return XLSTM(
        LM(cfg), {"params": params}, tokenizers.get(str(folder)), batch_size=4, max_length=64
    )


@pytest.mark.slow
def test_simple_evaluate_equals_the_backend_for_transformers(checkpoint, adapter, task_path):
    from lm_eval.models.huggingface import HFLM

    _, reference, tokenizer = checkpoint
    hf = HFLM(pretrained=reference, tokenizer=tokenizer, batch_size=4, max_length=64, device="cpu")
    tasks = Tasks(TASKS, task_path, num_fewshot=1)
    ours, theirs = tasks.run(adapter), tasks.run(hf)
    assert ours.keys() == theirs.keys() == set(TASKS)
    for task, metrics in theirs.items():
        assert metrics.keys() == ours[task].keys()
        for name, value in metrics.items():
            assert ours[task][name] == pytest.approx(value, rel=1e-4, abs=1e-4), (task, name)


@pytest.mark.slow
def test_requests_equal_those_of_the_backend_for_transformers(checkpoint, adapter, texts):
    """Each number, not only the metrics: also for empty contexts and long texts."""
    from lm_eval.api.instance import Instance

    hf = backend_for_transformers(checkpoint)

    def requests(kind, arguments):
        return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]

    words = [(text.split(), n) for n, text in enumerate(texts)]
    pairs = [(" ".join(w[:n]), " " + " ".join(w[n : n + 3])) for w, n in words]
    pairs += [(texts[0] * 9, " norm"), ("gate ", "scan")]
    pairs = requests("loglikelihood", pairs)
    ours, theirs = adapter.loglikelihood(pairs), hf.loglikelihood(pairs)
    np.testing.assert_allclose([x for x, _ in ours], [x for x, _ in theirs], rtol=1e-4)
    assert [flag for _, flag in ours] == [flag for _, flag in theirs]
    rolling = requests("loglikelihood_rolling", [(text,) for text in texts])
    ours, theirs = adapter.loglikelihood_rolling(rolling), hf.loglikelihood_rolling(rolling)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    options = ({"until": ["e"], "max_gen_toks": 20}, {"until": [], "max_gen_toks": 5})
    generate = requests("generate_until", [(t[:30], o) for t in texts[:5] for o in options])
    assert adapter.generate_until(generate) == hf.generate_until(generate)


@pytest.fixture
def needs_lm_eval():
    pytest.importorskip("lm_eval")


@pytest.mark.slow
def test_an_unknown_task_is_an_error_with_the_nearest_names(needs_lm_eval, task_path):
    with pytest.raises(ConfigError, match="unknown task 'tiny_choise'; did you mean tiny_choice"):
        Tasks(["tiny_choise"], task_path)


@pytest.mark.slow
@pytest.mark.parametrize("field", ["dataset_path", "doc_to_target", "doc_to_choice", "test_split"])
def test_a_task_file_without_a_field_is_an_error(needs_lm_eval, task_path, tmp_path, field):
    lines = [line for line in CHOICE.splitlines() if not line.startswith(field)]
    (tmp_path / "a.yaml").write_text("\n".join(lines).replace("tiny_choice", "incomplete"))
    with pytest.raises(ConfigError, match=rf"a.yaml must have the field {field}.*, but has only"):
        Tasks(["incomplete"], tmp_path)


@pytest.mark.slow
def test_data_that_do_not_exist_are_an_error(needs_lm_eval, tmp_path):
    (tmp_path / "a.yaml").write_text(CHOICE.replace("tiny_choice", "without_data"))
    with pytest.raises(ConfigError, match="task 'without_data' cannot be loaded"):
        Tasks(["without_data"], tmp_path)


@pytest.mark.slow
def test_options_of_generation_become_a_sampler(needs_lm_eval):
    from xlstm_jax.evaluate.harness import generation_options
    from xlstm_jax.generate import greedy

    options = generation_options({"until": "\n", "do_sample": False, "temperature": 0.7})
    assert options == {"max_new_tokens": 256, "until": ["\n"], "sampler": greedy}
    assert generation_options({"temperature": 0.5, "top_k": 3})["sampler"].top_k == 3
    with pytest.raises(ConfigError, match="generation_kwargs.num_beams=4 of a task is not supp"):
        generation_options({"num_beams": 4})


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({}, None),
        ({"dataset_path": None}, "dataset_path"),
        ({"dataset_path": None, "custom_dataset": "f"}, None),
        ({"doc_to_text": None}, "doc_to_text"),
        ({"doc_to_text": ""}, None),
        ({"doc_to_target": None}, "doc_to_target"),
        ({"output_type": "multiple_choice"}, "doc_to_choice"),
        ({"test_split": None}, "test_split or validation_split"),
        ({"test_split": None, "validation_split": "valid"}, None),
    ],
)
def test_fields_that_a_task_needs(changes, missing):
    cfg = dict(
        task="a", dataset_path="json", doc_to_text="{{a}}", doc_to_target="b", test_split="t"
    )
    cfg = {name: value for name, value in (cfg | changes).items() if value is not None}
    assert missing_field(cfg) == missing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"num_fewshot": -1}, "num_fewshot must be at least 0, got -1"),
    ],
)
def test_limits_are_checked_first(options, message):
    with pytest.raises(ConfigError, match=message):
        Tasks(["any"], **options)
