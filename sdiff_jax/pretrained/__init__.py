"""Other projects' files: weights, policies, folders of the diffusers format."""
