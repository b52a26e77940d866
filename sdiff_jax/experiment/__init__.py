"""From a config to the pieces of an experiment and its work directory."""
