--- The command `:Midfill`.

local config = require("midfill.config")
local programs = require("midfill.programs")
local server = require("midfill.server")

local M = {}

---@param lines string[]
local function show(lines)
  vim.api.nvim_echo({ { table.concat(lines, "\n") } }, true, {})
end

--- Return a field of an answer if it has the type of `otherwise`, or else that: a newer server may differ.
---@generic T
---@param values any
---@param name string
---@param otherwise T
---@return T
local function typed(values, name, otherwise)
  local value = type(values) == "table" and values[name] or nil
  return type(value) == type(otherwise) and value or otherwise
end

---@param explained table the answer to midfill/explain
---@return string[]
local function explanation(explained)
  local lines = {}
  local message, reason = typed(explained, "message", ""), typed(explained, "reason", "")
  local source = typed(explained, "source", "none")
  if message ~= "" then
    lines[1] = message
  elseif reason ~= "" then
    lines[1] = ("No suggestion: %s."):format(reason)
  elseif source == "none" then
    lines[1] = "No suggestion has been requested in this buffer yet."
  else
    lines[1] = ("The last suggestion came from: %s."):format(source)
  end
  local latency_ms = typed(explained, "latencyMs", -1)
  if latency_ms >= 0 then
    table.insert(lines, ("total: %.0f ms"):format(latency_ms))
    for _, stage in ipairs(typed(explained, "stages", {})) do
      table.insert(lines, ("  %-16s%8.1f ms"):format(typed(stage, "stage", "?"), typed(stage, "ms", 0)))
    end
  end
  local num_prompt = typed(explained, "promptTokens", 0)
  if num_prompt > 0 then
    local counts = "prompt: %d tokens, %d of them cached; %d tokens generated"
    local reused, generated = typed(explained, "reusedTokens", 0), typed(explained, "generatedTokens", 0)
    table.insert(lines, counts:format(num_prompt, reused, generated))
    for _, segment in ipairs(typed(explained, "segments", {})) do
      local row = "  %-16s%8d tokens"
      table.insert(lines, row:format(typed(segment, "source", "?"), typed(segment, "tokens", 0)))
    end
  end
  for _, filter in ipairs(typed(explained, "filters", {})) do
    local row = "filter: %s (%+d characters)"
    table.insert(lines, row:format(typed(filter, "filter", "?"), typed(filter, "characters", 0)))
  end
  return lines
end

--- Request the explanation of the last answer for the buffer.
---@param buf integer
---@param done fun(lines: string[])
local function explain(buf, done)
  local client = server.client_of(buf)
  if client == nil then
    done({ ("midfill is not active in this buffer (server: %s)."):format(server.state) })
    return
  end
  local params = { textDocument = vim.lsp.util.make_text_document_params(buf) }
  server.call(client, "request", "midfill/explain", params, function(err, result)
    done(err and { "midfill: " .. err.message } or explanation(result))
  end, buf)
end

---@type table<string, fun(argument?: string)>
local COMMANDS = {}

function COMMANDS.status()
  local midfill = require("midfill")
  local buf = vim.api.nvim_get_current_buf()
  local client = server.client()
  local info = client and client.server_info
  local lines = {
    ("server: %s%s"):format(server.state, info and (", midfill %s"):format(info.version) or ""),
    ("model: %s"):format(server.model or "unknown until the server is ready"),
    ("suggestions: %s"):format(midfill.is_enabled() and "on" or "off (:Midfill toggle)"),
    ("ghost text: %s"):format(config.values.inline == "native" and "by Neovim" or "by this plugin"),
    ("this buffer: %s"):format(server.client_of(buf) and "active" or "not active"),
  }
  if server.client_of(buf) == nil then
    show(lines)
    return
  end
  explain(buf, function(explained)
    table.insert(lines, "last answer: " .. explained[1])
    show(lines)
  end)
end

function COMMANDS.toggle()
  local midfill = require("midfill")
  midfill.toggle()
  vim.notify("midfill: suggestions are " .. (midfill.is_enabled() and "on" or "off"))
end

function COMMANDS.explain()
  explain(vim.api.nvim_get_current_buf(), show)
end

function COMMANDS.log()
  local path = vim.lsp.log and vim.lsp.log.get_filename and vim.lsp.log.get_filename()
    or vim.lsp.get_log_path()
  vim.cmd.tabedit(vim.fn.fnameescape(path))
  vim.cmd.normal({ "G", bang = true })
end

function COMMANDS.restart()
  server.restart()
end

--- Restart the server with a model; the choice holds until Neovim ends.
---@param name string
local function use_model(name)
  config.values.settings.model = name
  server.restart()
  vim.notify(("midfill: restarting with %s. To use it always, run: midfill model use %s"):format(name, name))
end

function COMMANDS.model(name)
  if name then
    use_model(name)
    return
  end
  -- The same program lists the models; words from "serve" on are for the server.
  local command = {}
  for _, word in ipairs(config.values.cmd) do
    if word == "serve" then
      break
    end
    table.insert(command, word)
  end
  local resolved = programs.resolve(vim.list_extend(command, { "model", "list", "--json" }))
  if resolved == nil then
    vim.notify(("midfill: cannot run %q; check the option `cmd`"):format(command[1]), vim.log.levels.ERROR)
    return
  end
  local options = vim.tbl_extend("error", programs.options(), { text = true })
  vim.system(resolved, options, function(done)
    local ok, listed = pcall(vim.json.decode, done.stdout)
    vim.schedule(function()
      if done.code ~= 0 or not ok then
        vim.notify("midfill: cannot list the models: " .. vim.trim(done.stderr or ""), vim.log.levels.ERROR)
        return
      end
      local models = vim.tbl_filter(function(model)
        return model.installed
      end, listed.models)
      local format = function(model)
        return ("%s%s"):format(model.name, model.name == server.model and "  (in use)" or "")
      end
      vim.ui.select(models, { prompt = "midfill: model", format_item = format }, function(model)
        if model then
          use_model(model.name)
        end
      end)
    end)
  end)
end

---@param command string
---@param arguments table
---@param done fun(result: table)
local function execute(command, arguments, done)
  local client = server.client()
  if client == nil then
    vim.notify(("midfill: the server is not running (%s); start it with :Midfill restart"):format(server.state), vim.log.levels.ERROR)
    return
  end
  local params = { command = command, arguments = arguments }
  server.call(client, "request", "workspace/executeCommand", params, function(err, result)
    if err then
      vim.notify("midfill: " .. err.message, vim.log.levels.ERROR)
    else
      done(result)
    end
  end, 0)
end

---@param name string|"off"
local function use_adapter(name)
  local command = name == "off" and "midfill.adapter.off" or "midfill.adapter.use"
  execute(command, name == "off" and {} or { name }, function(result)
    -- The server has already shown the error.
    if result.error == nil or result.error == vim.NIL then
      vim.notify(
        "midfill: this workspace now uses " .. (name == "off" and "no adapter" or "the adapter " .. name)
      )
    end
  end)
end

function COMMANDS.adapter(name)
  if name then
    use_adapter(name)
    return
  end
  execute("midfill.adapter.list", {}, function(result)
    local names = { "off" }
    local running = {}
    for _, adapter in ipairs(result.adapters) do
      table.insert(names, adapter.name)
      running[adapter.name] = adapter.running
    end
    local format = function(item)
      return item == "off" and "no adapter" or item .. (running[item] and "  (in use)" or "")
    end
    vim.ui.select(names, { prompt = "midfill: adapter", format_item = format }, function(chosen)
      if chosen then
        use_adapter(chosen)
      end
    end)
  end)
end

-- The server asks for confirmation, and then reports progress. `:Midfill train stop` stops it.
function COMMANDS.train(stop)
  local command = stop == "stop" and "midfill.adapter.stop" or "midfill.adapter.train"
  execute(command, {}, function() end)
end

function M.create()
  local names = vim.tbl_keys(COMMANDS)
  table.sort(names)
  vim.api.nvim_create_user_command("Midfill", function(call)
    local name, argument, more = unpack(call.fargs)
    local command = COMMANDS[name]
    if command == nil then
      vim.notify(
        ("midfill: unknown command %q; known: %s"):format(name, table.concat(names, ", ")),
        vim.log.levels.ERROR
      )
    elseif more or (argument and name ~= "model" and name ~= "adapter" and name ~= "train") then
      vim.notify(("midfill: too many arguments: %q"):format(call.args), vim.log.levels.ERROR)
    else
      command(argument)
    end
  end, {
    nargs = "+",
    desc = "midfill: " .. table.concat(names, ", "),
    complete = function(lead, line)
      if #vim.split(vim.trim(line:sub(1, #line - #lead)), "%s+") > 1 then
        return {}
      end
      return vim.tbl_filter(function(name)
        return vim.startswith(name, lead)
      end, names)
    end,
  })
end

return M
