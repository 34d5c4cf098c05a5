// What the person has set, in the form the server reads.
import * as vscode from "vscode";

const own = new Set(["command"]);   // for this extension, not for the server

export function serverSettings(context: vscode.ExtensionContext): Record<string, unknown> {
  const properties: Record<string, unknown> = context.extension.packageJSON.contributes.configuration.properties;
  const configuration = vscode.workspace.getConfiguration("pio");
  const names = Object.keys(properties).map(key => key.slice("pio.".length)).filter(name => !own.has(name));
  return Object.fromEntries(names.map(name => [name, configuration.get(name)]));
}
