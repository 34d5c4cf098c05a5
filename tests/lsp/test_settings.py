"""Settings from every side: the client's, the command line's, and the schema that the editors' pages are made of."""

import json
import socket
import subprocess
import sys

import pytest

from inference_pio.lsp_server.__main__ import main
from inference_pio.lsp_server.settings import Settings

WRONG = pytest.mark.parametrize("settings, words", [
    ({"maxTokens": "many"}, "'maxTokens' must be a whole number, not 'many'"), ({"max_tokens": 0}, "at least 1"), ({"temperature": True}, "temperature"),
    ({"temperature": float("nan")}, "at least 0"), ({"contextFiles": "yes"}, "true or false"), ({"frobnicate": 1}, "unknown setting 'frobnicate'"),
    ({"logLevel": "loud"}, "one of"), (17, "object"), ("text", "object"), ({"model": None}, "'model' must be a text"), ({"weights": ["q8"]}, "weights"),
    ({"threads": 10**30}, "at most 1024")])


def told(client, words) -> bool:
    return any(n["method"] == "window/showMessage" and words in n["params"]["message"] for n in client.notifications)


@WRONG
def test_wrong_settings_are_named_and_the_others_kept(ready, settings, words):
    _, client = ready()
    client.notify("workspace/didChangeConfiguration", {"settings": {"pio": settings}})
    client.wait(lambda: told(client, words), f"a message with {words!r}")
    client.open("x = ")
    assert client.inline(0, 4) == "answer"


@WRONG
def test_wrong_settings_at_the_start(served, settings, words):
    client = served().client
    client.initialize(options=settings)
    client.wait(lambda: told(client, words), f"a message with {words!r}")
    client.open("x = ")
    assert client.inline(0, 4) == "answer"


def test_one_wrong_setting_does_not_lose_the_right_ones(ready):
    served, client = ready(options={"maxTokens": 7, "temperature": "hot"})
    client.notify("workspace/didChangeConfiguration", {"settings": {"pio": {"maxTokens": -1, "deadlineMs": 999}}})
    client.open("x = ")
    client.inline(0, 4)
    params = served.engine.asked[-1].params
    assert (params.max_tokens, params.deadline_ms, params.temperature) == (7, 999.0, 0.0)


@pytest.mark.parametrize("setting", [{"model": "other"}, {"device": "cuda"}, {"weights": "q4"}, {"memory": 10**9}, {"context": 512}, {"threads": 3}])
def test_the_model_is_loaded_again_when_a_setting_changes_it(ready, setting):
    served, client = ready()
    first = served.engine
    client.notify("workspace/didChangeConfiguration", {"settings": {"pio": setting}})
    client.wait(lambda: len(served.engines) == 2, "the second engine")
    assert first.closed
    client.wait_ready()
    assert client.request("pio/status", {})["model"] == setting.get("model", Settings().model)


def test_other_settings_load_nothing(ready):
    served, client = ready()
    client.notify("workspace/didChangeConfiguration", {"settings": {"pio": {"maxTokens": 9, "multiline": False, "enable": False}}})
    assert client.request("pio/status", {})["enabled"] is False and len(served.engines) == 1


# ---- the command line ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, words", [
    (["--threads", "-3"], "'threads' must be at least 0, not -3"), (["--threads", "x"], "--threads"), (["--weights", "q5"], "--weights"), (["--port", "99999"], "1..65535"),
    (["--frobnicate"], "--frobnicate"), (["chat"], "no command 'chat': there are models and settings"), (["--bench", "--frob", "1"], "--frob"),
    (["--bench", "models"], "no command 'models' here")])
def test_a_wrong_argument_is_named(arguments, words, capsys):
    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code
    error = capsys.readouterr().err
    assert code == 2 and words in error and len(error.splitlines()) <= 3


def test_a_port_that_is_taken_is_named(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["--port", str(taken.getsockname()[1])]) == 1
    assert "cannot be served: Address already in use" in capsys.readouterr().err


def test_models_are_listed_with_what_they_need(capsys):
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    assert "smollm2-135m (the default): on disk, 98 MB; needs " in out and "From Qwen/Qwen3-0.6B." in out and max(map(len, out.splitlines())) < 90


def test_settings_are_printed_as_a_schema():
    done = subprocess.run([sys.executable, "-m", "inference_pio.lsp_server", "settings"], capture_output=True, check=True)
    schema = json.loads(done.stdout)
    assert schema["pio.maxTokens"] == {"type": "integer", "default": 64, "description": "Longest completion, in tokens.", "minimum": 1, "maximum": 1024}
    assert all(name.startswith("pio.") and entry["description"].endswith(".") for name, entry in schema.items())
