"""HTML pages about runs and studies."""
