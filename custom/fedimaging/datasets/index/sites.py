"""One source split into several sites of chosen sizes, reproducibly, as hospitals of a simulation."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fedimaging.datasets.index.build import check, copy_case, entries, header_of, open_source, usable_cases
from fedimaging.datasets.index.files import removed_on_error
from fedimaging.datasets.index.model import Candidate, IndexResult, Notes, Options
from fedimaging.datasets.manifest import Manifest
from fedimaging.datasets.site import MANIFEST_FILE
from fedimaging.errors import FedImagingError, Reason

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def build_sites(options: Options) -> list[IndexResult]:
    """Copies a source's cases to `<out>/<site>/<name>/`, each patient to one site, and writes a manifest for each site.

    Sites that hold exactly this already are left as they are.

    Args:
        options: `sites` has the cases of each site, `out` is the data root, `name` the dataset's (the source's folder).

    Raises:
        FedImagingError: as `build_index`; if the source has too few cases; if a site's folder holds anything else.
    """
    check(options)
    root, name = _checked(options)
    notes = Notes()
    with removed_on_error(root) as created, open_source(options, root, notes) as source:
        cases = usable_cases(source, options, None, notes)
        members = _assigned(cases, options)
        header = {"name": name, **header_of(cases, source, options, notes)}
        planned: dict[Path, tuple[Manifest, list[Candidate]]] = {}
        for site, chosen in members.items():
            out = root / site / name / MANIFEST_FILE
            if not chosen:
                raise FedImagingError(f"{site}: no patient is left for it; ask for fewer cases", Reason.TOO_FEW_CASES)
            made = header["made"] | {"site": site, "sites": dict(options.sites), "concentration": options.concentration}
            if source.classes:
                made["empty_masks"] = sum(not case.labels for case in chosen)
            listed = entries(chosen, source, options, source.splits)
            planned[out] = Manifest.parse(header | {"made": made} | listed, out), chosen
        if not _up_to_date(planned):
            for out, (manifest, chosen) in planned.items():
                for case in chosen:
                    copy_case(case, out.parent, created)
                manifest.check_files(out.parent, out)
            for out, (manifest, _) in planned.items():
                created.append(out)
                manifest.write(out)
    used = sum(map(len, members.values()))
    if used != len(cases):
        notes.warnings.append(f"{len(cases) - used} of {len(cases)} usable cases are in no site")
    for (site, chosen), wanted in zip(members.items(), options.sites.values(), strict=True):
        if len(chosen) != wanted:
            notes.warnings.append(f"{site} has {len(chosen)} cases, not {wanted}: a patient's images stay together")
    return [
        IndexResult(out, manifest, dict(notes.left_out), notes.warnings, 0) for out, (manifest, _) in planned.items()
    ]


def _assigned(cases: list[Candidate], options: Options) -> dict[str, list[Candidate]]:
    if options.concentration is None:
        return assign_sites(cases, options.sites, options.seed)
    return assign_skewed(cases, options.sites, options.seed, options.concentration)


def assign_sites(cases: list[Candidate], sites: Mapping[str, int], seed: int) -> dict[str, list[Candidate]]:
    """Gives each site about its number of cases, in the order of a seeded hash of the patients, each patient to one.

    Raises:
        FedImagingError: TOO_FEW_CASES if the sites ask for more than there is.
    """
    groups = _in_order(cases, sites, seed)
    lacking = dict(sites)
    members: dict[str, list[Candidate]] = {site: [] for site in sites}
    too_large: list[list[Candidate]] = []

    def place(group: list[Candidate], site: str) -> None:
        members[site] += group
        lacking[site] -= len(group)

    for group in groups:
        site = max(sites, key=lambda site: lacking[site] / sites[site])
        fitting = [site for site in sites if lacking[site] >= len(group)]
        if lacking[site] >= len(group):
            place(group, site)
        elif fitting:
            place(group, max(fitting, key=lambda site: lacking[site] / sites[site]))
        else:
            too_large.append(group)
    for group in too_large:
        site = max(sites, key=lambda site: lacking[site])
        if lacking[site] > len(group) / 2:
            place(group, site)
    return {site: sorted(chosen, key=lambda case: case.name) for site, chosen in members.items()}


def assign_skewed(
    cases: list[Candidate], sites: Mapping[str, int], seed: int, concentration: float
) -> dict[str, list[Candidate]]:
    """Gives each site about its number of cases with a skewed share of the classes, each patient to one site.

    A site's shares are drawn from a symmetric Dirichlet distribution (Hsu et al. 2019). Sites take turns; each takes a
    patient of the class that it lacks most, or of another where that class is used up. The first two turns of a site
    give it two classes, since nothing can be learned from one.

    Raises:
        FedImagingError: TOO_FEW_CASES if the sites ask for more than there is.
    """
    by_class: dict[str, list[list[Candidate]]] = defaultdict(list)
    for group in _in_order(cases, sites, seed):
        by_class["+".join(sorted({name for case in group for name in case.labels}))].append(group)
    classes = sorted(by_class)
    rng = np.random.default_rng((seed, 80))
    lacking = {
        site: dict(zip(classes, rng.dirichlet(np.full(len(classes), concentration)) * count, strict=True))
        for site, count in sites.items()
    }
    members: dict[str, list[Candidate]] = {site: [] for site in sites}
    taken: dict[str, set[str]] = {site: set() for site in sites}
    while any(by_class.values()) and any(len(members[site]) < count for site, count in sites.items()):
        site = min(sites, key=lambda site: len(members[site]) / sites[site])
        left = [name for name in classes if by_class[name]]
        fresh = [name for name in left if name not in taken[site]] if len(taken[site]) == 1 else []
        name = max(fresh or left, key=lambda name: lacking[site][name])
        group = by_class[name].pop()
        members[site] += group
        lacking[site][name] -= len(group)
        taken[site].add(name)
    return {site: sorted(chosen, key=lambda case: case.name) for site, chosen in members.items()}


def _in_order(cases: list[Candidate], sites: Mapping[str, int], seed: int) -> list[list[Candidate]]:
    """The cases by patient, in the order of a seeded hash. Raises FedImagingError if the sites ask for more."""
    wanted = sum(sites.values())
    if wanted > len(cases):
        raise FedImagingError(
            f"--split-sites asks for {wanted} cases, but {len(cases)} are usable; ask for fewer", Reason.TOO_FEW_CASES
        )
    by_patient: dict[str, list[Candidate]] = defaultdict(list)
    for case in cases:
        by_patient[case.patient].append(case)
    # Not the hash of assign_splits: which site has a patient must say nothing of the patient's split.
    order = sorted(by_patient, key=lambda name: (hashlib.sha256(f"{seed}:site:{name}".encode()).digest(), name))
    return [by_patient[patient] for patient in order]


def _checked(options: Options) -> tuple[Path, str]:
    """The data root and the dataset's name."""
    for site, count in options.sites.items():
        if not _NAME.fullmatch(site) or count < 1:
            raise FedImagingError(f"--split-sites {site}={count}: write a site's name and how many cases it gets")
    if options.out is None or options.out.suffix == ".json":
        raise FedImagingError("--split-sites: give the data root with --out FOLDER; it will hold <site>/<dataset>/")
    source = options.source.resolve()
    name = options.name or (
        source.name if source.is_dir() else source.stem if source.suffix == ".npz" else source.parent.name
    )
    if not _NAME.fullmatch(name):
        raise FedImagingError(f"dataset {name!r}: give a --name of letters, digits, '.', '_' and '-'")
    root = options.out.resolve()
    if source.is_dir() and root.is_relative_to(source):
        raise FedImagingError(f"{root}: lies in the source itself; give another --out")
    return root, name


def _up_to_date(planned: Mapping[Path, tuple[Manifest, list[Candidate]]]) -> bool:
    """Whether all of it is there already; refuses where a folder holds anything else."""
    states = {out: _holds(out, manifest) for out, (manifest, _) in planned.items()}
    if all(states.values()):
        return True
    for out in planned:
        if out.parent.exists() and (not out.parent.is_dir() or any(out.parent.iterdir())):
            raise FedImagingError(
                f"{out.parent}: holds another split or other data; remove it, or give another --out or --name"
            )
    return False


def _holds(out: Path, manifest: Manifest) -> bool:
    try:
        found = Manifest.read(out)
        found.check_files(out.parent, out)
    except FedImagingError:
        return False
    return found.digest() == manifest.digest()
