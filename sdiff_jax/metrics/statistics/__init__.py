"""Statistics of sets of images: collected batch by batch, stored, and drawn from."""
