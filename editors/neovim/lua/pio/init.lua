--- pio: ghost text from a model on your own machine.
---
--- require("pio").setup({ model = "smollm2-135m" })
local M = {}

M.defaults = {
  cmd = { "pio-lsp" },
  settings = {},                       -- what `pio-lsp settings` lists, e.g. { model = "qwen3-0.6b", maxTokens = 32 }
  filetypes = nil,                     -- list of file types; nil: all files with a name
  keys = { accept = "<Tab>", accept_word = "<M-Right>", accept_line = "<M-Down>", dismiss = "<C-]>", request = "<M-\\>" },
}

M.config = M.defaults

--- The client of a buffer, if it is attached and ready.
function M.client(buf)
  return vim.lsp.get_clients({ bufnr = buf or 0, name = "pio" })[1]
end

local function wanted(buf)
  if vim.bo[buf].buftype ~= "" or vim.api.nvim_buf_get_name(buf) == "" then return false end
  return not M.config.filetypes or vim.list_contains(M.config.filetypes, vim.bo[buf].filetype)
end

--- Start the server for a buffer (or attach the one that runs).
function M.start(buf)
  if not wanted(buf) then return end
  local capabilities = vim.lsp.protocol.make_client_capabilities()
  capabilities.textDocument.inlineCompletion = { dynamicRegistration = false }
  vim.lsp.start({
    name = "pio",
    cmd = M.config.cmd,
    root_dir = vim.fs.root(buf, { ".git" }) or vim.fs.dirname(vim.api.nvim_buf_get_name(buf)),
    capabilities = capabilities,
    init_options = next(M.config.settings) and M.config.settings or vim.empty_dict(),
    handlers = {
      ["pio/didChangeStatus"] = function(_, status)
        M.last_status = status
        vim.api.nvim_exec_autocmds("User", { pattern = "PioStatus" })
        vim.cmd.redrawstatus({ bang = true })
      end,
    },
  }, { bufnr = buf, reuse_client = function(client) return client.name == "pio" end })
end

--- For a status line: %{v:lua.require'pio'.statusline()}
function M.statusline()
  local status = M.last_status
  if not M.client() then return "" end
  if not status then return "pio …" end
  return status.state == "ready" and "pio " .. status.model or "pio " .. status.state
end

local function ask(method, params, show)
  local client = M.client()
  if not client then
    vim.notify("pio: no server is attached to this buffer (:checkhealth pio)", vim.log.levels.WARN)
    return
  end
  client:request(method, params, function(err, result) vim.schedule(function() show(err or result) end) end)
end

function M.setup(options)
  M.config = vim.tbl_deep_extend("force", M.defaults, options or {})
  local ghost = require("pio.ghost")
  -- An explicit colour: many colour schemes give comments none, and ghost text must not look like text.
  vim.api.nvim_set_hl(0, "PioGhost", { fg = "#808080", ctermfg = 8, italic = true, default = true })
  local group = vim.api.nvim_create_augroup("pio", { clear = true })
  vim.api.nvim_create_autocmd({ "BufReadPost", "BufNewFile", "FileType" }, {
    group = group, callback = function(event) M.start(event.buf) end,
  })
  ghost.setup(group, M.config.keys)
  vim.api.nvim_create_user_command("PioStatus", function()
    ask("pio/status", vim.empty_dict(), function(answer) vim.print(answer) end)
  end, { desc = "What the server is doing" })
  vim.api.nvim_create_user_command("PioExplain", function()
    ask("pio/explain", vim.empty_dict(), function(answer) vim.print(answer) end)
  end, { desc = "Why the last request showed what it showed" })
  vim.api.nvim_create_user_command("PioRestart", function()
    ask("workspace/executeCommand", { command = "pio.restart" }, function() vim.notify("pio: loading again") end)
  end, { desc = "Load the model again" })
  for _, buf in ipairs(vim.api.nvim_list_bufs()) do
    if vim.api.nvim_buf_is_loaded(buf) then M.start(buf) end
  end
end

return M
