--- Closers that an editor inserts after the cursor by itself, as a plugin such as nvim-autopairs does.
---
--- The server sends which closers of a suggestion those may be (`data.closers` of an item). This module finds
--- which of them stand in the line.

local M = {}

--- Return true if a text is nothing but closers.
---@param text string
function M.are_closers(text)
  return text:find("^[%)%]}>\"'`]*$") ~= nil
end

--- Return the pairs of an item, in bytes instead of code points.
---@param item table an InlineCompletionItem
---@param text string its text
---@param num_before integer bytes of it before the cursor, which are not counted
---@return integer[][] each is the offset of an opener, -1 if it is before the text, and that of its closer
function M.pairs_of(item, text, num_before)
  local sent = vim.tbl_get(item, "data", "closers")
  local starts = vim.str_utf_pos(text)
  local function bytes(offset)
    return (starts[offset + 1] or #text + 1) - 1 - num_before
  end
  local found = {}
  for _, pair in ipairs(type(sent) == "table" and sent or {}) do
    local opener = pair[1] < 0 and -1 or bytes(pair[1])
    if pair[1] < 0 or opener >= 0 then
      table.insert(found, { opener, bytes(pair[2]) })
    end
  end
  return found
end

--- Return the offsets, in a suggestion's text, of those of its closers that stand after the cursor; nil if
--- anything else does.
---@param suggestion midfill.Suggestion
---@param num_typed integer bytes of its text that have been typed
---@param after string the line after the cursor
---@return integer[]?
function M.standing(suggestion, num_typed, after)
  local given, awaited = {}, {}
  for _, pair in ipairs(suggestion.pairs) do
    if pair[1] < num_typed and num_typed <= pair[2] then
      table.insert(pair[1] < 0 and given or awaited, pair[2])
    end
  end
  local behind = suggestion.place.after:sub(suggestion.num_replaced - #given + 1)
  if not vim.endswith(after, behind) then
    return nil
  end
  local text, offsets, index = suggestion.text, {}, 0
  -- The editor may have closed some of what was typed, and other brackets not.
  for char in after:sub(1, #after - #behind):gmatch(".") do
    repeat
      index = index + 1
      local at = awaited[index]
      if at == nil then
        return nil
      end
      local is_same = text:sub(at + 1, at + 1) == char
    until is_same or (at == #text and M.are_closers(char))
    -- One after the text stays where it is.
    if awaited[index] < #text then
      table.insert(offsets, awaited[index])
    end
  end
  return vim.list_extend(offsets, given)
end

return M
