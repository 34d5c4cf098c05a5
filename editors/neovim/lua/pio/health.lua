--- :checkhealth pio
local M = {}

function M.check()
  local health, pio = vim.health, require("pio")
  health.start("pio")
  if vim.fn.has("nvim-0.11") == 1 then health.ok("Neovim is 0.11 or later") else health.error("Neovim 0.11 or later is needed") end
  local program = pio.config.cmd[1]
  if vim.fn.executable(program) == 1 then
    health.ok(program .. " is installed")
  else
    health.error(program .. " is not found", { "Install it (see README.md) or set `cmd` in require('pio').setup" })
  end
  local client = vim.lsp.get_clients({ name = "pio" })[1]
  if not client then
    health.warn("no server runs", { "Open a file; :LspLog tells why it does not start" })
    return
  end
  local answer = client:request_sync("pio/status", vim.empty_dict(), 2000)
  local status = answer and answer.result
  if not status then
    health.error("the server does not answer", { ":LspLog tells more" })
  elseif status.state == "error" then
    health.error(status.error)
  else
    health.ok(("the server is %s: %s"):format(status.state, status.model))
  end
end

return M
