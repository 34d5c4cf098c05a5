--- :checkhealth pio
local M = {}

local function check_program(config)
  local program = config.cmd[1]
  if vim.fn.executable(program) == 1 then
    vim.health.ok(program .. " is installed")
  else
    vim.health.error(program .. " is not found", { "Install it (README.md of the project) or set `cmd` in require('pio').setup" })
  end
end

local function check_keys(config)
  for action, key in pairs(config.keys) do
    local mapping = key ~= "" and vim.fn.maparg(key, "i", false, true) or {}
    if mapping.desc and not vim.startswith(mapping.desc, "pio: ") then
      vim.health.warn(("%s, which should %s, is taken by %s"):format(key, action:gsub("_", " "), mapping.desc),
        { "Set `keys` in require('pio').setup, or load pio after that" })
    end
  end
end

local function check_ghost()
  if require("pio.builtin").enabled(vim.api.nvim_get_current_buf()) then
    vim.health.ok("ghost text is drawn by Neovim's own inline completion, which waits 200 ms after each key")
  else
    vim.health.ok("ghost text is drawn by pio, which waits for nothing")
  end
end

local function check_server(server)
  local client = vim.lsp.get_clients({ name = "pio" })[1]
  if not client then
    return vim.health.error(server.problem or "no server runs", { "Open a file; :LspLog tells why it does not start; :PioRestart tries again" })
  end
  local version = client.server_info and client.server_info.version or "unknown"
  if vim.startswith(version, server.VERSION .. ".") then
    vim.health.ok("the server's version is " .. version)
  else
    vim.health.error(("the server's version is %s, the plugin's %s"):format(version, server.VERSION), { "Install matching ones" })
  end
  local answer = client:request_sync("pio/status", vim.empty_dict(), 2000)
  local status = answer and answer.result
  if not status then
    vim.health.error("the server does not answer", { ":LspLog tells more" })
  elseif status.state == "error" then
    vim.health.error(status.error)
  elseif status.state == "loading" then
    vim.health.warn(("%s is being loaded"):format(status.model))
  else
    vim.health.ok(("%s is ready on %s"):format(status.model, status.info and status.info.device_name or "this machine"))
  end
  if status and not status.enabled then vim.health.warn("completions are switched off", { ":PioToggle switches them on" }) end
  if status and status.last then vim.health.info(("the last request: %s (%s)"):format(status.last.reason, status.last.source)) end
end

function M.check()
  local pio = require("pio")
  vim.health.start("pio")
  if vim.fn.has("nvim-0.11") == 1 then vim.health.ok("Neovim is 0.11 or later") else vim.health.error("Neovim 0.11 or later is needed") end
  check_program(pio.config)
  check_keys(pio.config)
  check_ghost()
  check_server(require("pio.server"))
end

return M
