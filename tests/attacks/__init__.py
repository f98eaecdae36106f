"""Hostile files, made by code: see README.md."""
