"""Models of hf://, with the real client and a server that imitates the hub."""

import json
import os
import subprocess
import sys

import huggingface_hub
import jax
import pytest
from huggingface_hub import constants, utils

from tests import golden_files
from tests.convert import hub_server
from tests.convert.baselines import random_params
from tests.convert.test_round_trip import assert_same_trees, init, model
from xlstm_jax import convert
from xlstm_jax import hub as hub_client
from xlstm_jax.cli import main
from xlstm_jax.convert import license, remote
from xlstm_jax.errors import ConfigError, NetworkError
from xlstm_jax.train import restore_params

# How the client sends files without its package `hf_xet`, whose protocol the server does not have.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

ADDRESS = "hf://org/model"
FORBIDDEN = {"pytorch_model.bin": b"\x80\x04.", "modeling.py": b"1 / 0", "x/model.safetensors": b""}


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The hub, to which the client of this process is connected, with an empty cache."""
    with hub_server.serve() as hub:
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # between attempts
        monkeypatch.delenv("HF_TOKEN", raising=False)
        # Commands set this in their environment before the client is imported.
        utils.disable_progress_bars()
        remote.fetch.cache_clear()
        yield hub
        utils.enable_progress_bars()
        huggingface_hub.close_session()
        remote.fetch.cache_clear()


@pytest.fixture
def folder(tmp_path, key):
    """A checkpoint of several shards, its config and its parameters."""
    cfg = model()
    params = init(cfg, key)
    convert.save_hf(tmp_path / "hf", cfg, params, max_shard_bytes=4000)
    return tmp_path / "hf", cfg, params


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def publish(server, folder, **options):
    """A repository with the files of a folder and some that must not be downloaded."""
    repository = hub_server.Repository(files_of(folder) | FORBIDDEN, **options)
    server.repositories["org/model"] = repository
    return repository


def test_a_sharded_model_is_downloaded_once_and_without_other_files(server, folder, monkeypatch):
    path, _, params = folder
    publish(server, path)
    loaded_cfg, loaded = convert.load_hf(ADDRESS)
    assert loaded_cfg == convert.load_hf(path)[0]
    assert_same_trees(loaded, params)
    assert server.downloaded() == files_of(path).keys()
    assert len(server.downloaded()) > 4
    server.requests.clear()
    remote.fetch.cache_clear()
    convert.load_hf(ADDRESS)
    assert server.downloaded() == set()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    remote.fetch.cache_clear()
    server.requests.clear()
    assert_same_trees(convert.load_hf(ADDRESS)[1], params)
    assert server.requests == []


def test_a_revision_is_a_branch_or_a_commit(server, folder, key):
    path, _, params = folder
    repository = publish(server, path)
    first = repository.head
    repository.commit(repository.files | {"config.json": b"{}"})
    assert_same_trees(convert.load_hf(f"{ADDRESS}@{first}")[1], params)
    with pytest.raises(ConfigError, match="hf://org/model@v2 must have a revision that exists"):
        convert.load_hf(f"{ADDRESS}@v2")


def test_an_interrupted_download_is_resumed(server, folder):
    path, _, params = folder
    publish(server, path)
    name = next(name for name in files_of(path) if name.endswith(".safetensors"))
    server.interruptions[name] = 2
    assert_same_trees(convert.load_hf(ADDRESS)[1], params)
    assert server.interruptions[name] == 0
    assert sum(request.endswith(name) for request in server.requests) >= 3


def test_a_download_that_never_arrives_is_a_network_error(server, folder, monkeypatch):
    path, _, params = folder
    publish(server, path)
    names = [name for name in files_of(path) if name.endswith(".safetensors")]
    server.dead.add(names[-1])
    with pytest.raises(NetworkError, match="hf://org/model@.* the transfer was interrupted"):
        convert.load_hf(ADDRESS)
    # The other files were retained.
    server.dead.clear()
    server.requests.clear()
    assert_same_trees(convert.load_hf(ADDRESS)[1], params)
    assert names[-1] in server.downloaded() and len(server.downloaded()) < len(names)


def _without(files, *endings):
    return {name: data for name, data in files.items() if not name.endswith(endings)}


REPOSITORIES = {
    "no config.json": (
        lambda files: _without(files, "config.json"),
        "hf://org/model must have a config.json, but has none",
    ),
    "other formats only": (
        lambda files: _without(files, ".safetensors", ".index.json"),
        "hf://org/model must have weights in safetensors files, .* but has only "
        "pytorch_model.bin, which may run code when read",
    ),
    "no weights": (
        lambda files: {"config.json": files["config.json"]},
        "hf://org/model must have weights in safetensors files, .* but has none",
    ),
    "another architecture": (
        lambda files: files | {"config.json": b'{"model_type": "gpt2"}'},
        "model_type of config.json of hf://org/model must be one of 'xlstm', .* got 'gpt2'",
    ),
    "config.json is no table": (
        lambda files: files | {"config.json": b"[]"},
        "must be a JSON object",
    ),
    "a shard is missing": (
        lambda files: {name: x for name, x in files.items() if "-00002-of" not in name},
        "hf://org/model lacks model-00002-of-",
    ),
}


@pytest.mark.parametrize("case", REPOSITORIES)
def test_a_repository_that_cannot_be_read_is_rejected_without_its_weights(server, folder, case):
    change, message = REPOSITORIES[case]
    files = change(files_of(folder[0]) | FORBIDDEN)
    server.repositories["org/model"] = hub_server.Repository(files)
    with pytest.raises(ConfigError, match=message):
        convert.load_hf(ADDRESS)
    assert not any(name.endswith(".safetensors") for name in server.downloaded())


@pytest.mark.parametrize(
    ("options", "token", "message"),
    [
        ({"private": True}, None, r"does not exist, or access is denied \(status 401\)"),
        ({"private": True}, "hf_wrong", r"does not exist, or access is denied \(status 401\)"),
        ({"gated": True}, hub_server.READ_TOKEN, "only by those who accepted its terms"),
        (None, None, r"hf://org/model does not exist, or access is denied \(status 401\)"),
        (None, hub_server.TOKEN, r"hf://org/model does not exist, .* \(status 404\); check the"),
    ],
)
def test_access_is_needed(server, folder, monkeypatch, options, token, message):
    if options is not None:
        publish(server, folder[0], **options)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ConfigError, match=message):
        convert.load_hf(ADDRESS)


def test_a_token_gives_access(server, folder, monkeypatch):
    publish(server, folder[0], private=True)
    monkeypatch.setenv("HF_TOKEN", hub_server.READ_TOKEN)
    assert_same_trees(convert.load_hf(ADDRESS)[1], folder[2])


def test_a_hub_that_is_down_is_a_network_error(server, folder, monkeypatch):
    publish(server, folder[0])
    server.status = 500
    with pytest.raises(NetworkError, match="hf://org/model cannot be reached, .*500"):
        convert.load_hf(ADDRESS)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(NetworkError, match="hf://org/model cannot be reached"):
        convert.load_hf(ADDRESS)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NetworkError, match="hf://org/model needs the hub, which HF_HUB_OFFLINE"):
        convert.load_hf(ADDRESS)


@pytest.mark.parametrize(
    "name",
    ["", "/", "model", "org/", "/model", "a/b/c", "org/model@", "org/model@a b", "org/a--b"]
    + ["org/../x", "org/model@../x", "org/mo del", "org/modèl", "@main", "org/model@a@b"],
)
def test_malformed_addresses_are_rejected_without_a_request(server, name):
    for address in (f"hf://{name}", f"HF:/{name}", f"https://huggingface.co/{name}"):
        with pytest.raises(ConfigError, match="must be hf://ORG/NAME or hf://ORG/NAME@REVISION"):
            convert.load_hf(address)
    assert server.requests == []


def test_the_client_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", None)
    with pytest.raises(ConfigError, match=r"needs the package huggingface_hub, .*xlstm-jax\[hub\]"):
        convert.load_hf("hf://org/not-installed")


def test_a_pushed_folder_is_loaded_again(server, folder, tmp_path, monkeypatch):
    path, cfg, params = folder
    (path / "optimizer.pt").write_bytes(b"not for the hub")
    (path / "LICENSE").write_text("The terms.\n")
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    address, private = convert.push_hf(ADDRESS, path)
    repository = server.repositories["org/model"]
    assert private and repository.private
    assert address == f"{ADDRESS}@{repository.head}"
    expected = files_of(path).keys() - {"optimizer.pt"} | {"README.md", ".gitattributes"}
    assert repository.files.keys() == expected
    assert_same_trees(convert.load_hf(address)[1], params)
    card = repository.files["README.md"].decode()
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    for part in ("xLSTMForCausalLM", f"{count:,}", 'from_pretrained("org/model")', ADDRESS):
        assert part in card
    assert (
        'license: "other"\nlicense_name: "see-link"' in card and "| The terms. (LICENSE) |" in card
    )
    # A second upload replaces the weights, whatever their files were called, and nothing else.
    convert.save_hf(tmp_path / "single", cfg, jax.tree.map(lambda x: x + 1, params))
    repository.private = False
    assert not convert.push_hf(ADDRESS, tmp_path / "single").private
    assert {name for name in repository.files if "model" in name} == {"model.safetensors"}
    assert "LICENSE" in repository.files
    remote.fetch.cache_clear()
    assert_same_trees(convert.load_hf(ADDRESS)[1], jax.tree.map(lambda x: x + 1, params))


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "set HF_TOKEN to"),
        ("hf_wrong", ".*status 401"),
        (hub_server.READ_TOKEN, ".*status 403"),
    ],
)
def test_a_push_needs_write_access(server, folder, monkeypatch, token, message):
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ConfigError, match=f"^hf://org/model .*{message}"):
        hub_client.check_login(hub_client.parse(ADDRESS))
        convert.push_hf(ADDRESS, folder[0])
    assert server.repositories == {}


def test_only_complete_folders_are_pushed_to_a_branch(server, folder, tmp_path):
    path = folder[0]
    with pytest.raises(ConfigError, match="hf://org/model@main must have no revision"):
        convert.push_hf(f"{ADDRESS}@main", path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="must be a folder with a config.json"):
        convert.push_hf(ADDRESS, tmp_path / "empty")
    next(path.glob("*.safetensors")).unlink()
    with pytest.raises(ConfigError, match="lacks model-00001"):
        convert.push_hf(ADDRESS, path)
    assert server.requests == []


@pytest.mark.parametrize(
    ("line", "fields"),
    [
        ("apache-2.0 (README.md)", {"license": "apache-2.0"}),
        (
            "other, Some Terms, https://x (README.md)",
            {"license": "other", "name": "some-terms", "link": "https://x"},
        ),
        ("Some License (LICENSE)", {"license": "other", "name": "see-link"}),
        (license.UNKNOWN, {}),
        ("none: the weights were trained in this run; choose one", {}),
    ],
)
def test_the_header_of_a_card_has_licenses_that_the_hub_knows(line, fields):
    if "name" in fields:
        fields = {
            "license": fields["license"],
            "license_name": fields["name"],
            "license_link": fields.get("link", license.FILE),
        }
    assert license.header_fields(line) == fields


def test_commands_take_and_write_addresses(server, folder, tmp_path, monkeypatch, capsys):
    path, _, params = folder
    monkeypatch.chdir(tmp_path)
    repository = publish(server, path)
    repository.commit(repository.files | {"README.md": b"---\nlicense: mit\n---\n"})
    assert main(["convert", "hf-to-run", ADDRESS, "run"]) == 0
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["converted_from"] == f"{ADDRESS}@{repository.head}"
    assert_same_trees(restore_params("run")[1], params)
    record = {"step": 0, "valid_loss": 1.25, "valid_accuracy": 0.5, "loss": 9.0}
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    capsys.readouterr()
    assert main(["convert", "run-to-hf", "run", "hf://me/copy"]) == 0
    copy = server.repositories["me/copy"]
    out = capsys.readouterr().out
    assert f"hf://me/copy@{copy.head}" in out and "private" in out
    card = copy.files["README.md"].decode()
    assert 'license: "mit"' in card and "| `valid_loss` | 1.25 |" in card and "9" not in card[-200:]
    assert_same_trees(convert.load_hf("hf://me/copy")[1], params)


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("generate hf://org/none --prompt a", 2, "hf://org/none does not exist, or access"),
        ("evaluate hf://org --source x", 2, "must be hf://ORG/NAME"),
        ("evaluate hf://org/model", 2, "must have a tokenizer.json or a *.model"),
        ("generate hf://org/model --prompt a --step 3", 2, "step=3 applies to a run only"),
        ("convert hf-to-run hf://org/model@v9 run", 2, "must have a revision that exists"),
        ("convert run-to-hf run hf://org/new", 2, "set HF_TOKEN"),
        ("convert run-to-hf run hf://org/new@main", 2, "must have no revision"),
        ("convert hf-to-run hf://org/model run", 4, "cannot be reached"),
        ("generate hf://org/model --prompt a", 4, "cannot be reached"),
    ],
)
def test_errors_of_commands_are_one_line(
    server, folder, tmp_path, monkeypatch, capsys, command, code, message
):
    monkeypatch.chdir(tmp_path)
    publish(server, folder[0])
    server.status = 503 if code == 4 else None
    assert main(command.split()) == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_environment_of_the_client_is_honored(tmp_path):
    """In a process of its own: the client reads most variables when it is imported."""
    cfg = model(vocab_size=257)  # of bytes: it needs no tokenizer
    convert.save_hf(tmp_path / "hf", cfg, random_params(cfg))
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    environment = {n: v for n, v in environment.items() if n not in ("HF_TOKEN", "HF_HUB_OFFLINE")}

    def generate(**variables):
        command = ["-m", "xlstm_jax", "generate", ADDRESS, "--prompt", "a", "--max-new-tokens", "1"]
        return subprocess.run(
            [sys.executable, *command],
            env=environment | variables,
            capture_output=True,
            timeout=200,
        )

    with hub_server.serve() as server:
        publish(server, tmp_path / "hf", private=True)
        online = {"HF_ENDPOINT": server.url}
        denied = generate(**online)
        assert denied.returncode == 2 and b"status 401" in denied.stderr
        granted = generate(**online, HF_TOKEN=hub_server.READ_TOKEN)
        assert (granted.returncode, granted.stderr) == (0, b"")
    assert list((tmp_path / "home").rglob("model.safetensors"))
    offline = generate(HF_HUB_OFFLINE="1")
    assert (offline.returncode, offline.stdout) == (0, granted.stdout)


def test_tirex_is_loaded_from_the_hub(server):
    folder = golden_files.FOLDER / "tirex2_tiny"
    publish(server, folder)
    cfg, params = convert.load_tirex(ADDRESS)
    expected_cfg, expected = convert.load_tirex(folder)
    assert cfg == expected_cfg
    assert_same_trees(params, expected)
    assert server.downloaded() == files_of(folder).keys()
