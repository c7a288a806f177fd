--- Find programs, and the options to start them with.
---
--- The current folder may be an untrusted repository, so no program is found there (Windows searches it first,
--- as does a PATH with "."), and no Python module is imported from it.

local M = {}

local WINDOWS = vim.fn.has("win32") == 1
local HERE = vim.fs.dirname(vim.fn.fnamemodify(debug.getinfo(1, "S").source:sub(2), ":p"))

--- Return the options that start a program in this plugin's own folder, from which Python imports nothing.
---@return { cwd: string, env: table<string, string> }
function M.options()
  return { cwd = HERE, env = { PYTHONSAFEPATH = "1" } }
end

--- Return the command that installs the server, for messages: from this plugin's repository if it is in one.
---@return string
function M.install()
  local checkout = vim.fs.dirname(vim.fs.dirname(vim.fs.dirname(vim.fs.dirname(HERE))))
  return vim.fn.filereadable(checkout .. "/pyproject.toml") == 1
      and "pip install " .. vim.fn.shellescape(checkout)
    or "run `pip install .` in a checkout of its repository"
end

---@param path string
local function is_absolute(path)
  return path:find(WINDOWS and "^%a:[\\/]" or "^/") ~= nil or (WINDOWS and path:find("^[\\/][\\/]") ~= nil)
end

--- Return the absolute path of a program; nil if no absolute folder of the PATH contains it. Relative paths are
--- never found.
---@param name string
---@return string?
function M.find(name)
  if is_absolute(name) then
    return vim.fn.executable(name) == 1 and name or nil
  end
  if name == "" or name:find(WINDOWS and "[\\/:]" or "/") then
    return nil
  end
  for _, folder in ipairs(vim.split(vim.env.PATH or "", WINDOWS and ";" or ":", { plain = true })) do
    local file = folder:gsub("[\\/]*$", "") .. "/" .. name
    if is_absolute(folder) and vim.fn.executable(file) == 1 then
      return vim.fn.exepath(file)
    end
  end
  return nil
end

--- Return a command with its program's absolute path; nil if there is no such program.
---@param command string[]
---@return string[]?
function M.resolve(command)
  local program = M.find(command[1] or "")
  return program and vim.list_extend({ program }, command, 2)
end

return M
