"""Which models there are: plugins are found through entry points, so that a model is its folder and one line of metadata."""

from __future__ import annotations

import logging
from functools import cache
from importlib.metadata import entry_points

from inference_pio.engine.errors import ModelNotFound
from inference_pio.models.contract import ModelPlugin

GROUP = "inference_pio.models"
_log = logging.getLogger(__name__)


def plugins() -> dict[str, ModelPlugin]:
    """Plugins by the name that --model takes. One that does not load is left out; the others still work."""
    return _discover()[0]


def broken() -> dict[str, str]:
    """Why a plugin is left out, by its entry point's name."""
    return _discover()[1]


@cache
def _discover() -> tuple[dict[str, ModelPlugin], dict[str, str]]:
    found: dict[str, ModelPlugin] = {}
    failed: dict[str, str] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda e: e.name):
        try:
            plugin = entry.load()
            if not isinstance(plugin, ModelPlugin):
                raise TypeError(f"it is a {type(plugin).__name__}, not a ModelPlugin")
            if found.setdefault(plugin.name, plugin) is not plugin:
                raise ValueError(f"another plugin is called {plugin.name!r} too")
        except Exception as error:   # a plugin may come from anyone
            failed[entry.name] = f"model plugin {entry.name} ({entry.value}) does not load: {type(error).__name__}: {error}"
            _log.error("%s", failed[entry.name])
    return found, failed


def plugin_for(architecture: str, where: str, name: str | None = None) -> ModelPlugin:
    """The plugin that runs `architecture`: the one called `name` if it does, else the first. ModelNotFound if none does."""
    able = [p for p in plugins().values() if architecture in p.architectures]
    if not able:
        known = sorted({a for p in plugins().values() for a in p.architectures})
        raise ModelNotFound(f"{where}: no plugin runs the architecture {architecture!r}; known are {', '.join(known) or 'none'}")
    return next((p for p in able if p.name == name), able[0])
