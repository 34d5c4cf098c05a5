"""Engine: requests in, tokens out. What this file exports is all that lsp_server may touch."""
