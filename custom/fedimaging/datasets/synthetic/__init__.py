"""Synthetic hospitals with a manifest for each, as `python -m fedimaging data synth`: chest radiographs and brain MRI.

`hospitals` says what all have in common, `phantom` makes the chests and `radiographs` their DICOM files,
`brain_phantom` the brains and `brains` their NIfTI files; `command` does the rest.
"""

from fedimaging.datasets.synthetic.brains import BrainHospital, typical_brain_hospitals
from fedimaging.datasets.synthetic.command import add_commands, synthesize
from fedimaging.datasets.synthetic.hospitals import Hospital, typical_hospitals

__all__ = ["BrainHospital", "Hospital", "add_commands", "synthesize", "typical_brain_hospitals", "typical_hospitals"]
