"""A run: what it begins with, how a stage is built and trained, what is kept of it, and its stages in order."""
