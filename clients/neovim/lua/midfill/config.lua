--- What the user may set, and the defaults.

local M = {}

---@class midfill.Keys Keys of insert mode; false leaves a key alone.
---@field accept string|false the whole suggestion
---@field accept_word string|false its next word
---@field accept_line string|false the rest of its line
---@field dismiss string|false
---@field trigger string|false ask explicitly: also where nothing is shown unasked

---@class midfill.Config
---@field cmd string[] how the server is started; arguments of `midfill serve` may follow
---@field settings table<string, any> the server's settings, as in its config.toml
---@field filetypes table<string, boolean> file types that get suggestions; "*" is all others
---@field auto boolean whether suggestions come unasked
---@field debounce_ms integer rest after a key before the server is asked
---@field hide_during_completion boolean no ghost text while Neovim's own popup menu is open
---@field popup boolean whether suggestions are offered as popup items, too
---@field inline "own"|"native" who shows ghost text: this plugin, or Neovim itself (0.12), which waits longer
---@field keys midfill.Keys

---@type midfill.Config
local DEFAULTS = {
  cmd = { "midfill", "serve" },
  settings = {},
  filetypes = { ["*"] = true, gitrebase = false, help = false, netrw = false },
  auto = true,
  debounce_ms = 15,
  hide_during_completion = true,
  -- Ghost text is there already.
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
      error(("midfill: unknown option %s%s; there are: %s"):format(at, name, table.concat(names, ", ")), 0)
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

--- Take the user's options. Raises a sentence that names what is wrong.
---@param options? table
function M.set(options)
  options = options or {}
  check(options, DEFAULTS, "")
  check(options.keys or {}, DEFAULTS.keys, "keys.")
  local values = vim.tbl_deep_extend("force", vim.deepcopy(DEFAULTS), options)
  if not vim.tbl_contains({ "own", "native" }, values.inline) then
    error(("midfill: the option inline is own or native, not %q"):format(values.inline), 0)
  end
  if values.inline == "native" and vim.lsp.inline_completion == nil then
    error("midfill: the option inline is native, which needs Neovim 0.12; leave it out, or update Neovim", 0)
  end
  if #values.cmd == 0 then
    error("midfill: the option cmd is empty; the default is { 'midfill', 'serve' }", 0)
  end
  M.values = values
end

return M
