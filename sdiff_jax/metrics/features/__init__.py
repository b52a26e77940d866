"""Feature networks that metrics compare images in."""
