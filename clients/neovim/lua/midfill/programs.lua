--- Programs: where they are, and how they are started.
---
--- The current folder may be a stranger's repository, so nothing in it is found by chance: not a program
--- (Windows looks there first, and so does whoever has "." on the PATH), and not a module of Python.

local M = {}

local WINDOWS = vim.fn.has("win32") == 1
local HERE = vim.fs.dirname(vim.fn.fnamemodify(debug.getinfo(1, "S").source:sub(2), ":p"))

--- How a program is started: in this plugin's own folder, and Python imports nothing from there either.
---@return { cwd: string, env: table<string, string> }
function M.options()
  return { cwd = HERE, env = { PYTHONSAFEPATH = "1" } }
end

--- The way to get the server, for messages: what is beside this plugin can be installed.
---@return string
function M.install()
  local checkout = vim.fs.dirname(vim.fs.dirname(vim.fs.dirname(vim.fs.dirname(HERE))))
  return vim.fn.filereadable(checkout .. "/pyproject.toml") == 1
      and "pip install " .. vim.fn.shellescape(checkout)
    or "pip install . in a checkout of its repository"
end

---@param path string
local function is_absolute(path)
  return path:find(WINDOWS and "^%a:[\\/]" or "^/") ~= nil or (WINDOWS and path:find("^[\\/][\\/]") ~= nil)
end

--- The absolute path of a program; nil if there is none in an absolute folder of PATH. A path with a relative
--- folder in it is never found.
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

--- A command with the path of its program in the place of the name; nil if there is no such program.
---@param command string[]
---@return string[]?
function M.resolve(command)
  local program = M.find(command[1] or "")
  return program and vim.list_extend({ program }, command, 2)
end

return M
