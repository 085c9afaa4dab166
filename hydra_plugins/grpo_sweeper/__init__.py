"""The project's sweepers, where Hydra looks for them; what they do is in grpo.sweep."""
