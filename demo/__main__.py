"""`python -m demo`: write the demo's data again, into the package."""

from pathlib import Path

from demo.files import write_demo_data

if __name__ == "__main__":
    write_demo_data(Path(__file__).parents[1] / "src" / "veneer" / "cli" / "demo_data")
