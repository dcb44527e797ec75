"""SIGHUP: the configuration is read again, and what may change while the worker runs does. Used by app.py."""

from collections.abc import Callable
from typing import Any

from pydantic import SecretStr

from worker.config import Config
from worker.errors import ConfigError
from worker.letta.client import LettaClient
from worker.logs import Log, set_level

CHANGEABLE = {"watch.all", "watch.conversations", "watch.agents", "discovery.start", "log.level"}
KEY = {"letta.api_key", "letta.api_key_file"}
"""Where the key is; whether it has changed is seen by reading it."""
PAGE_TOKEN = {"service.page_token", "service.page_token_file"}
"""The same. Another one is taken, but none is not: what else is shown, and where, changes only at a start."""


class Reload:
    """Reads the configuration again and brings the running worker to it.

    `reread` gives the configuration as it is now, or raises ConfigError; `watch` is told of a new one.
    `use_page_token` is told of the status page's.
    """

    def __init__(
        self,
        config: Config,
        reread: Callable[[], Config],
        watch: Callable[[Config], None],
        letta: LettaClient,
        log: Log,
        *,
        use_page_token: Callable[[SecretStr], None],
    ) -> None:
        self._running = _settings(config)
        self._key = config.letta.read_api_key()
        self._page_token = config.service.read_page_token()
        self._reread = reread
        self._watch = watch
        self._letta = letta
        self._use_page_token = use_page_token
        self._log = log

    def reload(self) -> None:
        """Change what can change, and say what cannot. Of a wrong configuration nothing is taken."""
        try:
            config = self._reread()
            key = config.letta.read_api_key()
            page_token = config.service.read_page_token()
        except ConfigError as error:
            self._log.error("config.rejected", faults=str(error).splitlines())
            return
        settings = _settings(config)
        different = {name for name, value in settings.items() if self._running[name] != value}
        changed = different & CHANGEABLE
        if key != self._key:
            changed.add("letta.api_key")
            self._letta.use_key(key)
            self._key = key
        fixed = different - CHANGEABLE - KEY
        if page_token is not None:
            fixed -= PAGE_TOKEN
            if page_token != self._page_token:
                changed.add("service.page_token")
                self._use_page_token(page_token)
                self._page_token = page_token
        if changed & {"watch.all", "watch.conversations", "watch.agents", "discovery.start"}:
            self._watch(config)
        set_level(config.log.level)
        self._running |= {name: settings[name] for name in CHANGEABLE}
        self._log.info("config.reloaded", changed=sorted(changed))
        if fixed:
            self._log.warning("config.needs_restart", settings=sorted(fixed))


def _settings(config: Config) -> dict[str, Any]:
    """Every setting by its path in the file."""
    sections = config.model_dump()
    return {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}
