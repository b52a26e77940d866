"""Jobs of the command line, one a file; each exports run(config, workdir)."""
