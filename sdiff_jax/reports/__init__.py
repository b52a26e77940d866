"""HTML pages, figures and tables of results."""
