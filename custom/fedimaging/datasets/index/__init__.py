"""`python -m fedimaging data index`: a manifest from the images that a hospital has.

`pictures` knows the sources of classification (a CSV, a folder per class, arrays), `volumes` those of segmentation (the
Decathlon layout, pairs of image and mask, DICOM series with masks). `build` reads every case once, leaves out and tells
what can't be used, and writes the manifest; `sites` splits a source into several. `command` is the command line.
"""

from fedimaging.datasets.index.build import build_index
from fedimaging.datasets.index.command import add_commands, show
from fedimaging.datasets.index.model import IndexResult, Options
from fedimaging.datasets.index.sites import build_sites

__all__ = ["IndexResult", "Options", "add_commands", "build_index", "build_sites", "show"]
