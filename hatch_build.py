"""Build the C library into the wheel if there is a compiler, and put its sources there in any case.

Without a compiler the wheel is pure Python: veneer then builds the library on the user's machine, or does without.
"""

import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelsHook(BuildHookInterface):
    """`veneer/kernels/csrc/` and, if it can be built, `veneer/kernels/libveneer.so`."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel" or version == "editable":
            return
        csrc = Path(self.root) / "csrc"
        include = build_data["force_include"]
        for file in (*csrc.glob("*.h"), csrc / "veneer.cpp", csrc / "FLAGS"):
            include[str(file)] = f"veneer/kernels/csrc/{file.name}"
        self.folder = tempfile.mkdtemp()
        library = Path(self.folder) / "libveneer.so"
        if self.build(csrc, library):
            include[str(library)] = "veneer/kernels/libveneer.so"
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data.update(pure_python=False, tag=f"py3-none-{platform}")

    def build(self, csrc: Path, library: Path) -> bool:
        """Compile; False, and a word to the user, if that was not possible."""
        names = (os.environ.get("CXX"), "g++", "clang++", "c++")
        compiler = next((found for name in names if name and (found := shutil.which(name))), None)
        if compiler is None:
            self.app.display_warning("no C++ compiler: the wheel carries the kernels as sources only")
            return False
        flags = (csrc / "FLAGS").read_text(encoding="utf-8").split()
        command = [compiler, *flags, str(csrc / "veneer.cpp"), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            self.app.display_warning(f"the kernels were not built: {done.stderr.strip()[-500:]}")
        return done.returncode == 0

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        shutil.rmtree(getattr(self, "folder", ""), ignore_errors=True)
