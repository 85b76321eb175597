"""The lock files: every package that fedimaging runs on, with the SHA-256 of the one file that may be installed.

pip chooses the versions, for the machine that runs ``python -m provisioning lock``: Python 3.11 on Linux x86_64.
What is locked already stays as it is unless ``requirements.txt`` asks for something else.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fedimaging
from fedimaging.errors import FedImagingError
from fedimaging.version import package_hash

REQUIREMENTS = Path(__file__).parents[1] / "requirements.txt"
BUILD_LOCK = Path(__file__).with_name("requirements-build.lock")
"""what builds the packages that are no wheels; a lock file of its own, because it is installed first"""
BUILD_REQUIREMENTS = ("setuptools",)

_PIN = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)", re.MULTILINE)
_STATED = "as stated in the package's own licence text"


@dataclass(frozen=True)
class Lock:
    """One lock file and its bill of materials.

    Args:
        name: of the file.
        torch: the local version of PyTorch's build, "" for the one that needs a GPU's libraries.
        covers: in words.
    """

    name: str
    torch: str
    covers: str

    @property
    def path(self) -> Path:
        return Path(__file__).with_name(f"{self.name}.lock")

    @property
    def sbom_path(self) -> Path:
        return Path(__file__).with_name(f"{self.name}.cdx.json")


CPU = Lock("requirements", "+cpu", "with PyTorch's build for CPUs")
GPU = Lock("requirements-gpu", "", "with PyTorch's build for NVIDIA GPUs")
LOCKS = (CPU, GPU)


def write_locks(upgrade: bool) -> None:
    """Writes all lock files and bills of materials anew.

    Args:
        upgrade: takes the newest version of what ``requirements.txt`` does not pin.

    Raises:
        FedImagingError: if this is another platform than the one that is locked, or pip finds no solution.
    """
    if sys.version_info[:2] != (3, 11) or sys.platform != "linux":
        raise FedImagingError("the lock files are for Python 3.11 on Linux; run this there")
    for lock in LOCKS:
        packages = _resolve(lock, upgrade)
        lock.path.write_text(lock_text(f"What fedimaging runs on, {lock.covers}", packages))
        lock.sbom_path.write_text(json.dumps(bill_of_materials(packages), indent=1, sort_keys=True) + "\n")
        builders = {name: packages[name] for name in BUILD_REQUIREMENTS}
        BUILD_LOCK.write_text(lock_text("What builds those packages that are no wheels", builders))


def locked(lock: Lock) -> dict[str, str]:
    """The versions in a lock file, by canonical name."""
    return {canonicalize_name(name): version for name, version in _PIN.findall(lock.path.read_text())}


def _resolve(lock: Lock, upgrade: bool) -> dict[str, dict[str, Any]]:
    """What pip would install: ``{canonical name: {"metadata", "sha256"}}``. Nothing is installed."""
    with tempfile.TemporaryDirectory() as folder:
        wanted, pins, report = (Path(folder) / name for name in ("requirements.txt", "pins.txt", "report.json"))
        text = REQUIREMENTS.read_text()
        # An exact match (===) tells the builds of one version of PyTorch apart.
        wanted.write_text(re.sub(r"^torch==(\S+)", rf"torch===\g<1>{lock.torch}", text, flags=re.MULTILINE))
        direct = {canonicalize_name(name) for name, _ in _PIN.findall(text)}
        old = locked(lock) if lock.path.exists() and not upgrade else {}
        pins.write_text("".join(f"{name}=={version}\n" for name, version in old.items() if name not in direct))
        done = subprocess.run(  # noqa: S603 (this Python, no shell)
            [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet",
             "--report", str(report), "--requirement", str(wanted), "--constraint", str(pins)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            why = next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), "pip failed")
            raise FedImagingError(f"{lock.path.name}: {why}")
        return {
            canonicalize_name(item["metadata"]["name"]): {
                "metadata": item["metadata"],
                "sha256": item["download_info"]["archive_info"]["hashes"]["sha256"],
            }
            for item in json.loads(report.read_text())["install"]
        }


def lock_text(title: str, packages: Mapping[str, Mapping[str, Any]]) -> str:
    """A requirements file with one hash for each package: that of the file for this platform."""
    head = (
        f"# {title}, for Python 3.11 on Linux x86_64.\n"
        "# Written by `python -m provisioning lock`; do not edit. GUIDE.md says how it is installed.\n"
    )
    return head + "".join(
        f"{name}=={packages[name]['metadata']['version']} \\\n    --hash=sha256:{packages[name]['sha256']}\n"
        for name in sorted(packages)
    )


def bill_of_materials(packages: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A CycloneDX 1.6 bill of materials: versions, hashes, licences and who needs whom."""
    references = {name: _reference(name, packages[name]["metadata"]["version"]) for name in sorted(packages)}
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "components": [
            {
                "type": "library",
                "bom-ref": reference,
                "name": name,
                "version": packages[name]["metadata"]["version"],
                "purl": reference,
                "hashes": [{"alg": "SHA-256", "content": packages[name]["sha256"]}],
                "licenses": [_licence(packages[name]["metadata"])],
            }
            for name, reference in references.items()
        ],
        "dependencies": [
            {"ref": reference, "dependsOn": [references[need] for need in _needs(packages[name]["metadata"], packages)]}
            for name, reference in references.items()
        ],
    }


def _reference(name: str, version: str) -> str:
    """A package URL, https://github.com/package-url/purl-spec: the + of a local version is escaped."""
    return f"pkg:pypi/{name}@{version.replace('+', '%2B')}"


def _licence(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The SPDX expression of a package, or else what it calls its licence, or else its classifier."""
    if expression := metadata.get("license_expression"):
        return {"expression": expression}
    named = (metadata.get("license") or "").strip()
    if named and "\n" not in named and len(named) <= 64:
        return {"license": {"name": named}}
    classifiers = [text.split(" :: ")[-1] for text in metadata.get("classifier", ()) if text.startswith("License ::")]
    return {"license": {"name": classifiers[0] if classifiers else _STATED}}


def _needs(metadata: Mapping[str, Any], packages: Mapping[str, Any]) -> list[str]:
    environment: dict[str, Any] = {**default_environment(), "extra": ""}
    requirements = [Requirement(text) for text in metadata.get("requires_dist", ())]
    wanted = {
        canonicalize_name(requirement.name)
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate(environment)
    }
    return sorted(wanted & set(packages))


def sbom(lock: Lock) -> bytes:
    """A committed bill of materials with the package that it is of, at this version and hash."""
    bill = json.loads(lock.sbom_path.read_text())
    bill["metadata"] = {
        "component": {
            "type": "application",
            "bom-ref": "fedimaging",
            "name": "fedimaging",
            "version": fedimaging.__version__,
            "licenses": [{"license": {"id": "Apache-2.0"}}],
            "properties": [{"name": "fedimaging:sources:sha256", "value": package_hash()}],
        }
    }
    direct = {canonicalize_name(name) for name, _ in _PIN.findall(REQUIREMENTS.read_text())}
    needs = [component["bom-ref"] for component in bill["components"] if component["name"] in direct]
    bill["dependencies"].append({"ref": "fedimaging", "dependsOn": needs})
    return json.dumps(bill, indent=1).encode() + b"\n"
