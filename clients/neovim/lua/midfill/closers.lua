--- Brackets and quotes that were closed behind the cursor before their time, by a plugin such as
--- nvim-autopairs: how a suggestion that closes them itself gets past them. The server does the same.

local M = {}

local OPENERS, CLOSERS = "([{", ")]}"

---@param set string
---@param char string
local function is_in(set, char)
  return set:find(char, 1, true) ~= nil
end

--- Whether a text is nothing but what editors put behind the cursor by themselves.
---@param text string
function M.are_closers(text)
  return text:find("^[%)%]}>\"'`]*$") ~= nil
end

--- Where a text closes, in their order, what these closers close; the last of them it may not.
---@param text string
---@param closed string
---@return integer[] places from 1, in bytes
function M.closing(text, closed)
  local places, depth = {}, 0
  for at = 1, #text do
    local char = text:sub(at, at)
    if #places < #closed and depth == 0 and char == closed:sub(#places + 1, #places + 1) then
      table.insert(places, at)
    elseif is_in(OPENERS, char) then
      depth = depth + 1
    elseif is_in(CLOSERS, char) then
      depth = math.max(0, depth - 1)
    end
  end
  return places
end

--- What to insert before these closers, and how many of them it takes the place of.
---@param text string
---@param closed string
---@return string, integer
function M.fitted(text, closed)
  if vim.endswith(text, closed) then
    return text:sub(1, #text - #closed), 0
  end
  local places = M.closing(text, closed)
  while #places > 0 and places[#places] == #text do
    text = text:sub(1, #text - 1)
    table.remove(places)
  end
  return text, #places
end

--- Whether what was typed still needs the closers behind it.
---@param typed string
---@param closed string
function M.awaits(typed, closed)
  local first = closed:sub(1, 1)
  if first == "" or is_in("\"'`", first) then
    local _, count = typed:gsub(first == "" and "%z" or first, "")
    return count == 0 or count % 2 == 1
  end
  local depth = 0
  for char in typed:gmatch("[%(%[{%)%]}]") do
    depth = depth + (is_in(OPENERS, char) and 1 or -1)
    if depth < 0 then
      return false
    end
  end
  return true
end

return M
