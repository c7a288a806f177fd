--- Pieces of a suggestion that can be accepted by themselves.

local M = {}

--- Blanks, then a word or a run of signs. In a string, a line end is a sign for `\S`, and no blank for `\_s`.
local WORD = vim.regex([=[^[[:space:]]*\%(\k\+\|\%(\k\@![^[:space:]]\)\+\)]=])

--- The first word of a text, the rest of its first line (or the next one, if that is empty), or all of it.
---@param text string
---@param part? "word"|"line"
---@return string
function M.first(text, part)
  local piece = text
  if part == "word" then
    local _, last = WORD:match_str(text)
    piece = last and text:sub(1, last) or text
  elseif part == "line" then
    piece = text:match("^\n?[^\n]*")
  end
  return piece
end

return M
