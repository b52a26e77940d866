"""Jobs of the command line; each file exports run(config, workdir)."""
