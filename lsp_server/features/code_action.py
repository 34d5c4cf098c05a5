"""Code actions: the editor's own menu asks for an edit or an explanation. Editors that know pio carry the commands out themselves, in
their chat or as a diff; for all others the server does."""

from __future__ import annotations

from lsprotocol import types

ASK, REWRITE = "pio.ask", "pio.rewrite"


def actions(params: types.CodeActionParams) -> list[types.CodeAction]:
    where = {"textDocument": {"uri": params.text_document.uri}, "range": _plain(params.range)}
    found = []
    if params.context.diagnostics:
        problems = "\n".join(f"line {d.range.start.line - params.range.start.line + 1}: {d.message}" for d in params.context.diagnostics)
        found.append(_rewrite("Fix", types.CodeActionKind.QuickFix, f"Correct these problems:\n{problems}", where, params.context.diagnostics))
    if params.range.start == params.range.end:
        return found
    if not found:
        found.append(_rewrite("Fix", types.CodeActionKind.QuickFix, "Find what is wrong in this code and correct it.", where))
    found += [_rewrite("Refactor", types.CodeActionKind.RefactorRewrite, "Make this code easier to read. It must do the same.", where),
              _rewrite("Add docs", types.CodeActionKind.RefactorRewrite, "Add documentation comments. Change nothing else.", where)]
    found += [types.CodeAction(title=f"pio: {title}", kind=types.CodeActionKind.Empty, command=types.Command(
        title=title, command=ASK, arguments=[{**where, "messages": [{"role": "user", "content": text}]}]))
        for title, text in (("Explain", "/explain"), ("Add tests", "/tests"))]
    return found


def _rewrite(title: str, kind: types.CodeActionKind, instruction: str, where: dict, diagnostics: list | None = None) -> types.CodeAction:
    command = types.Command(title=title, command=REWRITE, arguments=[{**where, "instruction": instruction}])
    return types.CodeAction(title=f"pio: {title}", kind=kind, diagnostics=diagnostics, command=command)


def _plain(span: types.Range) -> dict[str, dict[str, int]]:
    return {side: {"line": position.line, "character": position.character} for side, position in (("start", span.start), ("end", span.end))}
