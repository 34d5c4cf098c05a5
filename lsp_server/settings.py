"""Every setting once: name, type, default, help. The editors' own settings pages are generated from here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import Attribute, field, fields, frozen


def _setting(default: Any, help: str, *, choices: tuple[str, ...] = (), least: float | None = None, most: float | None = None, restart: bool = False):
    return field(default=default, metadata={"help": help, "choices": choices, "least": least, "most": most, "restart": restart})


@frozen
class Settings:
    """What a person can set, under the key `pio` of the editor's configuration or by the command line's options of the same names."""

    enable: bool = _setting(True, "Show completions while you type.")
    model: str = _setting("smollm2-135m", "Name of an installed model, a Hugging Face id, a folder or a .gguf file.", restart=True)
    device: str = _setting("auto", "auto, cpu, cuda or cuda:N.", restart=True)
    weights: str = _setting("auto", "auto takes the checkpoint's own numbers; q8 or q4 rounds floats to 8 or 4 bits at the first start and keeps "
                                    "the result on disk.", choices=("auto", "q8", "q4"), restart=True)
    cache: str = _setting("auto", "How keys and values of past tokens are kept: auto in 16 bits; q8 in 8 bits, so that about twice as many fit (on a "
                                  "CPU).", choices=("auto", "q8"), restart=True)
    experts: str = _setting("auto", "Where a CPU has the experts of a model that has such: memory repacks them, file reads them in the model's file, which "
                                    "is slower and needs no memory of its own; auto takes the file where memory is too small.",
                            choices=("auto", "memory", "file"), restart=True)
    memory: int = _setting(0, "Bytes for weights and cache; 0 takes what is free.", least=0, restart=True)
    checkpoint_memory: int = _setting(0, "Bytes of the memory for recurrent states kept for later prompts, in models that have such; 0 takes room for "
                                         "64 of them.", least=0, restart=True)
    host_checkpoint_memory: int = _setting(0, "Bytes of main memory for those that a GPU has no room for; 0 takes up to 2 GB beside a GPU.", least=0,
                                           restart=True)
    context: int = _setting(0, "Tokens the model can see at once; 0 takes the model's own limit up to 8192.", least=0, most=1 << 20, restart=True)
    threads: int = _setting(0, "CPU threads; 0 takes one for each physical core.", least=0, most=1024, restart=True)
    max_tokens: int = _setting(64, "Longest completion, in tokens.", least=1, most=1024)
    prompt_tokens: int = _setting(1024, "Tokens of the document that the model sees.", least=64, most=1 << 17)
    deadline_ms: int = _setting(3000, "A completion that takes longer is shown as far as it got.", least=50, most=600_000)
    chat_tokens: int = _setting(1024, "Longest answer in the chat, in tokens.", least=1, most=1 << 16)
    thinking: bool = _setting(False, "Let models that can think before they answer in the chat do so; their thoughts are shown folded.")
    multiline: bool = _setting(True, "Suggest whole blocks; off: the rest of the line.")
    prefill: bool = _setting(True, "Begin to write at the key, before the editor asks for a completion.")
    prefetch: bool = _setting(True, "While a suggestion is shown, write what would follow it if it were accepted.")
    temperature: float = _setting(0.0, "0 always takes the likeliest token.", least=0.0, most=5.0)
    context_files: bool = _setting(True, "Show the model parts of other open files, where it was trained for that.")
    secrets: bool = _setting(False, "Complete in files that may hold secrets (.env, keys) and in ignored files, too.")
    log_level: str = _setting("warning", "What goes to the log on stderr.", choices=("error", "warning", "info", "debug"))

    def loads_alike(self, other: Settings) -> bool:
        """Whether the model that is loaded by these settings is the one that `other` would load."""
        return all(getattr(self, a.name) == getattr(other, a.name) for a in fields(type(self)) if a.metadata["restart"])

    @classmethod
    def from_client(cls, value: Any, base: Settings | None = None) -> tuple[Settings, list[str]]:
        """(settings, one message for each entry that was ignored). Keys may be snake_case or camelCase."""
        base = base or cls()
        if not isinstance(value, Mapping):
            # An empty list is what an empty table of Lua becomes.
            return base, [] if value is None or value == [] else [f"settings must be an object, not {type(value).__name__}"]
        known, messages, chosen = {a.name: a for a in fields(cls)}, [], {}
        for key, entry in value.items():
            attribute = known.get(_snake(str(key)))
            if attribute is None:
                messages.append(f"unknown setting {key!r}")
            elif problem := _problem(attribute, entry):
                messages.append(f"setting {key!r} {problem}, not {entry!r}")
            else:
                chosen[attribute.name] = float(entry) if attribute.type == "float" else entry
        return cls(**{name: chosen.get(name, getattr(base, name)) for name in known}), messages


_KINDS: dict[str, tuple[type, ...]] = {"bool": (bool,), "int": (int,), "float": (int, float), "str": (str,)}
_WORDS = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "a text"}


def _problem(attribute: Attribute, value: Any) -> str | None:
    kind, meta = str(attribute.type), attribute.metadata
    if not isinstance(value, _KINDS[kind]) or (isinstance(value, bool) and kind != "bool"):
        return f"must be {_WORDS[kind]}"
    if meta["choices"] and value not in meta["choices"]:
        return f"must be one of {', '.join(meta['choices'])}"
    if meta["least"] is not None and not value >= meta["least"]:
        return f"must be at least {meta['least']}"
    if meta["most"] is not None and not value <= meta["most"]:
        return f"must be at most {meta['most']}"
    return None


def _snake(name: str) -> str:
    return "".join("_" + c.lower() if c.isupper() else c for c in name)


def schema() -> dict[str, Any]:
    """JSON schema of the settings, as VS Code's `contributes.configuration.properties` wants it."""
    properties = {}
    for attribute in fields(Settings):
        kind, meta = str(attribute.type), attribute.metadata
        entry: dict[str, Any] = {"type": {"bool": "boolean", "int": "integer", "float": "number", "str": "string"}[kind],
                                 "default": attribute.default, "description": meta["help"]}
        entry |= {"enum": list(meta["choices"])} if meta["choices"] else {}
        entry |= {key: meta[name] for key, name in (("minimum", "least"), ("maximum", "most")) if meta[name] is not None}
        properties[f"pio.{_camel(attribute.name)}"] = entry
    return properties


def _camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(word.capitalize() for word in rest)
