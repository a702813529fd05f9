"""The machine this process runs on."""


def prepare_process() -> None:
    """Set up OpenMP for a process of veneer's own, before torch starts."""
