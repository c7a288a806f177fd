--- Ghost text by this plugin, for all versions of Neovim: send requests, follow typing, accept suggestions.
---
--- A suggestion belongs to the position at which it was requested. While the text typed since then is a
--- beginning of it, its rest is shown without a request. This happens in the same turn as the key, before
--- Neovim draws, so that nothing flickers.

local closers = require("midfill.closers")
local config = require("midfill.config")
local pieces = require("midfill.pieces")
local server = require("midfill.server")

local M = {}

local METHOD = "textDocument/inlineCompletion"
local INVOKED, AUTOMATIC = 1, 2

local namespace = vim.api.nvim_create_namespace("midfill")

---@class midfill.Place The cursor and its line. Rows and columns count from 0; columns are bytes.
---@field buf integer
---@field row integer
---@field col integer
---@field before string
---@field after string
---@field num_lines integer
---@field tick integer

---@class midfill.Suggestion
---@field place midfill.Place where `text` goes
---@field text string
---@field num_replaced integer how many closers behind the place it takes the place of
---@field pairs integer[][] which closers of `text` the editor may insert by itself
---@field command? lsp.Command tells the server that it was accepted
---@field client_id integer

local shown ---@type midfill.Suggestion?
local pending ---@type { client: vim.lsp.Client, place: midfill.Place, id: integer? }?
local seen ---@type midfill.Place?
local timer = assert(vim.uv.new_timer())
local enabled = false

---@return midfill.Place
local function here()
  local buf = vim.api.nvim_get_current_buf()
  local row, col = unpack(vim.api.nvim_win_get_cursor(0))
  local line = vim.api.nvim_get_current_line()
  return {
    buf = buf,
    row = row - 1,
    col = col,
    before = line:sub(1, col),
    after = line:sub(col + 1),
    num_lines = vim.api.nvim_buf_line_count(buf),
    tick = vim.api.nvim_buf_get_changedtick(buf),
  }
end

---@param a midfill.Place
---@param b midfill.Place
local function is_same(a, b)
  return a.buf == b.buf and a.tick == b.tick and a.row == b.row and a.col == b.col
end

--- What of a suggestion is left at a place, and where in that the closers are that stand behind the cursor;
--- nil if it does not hold there.
---@param suggestion midfill.Suggestion
---@param place midfill.Place
---@return string? rest
---@return integer[] offsets of closers in it, in bytes
local function rest_at(suggestion, place)
  local origin = suggestion.place
  local is_before = place.row < origin.row or (place.row == origin.row and place.col < origin.col)
  if place.buf ~= origin.buf or is_before or place.num_lines - origin.num_lines ~= place.row - origin.row then
    return nil, {}
  end
  local lines = vim.api.nvim_buf_get_text(place.buf, origin.row, 0, place.row, place.col, {})
  local text = table.concat(lines, "\n")
  if not vim.startswith(origin.before .. suggestion.text, text) then
    return nil, {}
  end
  local num_typed = #text - #origin.before
  local standing = closers.standing(suggestion, num_typed, place.after)
  if standing == nil then
    return nil, {}
  end
  local rest, offsets = suggestion.text:sub(num_typed + 1), {}
  for _, offset in ipairs(standing) do
    table.insert(offsets, offset - num_typed)
  end
  -- Those at its end can stay where they are.
  while #offsets > 0 and offsets[#offsets] == #rest - 1 do
    rest = rest:sub(1, table.remove(offsets))
  end
  if rest == "" then
    return nil, {}
  end
  return rest, offsets
end

---@param text string
---@param width integer columns before it on its line
---@return string
local function expand_tabs(text, width)
  local tab = vim.bo.tabstop
  return (
    text:gsub("([^\t]*)\t", function(head)
      width = width + vim.api.nvim_strwidth(head)
      local num_blanks = tab - width % tab
      width = width + num_blanks
      return head .. (" "):rep(num_blanks)
    end)
  )
end

--- Draw a text of one line around the closers in it that stand in the buffer already.
---@param place midfill.Place
---@param first string
---@param offsets integer[] where in `first` those closers are
---@param virt_lines table[] what stands below
local function draw_around(place, first, offsets, virt_lines)
  local start, width = 1, vim.fn.strdisplaywidth(place.before)
  for index = 0, #offsets do
    local piece = first:sub(start, offsets[index + 1] or #first)
    local is_last = index == #offsets
    if piece ~= "" or is_last then
      local drawn = expand_tabs(piece, width)
      vim.api.nvim_buf_set_extmark(place.buf, namespace, place.row, place.col + index, {
        id = index + 1,
        hl_mode = "combine",
        virt_text_pos = "inline",
        virt_text = { { drawn, "MidfillSuggestion" } },
        virt_lines = is_last and virt_lines or nil,
      })
      width = width + vim.api.nvim_strwidth(drawn) + 1
    end
    start = (offsets[index + 1] or #first) + 2
  end
end

--- Draw the rest of a suggestion at the cursor.
---@param place midfill.Place
---@param rest string
---@param offsets integer[] where in `rest` the closers are that stand behind the cursor
local function draw(place, rest, offsets)
  vim.api.nvim_buf_clear_namespace(place.buf, namespace, 0, -1)
  local lines = vim.split(rest, "\n", { plain = true })
  local virt_lines = {}
  for index = 2, #lines do
    table.insert(virt_lines, { { expand_tabs(lines[index], 0), "MidfillSuggestion" } })
  end
  local tail = place.after:sub(#offsets + 1)
  if (offsets[#offsets] or -1) < #lines[1] and (#lines == 1 or tail == "") then
    draw_around(place, lines[1], offsets, virt_lines)
    return
  end
  -- What stands behind the cursor will end up behind the last line, so it is shown there.
  local width = vim.fn.strdisplaywidth(place.before)
  local first = expand_tabs(lines[1], width)
  local hidden = expand_tabs(place.after, width)
  first = first .. (" "):rep(vim.api.nvim_strwidth(hidden) - vim.api.nvim_strwidth(first))
  table.insert(virt_lines[#virt_lines], { expand_tabs(tail, 0), "Normal" })
  vim.api.nvim_buf_set_extmark(place.buf, namespace, place.row, place.col, {
    id = 1,
    hl_mode = "replace",
    virt_text_pos = "overlay",
    virt_text = { { first, "MidfillSuggestion" } },
    virt_lines = virt_lines,
  })
end

local function cancel()
  timer:stop()
  if pending ~= nil then
    if pending.id ~= nil then
      server.call(pending.client, "cancel_request", pending.id)
    end
    pending = nil
  end
end

--- Hide the suggestion and cancel the pending request.
function M.clear()
  cancel()
  if shown ~= nil then
    local buf = shown.place.buf
    shown = nil
    if vim.api.nvim_buf_is_valid(buf) then
      vim.api.nvim_buf_clear_namespace(buf, namespace, 0, -1)
    end
  end
end

--- Convert a column in a client's units to bytes.
---@param line string
---@param column integer
---@param encoding string
local function byte_column(line, column, encoding)
  if encoding == "utf-8" then
    return math.min(column, #line)
  end
  if vim.fn.has("nvim-0.11") == 1 then
    return vim.str_byteindex(line, encoding, column, false)
  end
  local _, num_utf16 = vim.str_utfindex(line)
  return vim.str_byteindex(line, math.min(column, num_utf16), true)
end

---@param client vim.lsp.Client
---@param place midfill.Place
---@param item table an InlineCompletionItem
---@return midfill.Suggestion?
local function suggestion_of(client, place, item)
  local text = type(item.insertText) == "table" and item.insertText.value or item.insertText
  text = text:gsub("\r\n", "\n")
  local whole, num_replaced = text, 0
  if item.range then
    local line = place.before .. place.after
    local first = byte_column(line, item.range.start.character, client.offset_encoding)
    local last = byte_column(line, item.range["end"].character, client.offset_encoding)
    local typed = place.before:sub(first + 1)
    local replaced = line:sub(place.col + 1, last)
    local is_here = item.range.start.line == place.row and last >= place.col
    -- Ghost text can only add to what stands there: an item that replaces anything else is not shown.
    if not is_here or not vim.startswith(text, typed) or not closers.are_closers(replaced) then
      return nil
    end
    text, num_replaced = text:sub(#typed + 1), #replaced
  end
  if text == "" then
    return nil
  end
  return {
    place = place,
    text = text,
    num_replaced = num_replaced,
    pairs = closers.pairs_of(item, whole, #whole - #text),
    command = item.command,
    client_id = client.id,
  }
end

---@param kind integer
local function request(kind)
  cancel()
  local place = here()
  local client = server.client_of(place.buf)
  if client == nil or client.server_capabilities.inlineCompletionProvider == nil then
    return
  end
  local params = vim.lsp.util.make_position_params(0, client.offset_encoding) --[[@as table]]
  params.context = { triggerKind = kind }
  local mine = { client = client, place = place }
  pending = mine
  local function answered(err, result)
    if pending ~= mine then
      return
    end
    pending = nil
    local item = not err and result and (result.items or result)[1]
    if not item or not M.can_show() or not is_same(place, here()) then
      return
    end
    local suggestion = suggestion_of(client, place, item)
    if suggestion ~= nil then
      local rest, offsets = rest_at(suggestion, place)
      if rest then
        shown = suggestion
        draw(place, rest, offsets)
      end
    end
  end
  local _, id = server.call(client, "request", METHOD, params, answered, place.buf)
  mine.id = id
end

--- Return true if ghost text may be shown now.
function M.can_show()
  return vim.api.nvim_get_mode().mode:sub(1, 1) == "i"
    and not vim.o.paste
    and not (config.values.hide_during_completion and vim.fn.pumvisible() == 1)
end

local function is_automatic()
  return config.values.auto and vim.b.midfill_enabled ~= false and vim.fn.reg_executing() == ""
end

--- After a change of the text or the cursor: continue the suggestion, or request another one.
local function changed()
  if not M.can_show() then
    seen = nil
    M.clear()
    return
  end
  local place = here()
  if seen ~= nil and is_same(seen, place) then
    return
  end
  seen = place
  if pending ~= nil and is_same(pending.place, place) then
    return
  end
  if shown ~= nil then
    local rest, offsets = rest_at(shown, place)
    if rest then
      draw(place, rest, offsets)
      return
    end
  end
  M.clear()
  if is_automatic() and server.client_of(place.buf) then
    timer:start(
      config.values.debounce_ms,
      0,
      vim.schedule_wrap(function()
        -- It may have been cancelled after this was scheduled.
        if enabled and seen == place and M.can_show() then
          request(AUTOMATIC)
        end
      end)
    )
  end
end

--- Request a suggestion without a change of the text.
local function again()
  if enabled then
    seen = nil
    changed()
  end
end

function M.is_visible()
  return shown ~= nil and rest_at(shown, here()) ~= nil
end

--- Insert the suggestion, or its next word or line.
---@param part? "word"|"line"
---@return boolean accepted false if there was none
function M.accept(part)
  local place = here()
  local suggestion = shown
  if suggestion == nil then
    return false
  end
  local rest, offsets = rest_at(suggestion, place)
  if not rest then
    return false
  end
  local piece = pieces.first(rest, part)
  local num_replaced = 0
  for _, offset in ipairs(offsets) do
    -- Those closers whose turn it is.
    num_replaced = num_replaced + (offset < #piece and 1 or 0)
  end
  local lines = vim.split(piece, "\n", { plain = true })
  -- One undo reverts the accepted text, but not the text typed before.
  vim.cmd("let &undolevels = &undolevels")
  vim.api.nvim_buf_set_text(place.buf, place.row, place.col, place.row, place.col + num_replaced, lines)
  local col = #lines[#lines] + (#lines == 1 and place.col or 0)
  vim.api.nvim_win_set_cursor(0, { place.row + #lines, col })
  if piece ~= rest then
    changed()
    return true
  end
  M.clear()
  local client = vim.lsp.get_client_by_id(suggestion.client_id)
  if suggestion.command and client then
    local params = { command = suggestion.command.command, arguments = suggestion.command.arguments }
    server.call(client, "request", "workspace/executeCommand", params, function() end, place.buf)
  end
  return true
end

--- Return the keys of a mapping that accepts; nil if there is nothing to accept.
---@param part? "word"|"line"
---@return string?
function M.accepting_keys(part)
  -- The text is locked while an expression is evaluated.
  return M.is_visible()
      and ("<Cmd>lua require('midfill').accept(%s)<CR>"):format(part and ("%q"):format(part) or "")
    or nil
end

---@return string?
function M.dismissing_keys()
  return M.is_visible() and "<Cmd>lua require('midfill').dismiss()<CR>" or nil
end

--- Dismiss the suggestion; the next key requests another one.
---@return boolean dismissed false if there was none
function M.dismiss()
  local was_visible = M.is_visible()
  M.clear()
  return was_visible
end

--- Request a suggestion, even where none is shown automatically.
function M.trigger()
  if enabled and M.can_show() then
    M.clear()
    seen = here()
    request(INVOKED)
  end
end

---@return boolean
function M.is_waiting()
  return pending ~= nil
end

--- Hide everything.
local function leave()
  if shown ~= nil or pending ~= nil or seen ~= nil then
    seen = nil
    M.clear()
  end
end

---@param group integer an autocommand group
function M.watch(group)
  vim.api.nvim_set_hl(0, "MidfillSuggestion", { default = true, link = "NonText" })
  local function on(events, callback)
    vim.api.nvim_create_autocmd(events, {
      group = group,
      callback = function(event)
        if enabled then
          callback(event)
        end
      end,
    })
  end
  on({ "TextChangedI", "TextChangedP", "CursorMovedI", "CompleteChanged" }, changed)
  on({ "InsertEnter", "CompleteDone" }, function()
    vim.schedule(again)
  end)
  -- Not every way out of insert mode triggers InsertLeave: CTRL-C, <Insert> and CTRL-R = do not.
  on({ "InsertLeave", "BufLeave", "WinLeave" }, leave)
  on({ "ModeChanged", "SafeState", "OptionSet" }, function(event)
    if not M.can_show() then
      leave()
    elseif event.event == "ModeChanged" and seen == nil then
      -- Back from another mode within insert mode.
      vim.schedule(again)
    end
  end)
  server.on_ready = again
end

---@param on boolean
function M.enable(on)
  enabled = on
  M.clear()
  again()
end

return M
