"""What the server is doing, and why nothing was shown."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from inference_pio.lsp_server.session import LastRequest, Session


def loading(stage: str, detail: str) -> str:
    """What is told to people of a stage of LoadProgress."""
    verb = {"download": "downloading", "quantize": "rounding the weights of"}.get(stage, "loading")
    return f"{verb} {detail}"


def status(session: Session) -> dict[str, Any]:
    """`pio/status`: state is loading, ready or error; `last` tells of the last completion request."""
    answer: dict[str, Any] = {"state": "ready" if session.engine else "error" if session.error else "loading", "model": session.settings.model,
                              "enabled": session.settings.enable, "error": session.error,
                              "progress": asdict(session.progress) if session.progress else None}
    if session.last is not None:
        answer["last"] = _told(session.last)
    answer["prefetch"] = {"begun": session.prefetches, "used": session.prefetch_hits}
    if session.engine is not None:
        answer["engine"] = asdict(session.engine.status())
        answer["info"] = {**asdict(session.engine.info), "path": str(session.engine.info.path)}
    return answer


def models() -> list[dict[str, Any]]:
    """`pio/models`: what can be selected by name. Looks at the disk: not for the event loop."""
    from inference_pio.engine import list_models

    return [{"name": m.name, "description": m.description, "onDisk": m.on_disk is not None, "bytes": m.disk_bytes} for m in list_models()]


def explain(session: Session) -> dict[str, Any]:
    """`pio.explain`: why the last request showed what it showed, with the prompt the model saw."""
    last = session.last
    if last is None:
        return {"reason": "no completion was asked for yet"}
    return _told(last) | {"prompt": session.engine.prompt_text(last.prompt) if last.prompt and session.engine else None}


def _told(last: LastRequest) -> dict[str, Any]:
    return {field.name: getattr(last, field.name) for field in fields(last) if field.name not in ("prompt", "began")}
