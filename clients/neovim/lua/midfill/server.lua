--- The LSP client and its server process: one for all buffers, so that the model is in memory once.

local config = require("midfill.config")
local programs = require("midfill.programs")

local M = {}

--- Pauses before a crashed server is restarted; after the last one it stays off.
local BACK_OFF_MS = { 250, 1000, 4000 }
--- A server that has run this long resets the count of crashes.
local RECOVERED_S = 600

---@alias midfill.State "stopped"|"missing"|"starting"|"loading"|"ready"|"failed"|"restarting"|"given up"

---@type midfill.State
M.state = "stopped"
---@type integer? loading progress in per cent
M.percentage = nil
---@type string? the model's name
M.model = nil
--- Called when the model is ready, and when the server has ended.
M.on_ready = function() end
M.on_gone = function() end

local client_id ---@type integer?
local started_s = 0
local deaths = 0
local expected = false

---@param message string
---@param level? integer
local function say(message, level)
  vim.notify("midfill: " .. message, level or vim.log.levels.INFO)
end

---@param state midfill.State
local function become(state)
  M.state = state
  vim.cmd.redrawstatus()
end

--- Call a method of a client: with a dot in Neovim 0.10, with a colon since then.
---@param client vim.lsp.Client
---@param method string
function M.call(client, method, ...)
  if vim.fn.has("nvim-0.11") == 1 then
    return client[method](client, ...)
  end
  return client[method](...)
end

---@return vim.lsp.Client?
function M.client()
  local client = client_id and vim.lsp.get_client_by_id(client_id)
  return client and not M.call(client, "is_stopped") and client or nil
end

--- Return the client if it is attached to this buffer.
---@param buf integer
---@return vim.lsp.Client?
function M.client_of(buf)
  local client = M.client()
  return client and vim.lsp.buf_is_attached(buf, client.id) and client or nil
end

---@param buf integer
local function is_wanted(buf)
  local kind = vim.bo[buf].filetype
  if not vim.api.nvim_buf_is_loaded(buf) or vim.bo[buf].buftype ~= "" or kind == "" then
    return false
  end
  local wanted = config.values.filetypes[kind]
  if wanted == nil then
    wanted = config.values.filetypes["*"]
  end
  return wanted == true
end

---@param code integer
---@param signal integer
local function ended(code, signal)
  client_id = nil
  M.percentage = nil
  M.on_gone()
  if expected then
    expected = false
    become("stopped")
    return
  end
  if vim.uv.hrtime() / 1e9 - started_s > RECOVERED_S then
    deaths = 0
  end
  deaths = deaths + 1
  local how = signal ~= 0 and ("signal %d"):format(signal) or ("status %d"):format(code)
  local pause = BACK_OFF_MS[deaths]
  if pause == nil then
    become("given up")
    say(
      ("the server crashed again (%s) and stays off. :Midfill log may show why; :Midfill restart restarts it."):format(
        how
      ),
      vim.log.levels.ERROR
    )
    return
  end
  become("restarting")
  if deaths == 1 then
    say(
      ("the server crashed (%s) and is being restarted. :Midfill log may show why."):format(how),
      vim.log.levels.WARN
    )
  end
  vim.defer_fn(function()
    if M.state == "restarting" then
      M.attach_all()
    end
  end, pause)
end

--- Return a function that starts the process. It reports success to Neovim, because we report failures ourselves.
---@param command string[]
local function spawn(command)
  return function(dispatchers)
    local on_exit = dispatchers.on_exit
    return vim.lsp.rpc.start(
      command,
      vim.tbl_extend("force", dispatchers, {
        on_exit = function(code, signal)
          on_exit(0, 0)
          vim.schedule(function()
            ended(code, signal)
          end)
        end,
      }),
      programs.options()
    )
  end
end

local function capabilities()
  local own = { textDocument = { inlineCompletion = { dynamicRegistration = false } } }
  return vim.tbl_deep_extend("force", vim.lsp.protocol.make_client_capabilities(), own)
end

---@param client vim.lsp.Client
---@param root string?
local function add_folder(client, root)
  if root == nil then
    return
  end
  local uri = vim.uri_from_fname(root)
  for _, folder in ipairs(client.workspace_folders or {}) do
    if folder.uri == uri then
      return
    end
  end
  local folder = { uri = uri, name = root }
  client.workspace_folders = client.workspace_folders or {}
  table.insert(client.workspace_folders, folder)
  local event = { event = { added = { folder }, removed = {} } }
  M.call(client, "notify", "workspace/didChangeWorkspaceFolders", event)
end

--- Attach a buffer if its file type is wanted. Start the server if none is running.
---@param buf integer
function M.attach(buf)
  if not is_wanted(buf) or M.state == "given up" then
    return
  end
  local root = vim.fs.root(buf, { ".git", ".hg", ".jj" })
  local running = M.client()
  if running ~= nil then
    vim.lsp.buf_attach_client(buf, running.id)
    add_folder(running, root)
    return
  end
  local command = programs.resolve(config.values.cmd)
  if command == nil then
    if M.state ~= "missing" then
      become("missing")
      say(
        ("cannot run %q. Install the server (%s), or set its path: require('midfill').setup { cmd = { '/path/to/midfill', 'serve' } }"):format(
          config.values.cmd[1],
          programs.install()
        ),
        vim.log.levels.ERROR
      )
    end
    return
  end
  become("starting")
  started_s = vim.uv.hrtime() / 1e9
  client_id = vim.lsp.start({
    name = "midfill",
    cmd = spawn(command),
    root_dir = root,
    capabilities = capabilities(),
    -- An empty Lua table would be sent as a list.
    init_options = next(config.values.settings) and config.values.settings or vim.empty_dict(),
    on_init = function(client)
      if not config.values.popup then
        client.server_capabilities.completionProvider = nil
      end
    end,
  }, {
    bufnr = buf,
    reuse_client = function()
      return false
    end,
  })
  if client_id == nil then
    become("failed")
  end
end

--- Attach all loaded buffers of wanted file types.
function M.attach_all()
  for _, buf in ipairs(vim.api.nvim_list_bufs()) do
    M.attach(buf)
  end
end

--- Restart the server.
function M.restart()
  deaths = 0
  local client = M.client()
  if client == nil then
    become("stopped")
    M.attach_all()
    return
  end
  local on_gone = M.on_gone
  M.on_gone = function()
    M.on_gone = on_gone
    on_gone()
    vim.schedule(M.attach_all)
  end
  expected = true
  M.call(client, "stop")
end

---@param id integer
---@param value table a WorkDoneProgress value
local function progressed(id, value)
  if id ~= client_id then
    return
  end
  if value.kind == "begin" then
    M.model = (value.title or ""):match("^midfill: (.+)$") or M.model
  end
  if value.kind == "end" then
    M.percentage = nil
    become(value.message == "failed" and "failed" or "ready")
    if M.state == "ready" then
      M.on_ready()
    end
  else
    M.percentage = value.percentage or M.percentage
    become("loading")
  end
end

--- Correct a popup item of several lines: Neovim 0.12 inserts only its first line, and 0.10 inserts all as one
--- line, with NUL characters for line ends.
local function break_lines()
  local done = vim.v.completed_item
  local item = vim.tbl_get(done, "user_data", "nvim", "lsp", "completion_item") or {}
  local text = vim.tbl_get(item, "textEdit", "newText")
  if vim.tbl_get(item, "command", "command") ~= "midfill.accepted" or not (text and text:find("\n")) then
    return
  end
  local row, column = unpack(vim.api.nvim_win_get_cursor(0))
  local before = vim.api.nvim_get_current_line():sub(1, column):gsub("%z", "\n")
  local inserted = vim.endswith(before, text) and text or text:match("^[^\n]*")
  if done.word == inserted and vim.endswith(before, inserted) then
    local lines = vim.split(text, "\n")
    vim.api.nvim_buf_set_text(0, row - 1, column - #inserted, row - 1, column, lines)
    vim.api.nvim_win_set_cursor(0, { row + #lines - 1, #lines[#lines] })
  end
end

--- Follow buffers and the server's progress.
---@param group integer an autocommand group
function M.watch(group)
  vim.api.nvim_create_autocmd("FileType", {
    group = group,
    callback = function(event)
      M.attach(event.buf)
    end,
  })
  vim.api.nvim_create_autocmd("LspProgress", {
    group = group,
    callback = function(event)
      progressed(event.data.client_id, event.data.params.value)
    end,
  })
  vim.api.nvim_create_autocmd("CompleteDone", { group = group, callback = break_lines })
  vim.api.nvim_create_autocmd("VimLeavePre", {
    group = group,
    callback = function()
      expected = true
    end,
  })
end

return M
