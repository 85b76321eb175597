"""The encrypted archive, its passphrase and its sheet."""

import io
import json
import os
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from fedimaging.errors import FedImagingError
from provisioning import kit as kit_file
from provisioning.cli import main
from provisioning.federation import Federation
from provisioning.handover import hand_over, new_passphrase, pack
from provisioning.kit import ARCHIVE, KitError, hash_file, open_archive, seal, spoken, unseal, verify
from provisioning.lifecycle import standings
from tests.provisioning.conftest import make_federation, pins, project_text, tree


def test_the_archive_opens_with_its_passphrase_to_the_kit_that_was_built(handed_over):
    for name in ("hospital-a", "localhost", "lead@example.org"):
        kit = handed_over.kits / name
        assert verify(kit, pins(handed_over, name)).findings == []
        here = handed_over.federation.kit(name)
        files = {path: digest.split()[1] for path, digest in tree(kit).items() if not path.endswith(".key")}
        assert files == {path: digest.split()[1] for path, digest in tree(here).items()}
    assert stat.S_IMODE((handed_over.kits / "hospital-a/startup/client.key").stat().st_mode) == 0o600
    assert stat.S_IMODE((handed_over.kits / "hospital-a/startup/start.sh").stat().st_mode) == 0o755
    assert stat.S_IMODE((handed_over.kits / "hospital-a").stat().st_mode) == 0o700


def test_after_the_handover_the_admin_has_the_private_key_no_more(handed_over):
    for path in handed_over.folder.rglob("*"):
        if path.is_file() and b"PRIVATE KEY-----\n" in path.read_bytes():
            assert path.relative_to(handed_over.folder).parts[1] not in handed_over.archives
    assert not (handed_over.folder / "kits/hospital-a/startup/client.key").exists()
    assert (handed_over.folder / "kits/hospital-c/startup/client.key").exists()


def test_a_passphrase_is_stored_nowhere_and_each_is_another(handed_over):
    for passphrase in handed_over.passphrases.values():
        for path in handed_over.folder.rglob("*"):
            assert not path.is_file() or passphrase.encode() not in path.read_bytes()
    assert len(set(handed_over.passphrases.values())) == len(handed_over.passphrases)
    assert len({new_passphrase() for _ in range(100)}) == 100


def test_nothing_of_the_kit_can_be_read_in_the_archive(handed_over):
    sealed = handed_over.archives["hospital-a"].read_bytes()
    assert b"PRIVATE KEY" not in sealed
    assert b"fed_client" not in sealed
    header = json.loads(sealed.split(b"\n")[0])
    assert header["participant"] == "hospital-a"
    assert (header["cipher"], header["kdf"]) == ("AES-256-GCM", "scrypt")


def test_a_wrong_passphrase_or_a_changed_archive_opens_nothing(handed_over, tmp_path):
    archive, passphrase = handed_over.archives["hospital-a"], handed_over.passphrases["hospital-a"]
    with pytest.raises(KitError, match="wrong passphrase"):
        open_archive(archive, handed_over.passphrases["hospital-b"], tmp_path)
    sealed = bytearray(archive.read_bytes())
    for position in (30, len(sealed) // 2, len(sealed) - 1):
        changed = bytearray(sealed)
        changed[position] ^= 1
        (tmp_path / "changed.kit").write_bytes(changed)
        with pytest.raises(KitError, match=r"changed on its way|not a file of the format"):
            open_archive(tmp_path / "changed.kit", passphrase, tmp_path)
    renamed = bytes(sealed).replace(b'"hospital-a"', b'"hospital-b"', 1)
    (tmp_path / "changed.kit").write_bytes(renamed)
    with pytest.raises(KitError, match="changed on its way"):
        open_archive(tmp_path / "changed.kit", passphrase, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["changed.kit"]


def test_an_archive_is_not_unpacked_over_another_kit(handed_over, tmp_path):
    (tmp_path / "hospital-a").mkdir()
    with pytest.raises(KitError, match="is there already"):
        open_archive(handed_over.archives["hospital-a"], handed_over.passphrases["hospital-a"], tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "/etc/outside",
        "a/../../outside",
        "link",
        "device",
        ".installed/local/grants.yml",
        "./.installing/x",
    ],
)
def test_a_hostile_archive_writes_nothing_outside_the_kit(tmp_path, name):
    info = tarfile.TarInfo(name)
    if name == "link":
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    if name == "device":
        info.type = tarfile.FIFOTYPE
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        tar.addfile(info, io.BytesIO(b""))
    archive = tmp_path / "x.kit"
    archive.write_bytes(seal(packed.getvalue(), "p", ARCHIVE, participant="x"))
    with pytest.raises(KitError, match="not a plain file inside the kit"):
        open_archive(archive, "p", tmp_path)
    assert not list(tmp_path.rglob("*outside*"))
    assert list(tmp_path.iterdir()) == [archive]


@pytest.mark.parametrize("participant", ["..", "../x", "/tmp/x", "a/b", ""])
def test_a_hostile_participant_name_is_no_folder(tmp_path, participant):
    archive = tmp_path / "x.kit"
    archive.write_bytes(seal(b"", "p", ARCHIVE, participant=participant))
    with pytest.raises(KitError, match=r"no folder name|is there already"):
        open_archive(archive, "p", tmp_path / "to")
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("n", [b"1099511627776", b"0", b"-2", b"1", b"12", b"1e999", b"[]"])
def test_a_header_cannot_ask_for_boundless_memory_or_what_scrypt_cannot(n):
    sealed = seal(b"x", "p", ARCHIVE).replace(b'"n": 16', b'"n": ' + n)
    with pytest.raises(KitError, match="not a file of the format"):
        unseal(sealed, "p", ARCHIVE, "x")


def test_a_nonce_of_another_length_is_told():
    sealed = seal(b"x", "p", ARCHIVE)
    with pytest.raises(KitError, match="not a file of the format"):
        unseal(sealed.replace(b'"nonce": "', b'"nonce": "ab'), "p", ARCHIVE, "x")


def twice_the_same():
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("a"), io.BytesIO(b""))
    return packed.getvalue()


@pytest.mark.parametrize(
    "plain", [b"", b"no tar", b"\x1f\x8b\x08\x00", b"\x1f\x8b" + b"\0" * 100, twice_the_same(), "cut short"]
)
def test_an_archive_that_is_no_kit_is_told_in_a_line_and_leaves_nothing(handed_over, tmp_path, plain, capsys):
    if plain == "cut short":
        whole = pack(handed_over.kits / "hospital-b", "2026-01-01T00:00:00+00:00")
        plain = whole[: len(whole) // 2]
    archive, passphrase = tmp_path / "x.kit", tmp_path / "passphrase"
    archive.write_bytes(seal(plain, "p", ARCHIVE, participant="x"))
    passphrase.touch(mode=0o600)
    passphrase.write_text("p")
    arguments = ["open", str(archive), "--to", str(tmp_path / "to"), "--passphrase-file", str(passphrase)]
    assert kit_file.main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"error: {archive}: holds no kit: ")
    assert list((tmp_path / "to").iterdir()) == []


def test_the_sheet_says_what_is_read_out(handed_over):
    folder = handed_over.archives["hospital-a"].parent
    text = (folder / "sheet.txt").read_text()
    assert spoken(handed_over.federation.record["root"]) in text
    assert spoken(handed_over.federation.record["code"]) in text
    assert spoken(hash_file(folder / "kit.py")) in text
    assert spoken(hash_file(folder / "hospital-a.kit")) in text
    assert text.count("\n") <= 60
    assert (folder / "kit.py").read_bytes() == Path(kit_file.__file__).read_bytes()


def test_the_sheet_s_commands_work_with_the_folder_s_own_kit_py(handed_over, tmp_path):
    folder, record = handed_over.archives["hospital-a"].parent, handed_over.federation.record
    environment = {"PATH": os.environ["PATH"], "KIT_PASSPHRASE": handed_over.passphrases["hospital-a"]}

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-I", "kit.py", *map(str, arguments)],
            cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    done = run("open", "hospital-a.kit", "--to", tmp_path)
    assert done.returncode == 0, done.stderr
    assert environment["KIT_PASSPHRASE"] not in done.stdout + done.stderr
    known = ["--name", "hospital-a", "--root", spoken(record["root"]), "--code", spoken(record["code"])]
    done = run("verify", tmp_path / "hospital-a", *known, "--pin", tmp_path / "pins.json")
    assert done.returncode == 0, done.stderr


def test_the_command_shows_the_passphrase_once(tmp_path, capsys):
    made = make_federation(tmp_path, project_text())
    arguments = ["handover", "hospital-a", "--project", str(made.path), "--folder", str(made.folder)]
    assert main(arguments) == 0
    said = capsys.readouterr()
    passphrase = said.out.strip()
    assert passphrase.count("-") == 5
    assert passphrase not in said.err
    folder = open_archive(made.folder / "handover/hospital-a/hospital-a.kit", passphrase, tmp_path)
    assert verify(folder, pins(made, "hospital-a")).findings == []
    assert main(arguments) == 2
    assert "was handed over on" in capsys.readouterr().err
    assert main([*arguments[:1], "hospital-x", *arguments[2:]]) == 2
    assert "no kit of 'hospital-x' was built" in capsys.readouterr().err


def test_a_kit_that_is_gone_is_told(tmp_path):
    made = make_federation(tmp_path, project_text())
    (made.folder / "kits/hospital-a/kit_manifest.json").unlink()
    with pytest.raises(FedImagingError, match="the kit is missing"):
        hand_over(made.federation, "hospital-a")


def test_a_handover_that_is_cut_short_does_not_leave_a_key_that_is_said_to_be_gone(tmp_path, monkeypatch):
    made = make_federation(tmp_path, project_text())
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Federation, "save", lambda self: sys.exit("power cut"))
        hand_over(made.federation, "hospital-a")
    federation = Federation(made.folder)
    assert not (made.folder / "kits/hospital-a/startup/client.key").exists()
    keys = {one.name: one.key for one in standings(federation)}
    assert (keys["hospital-a"], keys["hospital-b"]) == ("participant", "here, until handover")
    with pytest.raises(FedImagingError, match="a handover was cut short"):
        hand_over(federation, "hospital-a")


def test_the_status_looks_at_the_key_s_file_and_not_at_the_record(tmp_path):
    made = make_federation(tmp_path, project_text())
    key = made.folder / "kits/hospital-a/startup/client.key"
    pem = key.read_bytes()
    hand_over(made.federation, "hospital-a")
    key.write_bytes(pem)  # as a backup of the folder brings it back
    assert {one.name: one.key for one in standings(made.federation)}["hospital-a"] == "here, until handover"


def test_a_packed_kit_says_nothing_of_the_machine_that_packed_it(handed_over):
    packed = pack(handed_over.kits / "hospital-b", "2026-01-01T00:00:00+00:00")
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        members = tar.getmembers()
    assert {(info.uid, info.gid, info.uname, info.mtime) for info in members} == {(0, 0, "", 1767225600)}
