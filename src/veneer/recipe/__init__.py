"""A training job as typed settings: YAML, flags, other tools' names, validation."""
