--- pio: ghost text, chat and edits from a model on your own machine. `:help pio`
---
--- require("pio").setup({ settings = { model = "smollm2-135m" } })
local M = {}

M.defaults = {
  cmd = { "pio-lsp" },
  settings = {},                       -- what `pio-lsp settings` lists, e.g. { model = "qwen3-0.6b", maxTokens = 32 }
  filetypes = nil,                     -- list of file types; nil: all files with a name
  keys = {
    accept = "<Tab>", accept_word = "<M-Right>", accept_line = "<M-Down>", next = "<M-]>", previous = "<M-[>",
    dismiss = "<C-]>", request = "<M-\\>",
  },
}

M.config = M.defaults

--- The client of a buffer, if it is attached.
function M.client(buf)
  return require("pio.server").client(buf)
end

--- For a status line: %{v:lua.require'pio'.statusline()}
function M.statusline()
  local server = require("pio.server")
  if server.problem then return "pio: no server" end
  if not M.client() then return "" end
  local status, loading = server.status, server.loading
  if loading then return ("pio: loading %d %%"):format(loading.percentage or 0) end
  if not status or status.state == "loading" then return "pio …" end
  if status.state == "error" then return "pio: error" end
  if not status.enabled then return "pio: off" end
  local parts, latency = { "pio " .. status.model }, require("pio.ghost").latency
  if status.info then parts[#parts + 1] = status.info.device end
  if latency then parts[#parts + 1] = ("%.0f ms"):format(latency) end
  return table.concat(parts, " · ")
end

function M.setup(options)
  M.config = vim.tbl_deep_extend("force", M.defaults, options or {})
  -- An explicit colour: many colour schemes give comments none, and ghost text must not look like text.
  vim.api.nvim_set_hl(0, "PioGhost", { fg = "#808080", ctermfg = 8, italic = true, default = true })
  local group = vim.api.nvim_create_augroup("pio", { clear = true })
  require("pio.ghost").setup(group, M.config.keys)
  require("pio.commands").setup()
  require("pio.server").setup(group)
end

return M
