--- Keys that keep their earlier meaning while there is no suggestion.

local M = {}

---@type table<string, string> keys that are already mapped by this plugin, and their fallbacks
local fallbacks = {}

--- Return a key sequence with the earlier meaning of `lhs`: the user's global mapping, or the key itself.
---@param lhs string
---@return string
local function fallback_of(lhs)
  local raw = vim.api.nvim_replace_termcodes(lhs, true, true, true)
  if fallbacks[raw] ~= nil then
    return fallbacks[raw]
  end
  local plug = ("<Plug>(midfill-fallback-%d)"):format(vim.tbl_count(fallbacks) + 1)
  fallbacks[raw] = plug
  for _, map in ipairs(vim.api.nvim_get_keymap("i")) do
    if map.lhsraw == raw or map.lhsrawalt == raw or map.lhs == lhs then
      map.lhs, map.lhsraw = plug, vim.api.nvim_replace_termcodes(plug, true, true, true)
      map.lhsrawalt, map.buffer = nil, 0
      map.rhs = map.rhs or ""
      vim.fn.mapset("i", false, map)
      return plug
    end
  end
  vim.keymap.set("i", plug, lhs)
  return plug
end

--- Map a key of insert mode.
---@param lhs string|false
---@param description string
---@param keys fun(): string? returns the keys to execute; nil for the earlier meaning
function M.map(lhs, description, keys)
  if not lhs then
    return
  end
  local fallback = fallback_of(lhs)
  vim.keymap.set("i", lhs, function()
    return keys() or fallback
  end, { expr = true, remap = true, silent = true, desc = "midfill: " .. description })
end

return M
