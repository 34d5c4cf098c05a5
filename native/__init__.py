"""Native: tensors in, tensors out. `backend` opens a library and owns memory, `ops` are the functions a model may call."""
