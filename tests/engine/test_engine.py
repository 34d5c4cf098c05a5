"""Requests from submission to the end: stopping, closing, priorities, errors. On a tiny checkpoint, and on the real one where time counts."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time

import pytest

from checkpoints import GOLDEN
from inference_pio.engine import BadCheckpoint, DeviceError, Engine, EngineError, ModelNotFound, OutOfMemory, Priority, SamplingParams, TokenPrompt
from inference_pio.engine.stopping import StopTexts

PROMPT = TokenPrompt(tuple(range(5, 25)))


@pytest.fixture(scope="module")
def engine():
    with Engine.open(GOLDEN / "llama", device="cpu", context=400) as engine:
        yield engine


@pytest.fixture(scope="module")
def real():
    with Engine.open("smollm2-135m", device="cpu") as engine:
        yield engine


def test_stop_texts_are_found_across_pieces_and_not_shown():
    stops = StopTexts(("\n\n", "END"))
    shown = [stops.feed(piece) for piece in ("a\n", "b", "\nE", "N", "x", "\n", "\nrest")]
    assert "".join(text for text, _ in shown) == "a\nb\nENx" and shown[-1][1]
    assert stops.feed("more") == ("", True) and stops.finish() == ""
    held = StopTexts(("END",))
    assert held.feed("the E")[0] == "the " and held.finish() == "E"


def test_length_stop_and_prefill_only(engine):
    answer = engine.generate(PROMPT, SamplingParams(max_tokens=5, ignore_eos=True))
    assert len(answer.token_ids) == 5 and answer.finish_reason == "length"
    answer = engine.generate(TokenPrompt(tuple(range(200, 260))), SamplingParams(max_tokens=0))
    assert answer.token_ids == () and answer.stats.computed_tokens == 60
    again = engine.generate(TokenPrompt(tuple(range(200, 260)) + (7,)), SamplingParams(max_tokens=1, ignore_eos=True))
    assert again.stats.reused_tokens == 60, "what was prefilled is reused"


def test_sampling_repeats_with_its_seed(engine):
    params = [SamplingParams(max_tokens=12, temperature=1.0, seed=seed, ignore_eos=True) for seed in (1, 1, 2)]
    first, same, other = (engine.generate(PROMPT, p).token_ids for p in params)
    assert first == same != other
    greedy = engine.generate(PROMPT, SamplingParams(max_tokens=12, ignore_eos=True)).token_ids
    assert engine.generate(PROMPT, SamplingParams(max_tokens=12, temperature=1.0, top_k=1, ignore_eos=True)).token_ids == greedy
    penalised = engine.generate(PROMPT, SamplingParams(max_tokens=12, presence_penalty=1e9, ignore_eos=True)).token_ids
    assert len(set(penalised)) == 12 and not set(penalised) & set(PROMPT.token_ids)


def test_a_penalty_is_for_its_own_request(engine):
    """Whatever row of a step it has, and whoever had that row before."""
    plain = SamplingParams(max_tokens=12, ignore_eos=True)
    penalised = SamplingParams(max_tokens=12, ignore_eos=True, presence_penalty=1e9)
    expected = {params: engine.generate(PROMPT, params).token_ids for params in (plain, penalised)}
    assert expected[plain] != expected[penalised]
    for together in ((penalised, penalised, penalised), (plain, penalised), (penalised, plain), (plain,), (plain, plain, penalised), (plain, plain)):
        streams = [(params, engine.submit(PROMPT, params)) for params in together]
        for params, stream in streams:
            stream.wait()
            assert stream.token_ids == expected[params], together


def test_deadline_and_async_iteration(real):
    async def collect():
        stream = real.submit("def main():", SamplingParams(max_tokens=8000, deadline_ms=150, ignore_eos=True))
        return "".join([piece async for piece in stream]), stream
    text, stream = asyncio.run(collect())
    assert stream.stats.finish_reason == "deadline" and text == stream.text and 0 < len(stream.token_ids) < 8000


def test_urgent_requests_overtake(real):
    background = real.submit("Once upon a time", SamplingParams(max_tokens=400, ignore_eos=True), Priority.PREFETCH)
    next(background)
    urgent = real.generate("def main():", SamplingParams(max_tokens=4, ignore_eos=True), Priority.COMPLETION)
    assert not background.done and len(urgent.token_ids) == 4
    background.close()
    assert list(background) is not None and background.stats.finish_reason == "closed"


def test_closing_leaves_the_engine_idle_within_a_step_and_keeps_the_work(real):
    steps = []
    for number in range(6):
        text = f"# file {number}\n" + "".join(f"value_{i} = compute({i} + {number})\n" for i in range(60))
        stream = real.submit(text, SamplingParams(max_tokens=50, ignore_eos=True))
        while not stream.stats.computed_tokens:
            time.sleep(0.001)
        before = real.status().steps
        stream.close()
        for _ in stream:
            pass
        steps.append(real.status().steps - before)
        assert real.status().running == real.status().waiting == 0
        again = real.generate(text, SamplingParams(max_tokens=1, ignore_eos=True))
        assert again.stats.reused_tokens > 0, "what was computed before the cancellation is reused"
    # A step may end between the question and the closing: most of the time none does.
    assert sorted(steps)[len(steps) // 2] <= 1, steps


def test_errors_name_the_thing(engine, tmp_path):
    with pytest.raises(EngineError, match="empty"):
        engine.submit(TokenPrompt(()))
    with pytest.raises(EngineError, match="no tokenizer"):
        engine.submit("text")
    with pytest.raises(EngineError, match="395 tokens .* context holds 400"):
        engine.submit(TokenPrompt(tuple([5] * 395)), SamplingParams(max_tokens=6))
    with pytest.raises(EngineError, match="token ids must be in 0..511"):
        engine.submit(TokenPrompt((512,)))
    for ids in ([512], [-1], [5, 10**12]):
        with pytest.raises(EngineError, match="token ids must be in 0..511"):
            engine.score(ids)
    with pytest.raises(ValueError, match="top_p must be"):
        SamplingParams(top_p=0)
    with pytest.raises(ModelNotFound, match="no model 'nonsense'"):
        Engine.open("nonsense")
    with pytest.raises(ModelNotFound, match="neither a config.json"):
        Engine.open(tmp_path)
    (tmp_path / "broken.gguf").write_bytes(b"GGUFxx")
    with pytest.raises(BadCheckpoint, match="cut off"):
        Engine.open(tmp_path / "broken.gguf")
    with pytest.raises(DeviceError, match="device must be"):
        Engine.open(GOLDEN / "llama", device="gpu")
    with pytest.raises(OutOfMemory, match="--context"):
        Engine.open(GOLDEN / "llama", device="cpu", memory=450_000)
    for _ in range(3):
        assert engine.generate(PROMPT, SamplingParams(max_tokens=1, ignore_eos=True)).token_ids, "it works on after every error"


def test_a_closed_engine_says_so():
    engine = Engine.open(GOLDEN / "llama", device="cpu", context=64)
    stream = engine.submit(PROMPT, SamplingParams(max_tokens=40, ignore_eos=True))
    engine.close()
    for _ in stream:
        pass
    assert stream.done
    with pytest.raises(EngineError, match="closed"):
        engine.submit(PROMPT, SamplingParams(max_tokens=1))


def test_no_array_library_is_needed():
    """Scoring, generating and reading logits, in a process that could not import one."""
    script = f"""
import sys
sys.modules["numpy"] = sys.modules["torch"] = None
from inference_pio.engine import Engine, SamplingParams, TokenPrompt
with Engine.open({str(GOLDEN / "llama")!r}, device="cpu", context=64) as engine:
    logits = engine.score([5, 6, 7])
    best = max(range(logits.shape[1]), key=logits.row(2).__getitem__)
    assert (best,) == engine.generate(TokenPrompt((5, 6, 7)), SamplingParams(max_tokens=1, ignore_eos=True)).token_ids
    print(logits.shape, len(logits.data))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "(3, 512) 1536\n", done.stderr


def test_a_step_that_is_repeated_gives_what_a_whole_one_gives():
    """Whoever joins, ends, is closed or needs a page in between."""
    def wait_for_token(stream):
        while not stream.token_ids:
            time.sleep(0.0001)

    def run(repeat):
        repeated = 0
        with Engine.open(GOLDEN / "llama", device="cpu", activations="f32", reuse=False) as engine:
            stepper = engine._stepper
            original = stepper._repeat

            def counted():
                nonlocal repeated
                done = repeat and original()
                repeated += done
                return done
            stepper._repeat = counted
            prompts = [TokenPrompt(tuple((t * 41 + 7 * k) % 512 for t in range(20 + k))) for k in range(4)]
            streams = [engine.submit(prompts[0], SamplingParams(max_tokens=50, temperature=1.0, seed=7, ignore_eos=True))]
            wait_for_token(streams[0])
            for prompt, length, penalty in zip(prompts[1:], (5, 30, 20), (0.0, 0.0, 1.0)):
                streams.append(engine.submit(prompt, SamplingParams(max_tokens=length, presence_penalty=penalty, ignore_eos=True)))
            closed = engine.submit(prompts[1], SamplingParams(max_tokens=400, ignore_eos=True))
            wait_for_token(closed)
            closed.close()
            for stream in (*streams, closed):
                stream.wait()
            assert closed.stats.finish_reason == "closed"
            return [stream.token_ids for stream in streams], repeated
    answers, repeated = run(True)
    assert (answers, 0) == run(False)
    assert [len(answer) for answer in answers] == [50, 5, 30, 20]
    assert repeated >= 15   # of the 30 steps or more after the shorter answers, all but those that need a page


@pytest.mark.parametrize("asynchronous", [False, True])
def test_tokens_are_handed_out_before_anybody_waits(asynchronous):
    """At once where a step runs to its end; else while the next one runs, so that the device never waits for readers."""
    greedy = SamplingParams(max_tokens=6, ignore_eos=True)
    with Engine.open(GOLDEN / "qwen3", device="cpu") as engine:
        expected = engine.generate(PROMPT, greedy).token_ids
        stepper, seen = engine._stepper, []
        runner = stepper._runner
        runner.backend.asynchronous = asynchronous
        def watched(what, function):
            def call(*arguments):
                seen.append((what, len(stepper._scheduler.sequences[0].stream.token_ids)))
                return function(*arguments)
            return call
        runner.forward, runner.repeat, runner.tokens = (
            watched(what, function) for what, function in (("step", runner.forward), ("step", runner.repeat), ("tokens", runner.tokens)))
        stream = engine.submit(PROMPT, greedy)
        for _ in stream:
            pass
        assert stream.token_ids == expected and len(expected) == 6
        steps = range(len(expected))
        assert [n for what, n in seen if what == "tokens"] == list(steps)
        assert [n for what, n in seen if what == "step"][-len(expected):] == [max(0, n - asynchronous) for n in steps]
