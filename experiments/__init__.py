"""Programs that make the tables kept in this folder, from the repository's root."""
