// The server's life: start, crash, restart, stop. Everything else asks it for the client.
import { spawn, type ChildProcess } from "node:child_process";
import * as vscode from "vscode";
import { CloseAction, ErrorAction, LanguageClient, State, type LanguageClientOptions } from "vscode-languageclient/node";
import { findServer, offerServer } from "./program";
import { serverSettings } from "./settings";

export interface ServerStatus {
  state: "loading" | "ready" | "error";
  model: string;
  error: string | null;
  progress: { stage: string; done: number; total: number; detail: string } | null;
  last?: { reason: string; source: string; rule: string | null; first_token_ms: number | null; total_ms: number | null; stats: Record<string, number> };
  info?: { name: string; device: string; device_name: string; context: number; weight_bytes: number };
}

const CRASHES = 3;               // so many within CRASH_WINDOW: a fault that starting again does not mend
const CRASH_WINDOW = 180_000;    // ms
const REGISTERED = 300;          // ms after which VS Code knows that there is somebody to ask
const STDERR_KEPT = 2000;        // characters

export class Server implements vscode.Disposable {
  client: LanguageClient | undefined;
  problem: string | undefined;      // why there is no client
  latency: number | undefined;      // ms from VS Code's request to the server's answer, of the last suggestion
  private readonly changed = new vscode.EventEmitter<void>();
  readonly onChange = this.changed.event;
  private readonly output = vscode.window.createOutputChannel("pio", { log: true });
  private readonly handlers = new Map<string, (parameters: any[]) => unknown>();
  private crashes: number[] = [];
  private stderr = "";
  private starting: Promise<void> = Promise.resolve();

  constructor(private readonly context: vscode.ExtensionContext) {}

  /** Stop what runs and start again; calls run one after the other. */
  restart(): Promise<void> {
    this.crashes = [];
    this.starting = this.starting.then(async () => { await this.stop(); await this.start(); });
    return this.starting;
  }

  carriesOut(command: string, handler: (parameters: any[]) => unknown): void {
    this.handlers.set(command, handler);
  }

  status(): Promise<ServerStatus> | undefined {
    return this.client?.state === State.Running ? this.client.sendRequest<ServerStatus>("pio/status", {}) : undefined;
  }

  private async start(): Promise<void> {
    let command: string[];
    try {
      command = await findServer(this.context);
    } catch (error) {
      this.fail((error as Error).message);
      void offerServer(this.context, this.problem!, () => void this.restart());
      return;
    }
    const client = new LanguageClient("pio", "pio", () => this.spawn(command), this.options());
    client.onDidChangeState(() => this.changed.fire());
    client.onNotification("pio/didChangeStatus", () => this.changed.fire());
    try {
      this.problem = undefined;
      this.client = client;
      await client.start();
      this.checkVersion(client);
      setTimeout(askForEarlyText, REGISTERED);
    } catch (error) {
      if (!this.problem) this.fail(`${command.join(" ")} does not start: ${(error as Error).message} ${this.lastWords()}`);
      void vscode.window.showErrorMessage(`pio: ${this.problem}`);
    }
    this.changed.fire();
  }

  private spawn(command: string[]): Promise<ChildProcess> {
    return new Promise((resolve, reject) => {
      const child = spawn(command[0], [...command.slice(1), "--stdio"], { cwd: vscode.workspace.workspaceFolders?.[0]?.uri.fsPath });
      this.stderr = "";
      child.stderr.on("data", (data: Buffer) => { this.stderr = (this.stderr + data.toString()).slice(-STDERR_KEPT); });
      child.once("error", error => reject(new Error(`${command[0]} cannot be run: ${error.message}`)));
      child.once("spawn", () => resolve(child));
    });
  }

  private options(): LanguageClientOptions {
    return {
      documentSelector: [{ scheme: "file" }, { scheme: "untitled" }],
      outputChannel: this.output,
      initializationOptions: serverSettings(this.context),
      middleware: {
        provideInlineCompletionItems: async (document, position, context, token, next) => {
          const begin = performance.now();
          const items = await next(document, position, context, token);
          if (!token.isCancellationRequested) {
            this.latency = performance.now() - begin;
            this.changed.fire();
          }
          return items;
        },
        // What code actions ask for is done here, in the chat and as a diff, rather than in the server.
        executeCommand: (command, parameters, next) => (this.handlers.get(command) ?? (p => next(command, p)))(parameters),
      },
      initializationFailedHandler: () => false,
      errorHandler: {
        error: () => ({ action: ErrorAction.Continue, handled: true }),
        closed: () => this.closed(),
      },
    };
  }

  private closed() {
    const now = Date.now();
    this.crashes = [...this.crashes.filter(then => now - then < CRASH_WINDOW), now];
    if (this.crashes.length < CRASHES) return { action: CloseAction.Restart, handled: true };
    this.fail(`the server ended ${CRASHES} times in a row and is not started again. ${this.lastWords()}`);
    void vscode.window.showErrorMessage(`pio: ${this.problem}`, "Start Again", "Show Log").then(choice => {
      if (choice === "Start Again") void this.restart();
      if (choice === "Show Log") this.output.show();
    });
    return { action: CloseAction.DoNotRestart, handled: true };
  }

  private lastWords(): string {
    const line = this.stderr.trim().split("\n").at(-1);
    return line ? `Its last words: ${line}` : "";
  }

  private checkVersion(client: LanguageClient): void {
    const server = client.initializeResult?.serverInfo?.version ?? "unknown";
    const mine: string = this.context.extension.packageJSON.version;
    const series = (version: string) => version.split(".").slice(0, 2).join(".");
    if (series(server) !== series(mine)) {
      void vscode.window.showWarningMessage(`pio: the server's version is ${server}, the extension's ${mine}: install matching ones.`);
    }
  }

  private fail(problem: string): void {
    this.problem = problem;
    this.output.error(problem);
    this.changed.fire();
  }

  sendSettings(): void {
    void this.client?.sendNotification("workspace/didChangeConfiguration", { settings: { pio: serverSettings(this.context) } });
  }

  showLog(): void {
    this.output.show();
  }

  async stop(): Promise<void> {
    const client = this.client;
    this.client = undefined;
    try { await client?.dispose(); } catch { /* it is gone already */ }
  }

  dispose(): void {
    this.output.dispose();
    this.changed.dispose();
  }
}

/** Somebody types faster than a server starts, and VS Code asks only once for each key. */
function askForEarlyText(): void {
  const typed = vscode.window.activeTextEditor?.document.isDirty && vscode.workspace.getConfiguration("pio").get("enable");
  if (typed) void vscode.commands.executeCommand("editor.action.inlineSuggest.trigger");
}
