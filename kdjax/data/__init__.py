"""Data: sources by name, transforms and batches; NumPy in, padded NumPy batches out."""
