--- `:checkhealth midfill`.

local config = require("midfill.config")
local programs = require("midfill.programs")
local server = require("midfill.server")

local M = {}

local function check_program()
  local program = config.values.cmd[1]
  local path = programs.find(program)
  if path == nil then
    vim.health.error(
      ("cannot run %q"):format(program),
      { programs.install(), "or set the option `cmd` of require('midfill').setup" }
    )
    return
  end
  local ok, result = pcall(function()
    local options = vim.tbl_extend("error", programs.options(), { text = true, timeout = 30000 })
    return vim.system({ path, "--version" }, options):wait()
  end)
  if ok and result.code == 0 then
    vim.health.ok(("%s: %s"):format(path, vim.trim(result.stdout)))
  else
    vim.health.warn(("%s --version failed"):format(path))
  end
end

local function check_server()
  local state = server.state
  if state == "ready" then
    vim.health.ok(("the server is ready, model %s"):format(server.model or "unknown"))
  elseif state == "failed" or state == "given up" or state == "missing" then
    vim.health.error(("the server is %s"):format(state), {
      ":Midfill log may show why",
      "`midfill doctor` checks the installation",
      ":Midfill restart restarts it",
    })
  else
    vim.health.info(("the server is %s"):format(state))
  end
  local client = server.client()
  if client then
    local num_buffers = vim.tbl_count(client.attached_buffers)
    vim.health.info(
      ("active in %d buffer(s); position encoding %s"):format(num_buffers, client.offset_encoding)
    )
  end
end

local function check_keys()
  for name, lhs in pairs(config.values.keys) do
    local map = lhs and vim.fn.maparg(lhs, "i", false, true) or nil
    if map and not vim.startswith(map.desc or "", "midfill: ") then
      vim.health.warn(
        ("%s (%s) is mapped to something else%s"):format(
          lhs,
          name,
          map.buffer == 1 and " in this buffer" or ""
        ),
        { "call require('midfill').setup after your mappings, or choose another key by the option `keys`" }
      )
    elseif map then
      vim.health.ok(("%s: %s"):format(lhs, name))
    end
  end
end

function M.check()
  vim.health.start("midfill")
  if vim.fn.has("nvim-0.10") == 0 then
    vim.health.error("Neovim 0.10 or newer is required")
    return
  end
  vim.health.info(
    config.values.inline == "native" and "ghost text is drawn by vim.lsp.inline_completion"
      or "ghost text is drawn by this plugin"
  )
  check_program()
  check_server()
  check_keys()
end

return M
