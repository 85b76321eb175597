"""Synthetic hospitals: DICOM DX files of chest phantoms and a manifest for each, as `python -m fedimaging data synth`.

`hospitals` says how they differ, `phantom` makes the pictures, `radiographs` the DICOM files, `command` does the rest.
"""

from fedimaging.datasets.synthetic.command import add_commands, synthesize
from fedimaging.datasets.synthetic.hospitals import Hospital, typical_hospitals

__all__ = ["Hospital", "add_commands", "synthesize", "typical_hospitals"]
