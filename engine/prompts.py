"""From what was asked to token ids, in the way the model was trained to be asked."""

from __future__ import annotations

from inference_pio.engine.chat_template import ChatTemplate
from inference_pio.engine.errors import BadCheckpoint, EngineError
from inference_pio.engine.request import ChatPrompt, FimPrompt, Prompt, TokenPrompt
from inference_pio.engine.tokenizer import Tokenizer
from inference_pio.models.contract import Prompts


class PromptRenderer:
    """tokenizer is None for a checkpoint that has none: then only token ids can be asked."""

    def __init__(self, prompts: Prompts, tokenizer: Tokenizer | None, template: ChatTemplate | None, where: str):
        self._prompts, self._tokenizer, self._template, self._where = prompts, tokenizer, template, where
        self.stop_ids: frozenset[int] = frozenset()
        self.fim_stop_ids: frozenset[int] = frozenset()
        self.boundaries: frozenset[int] = frozenset()   # tokens that end a segment of a prompt
        self.has_fim = False
        if tokenizer is None:
            return
        self.stop_ids = frozenset(tokenizer.special[t] for t in prompts.stop if t in tokenizer.special)
        self.fim_stop_ids = self.boundaries = self.stop_ids
        if prompts.fim is not None:
            self.has_fim = True
            for token in (prompts.fim.prefix, prompts.fim.suffix, prompts.fim.middle):
                if token not in tokenizer.special:
                    raise BadCheckpoint(f"{where}: its tokenizer lacks {token!r}, which fill-in-the-middle prompts need")
            self.fim_stop_ids |= {tokenizer.special[t] for t in prompts.fim.stop if t in tokenizer.special}
            fim = prompts.fim
            self.boundaries |= {tokenizer.special[t] for t in (fim.prefix, fim.suffix, fim.middle, fim.file) if t in tokenizer.special}

    def render(self, prompt: Prompt) -> tuple[list[int], bytes]:
        """(ids, bytes that the answer must begin with because a word was cut: they are in the document already)"""
        if isinstance(prompt, TokenPrompt):
            return list(prompt.token_ids), b""
        tokenizer = self._tokenizer
        if tokenizer is None:
            raise EngineError(f"{self._where} has no tokenizer: only token ids can be asked of it (TokenPrompt)")
        if isinstance(prompt, str):
            return tokenizer.encode(prompt), b""
        if isinstance(prompt, ChatPrompt):
            if self._template is None:
                raise EngineError(f"{self._where} has no chat template: it can only continue text")
            variables = {**(self._prompts.template_variables or {}), **prompt.template_variables}
            return self._template.render(tokenizer, prompt.messages, variables), b""
        return self._fill(prompt, tokenizer)

    def text(self, prompt: FimPrompt) -> str:
        """What the model sees, its special tokens by name."""
        return "".join(name or text for name, text in self._pieces(prompt))

    def _fill(self, prompt: FimPrompt, tokenizer: Tokenizer) -> tuple[list[int], bytes]:
        *before, (name, last) = self._pieces(prompt)
        ids = [i for special, text in before for i in ([tokenizer.special[special]] if special else tokenizer.encode(text))]
        # Healing stays behind the last special token, so that it can only take back what stands at the cursor.
        special = tokenizer.special[before[-1][0]] if before and before[-1][0] else None
        if special is None:
            return tokenizer.heal(ids + tokenizer.encode(last))
        middle, required = tokenizer.heal([special, *tokenizer.encode(last)])
        return ids + middle[1:], required

    def _pieces(self, prompt: FimPrompt) -> list[tuple[str, str]]:
        """(name of a special token, "") or ("", text), in order; the last is the text before the cursor."""
        fim = self._prompts.fim
        if fim is None:
            context = "".join(f"{chunk.path}\n{chunk.text}\n\n" for chunk in prompt.context)
            return [("", context + prompt.prefix + prompt.middle)]
        pieces: list[tuple[str, str]] = []
        if prompt.context and fim.file is not None:
            if fim.repository is not None:
                pieces += [(fim.repository, ""), ("", (prompt.repository or "repository") + "\n")]
            for chunk in prompt.context:
                pieces += [(fim.file, ""), ("", f"{chunk.path}\n{chunk.text}\n")]
            pieces += [(fim.file, ""), ("", (prompt.path or "file") + "\n")]
        # The beginning of the middle stands behind the middle token: typing only appends, and what stands before stays cached.
        return [*pieces, (fim.prefix, ""), ("", prompt.prefix), (fim.suffix, ""), ("", prompt.suffix), (fim.middle, ""), ("", prompt.middle)]
