"""`check` names each mistake by its line."""

import re

import pytest

from fedimaging.errors import FedImagingError
from provisioning.cli import main
from provisioning.project import PROJECT_FILE, ProjectFile, check

TEXT = PROJECT_FILE.read_text()


def problems(tmp_path, text, built=None):
    path = tmp_path / "project.yml"
    path.write_text(text)
    return check(ProjectFile(path), built, resolve=False)


def line_of(text, words):
    return next(number for number, line in enumerate(text.splitlines(), 1) if words in line)


def test_the_example_is_right_and_complete(tmp_path):
    assert problems(tmp_path, TEXT) == []
    file = ProjectFile(PROJECT_FILE)
    roles = [entry.get("role") for entry in file.participants()]
    assert roles.count("org_admin") == 3
    assert {"project_admin", "lead"} <= set(roles)
    hospitals = [entry["org"] for entry in file.participants() if entry["type"] == "client"]
    assert len(set(hospitals)) == 3


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("name: fl.example.org", "name: fl_example.org", "no host name"),
        ("name: fl.example.org", "name: -fl.example.org", "no host name"),
        ("- name: fl.example.org\n    type", "- type", "needs a name"),
        ("name: fl.example.org", f"name: {'a' * 60}.example.org", "up to 63 characters"),
        ("fed_learn_port: 443 ", "fed_learn_port: 70000 ", "1 to 65535"),
        ("fed_learn_port: 443 ", "fed_learn_port: https ", "1 to 65535"),
        ("fed_learn_port: 443 ", "fed_learn_port: 443\n    admin_port: 443 ", "in use twice"),
        ("storage: /var/lib/fedimaging", "storage: jobs", "absolute folder"),
        ("name: hospital-b", "name: hospital-a", "stands again"),
        ("name: hospital-b", "name: Hospital-A", "differs in capitals only"),
        ("name: hospital-b", "name: hospital b", "letters, digits"),
        ("name: hospital-b", "name: server", "means something else"),
        ("org: hospital_b", "org: hospital-b", "letters, digits and _"),
        ("org: hospital_b", "org: Hospital_A", "are the same to FLARE"),
        ("name: lead@example.org", "name: lead", "e-mail address"),
        ("role: lead", "role: leader", "unknown role 'leader'"),
        ("role: lead", "rolle: lead", "unknown key rolle"),
        ("num_of_gpus: 0", "num_of_gpus: two", "capacity must be"),
        ("type: client\n    org: hospital_b", "type: hospital\n    org: hospital_b", "unknown type 'hospital'"),
        ("org: hospital_b\n  - name: hospital-c", "org: x\n    org: hospital_b\n  - name: hospital-c", "second time"),
        ("root_valid_days: 3650", "root_valid_days: ten", "number of days"),
        ("api_version: 3", "api_version: 2", "api_version must be 3"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_by_its_line(tmp_path, old, new, words):
    text = TEXT.replace(old, new, 1)
    assert text != TEXT
    found = [problem for problem in problems(tmp_path, text) if re.search(words, problem.text)]
    assert found
    changed = [n for n, (a, b) in enumerate(zip(TEXT.splitlines(), text.splitlines(), strict=False), 1) if a != b]
    assert found[0].line in (changed[0], changed[0] + 1)


def test_an_organisation_without_its_org_admin_is_told_where_the_hospital_stands(tmp_path):
    text = TEXT.replace("org: hospital_b\n    role: org_admin", "org: hospital_b\n    role: member")
    (problem,) = problems(tmp_path, text)
    assert "hospital_b has no org_admin" in problem.text
    assert problem.line == line_of(text, "name: hospital-b") + 2


def test_two_servers_or_none_are_told(tmp_path):
    two = TEXT.replace("type: client\n    org: hospital_b", "type: server\n    storage: /srv/x\n    org: hospital_b")
    assert any("one server, not 2" in problem.text for problem in problems(tmp_path, two))


def test_a_missing_or_reordered_builder_is_told(tmp_path):
    path = "  - path: provisioning.builders.SiteBuilder               # the package, the policies and the guide\n"
    text = TEXT.replace(path, "")
    assert any("SiteBuilder is missing" in problem.text for problem in problems(tmp_path, text))
    text = text.replace("builders:\n", "builders:\n" + path)
    assert any("order must be" in problem.text for problem in problems(tmp_path, text))


def test_names_that_changed_since_the_last_build_are_told(tmp_path):
    built = {entry["name"]: entry for entry in ProjectFile(PROJECT_FILE).participants()}
    text = TEXT.replace("name: hospital-b", "name: hospital-berlin").replace("role: lead", "role: member")
    found = [problem for problem in problems(tmp_path, text, built) if not problem.warning]
    renamed, role = found
    assert "hospital-b is gone since the last build" in renamed.text
    assert "renamed to hospital-berlin?" in renamed.text
    assert renamed.line == line_of(text, "hospital-berlin")
    assert "role of lead@example.org was 'lead'" in role.text
    assert role.line == line_of(text, "name: lead@example.org") + 3


def test_a_server_that_does_not_resolve_is_a_warning(tmp_path):
    path = tmp_path / "project.yml"
    path.write_text(TEXT.replace("fl.example.org", "no-such-host.invalid"))
    (problem,) = check(ProjectFile(path))
    assert problem.warning
    assert "no-such-host.invalid does not resolve" in problem.text
    assert problem.line == line_of(path.read_text(), "- name: no-such-host.invalid")
    path.write_text(TEXT.replace("fl.example.org", "localhost"))
    assert check(ProjectFile(path)) == []


@pytest.mark.parametrize(
    ("text", "words"), [("a: [", ":1: not YAML"), ("- a", "must hold the keys"), ("", "must hold")]
)
def test_what_is_no_project_file_is_one_line(tmp_path, text, words):
    path = tmp_path / "project.yml"
    path.write_text(text)
    with pytest.raises(FedImagingError, match=re.escape(words)):
        ProjectFile(path)


def test_the_command_prints_file_and_line_and_ends_with_2(tmp_path, capsys):
    path = tmp_path / "project.yml"
    path.write_text(TEXT.replace("role: lead", "role: leader"))
    assert main(["check", "--project", str(path), "--folder", str(tmp_path / "f")]) == 2
    said = capsys.readouterr().err
    assert f"{path}:{line_of(path.read_text(), 'role: leader')}: error: unknown role 'leader'" in said
    assert main(["check", "--project", str(tmp_path / "none.yml")]) == 2
    assert not (tmp_path / "f").exists()
