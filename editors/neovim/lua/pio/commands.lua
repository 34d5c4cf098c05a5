--- What can be typed after a colon, and what code actions ask for.
local server, chat, edit = require("pio.server"), require("pio.chat"), require("pio.edit")
local M = {}

--- Carried out here, in the chat and as a diff, rather than in the server.
M.of_code_actions = {
  ["pio.ask"] = function(command)
    local argument = command.arguments[1]
    chat.ask(argument.messages[1].content, argument.range)
  end,
  ["pio.rewrite"] = function(command)
    local argument = command.arguments[1]
    edit.rewrite(vim.uri_to_bufnr(argument.textDocument.uri), argument.range, argument.instruction)
  end,
}

--- Whole lines, counted from 1, as LSP's range.
local function range_of(first, last)
  return { start = { line = first - 1, character = 0 }, ["end"] = { line = last, character = 0 } }
end

--- The server's code action of that title, for some lines and the diagnostics there.
local function act(title, first, last)
  local buf = vim.api.nvim_get_current_buf()
  local diagnostics = vim.tbl_filter(function(d) return d.lnum >= first - 1 and d.lnum < last end, vim.diagnostic.get(buf))
  local params = {
    textDocument = { uri = vim.uri_from_bufnr(buf) },
    range = range_of(first, last),
    context = { diagnostics = vim.lsp.diagnostic.from(diagnostics) },
  }
  server.request(buf, "textDocument/codeAction", params, function(err, actions)
    for _, action in ipairs(actions or {}) do
      if action.title == "pio: " .. title then return M.of_code_actions[action.command.command](action.command) end
    end
    vim.notify("pio: " .. (err and err.message or title .. " is not offered here"), vim.log.levels.WARN)
  end)
end

local function names_of_models()
  local client = server.client() or vim.lsp.get_clients({ name = "pio" })[1]
  local answer = client and client:request_sync("pio/models", vim.empty_dict(), 2000)
  return answer and answer.result or {}
end

local function choose_model(name)
  if name ~= "" then return server.set({ model = name }) end
  local function described(model)
    return ("%s: %s (%s)"):format(model.name, model.description, model.onDisk and "on disk" or "to be downloaded")
  end
  vim.ui.select(names_of_models(), { prompt = "Model", format_item = described }, function(model)
    if model then server.set({ model = model.name }) end
  end)
end

local function toggle()
  local enabled = require("pio").config.settings.enable == false
  server.set({ enable = enabled })
  vim.notify("pio: completions are " .. (enabled and "on" or "off"))
end

local function show(method)
  server.request(0, method, vim.empty_dict(), function(err, answer) vim.print(err or answer) end)
end

local function define(name, description, action, options)
  vim.api.nvim_create_user_command(name, action, vim.tbl_extend("force", { desc = description }, options or {}))
end

function M.setup()
  define("PioChat", "Open the chat, or ask about the file or the selected lines", function(o)
    chat.ask(o.args, o.range > 0 and range_of(o.line1, o.line2) or nil)
  end, { nargs = "*", range = true })
  define("PioStop", "Stop the answer that is being written", chat.stop)
  define("PioRetry", "Ask the last question again", chat.retry)
  define("PioNew", "Begin a new conversation", chat.new)

  define("PioEdit", "Rewrite the line or the selected lines", function(o)
    local buf, range = vim.api.nvim_get_current_buf(), range_of(o.line1, o.line2)
    if o.args ~= "" then return edit.rewrite(buf, range, o.args) end
    vim.ui.input({ prompt = "What should be changed? " }, function(text)
      if text and text ~= "" then edit.rewrite(buf, range, text) end
    end)
  end, { nargs = "*", range = true })
  define("PioAccept", "Accept the proposed edit", edit.accept)
  define("PioReject", "Reject the proposed edit", edit.reject)
  for name, title in pairs({ PioExplain = "Explain", PioFix = "Fix", PioRefactor = "Refactor", PioTests = "Add tests", PioDocs = "Add docs" }) do
    define(name, title .. ": the line or the selected lines", function(o) act(title, o.line1, o.line2) end, { range = true })
  end

  define("PioModel", "Select the model", function(o) choose_model(o.args) end, {
    nargs = "?",
    complete = function(typed)
      local names = vim.tbl_map(function(model) return model.name end, names_of_models())
      return vim.tbl_filter(function(name) return vim.startswith(name, typed) end, names)
    end,
  })
  define("PioToggle", "Switch completions on or off", toggle)
  define("PioStatus", "What the server is doing", function() show("pio/status") end)
  define("PioWhy", "Why the last request showed what it showed", function() show("pio/explain") end)
  define("PioRestart", "Start the server again", server.restart)
end

return M
