--- Ghost text: ask after every key, draw what comes, accept all of it, a word or a line.
local M = {}

local namespace = vim.api.nvim_create_namespace("pio")
local shown = nil     -- { buf, row, col, text, mark }
local pending = nil   -- { client, id }

local function client_of(buf)
  return require("pio").client(buf)
end

local function forget()
  if shown then pcall(vim.api.nvim_buf_del_extmark, shown.buf, namespace, shown.mark) end
  shown = nil
end

local function cancel()
  if pending then pending.client:cancel_request(pending.id) end
  pending = nil
end

function M.dismiss()
  cancel()
  forget()
end

local function draw(buf, row, col, text)
  forget()
  local lines = vim.split(text, "\n", { plain = true })
  local below = {}
  for i = 2, #lines do below[#below + 1] = { { lines[i], "PioGhost" } } end
  local mark = vim.api.nvim_buf_set_extmark(buf, namespace, row, col, {
    virt_text = lines[1] ~= "" and { { lines[1], "PioGhost" } } or nil,
    virt_text_pos = "inline",
    virt_lines = #below > 0 and below or nil,
  })
  shown = { buf = buf, row = row, col = col, text = text, mark = mark }
end

--- What is shown now: the text, or nil. Also for tests and status lines.
function M.text()
  return shown and shown.text
end

--- If the last key typed along with the ghost text, keep the rest of it on the screen: no flicker while the server answers.
local function type_through(buf, row, col)
  if not shown or shown.buf ~= buf or shown.row ~= row or col < shown.col then return false end
  local typed = vim.api.nvim_buf_get_text(buf, row, shown.col, row, col, {})[1]
  if typed == "" or shown.text:sub(1, #typed) ~= typed or #typed == #shown.text then return false end
  draw(buf, row, col, shown.text:sub(#typed + 1))
  return true
end

function M.request(kind)
  local buf = vim.api.nvim_get_current_buf()
  local client = client_of(buf)
  if not client or not client.initialized then return end
  cancel()
  local row, col = unpack(vim.api.nvim_win_get_cursor(0))
  row = row - 1
  if not type_through(buf, row, col) then forget() end
  local params = vim.lsp.util.make_position_params(0, client.offset_encoding)
  params.context = { triggerKind = kind }
  local tick = vim.api.nvim_buf_get_changedtick(buf)
  local ok, id = client:request("textDocument/inlineCompletion", params, function(err, result)
    if pending and vim.api.nvim_buf_is_valid(buf) and vim.api.nvim_buf_get_changedtick(buf) == tick then
      pending = nil
      local item = not err and result and (result.items or result)[1]
      local here = vim.api.nvim_get_current_buf() == buf and vim.api.nvim_win_get_cursor(0)
      if item and here and here[1] == row + 1 and here[2] == col and vim.fn.mode():sub(1, 1) == "i" then
        local text = item.insertText
        draw(buf, row, col, type(text) == "table" and text.value or text)
      elseif not item then
        forget()
      end
    end
  end, buf)
  if ok then pending = { client = client, id = id } end
end

--- Insert `text`, a beginning of the ghost text, and keep showing what is left.
local function insert(text)
  local buf, row, col, rest = shown.buf, shown.row, shown.col, shown.text:sub(#text + 1)
  M.dismiss()
  local lines = vim.split(text, "\n", { plain = true })
  vim.api.nvim_buf_set_text(buf, row, col, row, col, lines)
  local last_row, last_col = row + #lines - 1, (#lines == 1 and col or 0) + #lines[#lines]
  vim.api.nvim_win_set_cursor(0, { last_row + 1, last_col })
  if rest ~= "" then draw(buf, last_row, last_col, rest) end
end

function M.accept()
  if shown then insert(shown.text) end
end

function M.accept_word()
  if shown then insert(shown.text:match("^%s*[%w_\128-\255]+") or shown.text:match("^%s*[^%w%s]+") or shown.text) end
end

function M.accept_line()
  if shown then insert(shown.text:match("^\n?[^\n]*")) end
end

function M.setup(group, keys)
  vim.api.nvim_create_autocmd({ "TextChangedI", "CursorMovedI" }, {
    group = group,
    callback = function(event)
      -- Both events come for one key: ask once for each state of the text and place of the cursor.
      local state = vim.api.nvim_buf_get_changedtick(event.buf) .. ":" .. table.concat(vim.api.nvim_win_get_cursor(0), ":")
      if state ~= M.state then
        M.state = state
        M.request(2)
      end
    end,
  })
  vim.api.nvim_create_autocmd("InsertLeave", { group = group, callback = M.dismiss })
  -- Somebody types faster than a server starts: ask once it is there.
  vim.api.nvim_create_autocmd("LspAttach", {
    group = group,
    callback = function() if vim.fn.mode():sub(1, 1) == "i" then M.request(2) end end,
  })
  for action, key in pairs(keys) do
    if key and key ~= "" then
      vim.keymap.set("i", key, function()
        if action == "request" then
          vim.schedule(function() M.request(1) end)
        elseif shown then
          vim.schedule(M[action])   -- a mapping that gives keys may not change text
        else
          return key
        end
        return ""
      end, { expr = true, desc = "pio: " .. action:gsub("_", " ") })
    end
  end
end

return M
