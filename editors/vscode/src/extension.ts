// pio in VS Code: ghost text comes from the language client by itself; the rest is put together here.
import * as vscode from "vscode";
import { Chat } from "./chat";
import { commands } from "./commands";
import { Edits } from "./edit";
import { ModelProvider } from "./provider";
import { Server } from "./server";
import { StatusBar } from "./status";

let server: Server | undefined;

export function activate(context: vscode.ExtensionContext): void {
  server = new Server(context);
  const edits = new Edits(server), chat = new Chat(context, server, edits);
  server.carriesOut("pio.ask", ([{ messages, ...place }]) => chat.ask(messages[0].content, place));
  server.carriesOut("pio.rewrite", async ([{ textDocument, range, instruction }]) => {
    const document = await vscode.workspace.openTextDocument(vscode.Uri.parse(textDocument.uri));
    await edits.rewrite(document, new vscode.Range(range.start.line, range.start.character, range.end.line, range.end.character), instruction);
  });
  context.subscriptions.push(server, new StatusBar(server), ...commands(context, server), ...edits.register(),
    vscode.window.registerWebviewViewProvider("pio.chat", chat),
    vscode.commands.registerCommand("pio.chatHistory", () => chat.history()),
    vscode.lm.registerLanguageModelChatProvider("pio", new ModelProvider(server)),
    vscode.workspace.onDidChangeConfiguration(event => {
      if (event.affectsConfiguration("pio.command")) void server?.restart();
      else if (event.affectsConfiguration("pio")) server?.sendSettings();
    }));
  void server.restart();   // not awaited: VS Code must not wait for a process
}

export async function deactivate(): Promise<void> {
  await server?.stop();
}
