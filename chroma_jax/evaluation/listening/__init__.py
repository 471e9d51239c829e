"""Listening tests: a page that compares two systems by ear, and what its answers say."""
