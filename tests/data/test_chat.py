"""Chat templates: ids, the mask of the assistant's messages, and templates that misbehave."""

import json
import signal
import threading

import numpy as np
import pytest

from tests.data import tokenizer_files as make
from xlstm_jax.data import chat, sandbox, tokenizers
from xlstm_jax.errors import ConfigError

PREFIX = (
    "{{ bos_token }}{% for message in messages %}<|start|>{{ message['role'] }}\n"
    "{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
TAGGED = """
{%- for message in messages %}
    {{- '<|start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content }}<|end|>{% endgeneration %}
    {%- else %}
        {{- message.content + '<|end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}"""
ANSWERS = [" gr\u00f6\u00dfer \u6728 ", "ok"]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <b>you</b>"},
    {"role": "assistant", "content": ANSWERS[0]},
    {"role": "user", "content": "really?"},
    {"role": "assistant", "content": ANSWERS[1]},
]
NAME = "part/a.jsonl:17"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A byte-level BPE with the tokens of the templates."""
    values = json.loads(make.byte_level_bpe())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    values["added_tokens"] += [
        {"id": 600 + i, "content": content, "special": True, **flags}
        for i, content in enumerate(["<|start|>", "<|end|>"])
    ]
    # As in the file of GPT-2; it would remove spaces from the offsets of tokens.
    values["post_processor"] = dict(values["pre_tokenizer"], trim_offsets=True)
    path = tmp_path_factory.mktemp("chat")
    make.write_folder(path, json.dumps(values).encode())
    return path


@pytest.fixture
def encode(folder):
    """Encodes a conversation with a template of tokenizer_config.json."""

    def run(template, messages=MESSAGES, tokenizer=None, **settings):
        make.write_folder(
            folder, (folder / "tokenizer.json").read_bytes(), chat_template=template, **settings
        )
        tokenizer = tokenizer or tokenizers.get(str(folder))
        ids, mask, num_bytes = chat.load(str(folder)).encode(tokenizer, messages, NAME)
        return tokenizer, ids, mask, num_bytes

    return run


def targets(tokenizer, ids, mask):
    """The text of each run of targets; the end of an answer is "|"."""
    runs = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(mask)) + 1)
    ends = (601, tokenizer.eos_id)
    return [
        "".join(tokenizer.decode(part) if len(part) else "|" for part in split(ids[run], ends))
        for run in runs
        if mask[run[0]]
    ]


def split(ids, ends):
    """Runs of text tokens, and an empty run for each token in `ends`."""
    part: list[int] = []
    for i in ids.tolist():
        if i in ends:
            yield from ([part] if part else [])
            yield []
            part = []
        else:
            part.append(i)
    if part:
        yield part


@pytest.mark.parametrize("template", [PREFIX, TAGGED], ids=["prefixes", "tags"])
def test_targets_are_the_answers_with_their_end_tokens(encode, template):
    tokenizer, ids, mask, num_bytes = encode(template)
    assert targets(tokenizer, ids, mask) == [f"{answer}|" for answer in ANSWERS]
    assert mask.dtype == np.bool_ and mask.shape == ids.shape
    assert num_bytes == tokenizer.num_bytes(ids)


@pytest.mark.parametrize("template", [PREFIX, TAGGED], ids=["prefixes", "tags"])
def test_ids_are_those_of_the_formatted_text(encode, folder, template):
    tokenizer, ids, _, _ = encode(template)
    text = chat.load(str(folder)).render(MESSAGES).text
    np.testing.assert_array_equal(ids, [*tokenizer.encode(text), tokenizer.eos_id])
    formatted = (f"<|start|>{m['role']}\n{m['content']}<|end|>\n" for m in MESSAGES)
    assert text == "".join(formatted)


def test_the_token_after_a_tagged_answer_is_a_target(encode):
    template = TAGGED.replace("<|end|>{% endgeneration %}", "{% endgeneration %}<|end|>")
    tokenizer, ids, mask, _ = encode(template)
    assert targets(tokenizer, ids, mask) == [f"{answer}|" for answer in ANSWERS]


def test_without_special_tokens_the_end_of_the_document_is_a_target(encode):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer, ids, mask, _ = encode(template)
    # The token of a space before an answer also has characters of the answer.
    first, last = targets(tokenizer, ids, mask)
    assert first.strip() == ANSWERS[0].strip() and last.strip() == "ok\n|"
    assert ids[-1] == tokenizer.eos_id and mask[-1]


def test_an_end_of_document_in_the_template_is_not_repeated(encode):
    tokenizer, ids, mask, _ = encode(PREFIX.replace("<|end|>\n", "<|endoftext|>"))
    assert ids.tolist().count(tokenizer.eos_id) == len(MESSAGES)
    assert ids[-1] == tokenizer.eos_id and mask[-1]


def test_white_space_tokens_of_an_answer_are_targets(encode):
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "a \n\n  b  "}]
    tokenizer, ids, mask, _ = encode(PREFIX, messages)
    assert targets(tokenizer, ids, mask) == ["a \n\n  b  |"]


def test_a_tokenizer_without_offsets_encodes_segments(encode):
    tokenizer, ids, mask, num_bytes = encode(PREFIX, tokenizer=tokenizers.get("byte"))
    text = "".join(f"<|start|>{m['role']}\n{m['content']}<|end|>\n" for m in MESSAGES)
    assert ids.tolist() == [*text.encode(), 256] and num_bytes == len(text.encode())
    assert targets(tokenizer, ids, mask) == [f"{ANSWERS[0]}<|end|>\n", "ok<|end|>\n|"]


def test_special_tokens_become_their_ids_with_sentencepiece(tmp_path):
    template = "{% for m in messages %}{{ bos_token }}{{ m.content }}{{ eos_token }}{% endfor %}"
    folder = make.write_folder(
        tmp_path,
        make.sentencepiece_model(),
        bos_token="<s>",
        eos_token="</s>",
        chat_template=template + "{% if add_generation_prompt %}{{ bos_token }}{% endif %}",
    )
    tokenizer = tokenizers.get(folder)
    ids, mask, _ = chat.load(folder).encode(tokenizer, MESSAGES[1:3], NAME)
    assert ids.tolist().count(tokenizer.eos_id) == ids.tolist().count(1) == 2
    assert tokenizer.decode(ids[mask]) == ANSWERS[0] and ids[mask][-1] == tokenizer.eos_id


def test_the_template_is_a_file_or_the_default_one_of_a_list(encode, folder):
    named = [{"name": "tool_use", "template": "{{ 1 }}"}, {"name": "default", "template": PREFIX}]
    np.testing.assert_array_equal(encode(named)[1], encode(PREFIX)[1])
    (folder / "chat_template.jinja").write_text("<|start|>")
    try:
        assert encode(TAGGED)[1].tolist() == [600, 0]  # it has precedence
    finally:
        (folder / "chat_template.jinja").unlink()


def test_templates_have_the_functions_and_options_of_transformers(encode, folder):
    template = """
    {%- for m in messages %}
    {% if loop.index > 1 %}{% break %}{% endif %}
    {{ {'a': '<\u00e9>'} | tojson }}{{ '=' * 3 }}{{ strftime_now is defined }}{{ tools is none }}
    {%- if nothing %}{% endif %}
    {%- endfor %}"""
    encode(template)
    text = chat.load(str(folder)).render(MESSAGES[:1]).text
    assert text.strip() == '{"a": "<\u00e9>"}===FalseTrue'


FAULTY = {
    "endless": ("{% for i in range(9999) %}" * 3 + "{% endfor %}" * 3, "takes over 0.2 seconds"),
    "exponential": (
        "{% set n = namespace(x='ab' * 999) %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}"
        "{% endfor %}",
        # Whichever limit it meets first: writing to that much memory takes seconds.
        "needs over 512 MiB of memory|takes over 5 seconds",
    ),
    "padding": ("{{ 'a' | center(10 * 10 ** 0 * 1000000000) }}", r"the operator \*\*"),
    "huge_string": ("{{ 'a' | center(99999999999) }}", "needs over 512 MiB of memory"),
    "huge_format": ("{{ '%999999999d' % 3 }}", "needs over 512 MiB of memory|takes over"),
    "huge_integers": (
        "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
        r"the operator \* has too large operands",
    ),
    "output": ("{{ 'a' * 99999999 }}", "writes over 67,108,864 characters"),
    "class": ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__'"),
    "globals": ("{{ raise_exception.__globals__ }}", "access to attribute '__globals__'"),
    "init": ("{{ cycler.__init__.__globals__.os }}", "access to attribute '__init__'"),
    "mutation": ("{{ messages.append(1) }}", "access to attribute 'append'"),
    "raises": ("{{ raise_exception('roles\\nmust alternate') }}", "fails .*roles.*must alternate"),
    "unknown": ("{{ nothing }}", "'nothing' is undefined"),
    "missing_key": ("{{ messages[0].reasoning }}", "no attribute 'reasoning'"),
    "include": ("{% include '/etc/passwd' %}", "no loader"),
    "division": ("{{ 1 / 0 }}", "division by zero"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "is nested too deeply"),
    "surrogate": ("{{ '\\ud800' }}", "nests generation blocks"),
    "nested_tags": (
        "{% generation %}{% generation %}{% endgeneration %}{% endgeneration %}",
        "nests generation blocks",
    ),
    "random": ("{{ [1, 2] | random }}", "No filter named 'random'"),
    "syntax": ("{% if %}", "Expected an expression"),
    "deep": ("{{ " + "(" * 99_999, "is nested too deeply"),
    "long": ("x" * (1 + (1 << 20)), "must have at most 1,048,576 characters, got 1,048,577"),
    "number": (5, "must have a chat_template, got 5; write the template to chat_template.jinja"),
    "nameless": ([{"name": "other", "template": "x"}], "must have a chat_template, got None"),
    "inconsistent": (
        "{% for m in messages %}{{ m.content if loop.last else '' }}{% endfor %}",
        "formats message 3 differently when others follow, .* enclose answers in {% generation %}",
    ),
}  # fmt: skip
# These fail when they are loaded, so that no record is at fault.
WHEN_LOADED = {"random", "syntax", "deep", "long", "number", "nameless"}
# Jinja computes constants when it loads a template, if it has the memory.
MAY_BE_CONSTANT = {"huge_string", "huge_format"}


@pytest.mark.parametrize("case", FAULTY)
def test_a_template_that_misbehaves_is_refused_in_one_line(encode, monkeypatch, case):
    if case == "endless":
        monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.2)
    template, message = FAULTY[case]
    with pytest.raises(ConfigError, match=message) as info:
        encode(template)
    if case not in MAY_BE_CONSTANT:
        assert str(info.value).startswith(NAME) != (case in WHEN_LOADED)
    assert "tokenizer_config.json" in str(info.value) and "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], r"messages must be a list of at least one message, got \[\]; remove the record"),
        (None, "messages must be a list .* got None"),
        ("text", "messages must be a list .* got 'text'"),
        ([5], "message 1 must have a role of system, .*, got 5; rename it"),
        ([{"role": "bot", "content": "x"}], "message 1 must have a role of .*, got 'bot'"),
        ([{"content": "x"}], "message 1 must have a role of .*, got None"),
        ([MESSAGES[1], {"role": "assistant"}], "message 2 must have a content, .* got None; add"),
        ([{"role": "assistant", "content": 5}], "message 1 must have a content, .* got 5; add"),
        (
            [MESSAGES[1]],
            "messages must have one of the assistant, to learn from; remove the record",
        ),
        ([{"role": "assistant", "content": "\ud800"}], "messages must be JSON, and text UTF-8"),
        ([{**MESSAGES[2], "x": object()}], "messages must be JSON, .*; correct them"),
    ],
)
def test_an_invalid_conversation_is_refused_with_its_record(encode, messages, message):
    with pytest.raises(ConfigError, match=f"^{NAME}: {message}"):
        encode(PREFIX, messages)


def test_limits_are_restored(encode):
    import resource

    def handler(signum, frame):
        raise AssertionError

    before = signal.signal(signal.SIGALRM, handler)
    limit = resource.getrlimit(resource.RLIMIT_AS)
    signal.setitimer(signal.ITIMER_REAL, 1000)
    try:
        encode(PREFIX)
        assert signal.getsignal(signal.SIGALRM) is handler
        assert 900 < signal.getitimer(signal.ITIMER_REAL)[0] <= 1000
        assert resource.getrlimit(resource.RLIMIT_AS) == limit
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_templates_work_in_other_threads(encode):
    results = []
    thread = threading.Thread(target=lambda: results.append(encode(PREFIX)[1]))
    thread.start()
    thread.join()
    np.testing.assert_array_equal(results[0], encode(PREFIX)[1])


def test_a_named_tokenizer_has_no_template():
    with pytest.raises(ConfigError, match="tokenizer='byte' has no chat template; use the folder"):
        chat.load("byte")


def test_jinja_is_named_where_it_is_missing(encode, monkeypatch):
    import sys

    sandbox._environment.cache_clear()
    sandbox._compiled.cache_clear()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ConfigError, match="needs the package jinja2, .* `pip install 'xlstm-jax"):
        encode(PREFIX)
