"""Build step that pyproject.toml cannot express: copy the shipped files into the wheel.

A clone has ``ds_configs`` and ``examples`` at its root. The wheel has them in ``trainer/shipped``,
so that site-packages gets no folder ``examples``. ``trainer.config.SHIPPED`` is their parent.
"""

from __future__ import annotations

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

#: Everything a user runs. The generators of rows and of the tiny base stay in the repository.
PATTERNS = (
    "ds_configs/*.json",
    "examples/*.yaml",
    "examples/*.schema.json",
    "examples/data/*",
    "examples/pharmacy/*.*",
    "examples/tiny_base/*",
)


class BuildWithShippedFiles(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:  # an editable installation uses the clone's files
            return
        for pattern in PATTERNS:
            for file in sorted(Path().glob(pattern)):
                target = Path(self.build_lib, "trainer", "shipped", file)
                self.mkpath(str(target.parent))
                self.copy_file(str(file), str(target))


setup(cmdclass={"build_py": BuildWithShippedFiles})
