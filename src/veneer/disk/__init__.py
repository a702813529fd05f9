"""Bytes to plain data and back: tensors, model, adapter and run folders, atomic writes."""
