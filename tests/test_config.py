"""The configuration: every fault at once with its key, who goes before whom, and secrets that stay secret."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from worker.app import watch
from worker.config import Config, Watch, load
from worker.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydantic import BaseModel

SECRET = "sk-never-to-be-seen"
EXAMPLE = Path(__file__).parents[1] / "config.example.toml"


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """Writes a configuration; what it watches is added."""

    def write(text: str, watched: str = "[watch]\nall = true\n") -> Path:
        path = tmp_path / "config.toml"
        path.write_text(text + watched)
        return path

    return write


def faults_of(path: Path | None) -> list[str]:
    """The faults of a configuration, one a line."""
    with pytest.raises(ConfigError) as raised:
        load(path)
    assert SECRET not in str(raised.value)
    assert SECRET not in repr(raised.value.__cause__)
    return [line.strip() for line in str(raised.value).splitlines()[1:]]


def test_example_holds_the_defaults() -> None:
    """The example's values are the defaults; it differs in what it watches, because something must be watched."""
    assert load(EXAMPLE).model_dump() == Config(watch=Watch(all=True)).model_dump()


def test_example_names_every_setting() -> None:
    """The example lists every setting there is, each under its section and behind a comment that gives a reason."""
    sections = re.split(r"^\[(\w+)\]$", EXAMPLE.read_text(), flags=re.MULTILINE)
    texts = dict(zip(sections[1::2], sections[2::2], strict=True))
    assert list(texts) == list(Config.model_fields)
    for section, field in Config.model_fields.items():
        model: type[BaseModel] = field.annotation  # type: ignore[assignment]
        listed = re.findall(r"^(?:# )?(\w+) = ", texts[section], flags=re.MULTILINE)
        assert set(listed) == set(model.model_fields)
        for key in model.model_fields:
            before = re.split(rf"^(?:# )?{key} = ", texts[section], maxsplit=1, flags=re.MULTILINE)[0]
            assert before.rstrip("\n").rpartition("\n")[2].startswith("#"), f"{section}.{key} has no reason"


def test_example_is_all_toml() -> None:
    """What the example shows in comments can be taken out of them as it stands."""
    shown = "\n".join(re.findall(r"^# (\w+ = .*)$", EXAMPLE.read_text(), flags=re.MULTILINE))
    assert tomllib.loads(shown).keys() == {
        "api_key",
        "api_key_file",
        "ca_file",
        "conversations",
        "page_token",
        "page_token_file",
    }


def test_all_faults_at_once(written: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fault is told in one go, with the path of its key and what would be right."""
    monkeypatch.setenv("LETTA_INGEST_STROAGE__URL", "x")
    monkeypatch.setenv("LETTA_INGEST_STORAGE_URL", "x")
    path = written(
        f"""
        [letta]
        base_url = "letta.example.com"
        api_key = "{SECRET}\\n"
        batch_size = 1
        colour = "{SECRET}"
        [storage]
        url = "mysql://me:{SECRET}@db/x"
        [discovery]
        interval = 0
        start = 2026-01-01T00:00:00
        [service]
        listen = "9464"
        [log]
        level = "loud"
        [metrics]
        x = 1
        """,
        '[watch]\nconversations = ["thread-1"]\nagents = ["me"]\n',
    )

    faults = {fault.split(":")[0]: fault for fault in faults_of(path)}

    assert set(faults) == {
        "LETTA_INGEST_STROAGE__URL (environment)",
        "LETTA_INGEST_STORAGE_URL (environment)",
        "letta.base_url",
        "letta.api_key",
        "letta.batch_size",
        "letta.colour",
        "watch.conversations",
        "watch.agents",
        "storage.url",
        "discovery.interval",
        "discovery.start",
        "service.listen",
        "log.level",
        "metrics",
    }
    assert "https://letta.example.com" in faults["letta.base_url"]
    assert faults["letta.batch_size"].endswith(": should be greater than or equal to 2 (found 1)")
    assert "did you mean LETTA_INGEST_STORAGE__URL?" in faults["LETTA_INGEST_STROAGE__URL (environment)"]
    assert "no such setting" in faults["letta.colour"]
    assert "postgresql://" in faults["storage.url"]
    assert "conv-" in faults["watch.conversations"]
    assert "127.0.0.1:9464" in faults["service.listen"]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[letta]\nbase_url = 'http://'", "letta.base_url: write the server's address"),
        ("[letta]\nbase_url = 'http://[::1'", "letta.base_url: write the server's address"),
        ("[letta]\nbase_url = 'http://host:99999'", "letta.base_url: write the server's address"),
        ("[letta]\nbase_url = 'http://a b'", "letta.base_url: write the server's address"),
        (f"[letta]\nbase_url = 'http://me:{SECRET}@host'", "letta.base_url: write the bare address"),
        (f"[letta]\nbase_url = 'http://host?key={SECRET}'", "letta.base_url: write the bare address"),
        ("[letta]\napi_key = ' '", "letta.api_key: is empty"),
        (f"[letta]\napi_key = '{SECRET}é'", "letta.api_key: holds characters"),
        (f"[letta]\napi_key = '{SECRET}'\napi_key_file = 'x'", "letta: set api_key or api_key_file, not both"),
        ("[letta]\nmax_streams = 0", "letta.max_streams: should be greater than or equal to 1 (found 0)"),
        ("[letta]\nread_timeout = 'soon'", "letta.read_timeout: should be a valid number"),
        ("[storage]\nurl = 'sqlite://'", "storage.url: a database in memory"),
        (f"[storage]\nurl = '{SECRET}'", "storage.url: not a database URL"),
        ("[service]\nlisten = '127.0.0.1:65536'", "service.listen: write"),
        ("[service]\nlisten = '::1:80'", "service.listen: write"),
        ("[discovery]\nstart = 'yesterday'", 'discovery.start: should be "earliest", "latest" or a time'),
        ("[letta]\napi_key_file = 7", "letta.api_key_file: should be the path of a file"),
        ("[letta]\nbatchsize = 2", "letta.batchsize: there is no such setting; did you mean letta.batch_size?"),
        ("[sotrage]\nurl = 'x'", "sotrage: there is no such setting; did you mean storage?"),
        ("letta = 7", "letta: should be a section: write [letta]"),
        (f"api_key = '{SECRET}'", "api_key: there is no such setting; did you mean letta.api_key?"),
        (f"[letta]\napi_key = ['{SECRET}']", "letta.api_key: should be a valid string"),
        ("[service]\npage_token = 'short'", "service.page_token: write at least 16"),
        (f"[service]\npage_token = '{SECRET}é'", "service.page_token: write at least 16"),
        (f"[service]\npage_token = '{SECRET}'\npage_token_file = 'x'", "service: set page_token or page_token_file"),
        ("[service]\nlisten = '0.0.0.0:1'\ntranscripts = true", "service: transcripts = true shows what was said"),
        ("[service]\nlisten = '[::]:1'\ntranscripts = true", "service: transcripts = true shows what was said"),
        ("[service]\nlisten = 'host:1'\ntranscripts = true", "service: transcripts = true shows what was said"),
        (f"[letta]\napi_key = {SECRET}", "is not TOML"),
        (f"[letta]\napi_key = '{SECRET}", "is not TOML"),
    ],
)
def test_fault(written: Callable[..., Path], text: str, fault: str) -> None:
    """A wrong value is answered with its key and what would be right, never with the value (I10)."""
    assert any(line.startswith(fault) for line in faults_of(written(f"{text}\n"))), faults_of(written(f"{text}\n"))


def test_nothing_is_watched(written: Callable[..., Path]) -> None:
    """Nothing is watched by accident: it has to be said."""
    for watched in ("", "[watch]\n", "[watch]\nall = false\nagents = []\n"):
        assert [fault.split(":")[:2] for fault in faults_of(written("", watched))] == [["watch", " nothing is watched"]]


def test_no_file(tmp_path: Path) -> None:
    """A file that is not there is a fault; no file at all is none, the environment may say everything."""
    with pytest.raises(ConfigError, match=r"there is no such file; start from config\.example\.toml"):
        load(tmp_path / "config.toml")


def test_no_text(tmp_path: Path) -> None:
    """A file that is no text is told so."""
    path = tmp_path / "config.toml"
    path.write_bytes(b"\xff\xfe")

    assert faults_of(path)[0].startswith("is not TOML")


def test_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """All settings can come from the environment, lists as JSON."""
    monkeypatch.setenv("LETTA_INGEST_WATCH__AGENTS", '["agent-1"]')
    monkeypatch.setenv("LETTA_INGEST_LETTA__MAX_STREAMS", "3")
    monkeypatch.setenv("LETTA_INGEST_LETTA__API_KEY", SECRET)
    monkeypatch.setenv("letta_ingest_discovery__start", "2026-01-01T00:00:00Z")

    config = load(None)

    assert config.watch.agents == ("agent-1",)
    assert config.letta.max_streams == 3
    assert config.discovery.start.isoformat() == "2026-01-01T00:00:00+00:00"  # type: ignore[union-attr]
    assert SECRET not in repr(config)
    assert SECRET not in str(config.model_dump())


@pytest.mark.parametrize("value", ["agent-1", f'["{SECRET}'])
def test_list_in_the_environment_is_json(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """A list that is no JSON is answered with one that is."""
    monkeypatch.setenv("LETTA_INGEST_WATCH__AGENTS", value)

    (fault,) = faults_of(None)

    assert "watch" in fault
    assert """LETTA_INGEST_WATCH__AGENTS='["agent-...""" in fault


def test_precedence(written: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own variables go before the official client's, and both before the file; the rest of a section stays."""
    path = written('[letta]\nbase_url = "http://file:1"\napi_key = "file"\nbatch_size = 7\n')
    seen = [base_of(path)]
    monkeypatch.setenv("LETTA_BASE_URL", "http://official:2")
    monkeypatch.setenv("LETTA_API_KEY", "official")
    seen.append(base_of(path))
    monkeypatch.setenv("LETTA_INGEST_LETTA__BASE_URL", "http://own:3/v1/")
    monkeypatch.setenv("LETTA_INGEST_LETTA__API_KEY", "own")
    seen.append(base_of(path))
    for name in ("LETTA_INGEST_LETTA__BASE_URL", "LETTA_INGEST_LETTA__API_KEY"):
        monkeypatch.delenv(name)
    for name in ("LETTA_BASE_URL", "LETTA_API_KEY"):
        monkeypatch.setenv(name, "")
    seen.append(base_of(path))

    assert seen == [
        ("http://file:1", "file", 7),
        ("http://official:2", "official", 7),
        ("http://own:3", "own", 7),
        ("http://file:1", "file", 7),
    ]


def base_of(path: Path) -> tuple[str, str, int]:
    """Address, key and batch size of a configuration."""
    letta = load(path).letta
    key = letta.read_api_key()
    assert key is not None
    return letta.base_url, key.get_secret_value(), letta.batch_size


def test_key_from_a_file(written: Callable[..., Path], tmp_path: Path) -> None:
    """A key's file is read without the newline at its end."""
    (tmp_path / "key").write_text(f"{SECRET}\n")
    letta = load(written(f'[letta]\napi_key_file = "{tmp_path}/key"\n')).letta

    key = letta.read_api_key()

    assert key is not None
    assert key.get_secret_value() == SECRET
    assert SECRET not in repr(letta) + repr(key)


@pytest.mark.parametrize("content", [None, b"", b"\n", f"{SECRET}\n{SECRET}".encode(), b"\xff" + SECRET.encode()])
def test_key_file_of_no_use(written: Callable[..., Path], tmp_path: Path, content: bytes | None) -> None:
    """A key's file that is missing, empty or holds more than a key is named, and its content is not (I10)."""
    if content is not None:
        (tmp_path / "key").write_bytes(content)
    letta = load(written(f'[letta]\napi_key_file = "{tmp_path}/key"\n')).letta

    with pytest.raises(ConfigError, match=r"letta\.api_key_file: cannot use .*/key") as raised:
        letta.read_api_key()

    assert SECRET not in str(raised.value)


def test_key_from_systemd(written: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The systemd credential is used without being configured, where there is one and no other key."""
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    plain = load(written(""))
    assert plain.letta.read_api_key() is None

    (tmp_path / "letta_api_key").write_text(f"{SECRET}\n")

    key = plain.letta.read_api_key()
    assert key is not None
    assert key.get_secret_value() == SECRET
    assert base_of(written('[letta]\napi_key = "file"\n'))[1] == "file"


@pytest.mark.parametrize("listen", ["127.0.0.1:1", "127.8.8.8:1", "[::1]:1", "localhost:1"])
def test_transcripts_on_loopback(written: Callable[..., Path], listen: str) -> None:
    """Transcripts on loopback need no token; the same address without transcripts needs none anywhere."""
    assert load(written(f'[service]\nlisten = "{listen}"\ntranscripts = true\n')).service.read_page_token() is None
    assert not load(written('[service]\nlisten = "0.0.0.0:1"\n')).service.transcripts


def test_transcripts_elsewhere(written: Callable[..., Path], tmp_path: Path) -> None:
    """Transcripts on another address are taken with a token, which is in no representation (I10)."""
    (tmp_path / "key").write_text(f"{SECRET}\n")
    elsewhere = '[service]\nlisten = "0.0.0.0:1"\ntranscripts = true\n'
    for token in (f'page_token = "{SECRET}"\n', f'page_token_file = "{tmp_path}/key"\n'):
        service = load(written(elsewhere + token)).service
        read = service.read_page_token()
        assert read is not None
        assert read.get_secret_value() == SECRET
        assert SECRET not in repr(service) + str(service.model_dump())


@pytest.mark.parametrize("content", [None, b"", b"short\n", f"{SECRET}\n{SECRET}".encode(), b"\xff" + SECRET.encode()])
def test_token_file_of_no_use(written: Callable[..., Path], tmp_path: Path, content: bytes | None) -> None:
    """A token's file that is missing, empty or holds no token is named, and its content is not (I10)."""
    if content is not None:
        (tmp_path / "key").write_bytes(content)
    service = load(written(f'[service]\npage_token_file = "{tmp_path}/key"\n')).service

    with pytest.raises(ConfigError, match=r"service\.page_token_file: cannot use .*/key") as raised:
        service.read_page_token()

    assert SECRET not in str(raised.value)


def test_watch(written: Callable[..., Path]) -> None:
    """The three ways of naming what is watched come together; both ways of an agent's own conversation are one."""
    watched = """[watch]
        conversations = ["conv-1", "agent-1", { conversation_id = "default", agent_id = "agent-2" }]
        agents = ["agent-3"]
    """

    assert watch(load(written("", watched))).scopes == {
        "conversation:conv-1",
        "direct:agent-1",
        "direct:agent-2",
        "agent:agent-3",
    }


@pytest.mark.parametrize("entry", ["{ conversation_id = 'conv-1', agent_id = 'agent-1' }", "{ agent_id = 'me' }", "7"])
def test_watch_of_no_use(written: Callable[..., Path], entry: str) -> None:
    """An entry of another shape is a fault with its place in the list."""
    faults: list[Any] = faults_of(written("", f"[watch]\nconversations = ['conv-1', {entry}]\n"))

    assert all(fault.startswith("watch.conversations.1") for fault in faults)
