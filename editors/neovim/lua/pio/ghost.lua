--- Ghost text: ask after every key, draw what comes, accept all of it, a word or a line.
local accept, builtin = require("pio.accept"), require("pio.builtin")
local M = {}

local namespace = vim.api.nvim_create_namespace("pio")
local shown = nil     -- { buf, row, col, items, index, mark }
local pending = nil   -- { client, id }
local state = nil     -- the text and the place that were asked for last

M.latency = nil       -- ms from the last request to its answer

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

--- `items` are texts; the one at `index` is drawn, with its number where there are several and somebody looks at them.
local function draw(buf, row, col, items, index, numbered)
  forget()
  local lines = vim.split(items[index], "\n", { plain = true })
  local below = {}
  for i = 2, #lines do below[#below + 1] = { { lines[i], "PioGhost" } } end
  local first = lines[1] ~= "" and { { lines[1], "PioGhost" } } or {}
  if numbered then first[#first + 1] = { (" (%d/%d)"):format(index, #items), "PioGhost" } end
  local mark = vim.api.nvim_buf_set_extmark(buf, namespace, row, col, {
    virt_text = #first > 0 and first or nil,
    virt_text_pos = "inline",
    virt_lines = #below > 0 and below or nil,
  })
  shown = { buf = buf, row = row, col = col, items = items, index = index, mark = mark }
end

--- What is shown now: the text, or nil. Also for tests and status lines.
function M.text()
  return shown and shown.items[shown.index]
end

--- What is left of the items behind a text they begin with.
local function remainders(items, text)
  local left = {}
  for _, item in ipairs(items) do
    if vim.startswith(item, text) and #text < #item then left[#left + 1] = item:sub(#text + 1) end
  end
  return left
end

--- If the last key typed along with the ghost text, keep the rest of it on the screen: no flicker while the server answers.
local function type_through(buf, row, col)
  if not shown or shown.buf ~= buf or shown.row ~= row or col < shown.col then return false end
  local typed = vim.api.nvim_buf_get_text(buf, row, shown.col, row, col, {})[1]
  if typed == "" or not vim.startswith(M.text(), typed) or #typed == #M.text() then return false end
  draw(buf, row, col, remainders({ M.text() }, typed), 1)
  return true
end

local function plain(item)
  return type(item.insertText) == "table" and item.insertText.value or item.insertText
end

function M.request(kind)
  local buf = vim.api.nvim_get_current_buf()
  local client = require("pio").client(buf)
  if not client or not client.initialized then return end
  cancel()
  local row, col = unpack(vim.api.nvim_win_get_cursor(0))
  row = row - 1
  if not type_through(buf, row, col) then forget() end
  local params = vim.lsp.util.make_position_params(0, client.offset_encoding)
  params.context = { triggerKind = kind }
  local tick, begin = vim.api.nvim_buf_get_changedtick(buf), vim.uv.hrtime()
  local ok, id = client:request("textDocument/inlineCompletion", params, function(err, result)
    if pending and vim.api.nvim_buf_is_valid(buf) and vim.api.nvim_buf_get_changedtick(buf) == tick then
      pending = nil
      local items = not err and result and vim.tbl_map(plain, result.items or result) or {}
      local here = vim.api.nvim_get_current_buf() == buf and vim.api.nvim_win_get_cursor(0)
      if #items == 0 then
        forget()
      elseif here and here[1] == row + 1 and here[2] == col and vim.fn.mode():sub(1, 1) == "i" then
        draw(buf, row, col, items, 1)
        M.latency = (vim.uv.hrtime() - begin) / 1e6
      end
    end
  end, buf)
  if ok then pending = { client = client, id = id } end
end

--- Insert what `action` takes of the ghost text, and keep showing what is left.
local function take(action)
  local text, buf, row, col = accept.beginning[action](M.text()), shown.buf, shown.row, shown.col
  local left = remainders({ M.text() }, text)
  M.dismiss()
  row, col = accept.insert(buf, row, col, text)
  if #left > 0 then draw(buf, row, col, left, 1) end
end

local function cycle(count)
  if #shown.items > 1 then
    draw(shown.buf, shown.row, shown.col, shown.items, (shown.index - 1 + count) % #shown.items + 1, true)
  end
end

local actions = {
  dismiss = M.dismiss,
  next = function() cycle(1) end,
  previous = function() cycle(-1) end,
}
for action in pairs(accept.beginning) do actions[action] = function() take(action) end end

--- What a key types: nothing if it was an action.
local function press(action, key)
  local buf = vim.api.nvim_get_current_buf()
  if builtin.enabled(buf) then
    if builtin.act(action) == false then return key end
  elseif action == "request" then
    vim.schedule(function() M.request(1) end)
  elseif shown then
    vim.schedule(function() if shown then actions[action]() end end)   -- a mapping that gives keys may not change text
  else
    return key
  end
  return ""
end

function M.setup(group, keys)
  vim.api.nvim_create_autocmd({ "TextChangedI", "CursorMovedI" }, {
    group = group,
    callback = function(event)
      if builtin.enabled(event.buf) then return builtin.cancel(event.buf) end
      -- Both events come for one key: ask once for each state of the text and place of the cursor.
      local now = event.buf .. ":" .. vim.api.nvim_buf_get_changedtick(event.buf) .. ":" .. table.concat(vim.api.nvim_win_get_cursor(0), ":")
      if now ~= state then
        state = now
        M.request(2)
      end
    end,
  })
  vim.api.nvim_create_autocmd("InsertLeave", { group = group, callback = M.dismiss })
  -- Somebody types faster than a server starts: ask once it is there.
  vim.api.nvim_create_autocmd("LspAttach", {
    group = group,
    callback = function(event)
      if vim.fn.mode():sub(1, 1) ~= "i" or event.buf ~= vim.api.nvim_get_current_buf() then return end
      vim.schedule(function()   -- Neovim's own inline completion is attached after this
        if builtin.enabled(event.buf) then builtin.request(event.buf) else M.request(2) end
      end)
    end,
  })
  for action, key in pairs(keys) do
    if key and key ~= "" then
      vim.keymap.set("i", key, function() return press(action, key) end, { expr = true, desc = "pio: " .. action:gsub("_", " ") })
    end
  end
end

return M
