"""Language server: documents in, suggestions out."""
