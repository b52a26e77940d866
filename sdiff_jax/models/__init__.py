"""Networks, one a file; each exports build."""
