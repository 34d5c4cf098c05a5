"""Samples -> one JSON document (traces/README.md describes it). Tables and pages show this document and nothing else."""

from __future__ import annotations

import math
import os
import platform
from statistics import median
from typing import Any

from inference_pio.lsp_server.bench.replay import Recording, Sample
from inference_pio.lsp_server.bench.trace import KINDS, THROUGH

SCHEMA = 1
DECODED_ENOUGH = 8    # tokens an answer must have for its decode speed to mean something


def percentile(values: list[float], p: float) -> float:
    """Nearest rank: the smallest value that at least p percent of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(p / 100 * len(ordered)) - 1)]


def spread(values: list[float]) -> dict[str, float] | None:
    """p50, p90, p99 and the largest; None of nothing."""
    if not values:
        return None
    return {"p50": percentile(values, 50), "p90": percentile(values, 90), "p99": percentile(values, 99), "max": max(values)}


def run(name: str, about: dict[str, Any], recording: Recording) -> dict[str, Any]:
    """One replay on one server."""
    answers = [sample.answer for sample in recording.samples]
    decoded = [a for a in answers if a.tokens_per_second and a.generated_tokens >= DECODED_ENOUGH]
    kinds = {kind: of_kind(samples) for kind in KINDS if (samples := [s for s in recording.samples if s.kind == kind])}
    return {
        "name": name, **about,
        "seconds": recording.seconds, "requests": recording.requests, "measured": len(answers),
        "skipped": recording.skipped, "events_left": recording.events_left,
        "kinds": kinds,
        "from_memory_ms": spread([a.server_ms for a in answers if a.source == THROUGH and a.server_ms is not None]),
        "decode_tokens_per_second": median(a.tokens_per_second for a in decoded) if decoded else None,
        "decode_context": median(a.prompt_tokens + a.generated_tokens / 2 for a in decoded) if decoded else None,
        "cancel_to_idle_ms": spread(recording.idle_ms),
        "prompt_tokens": sum(a.prompt_tokens for a in answers), "reused_tokens": sum(a.reused_tokens for a in answers),
        "computed_tokens": sum(a.computed_tokens for a in answers), "recomputed_tokens": sum(a.recomputed_tokens for a in answers),
        "generated_tokens": sum(a.generated_tokens for a in answers),
        "samples": [of_sample(sample) for sample in recording.samples],
    }


def of_kind(samples: list[Sample]) -> dict[str, Any]:
    answers = [sample.answer for sample in samples]
    asked = [a for a in answers if a.prompt_tokens]    # those that reached the model
    return {
        "requests": len(answers), "shown": sum(bool(a.text) for a in answers), "reached_model": len(asked),
        "first_token_ms": spread([a.first_token_ms for a in answers if a.first_token_ms is not None]),
        "answer_ms": spread([a.answer_ms for a in answers]),
        "reused_tokens": spread([a.reused_tokens for a in asked]),
        "computed_tokens": spread([a.computed_tokens for a in asked]),
        "recomputed_tokens": spread([a.recomputed_tokens for a in asked]),
    }


def of_sample(sample: Sample) -> dict[str, Any]:
    a = sample.answer
    return {"trace": sample.trace, "document": sample.document, "kind": sample.kind, "at_s": round(sample.at_s, 4),
            "first_token_ms": a.first_token_ms, "answer_ms": a.answer_ms, "source": a.source, "reason": a.reason,
            "prompt_tokens": a.prompt_tokens, "reused_tokens": a.reused_tokens, "computed_tokens": a.computed_tokens,
            "recomputed_tokens": a.recomputed_tokens, "generated_tokens": a.generated_tokens, "characters": len(a.text)}


def ratios(ours: dict[str, Any], other: dict[str, Any]) -> dict[str, dict[str, float]]:
    """How many times longer `other` takes to the first token, by kind and percentile; above 1: `ours` is faster."""
    table = {}
    for kind, mine in ours["kinds"].items():
        theirs = other["kinds"].get(kind)
        if theirs and mine["first_token_ms"] and theirs["first_token_ms"]:
            table[kind] = {p: theirs["first_token_ms"][p] / mine["first_token_ms"][p] for p in ("p50", "p90", "p99")}
    return table


def roof(model: dict[str, Any], run: dict[str, Any], read_bytes_per_second: float) -> dict[str, Any]:
    """Decode speed as a part of what the memory could give: a token reads all weights, and the cache of every token before it."""
    read, decode = read_bytes_per_second / 1e9, None
    if run["decode_tokens_per_second"]:
        token = model["weight_bytes"] + run["decode_context"] * model["page_bytes"] / model["page_size"]
        decode = run["decode_tokens_per_second"] * token / 1e9
    return {"read_gb_per_second": read, "decode_gb_per_second": decode, "share": None if decode is None else decode / read}


def machine() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"system": f"{platform.system()} {platform.machine()}", "python": platform.python_version(), "processor": _processor(),
            "cores": cores}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"
