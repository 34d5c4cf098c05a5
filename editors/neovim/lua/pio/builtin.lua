--- Neovim 0.12's own inline completion, where somebody has switched it on with vim.lsp.inline_completion.enable(): our ghost text stands
--- aside, and two faults are mended. It never takes back a request whose answer nobody wants any more; and accepting after typing along
--- inserts what was typed a second time.
local accept = require("pio.accept")
local M = {}

local METHOD = "textDocument/inlineCompletion"

function M.enabled(buf)
  local client = vim.lsp.inline_completion and require("pio").client(buf)
  return client and vim.lsp.inline_completion.is_enabled({ bufnr = buf, client_id = client.id }) or false
end

--- Let it ask now; it offers no other way than to say that the cursor moved.
function M.request(buf)
  vim.schedule(function() vim.api.nvim_exec_autocmds("CursorMovedI", { buffer = buf }) end)
end

--- The cursor has moved: nobody wants an answer for where it was.
function M.cancel(buf)
  local client = require("pio").client(buf)
  for id, request in pairs(client and client.requests or {}) do
    if request.type == "pending" and request.method == METHOD and request.bufnr == buf then client:cancel_request(id) end
  end
end

--- Insert of an item what `action` takes, if the text before the cursor agrees with it.
local function take(action, item)
  local client = vim.lsp.get_client_by_id(item.client_id)
  if not client or client.name ~= "pio" then return item end   -- another server's: as Neovim does it
  local row, col = item.range:to_extmark()
  local buf, here = vim.api.nvim_get_current_buf(), vim.api.nvim_win_get_cursor(0)
  if here[1] ~= row + 1 or here[2] < col then return end
  local typed = vim.api.nvim_buf_get_text(buf, row, col, row, here[2], {})[1]
  if vim.startswith(item.insert_text, typed) and #typed < #item.insert_text then
    accept.insert(buf, row, here[2], accept.beginning[action](item.insert_text:sub(#typed + 1)))
  end
end

--- Carry out an action of the keys; false if nothing is shown.
function M.act(action)
  local builtin = vim.lsp.inline_completion
  if action == "request" then return M.request(vim.api.nvim_get_current_buf()) end
  if action == "next" or action == "previous" then
    return vim.schedule(function() builtin.select({ count = action == "next" and 1 or -1 }) end)
  end
  return builtin.get({ on_accept = function(item) if action ~= "dismiss" then return take(action, item) end end })
end

return M
