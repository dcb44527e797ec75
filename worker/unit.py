"""The systemd unit of this installation: deploy/letta-ingest.service with its two paths. Used by cli.py."""

import re
import sys
from pathlib import Path

EXECUTABLE = "/opt/letta-ingest/bin/letta-ingest"
CONFIG = "/etc/letta-ingest/config.toml"
"""What stands in the template for them."""
HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # noqa: S108 - nothing is put there
"""The unit's ProtectHome= and PrivateTmp= show the service nothing of these."""


def unit(executable: Path, config: Path) -> str:
    """The unit's text. Both paths are absolute."""
    template = _template().read_text()
    return template.replace(EXECUTABLE, _quoted(executable)).replace(CONFIG, _quoted(config))


def installed_executable() -> Path:
    """The command letta-ingest of the environment that runs this; it need not be in the PATH."""
    return Path(sys.executable).parent / "letta-ingest"


def is_hidden(path: Path) -> bool:
    """The service could not see this path."""
    return any(path.is_relative_to(folder) for folder in HIDDEN)


def _quoted(path: Path) -> str:
    """A path as one word of a command in a unit."""
    text = re.sub(r'([\\"])', r"\\\1", str(path)).replace("%", "%%").replace("$", "$$")
    return text if re.fullmatch(r"[\w/.%$@+=:,-]+", text) else f'"{text}"'


def _template() -> Path:
    """It is in the package when installed, and beside it in a checkout."""
    packaged = Path(__file__).parent / "letta-ingest.service"
    return packaged if packaged.exists() else Path(__file__).parents[1] / "deploy" / "letta-ingest.service"
