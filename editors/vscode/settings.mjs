// Writes the server's settings into package.json: node settings.mjs [path of pio-lsp]. A test compares the two.
import { execFileSync } from "node:child_process";
import fs from "node:fs";

const manifest = new URL("package.json", import.meta.url);
const own = {
  "pio.command": {
    type: "array", items: { type: "string" }, default: [], scope: "machine",
    description: "Command line that starts the server. Empty: pio-lsp from the PATH, ~/.local/bin, or where this extension installed it.",
  },
};
const parsed = JSON.parse(fs.readFileSync(manifest, "utf8"));
const server = JSON.parse(execFileSync(process.argv[2] ?? "pio-lsp", ["settings"], { encoding: "utf8" }));
parsed.contributes.configuration.properties = { ...own, ...server };
fs.writeFileSync(manifest, JSON.stringify(parsed, null, 2) + "\n");
