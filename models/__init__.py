"""Models: a step's batch in, logits out. Each folder is one model and can be deleted by itself."""
