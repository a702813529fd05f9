"""What loading says, with or without the C library."""


class Told(list[str]):
    """What is told, but for the line that a run without the C library begins with."""

    def append(self, line: str) -> None:
        if not line.startswith("plain torch computes"):
            super().append(line)
