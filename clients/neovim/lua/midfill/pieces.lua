--- The parts of a suggestion that can be accepted separately.

local M = {}

--- White space, then a word or a run of other characters. In a string, `\S` matches a line end and `\_s` does not.
local WORD = vim.regex([=[^[[:space:]]*\%(\k\+\|\%(\k\@![^[:space:]]\)\+\)]=])

--- Return the first word of a text, the rest of its first line (or the next line if that is empty), or all of it.
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
