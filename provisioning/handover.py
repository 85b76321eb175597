"""Handing a kit over: an encrypted archive, a passphrase that is shown once, and a sheet to read out by phone."""

from __future__ import annotations

import io
import json
import secrets
import shutil
import tarfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedimaging.errors import FedImagingError
from provisioning import kit as kit_file
from provisioning.federation import HANDOVER, Federation, discard, private_key, remove_private_key
from provisioning.kit import ARCHIVE, MANIFEST, hash_file, seal, spoken, write_private

SHEET = "sheet.txt"
_ALPHABET = "abcdefghjkmnpqrstuvwxyz23456789"
_GROUPS, _GROUP = 6, 5


def hand_over(federation: Federation, name: str) -> tuple[Path, str]:
    """Writes the encrypted archive, the sheet and the stand-alone opener; deletes the private key here.

    Returns:
        The folder with the three files, and the passphrase, which is kept nowhere.
    """
    with federation.locked():
        entry = federation.participant(name)
        if "handed_over" in entry:
            raise FedImagingError(
                f"{name}: was handed over on {entry['handed_over'][:10]}; its key is no longer here; if the archive "
                "or its passphrase is lost, add the participant anew under another name"
            )
        kit = federation.kit(name)
        if not (kit / MANIFEST).is_file():
            raise FedImagingError(f"{kit}: the kit is missing; restore it from a backup")
        manifest = json.loads((kit / MANIFEST).read_text())
        if not entry.get("own_key") and not private_key(federation, name).exists():
            raise FedImagingError(
                f"{name}: its private key is no longer here, as a handover was cut short; nobody has the passphrase of "
                "that archive: add the participant anew under another name"
            )
        passphrase = new_passphrase()
        folder = federation.folder / HANDOVER / name
        discard(folder)
        folder.mkdir(parents=True)
        archive = folder / f"{name}.kit"
        write_private(archive, seal(pack(kit, manifest["made"]), passphrase, ARCHIVE, participant=name))
        shutil.copyfile(kit_file.__file__, folder / "kit.py")
        (folder / SHEET).write_text(sheet(manifest, entry, archive, folder / "kit.py"))
        entry |= {"handed_over": datetime.now(UTC).isoformat(timespec="seconds"), "archive": hash_file(archive)}
        remove_private_key(federation, name)
        federation.save()
        return folder, passphrase


def new_passphrase() -> str:
    """148 random bits in groups of five, without characters that are mistaken for others over the phone."""
    return "-".join("".join(secrets.choice(_ALPHABET) for _ in range(_GROUP)) for _ in range(_GROUPS))


def pack(kit: Path, made: str) -> bytes:
    """A kit as gzipped tar: owners and times are no one's, scripts executable, the private key owner-only."""
    time = int(datetime.fromisoformat(made).timestamp())
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for path in sorted(kit.rglob("*")):
            info = tarfile.TarInfo(path.relative_to(kit).as_posix())
            info.mtime = time
            if path.is_dir():
                info.type, info.mode = tarfile.DIRTYPE, 0o755
                tar.addfile(info)
                continue
            info.size = path.stat().st_size
            info.mode = 0o755 if path.suffix == ".sh" else 0o600 if path.suffix == ".key" else 0o644
            with path.open("rb") as file:
                tar.addfile(info, file)
    return packed.getvalue()


def sheet(manifest: dict[str, object], entry: dict[str, Any], archive: Path, opener: Path) -> str:
    """The page that goes with the archive: what is read out over the phone, and the commands."""
    name, package = manifest["participant"], entry["package"]
    code = f"fedimaging {package['version']}\n  {spoken(package['sha256'])}" if package else "none"
    key = f" --key {name}.key" if entry.get("own_key") else ""
    return f"""Startup kit of {name}
{"=" * (15 + len(str(name)))}

Federation     {manifest["project"]}
Participant    {name} ({manifest["type"]}, organisation {manifest["org"]})
Kit made       {manifest["made"]}
Valid until    {entry["valid_until"][:10]}

Fingerprints (SHA-256). Ring the project admin up, on a number that you know from elsewhere, and have these read out to
you. Do not rely on this sheet: whoever can forge the kit can forge the sheet.

Root certificate
  {spoken(str(manifest["root"]))}
Code-signing key
  {spoken(str(manifest["code"]))}
Package in the kit: {code}
kit.py, which opens and verifies the kit
  {spoken(hash_file(opener))}
The archive {archive.name}
  {spoken(hash_file(archive))}

The passphrase of the archive comes by yet another way than the archive: by phone or in a sealed letter.

Open and verify. This needs Python 3.11 or newer with the package `cryptography`. `sha256sum kit.py` must say what is
above; kit.py is also in the project's public repository, in provisioning/.

  python kit.py open {archive.name} --to /srv/fedimaging{key}
  python kit.py verify /srv/fedimaging/{name} --name {name} \\
      --root 'ROOT FINGERPRINT FROM THE PHONE' \\
      --code 'CODE FINGERPRINT FROM THE PHONE' \\
      --pin /etc/fedimaging/pins.json

GUIDE.md in the kit goes on from here. Every start verifies again, and refuses a kit that was changed.
"""
