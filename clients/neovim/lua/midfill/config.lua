--- The options of `setup`, and their defaults.

local M = {}

---@class midfill.Keys Keys of insert mode; false maps none.
---@field accept string|false the whole suggestion
---@field accept_word string|false its next word
---@field accept_line string|false the rest of its line
---@field dismiss string|false
---@field trigger string|false request a suggestion, even where none is shown automatically

---@class midfill.Config
---@field cmd string[] command that starts the server; arguments of `midfill serve` may follow
---@field settings table<string, any> the server's settings, as in its config.toml
---@field filetypes table<string, boolean> file types that get suggestions; "*" is all others
---@field auto boolean show suggestions while typing
---@field debounce_ms integer milliseconds without a key before a request is sent
---@field hide_during_completion boolean no ghost text while Neovim's own popup menu is open
---@field popup boolean also offer suggestions as popup items
---@field inline "own"|"native" ghost text by this plugin, or by Neovim itself (0.12), which waits longer
---@field keys midfill.Keys

---@type midfill.Config
local DEFAULTS = {
  cmd = { "midfill", "serve" },
  settings = {},
  filetypes = { ["*"] = true, gitrebase = false, help = false, netrw = false },
  auto = true,
  debounce_ms = 15,
  hide_during_completion = true,
  -- Ghost text shows the suggestion already.
  popup = false,
  inline = "own",
  keys = {
    accept = "<Tab>",
    accept_word = "<C-Right>",
    accept_line = "<M-Right>",
    dismiss = "<C-]>",
    trigger = "<M-\\>",
  },
}

---@type midfill.Config
M.values = vim.deepcopy(DEFAULTS)

---@param given table
---@param known table
---@param at string
local function check(given, known, at)
  for name, value in pairs(given) do
    local default = known[name]
    if default == nil then
      local names = vim.tbl_keys(known)
      table.sort(names)
      error(("midfill: unknown option %s%s; known: %s"):format(at, name, table.concat(names, ", ")), 0)
    end
    local off = at == "keys." and value == false
    if type(value) ~= type(default) and not off then
      error(
        ("midfill: the option %s%s must be a %s, not %s"):format(at, name, type(default), vim.inspect(value)),
        0
      )
    end
  end
end

--- Set the user's options. Raises an error that names the wrong option and its value.
---@param options? table
function M.set(options)
  options = options or {}
  check(options, DEFAULTS, "")
  check(options.keys or {}, DEFAULTS.keys, "keys.")
  local values = vim.tbl_deep_extend("force", vim.deepcopy(DEFAULTS), options)
  if not vim.tbl_contains({ "own", "native" }, values.inline) then
    error(("midfill: the option inline must be own or native, not %q"):format(values.inline), 0)
  end
  if values.inline == "native" and vim.lsp.inline_completion == nil then
    error("midfill: the option inline = native needs Neovim 0.12; remove it, or update Neovim", 0)
  end
  if #values.cmd == 0 then
    error("midfill: the option cmd is empty; the default is { 'midfill', 'serve' }", 0)
  end
  M.values = values
end

return M
