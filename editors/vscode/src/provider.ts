// The model in VS Code's own chat, beside those of other vendors.
import * as vscode from "vscode";
import { ProgressType } from "vscode-languageclient/node";
import type { Server } from "./server";

export class ModelProvider implements vscode.LanguageModelChatProvider {
  constructor(private readonly server: Server) {}

  async provideLanguageModelChatInformation(): Promise<vscode.LanguageModelChatInformation[]> {
    const status = await this.server.status();
    if (!status?.info) return [];
    const { name, context } = status.info;
    return [{ id: name, name: `${name} (pio)`, family: name, version: "1", maxInputTokens: Math.floor(context / 2), maxOutputTokens: Math.floor(context / 2), capabilities: {} }];
  }

  async provideLanguageModelChatResponse(_model: vscode.LanguageModelChatInformation, messages: readonly vscode.LanguageModelChatRequestMessage[],
    _options: unknown, progress: vscode.Progress<vscode.LanguageModelResponsePart>, token: vscode.CancellationToken): Promise<void> {
    const client = await this.server.running();
    const name = `pio-model-${Date.now()}-${Math.random()}`;
    const listener = client.onProgress(new ProgressType<{ delta?: string }>(), name, async report => {
      if (report.delta) progress.report(new vscode.LanguageModelTextPart(report.delta));
    });
    const plain = messages.map(message => ({
      role: message.role === vscode.LanguageModelChatMessageRole.Assistant ? "assistant" : "user",
      content: message.content.map(part => part instanceof vscode.LanguageModelTextPart ? part.value : "").join(""),
    }));
    try {
      await client.sendRequest("pio/chat", { messages: plain, partialResultToken: name }, token);
    } finally {
      listener.dispose();
    }
  }

  async provideTokenCount(_model: vscode.LanguageModelChatInformation, text: string | vscode.LanguageModelChatRequestMessage): Promise<number> {
    const plain = typeof text === "string" ? text : text.content.map(part => part instanceof vscode.LanguageModelTextPart ? part.value : "").join("");
    return Math.ceil(plain.length / 3);   // more than it is: the server counts again, exactly
  }
}
