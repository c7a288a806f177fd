--- Ghost text from midfill, a language server for code completion on your own machine.

local config = require("midfill.config")
local server = require("midfill.server")

local M = {}

local enabled = true

--- Return the module that shows the ghost text.
local function backend()
  return require(config.values.inline == "native" and "midfill.native" or "midfill.ghost")
end

---@return boolean
function M.is_enabled()
  return enabled
end

--- Insert the suggestion on the screen, or its next word or line.
---@param part? "word"|"line"
---@return boolean accepted false if there was none
function M.accept(part)
  return backend().accept(part)
end

--- Dismiss the suggestion on the screen.
---@return boolean dismissed false if there was none
function M.dismiss()
  return backend().dismiss()
end

--- Request a suggestion, even at a position where none is shown automatically.
function M.trigger()
  backend().trigger()
end

--- Switch suggestions on or off, ghost text and popup items.
---@param on? boolean default: toggle
function M.toggle(on)
  enabled = on == nil and not enabled or on == true
  local client = server.client()
  if client then
    local change = { settings = { midfill = { enabled = enabled } } }
    server.call(client, "notify", "workspace/didChangeConfiguration", change)
  end
  backend().enable(enabled)
  vim.cmd.redrawstatus()
end

--- Return a short text for the status line; "" if midfill is not active in the buffer.
---@return string
function M.statusline()
  if not enabled then
    return "midfill off"
  end
  local state = server.state
  if state == "ready" then
    local buf = vim.api.nvim_get_current_buf()
    if server.client_of(buf) == nil then
      return ""
    end
    return backend().is_waiting() and "midfill …" or "midfill"
  end
  if state == "loading" and server.percentage then
    return ("midfill %d%%%%"):format(server.percentage)
  end
  return state == "stopped" and "" or "midfill " .. state
end

local function map_keys()
  local map = require("midfill.keys").map
  local keys = config.values.keys
  map(keys.accept, "accept", function()
    return backend().accepting_keys()
  end)
  map(keys.accept_word, "accept a word", function()
    return backend().accepting_keys("word")
  end)
  map(keys.accept_line, "accept a line", function()
    return backend().accepting_keys("line")
  end)
  map(keys.dismiss, "dismiss", function()
    return backend().dismissing_keys()
  end)
  map(keys.trigger, "request a suggestion", function()
    return "<Cmd>lua require('midfill').trigger()<CR>"
  end)
end

--- Start midfill. Call this once, after your own mappings.
---@param options? midfill.Config every field is optional
function M.setup(options)
  if vim.fn.has("nvim-0.10") == 0 then
    vim.notify("midfill: Neovim 0.10 or newer is required.", vim.log.levels.ERROR)
    return
  end
  config.set(options)
  local group = vim.api.nvim_create_augroup("midfill", { clear = true })
  map_keys()
  server.on_gone = function()
    backend().clear()
  end
  server.watch(group)
  backend().watch(group)
  backend().enable(enabled)
  require("midfill.command").create()
  server.attach_all()
end

return M
