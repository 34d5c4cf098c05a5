"""Which files the model may see: none that hold secrets, none that git ignores, unless the user allows it."""

from __future__ import annotations

import fnmatch
import subprocess
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from inference_pio.engine import ContextChunk
from inference_pio.lsp_server.documents import Document

_SECRET = (".env", ".env.*", "*.env", "*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.keystore", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*",
           ".netrc", ".npmrc", ".pypirc", ".htpasswd", "credentials", "credentials.*", "secrets.*", "*.kdbx", ".git-credentials")
_CHUNKS, _CHUNK = 3, 1500   # other files shown, characters of each


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


def chunks(document: Document, recent: Iterable[Document], privacy: Privacy, secrets_allowed: bool) -> tuple[ContextChunk, ...]:
    """Heads of the other open files, in an order that does not change while one types: by name."""
    others = [d for d in recent if d.uri != document.uri and d.text.strip() and (secrets_allowed or privacy.reason(d.uri) is None)]
    chosen = sorted(others[:_CHUNKS], key=lambda d: d.uri)
    return tuple(ContextChunk(d.uri.rsplit("/", 1)[-1], _whole_lines(d.text)) for d in chosen)


def _whole_lines(text: str) -> str:
    return text if len(text) <= _CHUNK else text[:text.rfind("\n", 0, _CHUNK) + 1 or _CHUNK]
