--- Ghost text by Neovim itself: `vim.lsp.inline_completion`, from Neovim 0.12 on.
---
--- Neovim sends its request 200 ms after the last key, so this is optional and not the default.

local pieces = require("midfill.pieces")
local server = require("midfill.server")

local M = {}

---@param part? "word"|"line"
---@return boolean accepted false if there was none
function M.accept(part)
  if part == nil then
    return vim.lsp.inline_completion.get()
  end
  return vim.lsp.inline_completion.get({
    on_accept = function(item)
      if type(item.insert_text) == "string" then
        local piece = pieces.first(item.insert_text, part)
        if piece ~= item.insert_text then
          item.insert_text, item.command = piece, nil
        end
      end
      return item
    end,
  })
end

--- Return the keys of a mapping that accepts; nil if there is nothing to accept.
---@param part? "word"|"line"
---@return string?
function M.accepting_keys(part)
  return M.accept(part) and "" or nil
end

--- Neovim's inline completion can neither dismiss a suggestion nor request one.
---@return string?
function M.dismissing_keys()
  return nil
end

function M.dismiss()
  return false
end

function M.trigger()
  vim.notify(
    "midfill: not supported by Neovim's own inline completion; see :help midfill-inline"
  )
end

function M.clear() end

function M.is_waiting()
  return false
end

---@param client vim.lsp.Client
---@param on boolean
local function set(client, on)
  vim.lsp.inline_completion.enable(on, { client_id = client.id })
  -- Neovim regards a buffer without an entry as off, so that switching it off would have no effect there.
  for buf in pairs(on and client.attached_buffers or {}) do
    vim.lsp.inline_completion.enable(true, { bufnr = buf })
  end
end

---@param group integer
function M.watch(group)
  vim.api.nvim_create_autocmd("LspAttach", {
    group = group,
    callback = function(event)
      local client = server.client()
      if client and client.id == event.data.client_id then
        set(client, require("midfill").is_enabled())
      end
    end,
  })
end

---@param on boolean
function M.enable(on)
  local client = server.client()
  if client then
    set(client, on)
  end
end

return M
