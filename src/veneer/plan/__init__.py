"""Memory, disk and time of a recipe, estimated before any weight is read."""
