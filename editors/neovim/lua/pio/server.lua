--- The server's life: start, attach, crash, start again.
local M = {}

M.VERSION = "0.1"              -- the series of servers that this plugin speaks with
local CRASHES = 3              -- so many within WINDOW: a fault that starting again does not mend
local WINDOW = 180             -- seconds
local SIGTERM = 15             -- what client:stop(true) sends

M.status = nil                 -- what the server last told of itself: pio/status
M.loading = nil                -- { message, percentage } while a model is loaded
M.problem = nil                -- why no server runs
M.handlers = { progress = {}, died = {} }   -- token -> function(value); functions called when a server ended

local crashes, leaving = {}, false

local function config()
  return require("pio").config
end

local function changed()
  vim.api.nvim_exec_autocmds("User", { pattern = "PioStatus" })
  vim.cmd.redrawstatus({ bang = true })
end

local function fail(problem)
  M.problem = problem
  vim.notify("pio: " .. problem, vim.log.levels.ERROR)
  changed()
end

function M.client(buf)
  return vim.lsp.get_clients({ bufnr = buf or 0, name = "pio" })[1]
end

local function wanted(buf)
  if not vim.api.nvim_buf_is_loaded(buf) or vim.bo[buf].buftype ~= "" or vim.api.nvim_buf_get_name(buf) == "" then return false end
  return not config().filetypes or vim.list_contains(config().filetypes, vim.bo[buf].filetype)
end

function M.attach_all()
  for _, buf in ipairs(vim.api.nvim_list_bufs()) do M.start(buf) end
end

local function on_progress(err, params, context)
  local token, value = params.token, params.value
  local own = M.handlers.progress[token]
  if own then return own(value) end
  if type(token) == "string" and vim.startswith(token, "pio-load") then
    M.loading = value.kind ~= "end" and vim.tbl_extend("force", M.loading or {}, value) or nil
    changed()
  end
  return vim.lsp.handlers["$/progress"](err, params, context)
end

--- A server ended. One that was not told to is started again, but not for ever.
local function on_exit(code, signal)
  M.loading, M.status = nil, nil
  for _, died in ipairs(M.handlers.died) do died() end
  if leaving or (code == 0 and signal == 0) or signal == SIGTERM then return changed() end
  local now = vim.uv.now() / 1000
  crashes = vim.tbl_filter(function(moment) return now - moment < WINDOW end, crashes)
  crashes[#crashes + 1] = now
  if #crashes < CRASHES then return M.attach_all() end
  fail(("the server ended %d times in a row (%s %d) and is not started again: :LspLog tells more, :PioRestart tries once more"):format(
    CRASHES, signal == 0 and "exit code" or "signal", signal == 0 and code or signal))
end

local function check_version(client)
  local version = client.server_info and client.server_info.version or "unknown"
  if not vim.startswith(version, M.VERSION .. ".") then
    vim.notify(("pio: the server's version is %s, the plugin's %s: install matching ones"):format(version, M.VERSION), vim.log.levels.WARN)
  end
end

--- Start the server for a buffer, or attach the one that runs.
function M.start(buf)
  if M.problem or not wanted(buf) then return end
  local program = config().cmd[1]
  if vim.fn.executable(program) ~= 1 then
    return fail(program .. " is not found: install it (README.md of the project) or set `cmd` in require('pio').setup, then :PioRestart")
  end
  local capabilities = vim.lsp.protocol.make_client_capabilities()
  capabilities.textDocument.inlineCompletion = { dynamicRegistration = false }
  vim.lsp.start({
    name = "pio",
    cmd = config().cmd,
    root_dir = vim.fs.root(buf, { ".git" }) or vim.fs.dirname(vim.api.nvim_buf_get_name(buf)),
    capabilities = capabilities,
    init_options = next(config().settings) and config().settings or vim.empty_dict(),
    on_init = check_version,
    on_exit = vim.schedule_wrap(on_exit),
    commands = require("pio.commands").of_code_actions,
    handlers = {
      ["pio/didChangeStatus"] = function(_, status)
        M.status = status
        changed()
      end,
      ["$/progress"] = on_progress,
    },
  }, { bufnr = buf, reuse_client = function(client) return client.name == "pio" and not client:is_stopped() end })
end

--- A new process; also after crashes.
function M.restart()
  crashes, M.problem = {}, nil
  local running = vim.lsp.get_clients({ name = "pio" })
  for _, client in ipairs(running) do client:stop(true) end
  vim.wait(2000, function() return #vim.lsp.get_clients({ name = "pio" }) == 0 end, 10)
  M.attach_all()
end

--- Change settings of the running server and of those that will be started.
function M.set(settings)
  config().settings = vim.tbl_extend("force", config().settings, settings)
  for _, client in ipairs(vim.lsp.get_clients({ name = "pio" })) do
    client:notify("workspace/didChangeConfiguration", { settings = { pio = config().settings } })
    client:request("pio/status", vim.empty_dict(), function(_, status)
      M.status = status or M.status
      changed()
    end)
  end
end

--- Ask the buffer's server, or say that there is none.
function M.request(buf, method, params, handler)
  local client = M.client(buf)
  if not client then return vim.notify("pio: " .. (M.problem or "no server is attached to this buffer (:checkhealth pio)"), vim.log.levels.WARN) end
  local ok, id = client:request(method, params, vim.schedule_wrap(handler), buf)
  return ok and { client = client, id = id } or nil
end

function M.setup(group)
  vim.api.nvim_create_autocmd({ "BufReadPost", "BufNewFile", "FileType" }, {
    group = group, callback = function(event) M.start(event.buf) end,
  })
  vim.api.nvim_create_autocmd("VimLeavePre", { group = group, callback = function() leaving = true end })
  M.attach_all()
end

return M
