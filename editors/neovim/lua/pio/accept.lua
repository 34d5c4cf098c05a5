--- What accepting takes of a suggestion, and how it goes into the buffer.
local M = {}

--- action -> the beginning of the text that it takes
M.beginning = {
  accept = function(text) return text end,
  accept_word = function(text) return text:match("^%s*[%w_\128-\255]+") or text:match("^%s*[^%w%s]+") or text end,
  accept_line = function(text) return text:match("^\n?[^\n]*") end,
}

--- Insert text and put the cursor behind it; gives that place.
function M.insert(buf, row, col, text)
  local lines = vim.split(text, "\n", { plain = true })
  vim.api.nvim_buf_set_text(buf, row, col, row, col, lines)
  local last_row, last_col = row + #lines - 1, (#lines == 1 and col or 0) + #lines[#lines]
  vim.api.nvim_win_set_cursor(0, { last_row + 1, last_col })
  return last_row, last_col
end

return M
