"""Fetches the third-party code that the web frontend ships, from the npm registry that npm is
configured for.

`web/vendor/` is committed, so that users need neither npm nor a network. Run this to move on to
another version: change the version and the digest below, run it, commit the outcome. The same
versions give the same files.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

VENDOR = Path(__file__).resolve().parent.parent / "web" / "vendor"


@dataclass(frozen=True)
class Package:
    """One package of the registry.

    Attributes:
        integrity: SHA-512 of its archive, as npm writes it.
        license: as its package.json must name it.
        files: what is shipped, by the name in the archive.
    """

    name: str
    version: str
    integrity: str
    license: str
    files: dict[str, str]


PACKAGES = [
    Package(
        name="uplot",
        version="1.6.32",
        integrity="sha512-KIMVnG68zvu5XXUbC4LQEPnhwOxBuLyW1AHtpm6IKTXImkbLgkMy+jabjLgSLMasNuGGzQm/ep3tOkyTxpiQIw==",
        license="MIT",
        files={
            "package/dist/uPlot.esm.js": "uPlot.esm.js",
            "package/dist/uPlot.min.css": "uPlot.min.css",
            "package/dist/uPlot.d.ts": "uPlot.esm.d.ts",
            "package/LICENSE": "LICENSE",
        },
    ),
]


def main() -> None:
    """Writes every package below `web/vendor/`, each in a folder of its own with its license and
    where it came from."""
    npm = shutil.which("npm")
    if npm is None:
        sys.exit("vendor_web: npm is needed (Debian, Ubuntu: apt install npm)")
    for package in PACKAGES:
        with tempfile.TemporaryDirectory() as folder:
            command = [
                npm,
                "pack",
                f"{package.name}@{package.version}",
                "--pack-destination",
                folder,
                "--silent",
            ]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            (archive,) = Path(folder).glob("*.tgz")
            unpack(package, archive, VENDOR / package.name)
        print(f"vendor_web: {package.name} {package.version}, {package.license}")


def unpack(package: Package, archive: Path, folder: Path) -> None:
    """Takes the named files out of a package's archive, after its digest and its license were
    compared."""
    digest = "sha512-" + base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if digest != package.integrity:
        sys.exit(
            f"vendor_web: {package.name} {package.version} is not what it was: {digest}, not {package.integrity}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        declared = json.loads(_read(tar, "package/package.json"))
        if declared["license"] != package.license:
            sys.exit(
                f"vendor_web: {package.name} is now under {declared['license']}, not {package.license}"
            )
        content = {target: _read(tar, source) for source, target in package.files.items()}
    for name, data in content.items():
        (folder / name).write_bytes(data)
    origin = {
        "name": package.name,
        "version": package.version,
        "license": package.license,
        "homepage": declared.get("homepage"),
        "integrity": package.integrity,
        "sha256": {
            name: hashlib.sha256(data).hexdigest() for name, data in sorted(content.items())
        },
    }
    (folder / "origin.json").write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")


def _read(tar: tarfile.TarFile, name: str) -> bytes:
    member = tar.extractfile(name)
    if member is None:
        sys.exit(f"vendor_web: {name} is no file in the archive")
    return member.read()


if __name__ == "__main__":
    main()
