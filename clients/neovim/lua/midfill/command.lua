--- The command `:Midfill`.

local server = require("midfill.server")

local M = {}

---@param lines string[]
local function show(lines)
  vim.api.nvim_echo({ { table.concat(lines, "\n") } }, true, {})
end

---@param explained table the answer to midfill/explain
---@return string[]
local function explanation(explained)
  local function given(value)
    return value ~= nil and value ~= vim.NIL
  end
  local lines = {}
  if given(explained.message) then
    lines[1] = explained.message
  elseif explained.source == "none" then
    lines[1] = "Nothing has been asked for here yet."
  else
    lines[1] = ("The last suggestion came from: %s."):format(explained.source)
  end
  if given(explained.latencyMs) then
    table.insert(lines, ("%.0f ms in all"):format(explained.latencyMs))
    for _, stage in ipairs(explained.stages) do
      table.insert(lines, ("  %-16s%8.1f ms"):format(stage.stage, stage.ms))
    end
  end
  if given(explained.promptTokens) and explained.promptTokens > 0 then
    local counts = "prompt: %d tokens, %d of them computed before; %d tokens written"
    table.insert(
      lines,
      counts:format(explained.promptTokens, explained.reusedTokens, explained.generatedTokens)
    )
    for _, segment in ipairs(explained.segments) do
      table.insert(lines, ("  %-16s%8d tokens"):format(segment.source, segment.tokens))
    end
  end
  for _, filter in ipairs(explained.filters or {}) do
    table.insert(lines, ("filter: %s (%+d characters)"):format(filter.filter, filter.characters))
  end
  return lines
end

--- Ask why the last answer for the buffer was as it was.
---@param buf integer
---@param done fun(lines: string[])
local function explain(buf, done)
  local client = server.client_of(buf)
  if client == nil then
    done({ ("midfill does not serve this buffer (the server is %s)."):format(server.state) })
    return
  end
  local params = { textDocument = vim.lsp.util.make_text_document_params(buf) }
  server.call(client, "request", "midfill/explain", params, function(err, result)
    done(err and { "midfill: " .. err.message } or explanation(result))
  end, buf)
end

---@type table<string, fun()>
local COMMANDS = {}

function COMMANDS.status()
  local midfill = require("midfill")
  local buf = vim.api.nvim_get_current_buf()
  local client = server.client()
  local info = client and client.server_info
  local lines = {
    ("server: %s%s"):format(server.state, info and (", midfill %s"):format(info.version) or ""),
    ("model: %s"):format(server.model or "not known yet"),
    ("suggestions: %s"):format(midfill.is_enabled() and "on" or "off (:Midfill toggle)"),
    ("ghost text: %s"):format(midfill.inline() == "native" and "by Neovim" or "by this plugin"),
    ("this buffer: %s"):format(server.client_of(buf) and "served" or "not served"),
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

function M.create()
  local names = vim.tbl_keys(COMMANDS)
  table.sort(names)
  vim.api.nvim_create_user_command("Midfill", function(call)
    local command = COMMANDS[call.args]
    if command == nil then
      vim.notify(
        ("midfill: no command %q; there are: %s"):format(call.args, table.concat(names, ", ")),
        vim.log.levels.ERROR
      )
      return
    end
    command()
  end, {
    nargs = 1,
    desc = "midfill: " .. table.concat(names, ", "),
    complete = function(lead)
      return vim.tbl_filter(function(name)
        return vim.startswith(name, lead)
      end, names)
    end,
  })
end

return M
