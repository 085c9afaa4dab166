"""The project's sweepers, in the package where Hydra looks for plugins; their code: grpo.sweep."""
