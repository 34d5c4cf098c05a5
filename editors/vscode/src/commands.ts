// What can be done from the command palette and the status bar.
import * as vscode from "vscode";
import { findServer } from "./program";
import type { Server } from "./server";

interface Listing { name: string; description: string; onDisk: boolean; bytes: number | null }

export function commands(context: vscode.ExtensionContext, server: Server): vscode.Disposable[] {
  const configuration = () => vscode.workspace.getConfiguration("pio");
  const table: Record<string, () => unknown> = {
    "pio.showMenu": async () => {
      const entries = [["Chat", "pio.chat.focus"], ["Edit Selection…", "pio.edit"], ["Select Model…", "pio.selectModel"], ["Switch Completions On or Off", "pio.toggle"], ["Why Was This (Not) Shown?", "pio.explainLast"],
        ["Measure Latency", "pio.bench"], ["Restart Server", "pio.restartServer"], ["Show Log", "log"], ["Settings", "settings"]];
      const chosen = await vscode.window.showQuickPick(entries.map(([label, id]) => ({ label, id })), { title: "pio" });
      if (chosen?.id === "log") server.showLog();
      else if (chosen?.id === "settings") await vscode.commands.executeCommand("workbench.action.openSettings", "pio.");
      else if (chosen) await vscode.commands.executeCommand(chosen.id);
    },
    "pio.selectModel": async () => {
      const models = await (await server.running()).sendRequest<Listing[]>("pio/models", {});
      const other = "Another…";
      const size = (m: Listing) => m.bytes ? `${(m.bytes / 1e6).toFixed(0)} MB` : "size not known";
      const chosen = await vscode.window.showQuickPick([
        ...models.map(m => ({ label: m.name, description: `${m.onDisk ? "on disk" : "to be downloaded"}, ${size(m)}`, detail: m.description })),
        { label: other, description: "a Hugging Face id, a folder or a .gguf file", detail: "" },
      ], { title: "Model", matchOnDetail: true });
      const name = chosen?.label === other ? await vscode.window.showInputBox({ prompt: "A Hugging Face id, a folder or a .gguf file" }) : chosen?.label;
      if (name) await configuration().update("model", name, vscode.ConfigurationTarget.Global);
    },
    "pio.restartServer": () => server.restart(),
    "pio.toggle": () => configuration().update("enable", !configuration().get<boolean>("enable"), vscode.ConfigurationTarget.Global),
    "pio.explainLast": async () => {
      const answer = await (await server.running()).sendRequest<Record<string, unknown>>("pio/explain", {});
      const content = Object.entries(answer).map(([key, value]) => `${key}: ${typeof value === "string" ? value : JSON.stringify(value, null, 2)}`).join("\n");
      await vscode.window.showTextDocument(await vscode.workspace.openTextDocument({ content, language: "plaintext" }), { preview: true });
    },
    "pio.bench": async () => {
      const [program, ...options] = await findServer(context);
      const terminal = vscode.window.createTerminal({ name: "pio --bench", shellPath: program,
        shellArgs: [...options, "--bench", "--model", configuration().get("model", "")] });
      terminal.show();
    },
  };
  return Object.entries(table).map(([name, action]) => vscode.commands.registerCommand(name, action));
}
