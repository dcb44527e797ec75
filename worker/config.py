"""The configuration: TOML file and environment -> Config, every fault reported at once with its key's path.

Used by cli.py and app.py only; everybody else is handed values.
"""

import datetime as dt
import difflib
import ipaddress
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from worker.errors import ConfigError
from worker.storage.engine import parse_url

CREDENTIAL_NAME = "letta_api_key"
"""The name of the systemd credential that is used without being configured (LoadCredential=letta_api_key:...)."""
PREFIX = "LETTA_INGEST_"
MAX_PORT = 65535
LEAST_TOKEN_CHARS = 16
"""A token is guessed over HTTP as fast as the worker answers."""


class _Section(BaseModel):
    """A field's description says what would be right, where pydantic's own words do not help.

    `repr=False`: what was found is never shown, because a secret may be in it (I10).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)


class Letta(_Section):
    """How to reach the Letta server, and the parameters of its streams."""

    base_url: str = Field("http://localhost:8283", repr=False)
    api_key: SecretStr | None = Field(None, repr=False)
    api_key_file: Path | None = Field(None, repr=False, description="should be the path of a file")
    ca_file: Path | None = Field(None, description="should be the path of a file")
    connect_timeout: float = Field(10.0, gt=0)
    read_timeout: float = Field(90.0, gt=0)
    batch_size: int = Field(1000, ge=2)
    poll_interval: float = Field(0.1, gt=0)
    include_pings: bool = True
    max_streams: int = Field(16, ge=1)
    max_event_bytes: int = Field(32 * 1024 * 1024, ge=1024)

    @field_validator("base_url")
    @classmethod
    def _is_http_url(cls, value: str) -> str:
        try:
            parts = urlsplit(value)
            is_address = parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0
        except ValueError:
            is_address = False
        if not is_address or not value.isprintable() or " " in value:
            raise ValueError('write the server\'s address with its scheme, such as "https://letta.example.com"')
        if parts.username is not None or parts.query or parts.fragment:
            # An address is logged; a password in it would be too (I10).
            raise ValueError("write the bare address, without user, password or query; the key belongs into api_key")
        return value.rstrip("/").removesuffix("/v1")

    @field_validator("api_key")
    @classmethod
    def _is_header_value(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None:
            return None
        text = value.get_secret_value()
        if not text.strip():
            raise ValueError("is empty")
        if not (text.isprintable() and text.isascii()):
            raise ValueError(
                "holds characters that cannot stand in an HTTP header; is it the whole key and only the key?"
            )
        return value

    @model_validator(mode="after")
    def _has_one_key(self) -> "Letta":
        if self.api_key is not None and self.api_key_file is not None:
            raise ValueError("set api_key or api_key_file, not both")
        return self

    def read_api_key(self) -> SecretStr | None:
        """The key from wherever it is kept. Raises ConfigError when its file cannot be read."""
        if self.api_key is not None:
            return self.api_key
        path = self.api_key_file
        if path is None and (folder := os.environ.get("CREDENTIALS_DIRECTORY")):
            credential = Path(folder) / CREDENTIAL_NAME
            path = credential if credential.exists() else None
        if path is None:
            return None
        try:
            return self._is_header_value(SecretStr(path.read_text().strip()))
        except (OSError, ValueError) as error:
            raise ConfigError(f"letta.api_key_file: cannot use {path}: {error}") from None


class AgentDirect(_Section):
    """A conversation named as the API names it: `default` with the agent's id."""

    conversation_id: Literal["default"] = "default"
    agent_id: str = Field(pattern="^agent-")


_CONVERSATION = (
    '"conv-...", or for an agent\'s own conversation "agent-..."'
    ' or { conversation_id = "default", agent_id = "agent-..." }'
)


class Watch(_Section):
    """Whose runs are stored."""

    all: bool = False
    conversations: tuple[str | AgentDirect, ...] = Field((), description=f"should be a list of ids: {_CONVERSATION}")
    agents: tuple[str, ...] = Field((), description='should be a list of ids, such as ["agent-..."]')

    @field_validator("conversations")
    @classmethod
    def _are_conversations(cls, value: tuple[str | AgentDirect, ...]) -> tuple[str | AgentDirect, ...]:
        for entry in value:
            if isinstance(entry, str) and not entry.startswith(("conv-", "agent-")):
                raise ValueError(f"{entry!r} is no such id: write {_CONVERSATION}")
        return value

    @field_validator("agents")
    @classmethod
    def _are_agents(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for entry in value:
            if not entry.startswith("agent-"):
                raise ValueError(f'{entry!r} is no such id: write "agent-..."')
        return value

    @model_validator(mode="after")
    def _watches_something(self) -> "Watch":
        if not (self.all or self.conversations or self.agents):
            raise ValueError("nothing is watched: set all = true, or name conversations or agents")
        return self

    @property
    def conversation_ids(self) -> list[str]:
        """Conversations as ids; an agent-direct one is its agent's id."""
        return [entry if isinstance(entry, str) else entry.agent_id for entry in self.conversations]


class Storage(_Section):
    """Where chunks are kept."""

    url: SecretStr = Field(SecretStr("sqlite:///letta-ingest.db"), repr=False)

    @field_validator("url")
    @classmethod
    def _is_supported(cls, value: SecretStr) -> SecretStr:
        parse_url(value.get_secret_value())
        return value


class Discovery(_Section):
    """How runs are found."""

    interval: float = Field(5.0, gt=0)
    start: Literal["earliest", "latest"] | dt.datetime = Field(
        "earliest", description='should be "earliest", "latest" or a time with its zone, such as 2026-01-31T00:00:00Z'
    )

    @field_validator("start")
    @classmethod
    def _has_zone(cls, value: str | dt.datetime) -> str | dt.datetime:
        if isinstance(value, dt.datetime) and value.tzinfo is None:
            raise ValueError("a time needs its zone, such as 2026-01-31T00:00:00Z")
        return value


class Service(_Section):
    """What the worker shows of itself."""

    listen: str = "127.0.0.1:9464"
    transcripts: bool = False
    page_token: SecretStr | None = Field(None, repr=False)
    page_token_file: Path | None = Field(None, repr=False, description="should be the path of a file")

    @field_validator("listen")
    @classmethod
    def _is_address(cls, value: str) -> str:
        found = re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^:\s]+):(\d{1,5})", value)
        if found is None or int(found[2]) > MAX_PORT:
            raise ValueError('write "address:port", such as "127.0.0.1:9464" or "[::1]:9464"')
        return value

    @field_validator("page_token")
    @classmethod
    def _is_token(cls, value: SecretStr | None) -> SecretStr | None:
        text = value.get_secret_value() if value is not None else None
        if text is not None and not (len(text) >= LEAST_TOKEN_CHARS and text.isascii() and text.isprintable()):
            raise ValueError(
                f"write at least {LEAST_TOKEN_CHARS} printable ASCII characters, as `openssl rand -hex 16` does"
            )
        return value

    @model_validator(mode="after")
    def _is_private(self) -> "Service":
        if self.page_token is not None and self.page_token_file is not None:
            raise ValueError("set page_token or page_token_file, not both")
        if self.transcripts and not self.is_loopback and self.page_token is None and self.page_token_file is None:
            raise ValueError(
                f"transcripts = true shows what was said to whoever reaches {self.listen}: set page_token or"
                ' page_token_file, or listen on loopback, such as "127.0.0.1:9464"'
            )
        return self

    @property
    def host(self) -> str:
        """The address without its port."""
        return self.listen.rpartition(":")[0].strip("[]")

    @property
    def is_loopback(self) -> bool:
        """Only this machine reaches it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a name; only this one is surely this machine's own
            return self.host == "localhost"

    def read_page_token(self) -> SecretStr | None:
        """The token from wherever it is kept. Raises ConfigError when its file cannot be read."""
        if self.page_token_file is None:
            return self.page_token
        try:
            return self._is_token(SecretStr(self.page_token_file.read_text().strip()))
        except (OSError, ValueError) as error:
            raise ConfigError(f"service.page_token_file: cannot use {self.page_token_file}: {error}") from None


class Log(_Section):
    """What is logged to stderr, and how."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["json", "console"] = "json"


class Config(BaseSettings):
    """All settings. `load` reads them; the sections are documented in config.example.toml."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True, hide_input_in_errors=True
    )

    letta: Letta = Letta()
    watch: Watch
    storage: Storage = Storage()
    discovery: Discovery = Discovery()
    service: Service = Service()
    log: Log = Log()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Our own variables go before the official client's, and both before the file."""
        return env_settings, init_settings, TomlConfigSettingsSource(settings_cls)


def load(path: Path | None) -> Config:
    """Read the file and the environment. Raises ConfigError with every fault, one a line."""
    if path is not None and not path.is_file():
        raise ConfigError(f"{path}: there is no such file; start from config.example.toml")

    class FromFile(Config):
        model_config = SettingsConfigDict(toml_file=path)

    faults = [*_misspelt_variables()]
    try:
        config = FromFile(**_official_variables())
    except ValidationError as error:
        faults += _faults(error)
    except SettingsError as error:  # a variable that holds a list or a table and is no JSON
        faults.append(f"{error}: lists in variables are JSON, such as {PREFIX}WATCH__AGENTS='[\"agent-...\"]'")
    except ValueError as error:  # not TOML, not UTF-8
        faults.append(f"is not TOML: {error}")
    except OSError as error:
        faults.append(f"cannot be read: {error.strerror}")
    if faults:
        lines = "\n".join(f"  {fault}" for fault in faults)
        raise ConfigError(f"the configuration{f' in {path}' if path else ''} is wrong:\n{lines}")
    return config


def _misspelt_variables() -> Iterator[str]:
    """A variable that is meant for us and names no section would be ignored, and its setting left at its default."""
    sections = {name.upper() for name in Config.model_fields}
    for name in sorted(os.environ):
        section, separator, _ = name.upper().removeprefix(PREFIX).partition("__")
        is_ours = name.upper().startswith(PREFIX) and (separator or section.split("_")[0] in sections)
        if is_ours and section not in sections:
            near = _nearest(name.upper().removeprefix(PREFIX), [s.replace(".", "__").upper() for s in _settings()])
            advice = f"did you mean {PREFIX}{near}?" if near else f"write {PREFIX}SECTION__KEY"
            yield f"{name} (environment): there is no such setting; {advice}"


def _official_variables() -> dict[str, Any]:
    """What the official client reads, so that one environment serves both."""
    named = {"base_url": os.environ.get("LETTA_BASE_URL"), "api_key": os.environ.get("LETTA_API_KEY")}
    letta = {key: value for key, value in named.items() if value}
    return {"letta": letta} if letta else {}


def _faults(error: ValidationError) -> list[str]:
    """One line for each key, however many types it might have had; with what was found, unless it may be a secret."""
    lines: dict[str, str] = {}
    for fault in error.errors(include_url=False):
        section_and_key, more = fault["loc"][:2], fault["loc"][2:3]
        # An entry's number belongs to the path; the types that pydantic has tried do not.
        path = ".".join(str(part) for part in (*section_and_key, *(part for part in more if isinstance(part, int))))
        lines.setdefault(path, f"{path}: {_advice(path, fault)}")
    return list(lines.values())


def _advice(path: str, fault: Any) -> str:
    """What would be right."""
    section, _, key = path.partition(".")
    field = _settings().get(".".join([section, key.partition(".")[0]]))
    if fault["type"] == "missing" and path == "watch":
        return "nothing is watched: add a [watch] section with all = true, or name conversations or agents"
    if field is None and section in Config.model_fields and not key:
        return _section_advice(section, fault)
    if field is None:
        elsewhere = [name for name in _settings() if name.endswith(f".{path}")]
        near = _nearest(path, [*Config.model_fields, *_settings()]) or next(iter(elsewhere), None)
        return f"there is no such setting; {f'did you mean {near}?' if near else 'config.example.toml lists them all'}"
    return _said(fault, field.description) + _found(fault["input"], is_shown=field.repr)


def _said(fault: Any, description: str | None) -> str:
    if fault["type"] == "value_error":
        return str(fault["ctx"]["error"])
    return description or fault["msg"].replace("Input should be", "should be")


def _found(value: Any, *, is_shown: bool) -> str:
    return f" (found {value!r})" if is_shown and isinstance(value, str | int | float) else ""


def _section_advice(section: str, fault: Any) -> str:
    is_ours = fault["type"] == "value_error"
    return str(fault["ctx"]["error"]) if is_ours else f"should be a section: write [{section}], and its settings below"


def _settings() -> dict[str, FieldInfo]:
    """Every setting there is, by its path."""
    found: dict[str, FieldInfo] = {}
    for section, field in Config.model_fields.items():
        model: type[_Section] = field.annotation  # type: ignore[assignment]
        found |= {f"{section}.{key}": setting for key, setting in model.model_fields.items()}
    return found


def _nearest(name: str, known: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.75)), None)
