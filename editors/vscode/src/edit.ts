// Edits are proposed as a diff and applied only when somebody accepts them, in one step that one undo takes back.
import * as vscode from "vscode";
import type { WorkspaceEdit } from "vscode-languageclient/node";
import type { Server } from "./server";

const SCHEME = "pio-proposal";

interface Proposal { document: vscode.TextDocument; version: number; edits: vscode.TextEdit[]; uri: vscode.Uri; text: string }

export class Edits implements vscode.TextDocumentContentProvider {
  private proposal: Proposal | undefined;
  private count = 0;

  constructor(private readonly server: Server) {}

  register(): vscode.Disposable[] {
    return [
      vscode.workspace.registerTextDocumentContentProvider(SCHEME, this),
      vscode.commands.registerCommand("pio.edit", () => this.askAndRewrite()),
      vscode.commands.registerCommand("pio.acceptEdit", () => this.accept()),
      vscode.commands.registerCommand("pio.rejectEdit", () => this.close()),
    ];
  }

  provideTextDocumentContent(uri: vscode.Uri): string {
    return this.proposal?.uri.toString() === uri.toString() ? this.proposal.text : "";
  }

  private async askAndRewrite(): Promise<void> {
    const editor = vscode.window.activeTextEditor;
    if (!editor) return;
    // Without a selection the line is meant.
    const range = editor.selection.isEmpty ? editor.document.lineAt(editor.selection.active.line).range : editor.selection;
    const instruction = await vscode.window.showInputBox({ title: "pio: Edit Selection", prompt: "What should be changed?", placeHolder: "add a docstring" });
    if (instruction) await this.rewrite(editor.document, range, instruction);
  }

  async rewrite(document: vscode.TextDocument, range: vscode.Range, instruction: string): Promise<void> {
    const options = { location: vscode.ProgressLocation.Notification, title: `pio: ${instruction}`, cancellable: true };
    await vscode.window.withProgress(options, async (_, token) => {
      try {
        const client = await this.server.running(), convert = client.code2ProtocolConverter;
        const params = { textDocument: convert.asVersionedTextDocumentIdentifier(document), range: convert.asRange(range), instruction };
        const edit = await client.protocol2CodeConverter.asWorkspaceEdit(await client.sendRequest<WorkspaceEdit>("pio/edit", params, token));
        await this.propose(document, edit?.get(document.uri) ?? []);
      } catch (error) {
        if (!token.isCancellationRequested) void vscode.window.showErrorMessage(`pio: ${(error as Error).message}`);
      }
    });
  }

  /** Show what the document would become. */
  async propose(document: vscode.TextDocument, edits: vscode.TextEdit[]): Promise<void> {
    const text = applied(document, edits);
    if (text === document.getText()) return void vscode.window.showInformationMessage("pio: nothing would change");
    const name = document.uri.path.split("/").at(-1);
    const uri = vscode.Uri.from({ scheme: SCHEME, path: `/${++this.count}/${name}` });
    this.proposal = { document, version: document.version, edits, uri, text };
    await vscode.commands.executeCommand("vscode.diff", document.uri, uri, `${name}: proposal (Ctrl+Enter accepts, Escape rejects)`);
  }

  private async accept(): Promise<void> {
    const proposal = this.proposal;
    if (!proposal) return;
    if (proposal.document.version !== proposal.version) {
      return void vscode.window.showErrorMessage("pio: the document was changed since the proposal was made; nothing was applied");
    }
    await this.close();
    const edit = new vscode.WorkspaceEdit();
    edit.set(proposal.document.uri, proposal.edits);
    const { document } = proposal;
    const applied = await exists(document.uri) && await vscode.workspace.applyEdit(edit), changed = applied && document.isDirty;
    await vscode.window.showTextDocument(document);
    if (changed) return;
    if (applied) await vscode.commands.executeCommand("workbench.action.files.revert");   // VS Code changes read-only text, but not its file
    void vscode.window.showErrorMessage(`pio: ${vscode.workspace.asRelativePath(document.uri)} cannot be changed: it is read-only or was deleted`);
  }

  private async close(): Promise<void> {
    this.proposal = undefined;
    const tabs = vscode.window.tabGroups.all.flatMap(group => group.tabs);
    await vscode.window.tabGroups.close(tabs.filter(tab => tab.input instanceof vscode.TabInputTextDiff && tab.input.modified.scheme === SCHEME));
  }
}

/** Untitled documents are on no disk. */
async function exists(uri: vscode.Uri): Promise<boolean> {
  try { return uri.scheme === "untitled" || Boolean(await vscode.workspace.fs.stat(uri)); } catch { return false; }
}

function applied(document: vscode.TextDocument, edits: vscode.TextEdit[]): string {
  let text = document.getText();
  for (const edit of [...edits].sort((a, b) => b.range.start.compareTo(a.range.start))) {
    text = text.slice(0, document.offsetAt(edit.range.start)) + edit.newText + text.slice(document.offsetAt(edit.range.end));
  }
  return text;
}
