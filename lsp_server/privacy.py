"""Which files the model may see: none that hold secrets, none that git ignores, unless the user allows it."""

from __future__ import annotations

import fnmatch
import subprocess
from pathlib import Path
from urllib.parse import unquote, urlsplit

_SECRET = (".env", ".env.*", "*.env", "*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.keystore", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*",
           ".netrc", ".npmrc", ".pypirc", ".htpasswd", "credentials", "credentials.*", "secrets.*", "*.kdbx", ".git-credentials")


def path_of(uri: str) -> Path | None:
    """The file of a file: URI."""
    parts = urlsplit(uri)
    return Path(unquote(parts.path)) if parts.scheme == "file" else None


class Privacy:
    """Answers are remembered for the session; git is asked once for each file."""

    def __init__(self) -> None:
        self._ignored: dict[str, bool] = {}

    def reason(self, uri: str) -> str | None:
        """Why the file must not be shown to the model; None if it may. May run git: not for the event loop."""
        path = path_of(uri)
        if path is None:
            return None
        if any(fnmatch.fnmatch(path.name.lower(), pattern) for pattern in _SECRET):
            return "secret file"
        if uri not in self._ignored:
            self._ignored[uri] = _git_ignores(path)
        return "ignored by git" if self._ignored[uri] else None


def _git_ignores(path: Path) -> bool:
    try:
        done = subprocess.run(["git", "check-ignore", "-q", "--", str(path)], cwd=path.parent, stdin=subprocess.DEVNULL,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=2)
    except (OSError, subprocess.TimeoutExpired):
        return False   # no git, or no such folder: nothing is known to be ignored
    return done.returncode == 0
