"""The command `data index`."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedimaging.commands import add_command
from fedimaging.datasets.index.build import TASKS, build_index
from fedimaging.datasets.index.model import LABELS_FILE, IndexResult, Options
from fedimaging.datasets.index.sites import build_sites
from fedimaging.datasets.index.volumes import DECATHLON_FILE
from fedimaging.datasets.manifest import FRACTIONS, SPLITS
from fedimaging.datasets.site import MANIFEST_FILE
from fedimaging.errors import FedImagingError

_EXAMPLES = """\
a CSV of files and labels (columns file, label, patient_id):
  python -m fedimaging data index /srv/xray --labels /srv/xray/labels.csv
DICOM files, labels by accession number:
  python -m fedimaging data index /srv/dicom --labels findings.csv --match AccessionNumber --image-column accession
a folder per class, the patient being what precedes the first underscore of a file's name:
  python -m fedimaging data index /srv/classes --patient-regex '([^/_]+)_[^/]*$'
volumes with masks in the layout of the Medical Segmentation Decathlon (dataset.json):
  python -m fedimaging data index /srv/hippocampus
NIfTI images case_0000.nii.gz with masks case.nii.gz, or DICOM series in a folder per case with NIfTI masks:
  python -m fedimaging data index /srv/liver --image-suffix _0000.nii.gz --label-suffix .nii.gz --classes liver
  python -m fedimaging data index /srv/ct --masks /srv/ct/masks --classes liver,tumour --allow-empty
one source as three sites of a simulation:
  python -m fedimaging data index /srv/hippocampus --split-sites hospital-a=80,hospital-b=50,hospital-c=30 \\
    --out data/real
photographs as eight sites that differ in their classes:
  python -m fedimaging data index /srv/photos --out data/skewed --concentration 0.1 \\
    --split-sites a=200,b=200,c=200,d=200,e=200,f=200,g=200,h=200
images that lie on a read-only disk:
  python -m fedimaging data index /mnt/xray --copy --out data/real/hospital-a/chest_xray/manifest.json
"""


def show(result: IndexResult, console: Console) -> None:
    """Prints cases, patients and classes per split, and what was left out and why."""
    _show_table(result, console)
    _show_notes(result, console)


def _show_table(result: IndexResult, console: Console) -> None:
    manifest = result.manifest
    console.print(f"{manifest.name}: {escape(str(result.path))}", highlight=False, soft_wrap=True)
    table = Table()
    classes = manifest.classes if manifest.task == "classification" else []
    for column in ("split", "cases", "patients", *classes):
        table.add_column(escape(column), justify="left" if column == "split" else "right")
    for split in SPLITS:
        cases = manifest.split(split)
        counts = (len(cases), len({case.patient for case in cases}), *manifest.class_counts(split).values())
        table.add_row(split, *map(str, counts))
    console.print(table)
    if manifest.task == "segmentation":
        console.print(f"structures: {escape(', '.join(manifest.classes))}; empty masks: {manifest.made['empty_masks']}")
    if result.kept_patients:
        console.print(f"{result.kept_patients} patients keep the split that they had")


def _show_notes(result: IndexResult, console: Console) -> None:
    for reason, names in sorted(result.left_out.items(), key=lambda item: -len(item[1])):
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        console.print(f"[yellow]left out {len(names)}:[/] {escape(reason)}: {escape(shown)}")
    for warning in result.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}")


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `index` to the `data` commands."""
    parser = add_command(
        subparsers,
        "index",
        "make a manifest from the images that are here",
        _EXAMPLES,
        "Makes a manifest from a folder of images with labels from a CSV or from a folder per class,\n"
        "or from a folder of volumes with masks.",
    )
    add = parser.add_argument
    add(
        "source",
        type=Path,
        help=f"folder of images (with {LABELS_FILE} or a folder per class), CSV, .npz of arrays, or folder of volumes "
        f"(with {DECATHLON_FILE}, or images and masks named alike)",
    )
    add("--task", choices=TASKS, help="default what the source looks like")
    add("--labels", type=Path, metavar="CSV", help=f"labels; default {LABELS_FILE} in the folder, if it exists")
    add("--match", metavar="KEYWORD", help="the image column holds this DICOM element, such as SOPInstanceUID")
    add("--out", type=Path, help=f"default {MANIFEST_FILE} in the folder; images must lie below the manifest's folder")
    add("--copy", action="store_true", help="copy the images below the manifest's folder")
    add("--name", help="the dataset's name; default the name of the manifest's folder")
    add("--modality", help="default what the DICOM files say, else DX")
    for what, default in (("image", "file"), ("label", "label"), ("patient", "patient_id")):
        add(f"--{what}-column", metavar="NAME", help=f"column of the CSV; default {default}")
    for what in ("age", "sex", "vendor", "view"):
        default = "age_group" if what == "age" else what
        add(f"--{what}-column", metavar="NAME", help=f"column of the CSV; default {default} if there, else DICOM")
    add("--label-separator", metavar="TEXT", help="cases have several labels, separated by this in the label column")
    add("--patient-regex", metavar="REGEX", help="finds the patient as group 1 in an image's path")
    add(
        "--classes",
        metavar="A,B",
        help=f"classes to use, in this order; default all, sorted; of masks the structures' names in the order of the "
        f"values 1, 2, ...; default those of {DECATHLON_FILE}",
    )
    add("--rename", metavar="OLD=NEW", action="append", default=[], help="label to class; an empty NEW is no finding")
    add("--image-suffix", metavar="TEXT", help="how the names of NIfTI images end; default .nii.gz or .nii")
    add(
        "--label-suffix", metavar="TEXT", help="how the names of masks go on after the image's; default .nii.gz or .nii"
    )
    add("--masks", type=Path, metavar="FOLDER", help="where the masks are; default beside the images")
    add("--allow-empty", action="store_true", help="a mask may be empty, as in a brain without a lesion")
    add("--split-sites", metavar="SITE=CASES,...", help="copy the source as several sites to --out, now the data root")
    add(
        "--concentration",
        type=float,
        help="skew the sites' classes: each site's shares are drawn from a Dirichlet distribution of this "
        "concentration; 0.1 differs much, 100 little (default: sites are alike)",
    )
    add("--seed", type=int, default=0, help="of the split; default %(default)s")
    add("--fractions", default=",".join(map(str, FRACTIONS)), help="training,validation,test; default %(default)s")
    add("--keep", action=argparse.BooleanOptionalAction, default=True, help="keep the splits of an existing manifest")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    plain = {f.name: getattr(args, f.name) for f in fields(Options) if hasattr(args, f.name)}
    columns = {what: getattr(args, f"{what}_column") for what in ("image", "label", "patient", "sex", "vendor", "view")}
    columns["age_group"] = args.age_column
    options = Options(
        **plain
        | {
            "columns": {what: column for what, column in columns.items() if column},
            "classes": tuple(name.strip() for name in args.classes.split(",")) if args.classes else (),
            "rename": dict(_pair(text) for text in args.rename),
            "fractions": _fractions(args.fractions),
            "sites": _sites(args.split_sites) if args.split_sites else {},
        }
    )
    console = Console()
    if not options.sites:
        show(build_index(options), console)
        return
    results = build_sites(options)
    for result in results:
        _show_table(result, console)
    _show_notes(results[0], console)


def _sites(text: str) -> dict[str, int]:
    sites: dict[str, int] = {}
    for part in text.split(","):
        site, _, count = part.strip().partition("=")
        if not site or site in sites or not count.isdigit():
            raise FedImagingError(
                f"--split-sites {text}: write SITE=CASES,SITE=CASES, such as hospital-a=80,hospital-b=50"
            )
        sites[site] = int(count)
    return sites


def _pair(text: str) -> tuple[str, str]:
    old, equals, new = text.partition("=")
    if not equals or not old:
        raise FedImagingError(f"--rename {text}: write OLD=NEW, such as COVID-19=pneumonia")
    return old.strip(), new.strip()


def _fractions(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise FedImagingError(f"--fractions {text}: write three numbers, such as 0.7,0.1,0.2") from None
