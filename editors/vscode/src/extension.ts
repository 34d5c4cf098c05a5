// pio in VS Code: ghost text comes from the language client by itself; the rest is put together here.
import * as vscode from "vscode";
import { commands } from "./commands";
import { Server } from "./server";
import { StatusBar } from "./status";

let server: Server | undefined;

export function activate(context: vscode.ExtensionContext): void {
  server = new Server(context);
  context.subscriptions.push(server, new StatusBar(server), ...commands(context, server),
    vscode.workspace.onDidChangeConfiguration(event => {
      if (event.affectsConfiguration("pio.command")) void server?.restart();
      else if (event.affectsConfiguration("pio")) server?.sendSettings();
    }));
  void server.restart();   // not awaited: VS Code must not wait for a process
}

export async function deactivate(): Promise<void> {
  await server?.stop();
}
