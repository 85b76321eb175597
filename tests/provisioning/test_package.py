"""Another version of the package: issued, installed into a kit, rolled back; whatever goes wrong, the kit is whole."""

import json
import os
import shutil
import sys
import tarfile
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

import fedimaging
from provisioning import kit as kit_file
from provisioning import package as site_package
from provisioning.cli import main
from provisioning.keys import Keys
from provisioning.kit import KitError, Pins, install, pack_files, rollback, verify
from provisioning.package import contents, manifest, signature_files, write_package
from tests.provisioning.conftest import PASSPHRASE, pins, project_text, tree

CODE = "local/custom/fedimaging"
STRANGER = ec.generate_private_key(ec.SECP256R1())


@pytest.fixture(scope="module")
def code_key(handed_over):
    return Keys.read(handed_over.folder, PASSPHRASE).code_key


@pytest.fixture(scope="module")
def newer(tmp_path_factory, code_key):
    """Version 0.2.0: a file more, a file less, a file changed, and another default policy."""
    folder = tmp_path_factory.mktemp("newer")
    shutil.copytree(site_package.PACKAGE, folder / "fedimaging", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "fedimaging/new").mkdir()
    (folder / "fedimaging/new/thing.py").write_text('"""New."""\n')
    shutil.rmtree(folder / "fedimaging/report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(site_package, "PACKAGE", folder / "fedimaging")
        patch.setattr(fedimaging, "__version__", "0.2.0")
        patch.setattr(site_package.policy, "_LOG_FILES", 3)
        write_package(folder / "new.package", code_key)
    return folder / "new.package"


@pytest.fixture
def kit(handed_over, tmp_path):
    """A hospital's kit with files of its own."""
    kit = shutil.copytree(handed_over.kits / "hospital-a", tmp_path / "hospital-a")
    (kit / "local/datasets.yml").write_text("chest_xray: {path: /srv/xray}\n")
    (kit / "local/resources.json").write_text("{}")
    (kit / "local/privacy.json").write_text("{}")
    (kit / "log.txt").write_text("what happened\n")
    return kit


@pytest.fixture
def issued(tmp_path, code_key, monkeypatch):
    """Issues a package under a version."""

    def issue(version):
        archive = tmp_path / f"{version}.package"
        monkeypatch.setattr(fedimaging, "__version__", version)
        if not archive.exists():
            write_package(archive, code_key)
        return archive

    return issue


@pytest.fixture
def newer_into(kit, newer):
    return kit, newer


@pytest.fixture
def trusted(handed_over):
    return pins(handed_over, "hospital-a")


def version(kit):
    return json.loads((kit / "package_manifest.json").read_text())["version"]


def outside_the_package(kit):
    packaged = json.loads((kit / "package_manifest.json").read_text())["files"]
    own = {*packaged, "local/resources.json.default", "package_manifest.json", "package_manifest.sig"}
    return {name: digest for name, digest in tree(kit).items() if name not in {*own, "previous.package"}}


def test_a_package_is_installed_and_rolled_back_and_all_else_stays(kit, newer, trusted):
    before, others = tree(kit), outside_the_package(kit)
    assert install(kit, newer, trusted)["version"] == "0.2.0"
    report = verify(kit, trusted)
    assert report.findings == []
    assert report.package["version"] == version(kit) == "0.2.0"
    assert (kit / CODE / "new/thing.py").is_file()
    assert not (kit / CODE / "report").exists()
    assert 'backupCount": 3' in (kit / "local/log_config.json.default").read_text()
    assert outside_the_package(kit) == others
    assert rollback(kit, trusted)["version"] == fedimaging.__version__
    after = tree(kit)
    assert after.pop("previous.package")
    assert after == before
    assert rollback(kit, trusted)["version"] == "0.2.0"
    assert verify(kit, trusted).findings == []


def test_the_server_s_kit_takes_the_same_package_and_keeps_its_storage(handed_over, newer, tmp_path):
    kit = shutil.copytree(handed_over.kits / "localhost", tmp_path / "localhost")
    before = (kit / "local/resources.json.default").read_bytes()
    install(kit, newer, pins(handed_over, "localhost"))
    assert verify(kit, pins(handed_over, "localhost")).findings == []
    assert (kit / "local/resources.json.default").read_bytes() == before
    assert b'"uri_root": "/var/lib/fedimaging/jobs"' in before


def interrupted(monkeypatch, owner, name, after):
    """The power is cut at a call of a function."""
    calls, real = [], getattr(owner, name)

    def cut(*arguments, **named):
        calls.append(1)
        if len(calls) > after:
            raise SystemExit("power cut")
        return real(*arguments, **named)

    monkeypatch.setattr(owner, name, cut)


@pytest.mark.parametrize("after", [0, 1, 60])
def test_an_installation_that_is_cut_short_while_it_writes_leaves_the_old_version(
    kit, newer, trusted, monkeypatch, after
):
    interrupted(monkeypatch, kit_file, "_write_whole", after)
    with pytest.raises(SystemExit):
        install(kit, newer, trusted)
    monkeypatch.undo()
    assert verify(kit, trusted).findings == []
    assert version(kit) == fedimaging.__version__
    assert install(kit, newer, trusted)["version"] == "0.2.0"
    assert verify(kit, trusted).findings == []


@pytest.mark.parametrize(("name", "after"), [("replace", 0), ("replace", 50), ("unlink", 2)])
def test_an_installation_that_is_cut_short_while_it_moves_is_ended_at_the_next_start(
    newer_into, trusted, monkeypatch, name, after
):
    kit, newer = newer_into
    interrupted(monkeypatch, Path, name, after)
    with pytest.raises(SystemExit):
        install(kit, newer, trusted)
    monkeypatch.undo()
    assert ("interrupted", ".installed") in {(finding.kind, finding.where) for finding in verify(kit, trusted).findings}
    trusted.write(kit.parent / "pins.json")
    before = os.umask(0o077)  # as the service has it
    try:
        assert kit_file.main(["finish", str(kit), "--pins", str(kit.parent / "pins.json")]) == 0
    finally:
        os.umask(before)
    assert (kit / CODE / "new").stat().st_mode & 0o777 == 0o755
    assert verify(kit, trusted).findings == []
    assert version(kit) == "0.2.0"
    assert rollback(kit, trusted)["version"] == fedimaging.__version__


@pytest.fixture
def begun(kit, newer, trusted, tmp_path, monkeypatch):
    """A kit into which a genuine installation was cut short, and its pins in a file."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupted(patch, Path, "replace", 3)
        install(kit, newer, trusted)
    trusted.write(tmp_path / "pins.json")
    return kit


def staged(kit, files):
    """What an attacker who can write the kit, or the archive on its way, would have the next start move."""
    for name, content in files.items():
        path = kit / ".installed" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@pytest.mark.parametrize("command", ["finish", "start", "install", "rollback"])
@pytest.mark.parametrize(
    "files",
    [
        {"new/local/grants.yml": b"grants: [everything]", "removed.json": b'["../victim.txt"]'},
        {"local/grants.yml": b"grants: [everything]"},
        {"startup/start.sh": b"rm -rf /"},
        {f"{CODE}/cli.py": b"import os"},
        {"kit_manifest.json": b"{}"},
        {"local/resources.json.default": b"{}"},
        {"package_manifest.json": b'{"files": {"local/grants.yml": ""}}'},
    ],
)
def test_what_is_staged_is_not_believed(begun, tmp_path, files, command, capsys):
    """Not even if a genuine installation was cut short: nothing is moved or deleted, in the kit or outside."""
    (tmp_path / "victim.txt").write_text("of another")
    staged(begun, files)
    before = tree(tmp_path)
    more = ["new.package"] if command == "install" else []
    assert kit_file.main([command, str(begun), *more, "--pins", str(tmp_path / "pins.json")]) == 2
    assert "refused: an installation was begun, but" in capsys.readouterr().err
    assert tree(tmp_path) == before


def test_an_installation_is_not_moved_through_a_link_out_of_the_kit(begun, trusted, tmp_path):
    shutil.move(begun / "local/custom", tmp_path / "elsewhere")
    (begun / "local/custom").symlink_to(tmp_path / "elsewhere")
    before = tree(tmp_path)
    with pytest.raises(KitError, match=r"local/custom: a symbolic link"):
        kit_file.finish_installation(begun, trusted)
    assert tree(tmp_path) == before


def test_a_package_that_is_staged_but_signed_by_another_is_not_installed(kit, trusted):
    files = contents()
    staged(kit, files | signature_files(manifest(files), STRANGER))
    before = tree(kit)
    with pytest.raises(KitError, match="signed by another key than the pinned one"):
        kit_file.finish_installation(kit, trusted)
    assert tree(kit) == before


def repacked(archive, folder, change):
    """A copy of a package with its files changed, signed as it was."""
    with tarfile.open(archive) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}
    change(files)
    (folder / "changed.package").write_bytes(pack_files(files))
    return folder / "changed.package"


def set_file(name, content):
    return lambda files: files.__setitem__(name, content)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_file(f"{CODE}/cli.py", b"import os\n"), "cli.py was changed"),
        (set_file(f"{CODE}/more.py", b""), "more.py is not signed"),
        (lambda files: files.pop(f"{CODE}/cli.py"), "cli.py is missing"),
        (set_file("startup/start.sh", b"true\n"), "start.sh is not signed"),
        (set_file("package_manifest.json", b"{}"), "signature does not fit"),
        (lambda files: files.pop("package_manifest.sig"), "is not signed"),
        (lambda files: files.update(signature_files(manifest({}), STRANGER)), "another key"),
    ],
)  # fmt: skip
def test_a_changed_package_is_refused_and_changes_nothing(newer_into, trusted, tmp_path, change, words):
    kit, newer = newer_into
    before = tree(kit)
    with pytest.raises(KitError, match=words):
        install(kit, repacked(newer, tmp_path, change), trusted)
    assert tree(kit) == before


@pytest.mark.parametrize("name", ["startup/start.sh", "local/privacy.json", "local/resources.json", "../x", "x.py"])
def test_even_a_signed_package_touches_nothing_but_a_package_s_files(kit, trusted, code_key, tmp_path, name):
    files = contents() | {name: b"evil"}
    archive = tmp_path / "evil.package"
    archive.write_bytes(pack_files(files | signature_files(manifest(files), code_key)))
    before = tree(kit)
    with pytest.raises(KitError, match="no file of a package"):
        install(kit, archive, trusted)
    assert tree(kit) == before


def test_a_version_that_the_site_does_not_accept_is_refused(kit, newer, trusted):
    only_old = Pins(trusted.participant, trusted.root, trusted.code, (fedimaging.__version__,))
    with pytest.raises(KitError, match=r"fedimaging 0\.2\.0; accepted are"):
        install(kit, newer, only_old)
    both = Pins(trusted.participant, trusted.root, trusted.code, (fedimaging.__version__, "0.2.0"))
    assert install(kit, newer, both)["version"] == "0.2.0"


@pytest.mark.parametrize(
    "case", [("0.2.0", "0.1.9", True), ("0.10.0", "0.9.0", True), ("0.9.0", "0.10.0", False), ("0.2.0", "0.2", False)]
)
def test_an_older_package_is_installed_only_if_that_is_asked_for(kit, trusted, issued, case):
    old, new, refused = case
    install(kit, issued(old), trusted)
    if refused:
        before = tree(kit)
        with pytest.raises(KitError, match=f"{new} is older than {old}, which is installed; `rollback` goes back"):
            install(kit, issued(new), trusted)
        assert tree(kit) == before
    assert install(kit, issued(new), trusted, downgrade=refused)["version"] == new
    assert rollback(kit, trusted)["version"] == old


@pytest.mark.parametrize("content", [b"", b"not a package", b"\x1f\x8b\x08\x00", b"\x1f\x8b" + b"\0" * 100])
def test_a_file_that_is_no_package_is_told(kit, trusted, tmp_path, content):
    (tmp_path / "x.package").write_bytes(content)
    with pytest.raises(KitError, match=r"can't read the package|not signed"):
        install(kit, tmp_path / "x.package", trusted)


def test_a_kit_that_does_not_verify_or_has_it_already_is_left_alone(kit, newer, trusted, tmp_path, code_key):
    with pytest.raises(KitError, match="no other package was installed before"):
        rollback(kit, trusted)
    install(kit, newer, trusted)
    with pytest.raises(KitError, match="is installed already"):
        install(kit, newer, trusted)
    (kit / CODE / "cli.py").write_text("")
    with pytest.raises(KitError, match="does not verify"):
        rollback(kit, trusted)


def test_a_kit_that_runs_is_not_changed(kit, newer, trusted, monkeypatch):
    monkeypatch.setattr(
        kit_file, "_command_line", lambda number: [str(kit / "startup/sub_start.sh")] * (number == os.getpid())
    )
    before = tree(kit)
    with pytest.raises(KitError, match=rf"runs \(process {os.getpid()}\); stop it first"):
        install(kit, newer, trusted)
    assert tree(kit) == before


def test_the_commands(handed_over, kit, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PROVISIONING_PASSPHRASE", PASSPHRASE)
    out, pinned = tmp_path / "new.package", tmp_path / "pins.json"
    pins(handed_over, "hospital-a").write(pinned)
    (tmp_path / "project.yml").write_text(project_text())
    known = ["--project", str(tmp_path / "project.yml"), "--folder", str(handed_over.folder)]
    monkeypatch.setattr(fedimaging, "__version__", "0.1.1")
    assert main(["package", "--out", str(out), *known]) == 0
    assert main(["package", "--out", str(out), *known]) == 2
    assert "not written over another" in capsys.readouterr().err
    assert main(["install", str(kit), str(out), "--pins", str(pinned)]) == 0
    assert "installed: fedimaging 0.1.1" in capsys.readouterr().out
    assert main(["rollback", str(kit), "--pins", str(pinned)]) == 0
    assert kit_file.main(["status", str(kit), "--pins", str(pinned)]) == 1
    said = capsys.readouterr().out
    assert "runs         no" in said
    assert f"fedimaging {sys.modules['fedimaging.version'].__version__}, " in said


def test_a_package_s_bytes_do_not_tell_who_made_it_when(newer, tmp_path):
    with tarfile.open(newer) as tar:
        members = tar.getmembers()
    assert {(info.uid, info.uname, info.mtime, info.mode) for info in members} == {(0, "", 0, 0o644)}
    assert newer.read_bytes()[4:8] == b"\0\0\0\0"
