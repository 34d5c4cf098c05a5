// Where the server is, and how to get it.
import { constants } from "node:fs";
import { access } from "node:fs/promises";
import * as os from "node:os";
import * as path from "node:path";
import * as vscode from "vscode";

const windows = process.platform === "win32";
const program = windows ? "pio-lsp.exe" : "pio-lsp";
const scripts = windows ? "Scripts" : "bin";

async function runs(file: string): Promise<boolean> {
  try { await access(file, constants.X_OK); return true; } catch { return false; }
}

/** The command line that starts the server, or what is wrong. */
export async function findServer(context: vscode.ExtensionContext): Promise<string[]> {
  const configured = vscode.workspace.getConfiguration("pio").get<string[]>("command", []);
  if (configured.length > 0) {
    if (path.isAbsolute(configured[0]) && !await runs(configured[0])) throw new Error(`the setting pio.command names ${configured[0]}, which cannot be run`);
    return configured;
  }
  const folders = [...(process.env.PATH ?? "").split(path.delimiter), path.join(os.homedir(), ".local", "bin"), path.join(ownFolder(context), scripts)];
  for (const folder of folders.filter(path.isAbsolute)) {
    const file = path.join(folder, program);
    if (await runs(file)) return [file];
  }
  throw new Error(`${program} is not on the PATH, in ~/.local/bin or among what this extension installed`);
}

function ownFolder(context: vscode.ExtensionContext): string {
  return path.join(context.globalStorageUri.fsPath, "server");
}

/** Say what is wrong and offer the ways out. Nothing is fetched unless the person picks a source and starts it. */
export async function offerServer(context: vscode.ExtensionContext, problem: string, restart: () => void): Promise<void> {
  const install = "Install from a Folder or Wheel…", set = "Set Its Path…";
  const choice = await vscode.window.showErrorMessage(`pio: no server: ${problem}`, install, set);
  if (choice === set) await vscode.commands.executeCommand("workbench.action.openSettings", "pio.command");
  if (choice === install) await installFrom(context, restart);
}

async function installFrom(context: vscode.ExtensionContext, restart: () => void): Promise<void> {
  const [source] = await vscode.window.showOpenDialog({
    title: "The project's folder, or its wheel", openLabel: "Install", canSelectFiles: true, canSelectFolders: true,
  }) ?? [];
  if (!source) return;
  const folder = ownFolder(context), python = path.join(folder, scripts, windows ? "python.exe" : "python");
  const task = new vscode.Task({ type: "pio" }, vscode.TaskScope.Workspace, "Install the server", "pio",
    new vscode.ShellExecution(`${windows ? "py" : "python3"} -m venv "${folder}" && "${python}" -m pip install "${source.fsPath}"`));
  const execution = await vscode.tasks.executeTask(task);
  const listener = vscode.tasks.onDidEndTaskProcess(event => {
    if (event.execution !== execution) return;
    listener.dispose();
    if (event.exitCode === 0) restart();
  });
}
