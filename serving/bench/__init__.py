"""Measuring servers: load over HTTP, the start, the front end's ceiling, the engine alone."""
