--- Edits are proposed as a diff and applied only when somebody accepts them, in one step that one undo takes back.
local server = require("pio.server")
local M = {}

local proposal = nil   -- { buf, tick, edits, encoding, tab }

local function close()
  local tab = proposal.tab
  proposal = nil
  if vim.api.nvim_tabpage_is_valid(tab) then vim.cmd.tabclose(vim.api.nvim_tabpage_get_number(tab)) end
end

function M.reject()
  if proposal then close() end
end

function M.accept()
  if not proposal then return end
  local buf, edits, encoding, stale = proposal.buf, proposal.edits, proposal.encoding, nil
  if not vim.api.nvim_buf_is_loaded(buf) then
    stale = "the buffer is gone"
  elseif vim.api.nvim_buf_get_changedtick(buf) ~= proposal.tick then
    stale = "the text was changed since the proposal was made"
  elseif not vim.bo[buf].modifiable then
    stale = "the buffer cannot be changed ('modifiable' is off)"
  end
  close()
  if stale then return vim.notify(("pio: %s; nothing was applied"):format(stale), vim.log.levels.ERROR) end
  vim.lsp.util.apply_text_edits(edits, buf, encoding)
end

--- Show what the buffer would become, beside what it is, in a tab of its own.
local function propose(buf, edits, encoding)
  local lines = vim.api.nvim_buf_get_lines(buf, 0, -1, false)
  local result = vim.api.nvim_create_buf(false, true)
  vim.api.nvim_buf_set_lines(result, 0, -1, false, lines)
  vim.lsp.util.apply_text_edits(edits, result, encoding)
  if vim.deep_equal(lines, vim.api.nvim_buf_get_lines(result, 0, -1, false)) then
    vim.api.nvim_buf_delete(result, {})
    return vim.notify("pio: nothing would change")
  end
  M.reject()
  vim.bo[result].modifiable, vim.bo[result].bufhidden, vim.bo[result].filetype = false, "wipe", vim.bo[buf].filetype
  vim.api.nvim_buf_set_name(result, ("pio://proposal/%d/%s"):format(result, vim.fs.basename(vim.api.nvim_buf_get_name(buf))))
  vim.cmd("tab split")
  vim.api.nvim_win_set_buf(0, buf)
  vim.cmd.diffthis()
  vim.cmd("rightbelow vsplit")
  vim.api.nvim_win_set_buf(0, result)
  vim.cmd.diffthis()
  vim.wo.winbar = "pio proposes: Enter accepts, q rejects"
  vim.keymap.set("n", "<CR>", M.accept, { buffer = result, desc = "pio: accept" })
  vim.keymap.set("n", "q", M.reject, { buffer = result, desc = "pio: reject" })
  proposal = { buf = buf, tick = vim.api.nvim_buf_get_changedtick(buf), edits = edits, encoding = encoding, tab = vim.api.nvim_get_current_tabpage() }
end

--- Have a range (LSP's) of the buffer rewritten as `instruction` says.
function M.rewrite(buf, range, instruction)
  if not vim.bo[buf].modifiable then return vim.notify("pio: the buffer cannot be changed ('modifiable' is off)", vim.log.levels.ERROR) end
  local tick = vim.api.nvim_buf_get_changedtick(buf)
  local params = { textDocument = { uri = vim.uri_from_bufnr(buf) }, range = range, instruction = instruction }
  local request = server.request(buf, "pio/edit", params, function(err, result, context)
    if err then return vim.notify("pio: " .. err.message, vim.log.levels.ERROR) end
    if not vim.api.nvim_buf_is_loaded(buf) or vim.api.nvim_buf_get_changedtick(buf) ~= tick then
      return vim.notify("pio: the text was changed while the model wrote; nothing is proposed", vim.log.levels.WARN)
    end
    local client = vim.lsp.get_client_by_id(context.client_id)
    propose(buf, result.documentChanges[1].edits, client and client.offset_encoding or "utf-8")
  end)
  if request then vim.notify("pio: " .. instruction .. " …") end
end

return M
