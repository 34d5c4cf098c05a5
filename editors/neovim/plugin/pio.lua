if vim.g.loaded_pio then return end
vim.g.loaded_pio = true
if vim.g.pio_setup ~= false then vim.schedule(function() if not package.loaded["pio.ghost"] then require("pio").setup(vim.g.pio or {}) end end) end
