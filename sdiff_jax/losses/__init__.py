"""Training objectives, one a file; each exports build."""
