"""Models in the diffusers format: networks, text encoder, scheduler."""
