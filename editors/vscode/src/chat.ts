// The chat: conversations are kept here, so that neither a hidden view nor a dead server loses one; the view only draws them.
import * as vscode from "vscode";
import { ErrorCodes, ProgressType, ResponseError } from "vscode-languageclient/node";
import type { Edits } from "./edit";
import type { Server } from "./server";

interface Place { textDocument: { uri: string }; range?: unknown }
interface Turn { role: "user" | "assistant"; content: string; place?: Place; reasoning?: string; note?: string; error?: string }
interface Report { delta?: string; reasoning?: string; hidden?: string; repeats?: boolean; context?: { shown: { name: string; tokens: number; cut: boolean }[]; dropped: number; tokens: number } }
type FromView =
  | { type: "ready" | "stop" | "new" | "retry" }
  | { type: "ask" | "copy" | "insert" | "apply"; text: string };

const KEPT = 20;   // conversations

export class Chat implements vscode.WebviewViewProvider {
  private view: vscode.WebviewView | undefined;
  private turns: Turn[] = [];
  private running: vscode.CancellationTokenSource | undefined;
  private readonly began: { text: string; place?: Place }[] = [];   // asked before the view was there

  constructor(private readonly context: vscode.ExtensionContext, private readonly server: Server, private readonly edits: Edits) {}

  resolveWebviewView(view: vscode.WebviewView): void {
    this.view = view;
    const [media, dist] = ["media", "dist"].map(name => vscode.Uri.joinPath(this.context.extensionUri, name));
    const file = (folder: vscode.Uri, name: string) => view.webview.asWebviewUri(vscode.Uri.joinPath(folder, name));
    view.webview.options = { enableScripts: true, localResourceRoots: [media, dist] };
    view.webview.onDidReceiveMessage((message: FromView) => this.receive(message));
    view.onDidDispose(() => { this.view = undefined; });
    const allowed = `default-src 'none'; style-src ${view.webview.cspSource}; script-src ${view.webview.cspSource}`;
    // Disabled until the script runs: what is typed before would be lost.
    view.webview.html = `<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">
      <meta http-equiv="Content-Security-Policy" content="${allowed}"><link rel="stylesheet" href="${file(media, "chat.css")}"></head>
      <body><main id="log" role="log" aria-live="polite"></main>
      <form id="form"><fieldset id="controls" disabled><textarea id="question" rows="3" aria-label="Ask about the code" placeholder="Ask about the code (/explain /fix /refactor /tests /docs)"></textarea>
      <div><button id="send" type="submit">Ask</button><button id="stop" type="button" hidden>Stop</button>
      <button id="new" type="button" class="quiet">New Chat</button></div></fieldset></form>
      <script src="${file(dist, "chat.js")}"></script></body></html>`;
  }

  /** Open the view and ask; for commands and code actions. */
  async ask(text: string, place?: Place): Promise<void> {
    if (this.view) {
      this.view.show(true);
      return this.answer(text, place);
    }
    this.began.push({ text, place });
    await vscode.commands.executeCommand("pio.chat.focus");
  }

  async history(): Promise<void> {
    const kept = this.context.workspaceState.get<Turn[][]>("conversations", []);
    const chosen = await vscode.window.showQuickPick(kept.map(turns => ({ label: turns[0].content.slice(0, 80), turns })), { title: "Conversations" });
    if (!chosen) return;
    this.running?.cancel();
    this.turns = chosen.turns;
    await vscode.commands.executeCommand("pio.chat.focus");
    this.draw();
  }

  private async receive(message: FromView): Promise<void> {
    const editor = vscode.window.activeTextEditor;
    switch (message.type) {
      case "ready":
        this.draw();
        for (const { text, place } of this.began.splice(0)) await this.answer(text, place);
        break;
      case "ask": await this.answer(message.text); break;
      case "stop": this.running?.cancel(); break;
      case "new": this.running?.cancel(); this.turns = []; this.draw(); break;
      case "retry": {
        const question = this.turns.splice(this.turns.findLastIndex(turn => turn.role === "user"))[0];
        this.draw();
        if (question) await this.answer(question.content, question.place);
        break;
      }
      case "copy": await vscode.env.clipboard.writeText(message.text); break;
      case "insert": await editor?.edit(edit => edit.insert(editor.selection.active, message.text)); break;
      case "apply": if (editor) await this.edits.propose(editor.document, [vscode.TextEdit.replace(editor.selection, message.text)]); break;
    }
  }

  private async answer(text: string, place = this.place()): Promise<void> {
    if (this.running) return;
    const running = this.running = new vscode.CancellationTokenSource();
    const messages = [...this.turns.map(({ role, content }) => ({ role, content })).filter(turn => turn.content), { role: "user", content: text }];
    const turn: Turn = { role: "assistant", content: "" };
    this.turns.push({ role: "user", content: text, place }, turn);
    this.draw();
    const token = `pio-chat-${Date.now()}-${Math.random()}`;
    let listener: vscode.Disposable | undefined;
    const stopped = new Promise<never>((_, reject) => running.token.onCancellationRequested(reject));   // even if the server does not answer
    try {
      const client = await Promise.race([this.server.running(), stopped]);
      listener = client.onProgress(new ProgressType<Report>(), token, async report => this.report(turn, report));
      const params = { messages, ...place, partialResultToken: token };
      turn.content = (await Promise.race([client.sendRequest<{ text: string }>("pio/chat", params, running.token), stopped])).text;
    } catch (error) {
      const died = error instanceof ResponseError && error.code === ErrorCodes.PendingResponseRejected;
      turn.error = running.token.isCancellationRequested ? "Stopped." : died ? "The server ended in the middle of the answer." : (error as Error).message;
    }
    listener?.dispose();
    this.running = undefined;
    this.draw();
    await this.keep();
  }

  private report(turn: Turn, report: Report): void {
    if (report.delta !== undefined) {
      turn.content += report.delta;
      return this.post({ type: "delta", text: report.delta });
    }
    if (report.reasoning !== undefined) {
      turn.reasoning = (turn.reasoning ?? "") + report.reasoning;
      return this.post({ type: "reasoning", text: report.reasoning });
    }
    if (report.repeats) turn.note = `${turn.note ?? ""} It was stopped because the model began to repeat itself.`;
    if (report.hidden) turn.note = `The file is not shown to the model: ${report.hidden}.`;
    if (report.context) {
      const { shown, dropped, tokens } = report.context;
      const files = shown.map(item => `${item.name} (${item.tokens} tokens${item.cut ? ", its beginning" : ""})`).join(", ");
      turn.note = [turn.note, files && `Sees ${files}.`, dropped && `${dropped} earlier messages no longer fit.`, `${tokens} tokens in all.`].filter(Boolean).join(" ");
    }
    this.draw();
  }

  /** What a question is about: the selection of the editor, or its file. */
  private place(): Place | undefined {
    const editor = vscode.window.activeTextEditor;
    if (!editor || !["file", "untitled"].includes(editor.document.uri.scheme)) return undefined;
    const { start, end, isEmpty } = editor.selection, plain = ({ line, character }: vscode.Position) => ({ line, character });
    return { textDocument: { uri: editor.document.uri.toString() }, ...(isEmpty ? {} : { range: { start: plain(start), end: plain(end) } }) };
  }

  private async keep(): Promise<void> {
    const first = this.turns[0]?.content, kept = this.context.workspaceState.get<Turn[][]>("conversations", []);
    if (first) await this.context.workspaceState.update("conversations", [this.turns, ...kept.filter(turns => turns[0].content !== first)].slice(0, KEPT));
  }

  private draw(): void {
    this.post({ type: "draw", turns: this.turns, running: this.running !== undefined });
  }

  private post(message: unknown): void {
    void this.view?.webview.postMessage(message);
  }
}
