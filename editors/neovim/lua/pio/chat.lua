--- The chat: a window that shows the conversation, and a small one below it to ask in. The conversation is kept here, so that a server
--- that dies takes none of it away.
local server = require("pio.server")
local M = {}

local namespace = vim.api.nvim_create_namespace("pio.chat")
local HINT = "Ask about the code: /explain /fix /refactor /tests /docs · Enter sends, Ctrl-C stops, :PioRetry, :PioNew"

local turns = {}        -- { role, content, place, notes, reasoning, error }
local running = nil     -- { client, id, token } of the answer that is being written
local log, box          -- the two buffers
local source = nil      -- the buffer that questions are about
local count = 0

--- What the model writes becomes lines of text: no control codes.
local function plain(text)
  return (text:gsub("\27%[[0-9;]*%a", ""):gsub("[%z\1-\8\11-\31\127]", ""))
end

local function lines_of(turn)
  local out = {}
  local function add(text) vim.list_extend(out, vim.split(plain(text), "\n", { plain = true })) end
  if turn.role == "user" then
    add("# " .. turn.content:gsub("\n", "\n# "))
  else
    for _, note in ipairs(turn.notes) do add("> " .. note) end
    if turn.reasoning ~= "" then
      add("{{{ Reasoning")
      add(vim.trim(turn.reasoning))
      add("}}}")
    end
    add(turn.content)
    if turn.error then add("**" .. turn.error .. "**") end
  end
  out[#out + 1] = ""
  return out
end

local function set_lines(first, last, lines)
  vim.bo[log].modifiable = true
  vim.api.nvim_buf_set_lines(log, first, last, false, lines)
  vim.bo[log].modifiable = false
end

--- Draw a turn anew, the last one as a rule; windows that look at the end follow it.
local function draw(turn)
  if not log or not vim.api.nvim_buf_is_valid(log) then return end
  local following = vim.tbl_filter(function(window)
    return vim.api.nvim_win_get_cursor(window)[1] >= vim.api.nvim_buf_line_count(log)
  end, vim.fn.win_findbuf(log))
  set_lines(turn.line, -1, lines_of(turn))
  for _, window in ipairs(following) do vim.api.nvim_win_set_cursor(window, { vim.api.nvim_buf_line_count(log), 0 }) end
end

local function push(turn)
  local count_of_lines = vim.api.nvim_buf_line_count(log)
  turn.line = #turns == 0 and 0 or count_of_lines
  turns[#turns + 1] = turn
  draw(turn)
end

--- Many pieces may come between two pictures of the screen: one drawing for all of them.
local function draw_soon(turn)
  if turn.drawing then return end
  turn.drawing = true
  vim.schedule(function()
    turn.drawing = false
    draw(turn)
  end)
end

local function finish(turn, problem)
  if not running or running.turn ~= turn then return end
  server.handlers.progress[running.token] = nil
  running = nil
  turn.error = problem
  draw(turn)
end

local function notes_of(report)
  if report.hidden then return { ("The file is not shown to the model: %s."):format(report.hidden) } end
  if report.repeats then return { "It was stopped because the model began to repeat itself." } end
  local notes, context = {}, report.context
  for _, item in ipairs(context.shown) do
    notes[#notes + 1] = ("Sees %s (%d tokens%s)."):format(item.name, item.tokens, item.cut and ", its beginning" or "")
  end
  if context.dropped > 0 then notes[#notes + 1] = ("%d earlier messages no longer fit."):format(context.dropped) end
  notes[#notes + 1] = ("%d tokens in all."):format(context.tokens)
  return { table.concat(notes, " ") }
end

local function on_report(turn, report)
  if not running or running.turn ~= turn then return end
  if report.delta then
    turn.content = turn.content .. report.delta
  elseif report.reasoning then
    turn.reasoning = turn.reasoning .. report.reasoning
  else
    vim.list_extend(turn.notes, notes_of(report))
  end
  draw_soon(turn)
end

local function messages()
  local out = {}
  for _, turn in ipairs(turns) do
    if turn.content ~= "" then out[#out + 1] = { role = turn.role, content = turn.content } end
  end
  return out
end

local function answer(question)
  local params = vim.tbl_extend("force", question.place, { messages = messages() })
  local turn = { role = "assistant", content = "", reasoning = "", notes = {} }
  push(turn)
  count = count + 1
  params.partialResultToken = ("pio-chat-%d-%d"):format(vim.fn.getpid(), count)
  running = { turn = turn, token = params.partialResultToken }
  server.handlers.progress[running.token] = function(report) on_report(turn, report) end
  local request = server.request(source, "pio/chat", params, function(err, result)
    if result then turn.content = result.text end
    finish(turn, err and err.message)
  end)
  if not request then return finish(turn, server.problem or "No server is attached to the file (:checkhealth pio).") end
  running.client, running.id = request.client, request.id
end

--- What a question is about: the file that was looked at before, or lines of it.
local function place(range)
  if not source or not vim.api.nvim_buf_is_valid(source) or not server.client(source) then return {} end
  return { textDocument = { uri = vim.uri_from_bufnr(source) }, range = range }
end

--- Open the chat and ask, if there is a question. `range` is LSP's.
function M.ask(text, range)
  M.open()
  if not text or text == "" then return end
  if running then return vim.notify("pio: an answer is being written: Ctrl-C or :PioStop stops it", vim.log.levels.WARN) end
  local question = { role = "user", content = text, place = place(range) }
  push(question)
  answer(question)
end

function M.stop()
  if not running then return end
  if running.client then running.client:cancel_request(running.id) end
  finish(running.turn, "Stopped.")
end

--- Ask the last question again.
function M.retry()
  M.stop()
  while #turns > 0 and turns[#turns].role == "assistant" do
    set_lines(table.remove(turns).line, -1, {})
  end
  if #turns > 0 then answer(turns[#turns]) end
end

function M.new()
  M.stop()
  turns = {}
  if log then set_lines(0, -1, {}) end
  M.open()
end

local function scratch(name, filetype)
  local buf = vim.api.nvim_create_buf(false, true)
  vim.api.nvim_buf_set_name(buf, name)
  vim.bo[buf].bufhidden = "hide"
  vim.bo[buf].filetype = filetype
  return buf
end

local function send()
  local text = vim.trim(table.concat(vim.api.nvim_buf_get_lines(box, 0, -1, false), "\n"))
  if text == "" then return end
  if not running then vim.api.nvim_buf_set_lines(box, 0, -1, false, {}) end
  M.ask(text)
end

local function close()
  for _, buf in ipairs({ log, box }) do
    for _, window in ipairs(vim.fn.win_findbuf(buf)) do pcall(vim.api.nvim_win_close, window, true) end
  end
end

local function make_buffers()
  if log and vim.api.nvim_buf_is_valid(log) and vim.api.nvim_buf_is_valid(box) then return end
  log, box = scratch("pio://chat", "markdown"), scratch("pio://ask", "pio")
  vim.bo[log].modifiable = false
  vim.keymap.set({ "n", "i" }, "<CR>", send, { buffer = box, desc = "pio: send" })
  vim.keymap.set("i", "<C-j>", "<CR>", { buffer = box, desc = "pio: a new line" })
  for _, buf in ipairs({ log, box }) do
    vim.keymap.set({ "n", "i" }, "<C-c>", M.stop, { buffer = buf, desc = "pio: stop" })
    vim.keymap.set("n", "q", close, { buffer = buf, desc = "pio: close the chat" })
  end
  vim.api.nvim_buf_set_extmark(box, namespace, 0, 0, { virt_lines = { { { HINT, "Comment" } } } })
end

--- Show the chat and go into the box below it.
function M.open()
  if vim.bo.buftype == "" then source = vim.api.nvim_get_current_buf() end
  make_buffers()
  if #vim.fn.win_findbuf(log) == 0 then
    vim.cmd("botright vsplit")
    vim.api.nvim_win_set_buf(0, log)
    vim.wo.wrap, vim.wo.linebreak, vim.wo.number, vim.wo.foldmethod, vim.wo.foldlevel = true, true, false, "marker", 0
  end
  local asking = vim.fn.win_findbuf(box)[1]
  if asking then return vim.api.nvim_set_current_win(asking) end
  vim.api.nvim_set_current_win(vim.fn.win_findbuf(log)[1])
  vim.cmd("belowright 4split")
  vim.api.nvim_win_set_buf(0, box)
  vim.wo.winfixheight, vim.wo.number = true, false
end

table.insert(server.handlers.died, function()
  if running then finish(running.turn, "The server ended in the middle of the answer. :PioRetry asks again.") end
end)

return M
