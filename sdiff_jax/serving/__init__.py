"""A service over HTTP: batches of many clients' requests, and a page in the browser."""
