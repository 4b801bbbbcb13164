"""Published checkpoints, translated into folders in diffusers layout."""
