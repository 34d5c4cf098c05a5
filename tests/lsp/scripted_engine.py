"""An engine without a model: it writes what a test tells it to, and remembers what it was asked. `python scripted_engine.py OPTIONS`
serves LSP with it, so that tests can have a real process, too."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field, fields
from pathlib import Path

from inference_pio.engine import EngineError, EngineInfo, EngineStatus, FimPrompt, LoadProgress, Priority, Prompt, SamplingParams, TokenStream

INFO = EngineInfo(
    name="scripted", architecture="Scripted", path=Path("/nowhere"), device="cpu", device_name="none", build="none", activations="f32",
    context=4096, fim=True, has_tokenizer=True, weight_bytes=0, page_bytes=0, page_count=0, page_size=16, state_bytes=0, state_count=0,
    host_state_count=0)


def _open_gate() -> threading.Event:
    gate = threading.Event()
    gate.set()
    return gate


@dataclass
class Script:
    """What the engine does. `answers` are given in turn, the last one for ever; `token_seconds` pass before each character."""

    answers: list[str] = field(default_factory=lambda: ["answer"])
    token_seconds: float = 0.0
    load_seconds: float = 0.0
    load_error: str | None = None
    gate: threading.Event = field(default_factory=_open_gate)   # while it is closed, whoever calls the engine waits
    submit_error: str | None = None
    fim: bool = True
    context: int = 4096
    stamp: bool = False       # answer with the time at which that is written, in seconds since 1970


@dataclass
class Asked:
    prompt: Prompt
    params: SamplingParams
    priority: Priority
    stream: TokenStream


class ScriptedEngine:
    """The part of Engine that lsp_server uses. A token is a character in answers, four of them in prompts."""

    def __init__(self, script: Script):
        self.script, self.asked, self.closed, self.waiting = script, [], False, 0
        self.info = EngineInfo(**{**INFO.__dict__, "fim": script.fim, "context": script.context})
        self._answers = list(script.answers)

    @classmethod
    def opener(cls, script: Script, opened: list[ScriptedEngine]):
        """A replacement for Engine.open; what it opens is appended to `opened`."""
        def open_engine(model: str, *, progress, **options) -> ScriptedEngine:
            progress(LoadProgress("load", 1, 2, "half"))
            time.sleep(script.load_seconds)
            script.gate.wait()
            if script.load_error:
                raise EngineError(script.load_error)
            progress(LoadProgress("ready", 1, 1, "all"))
            opened.append(cls(script))
            return opened[-1]
        return open_engine

    def submit(self, prompt: Prompt, params: SamplingParams = SamplingParams(), priority: Priority = Priority.COMPLETION) -> TokenStream:
        self.waiting += 1
        self.script.gate.wait()
        self.waiting -= 1
        if self.script.submit_error:
            raise EngineError(self.script.submit_error)
        stream = TokenStream(lambda: None)
        self.asked.append(Asked(prompt, params, priority, stream))
        answer = ""
        if params.max_tokens and priority is not Priority.PREFETCH:
            answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        elif params.max_tokens:
            answer = self._answers[0]
        threading.Thread(target=self._write, args=(stream, answer, params), daemon=True).start()
        return stream

    def _write(self, stream: TokenStream, answer: str, params: SamplingParams) -> None:
        if self.script.stamp:
            stream.put(0, f"{time.time():.4f}")
            return stream.end("stop")
        stop = min((at for at in (answer.find(s) for s in params.stop) if at >= 0), default=len(answer))
        for number, character in enumerate(answer[:stop][:params.max_tokens]):
            time.sleep(self.script.token_seconds)
            if stream.closed:
                return stream.end("closed")
            stream.put(number, character)
        stream.end("length" if stop > params.max_tokens else "stop")

    def prompt_length(self, prompt: FimPrompt) -> int:
        return self.count_tokens(prompt.prefix + prompt.middle + prompt.suffix)

    def prompt_text(self, prompt: FimPrompt) -> str:
        return prompt.prefix + prompt.middle

    def count_tokens(self, text: str) -> int:
        return -(-len(text) // 4)

    def status(self) -> EngineStatus:
        running = sum(not a.stream.done for a in self.asked)
        nothing = {f.name: 0 for f in fields(EngineStatus)}
        return EngineStatus(**nothing | {"running": running, "last_error": None})

    def close(self) -> None:
        self.script.gate.wait()
        self.closed = True
        for asked in self.asked:
            asked.stream.close()


def main() -> None:
    import argparse

    from inference_pio.lsp_server.server import Server
    from inference_pio.lsp_server.settings import Settings
    from inference_pio.lsp_server.tcp import serve

    parser = argparse.ArgumentParser()
    parser.add_argument("--answer", default="answer")
    parser.add_argument("--token-seconds", type=float, default=0)
    parser.add_argument("--stamp", action="store_true", help="answer with the time at which that is written")
    parser.add_argument("--load-seconds", type=float, default=0)
    parser.add_argument("--print-to-stdout", action="store_true", help="as a careless library would")
    parser.add_argument("--stdio", action="store_true")
    parser.add_argument("--port", type=int)
    arguments = parser.parse_args()
    opener = ScriptedEngine.opener(Script([arguments.answer], arguments.token_seconds, arguments.load_seconds, stamp=arguments.stamp), [])

    def open_engine(*args, **options):
        if arguments.print_to_stdout:
            import os
            print("printed by Python")
            os.write(1, b"written by a C library\n")
            os.system("echo by a child process")
        return opener(*args, **options)

    if arguments.port is None:
        Server(Settings(), "0.1.0", open_engine).serve_stdio()
    else:
        serve(arguments.port, lambda shared: Server(Settings(), "0.1.0", shared, alone=False), open_engine)


if __name__ == "__main__":
    main()
