// The status bar: what the server does, in a few words; more in the tooltip.
import * as vscode from "vscode";
import type { Server, ServerStatus } from "./server";

const SOON = 250;        // ms after something happened: several events, one request
const LOADING = 500;     // ms between looks at a model that is being loaded

export class StatusBar implements vscode.Disposable {
  private readonly item = vscode.window.createStatusBarItem("pio.status", vscode.StatusBarAlignment.Right, 100);
  private timer: NodeJS.Timeout | undefined;
  private readonly listener: vscode.Disposable;
  private model: string | undefined;
  private rate: number | undefined;   // tokens per second of the last suggestion that the model wrote; many need no model

  constructor(private readonly server: Server) {
    this.item.name = "pio";
    this.item.command = "pio.showMenu";
    this.listener = server.onChange(() => this.soon(SOON));
    this.show("$(loading~spin) pio", "The server starts.");
    this.item.show();
  }

  private soon(delay: number): void {
    this.timer ??= setTimeout(() => { this.timer = undefined; void this.update(); }, delay);
  }

  private async update(): Promise<void> {
    if (this.server.problem) return this.show("$(error) pio", this.server.problem, "statusBarItem.errorBackground");
    let status: ServerStatus | undefined;
    try { status = await this.server.status(); } catch { /* it is starting again */ }
    if (!status) return this.show("$(loading~spin) pio", "The server starts.");
    if (status.state === "error") return this.show(`$(error) pio: ${status.model}`, status.error ?? "", "statusBarItem.errorBackground");
    if (status.state === "loading") {
      const { progress } = status, percent = progress?.total ? ` ${Math.floor(100 * progress.done / progress.total)} %` : "";
      this.show(`$(loading~spin) pio: ${status.model}${percent}`, `${progress?.stage ?? "load"}: ${progress?.detail ?? status.model}`);
      return this.soon(LOADING);
    }
    const { latency } = this.server;
    this.rate = status.last?.stats.tokens_per_second || (status.model === this.model ? this.rate : undefined);
    this.model = status.model;
    const parts = [status.model, status.info?.device ?? "", this.rate && `${this.rate.toFixed(0)} tok/s`, latency !== undefined && `${latency.toFixed(0)} ms`];
    this.show(`$(${status.enabled ? "sparkle" : "circle-slash"}) ${parts.filter(Boolean).join(" · ")}`, this.details(status));
  }

  private details({ last, info, enabled }: ServerStatus): string {
    const lines = [info ? `${info.name} on ${info.device_name}, ${info.context} tokens of context` : "", enabled ? "" : "Completions are switched off"];
    if (last) {
      lines.push(`Last request: ${last.reason} (${last.source}), ${last.total_ms?.toFixed(0) ?? "?"} ms in the server`);
      if (this.server.latency !== undefined) lines.push(`${this.server.latency.toFixed(0)} ms until VS Code had it`);
      if (last.stats.prompt_tokens) lines.push(`${last.stats.reused_tokens} of ${last.stats.prompt_tokens} prompt tokens reused`);
    }
    return lines.filter(Boolean).join("\n");
  }

  private show(text: string, tooltip: string, background?: string): void {
    this.item.text = text;
    this.item.tooltip = tooltip;
    this.item.backgroundColor = background ? new vscode.ThemeColor(background) : undefined;
  }

  dispose(): void {
    clearTimeout(this.timer);
    this.listener.dispose();
    this.item.dispose();
  }
}
