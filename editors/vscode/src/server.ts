// The server's life: start, crash, restart, stop. Everything else asks it for the client.
import { spawn, type ChildProcess } from "node:child_process";
import * as vscode from "vscode";
import { CloseAction, ErrorAction, LanguageClient, State, type LanguageClientOptions } from "vscode-languageclient/node";
import { findServer, offerServer } from "./program";
import { serverSettings } from "./settings";

export interface ServerStatus {
  state: "loading" | "ready" | "error";
  enabled: boolean;
  model: string;
  error: string | null;
  progress: { stage: string; done: number; total: number; detail: string } | null;
  last?: { reason: string; source: string; rule: string | null; first_token_ms: number | null; total_ms: number | null; stats: Record<string, number> };
  info?: { name: string; device: string; device_name: string; context: number; weight_bytes: number };
}

const CRASHES = 3;               // so many within CRASH_WINDOW: a fault that starting again does not mend
const CRASH_WINDOW = 180_000;    // ms
const STDERR_KEPT = 2000;        // characters
const LEAVE_WITHIN = 1000;       // ms that a server has, once it was told to

/** One life of a server. What goes wrong with it is told once, by Server. */
class Client extends LanguageClient {
  override error(message: string, data?: unknown): void {
    super.error(message, data, false);
  }
}

export class Server implements vscode.Disposable {
  client: Client | undefined;
  problem: string | undefined;      // why there is no client
  latency: number | undefined;      // ms from VS Code's request to the server's answer, of the last suggestion
  private readonly changed = new vscode.EventEmitter<void>();
  readonly onChange = this.changed.event;
  private readonly output = vscode.window.createOutputChannel("pio", { log: true });
  private readonly handlers = new Map<string, (parameters: any[]) => unknown>();
  private child: ChildProcess | undefined;
  private crashes: number[] = [];
  private stderr = "";
  private lives: Promise<void> = Promise.resolve();   // starts and stops, one after the other

  constructor(private readonly context: vscode.ExtensionContext) {}

  /** Stop what runs and start again. */
  restart(): Promise<void> {
    this.crashes = [];
    if (this.client?.state === State.Starting) this.child?.kill();   // one that never answers would be waited for
    return this.next(async () => { await this.stop(); await this.start(); });
  }

  private next(action: () => Promise<void>): Promise<void> {
    return this.lives = this.lives.then(action);
  }

  /** The client, once a server runs; an error if none will. */
  async running(): Promise<Client> {
    for (let lives; lives !== this.lives;) await (lives = this.lives);
    if (this.client?.state !== State.Running) throw new Error(this.problem ?? "the server is not running");
    return this.client;
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
    let ended = false;
    const client = new Client("pio", "pio", () => this.spawn(command), this.options(() => {
      ended = true;
      void this.next(() => this.recover(client));
    }));
    client.onDidChangeState(() => this.changed.fire());
    client.onNotification("pio/didChangeStatus", () => this.changed.fire());
    this.problem = undefined;
    this.client = client;
    try {
      await client.start();
      this.checkVersion(client);
      void askForEarlyText();
    } catch (error) {
      if (ended) return;   // recover() sees to it
      this.fail(`${command.join(" ")} does not start: ${(error as Error).message}`);
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
      child.once("spawn", () => resolve(this.child = child));
    });
  }

  /** A server ended without having been told to: start another one, but not for ever. Not left to the language client, which starts the
      same client again and forgets it if the server dies once more while it starts. */
  private async recover(client: Client): Promise<void> {
    if (this.client !== client) return;   // it was told to
    const now = Date.now();
    this.crashes = [...this.crashes.filter(then => now - then < CRASH_WINDOW), now];
    await this.stop();
    if (this.crashes.length < CRASHES) return this.start();
    this.fail(`the server ended ${CRASHES} times in a row and is not started again. ${this.lastWords()}`);
    void vscode.window.showErrorMessage(`pio: ${this.problem}`, "Start Again", "Show Log").then(choice => {
      if (choice === "Start Again") void this.restart();
      if (choice === "Show Log") this.output.show();
    });
  }

  private options(closed: () => void): LanguageClientOptions {
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
        closed: () => {
          closed();
          return { action: CloseAction.DoNotRestart, handled: true };
        },
      },
    };
  }

  private lastWords(): string {
    const line = this.stderr.trim().split("\n").at(-1);
    return line ? `Its last words: ${line}` : "";
  }

  private checkVersion(client: Client): void {
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
    if (this.client?.state !== State.Running) return;
    void this.client.sendNotification("workspace/didChangeConfiguration", { settings: { pio: serverSettings(this.context) } });
    this.changed.fire();
  }

  showLog(): void {
    this.output.show();
  }

  /** Until the process is gone and has said all it had to say. */
  async stop(): Promise<void> {
    const { client, child } = this;
    this.client = this.child = undefined;
    try { await client?.dispose(); } catch { /* it is gone already, or never ran */ }
    if (!child || child.stderr?.closed) return;
    const late = setTimeout(() => child.kill("SIGKILL"), LEAVE_WITHIN);
    await new Promise(resolve => child.once("close", resolve));
    clearTimeout(late);
  }

  dispose(): void {
    this.output.dispose();
    this.changed.dispose();
  }
}

/** Somebody types faster than a server starts, and VS Code asks only once for each key. */
async function askForEarlyText(): Promise<void> {
  // Messages keep their order: when this one is answered, VS Code knows whom to ask, and what was typed before that is known here.
  await vscode.commands.executeCommand("setContext", "pio.running", true);
  const typed = vscode.window.activeTextEditor?.document.isDirty && vscode.workspace.getConfiguration("pio").get("enable");
  if (typed) await vscode.commands.executeCommand("editor.action.inlineSuggest.trigger");
}
