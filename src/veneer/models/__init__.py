"""Where a model comes from, its skeleton, its parts, its attention."""
