#!/usr/bin/env python3
"""Lets a new virtual environment see the packages of the Python that runs this, when that is a virtual environment too.

`python -m venv --system-site-packages` shows the packages of the Python at the bottom, not those of the environment it
was called from, and that is where a machine's torch often is. Usage: inherit_packages.py <the new environment's python>
"""

import subprocess
import sys
import sysconfig
from pathlib import Path


def main(new_python: str) -> None:
    if sys.prefix == sys.base_prefix:
        return
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([new_python, "-c", ask], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    folders = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    (Path(site) / "inherited_packages.pth").write_text("".join(f"{folder}\n" for folder in folders))


if __name__ == "__main__":
    main(sys.argv[1])
