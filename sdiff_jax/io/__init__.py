"""Files: atomic writes, JSON with clear errors, resumable output, images."""
