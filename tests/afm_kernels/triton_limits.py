"""A pytest plugin, for the interpreter's runs alone: other block sizes and thresholds for the Triton kernels.

AFM_TRITON_LIMITS holds the changed fields of ``afm_kernels.triton.launch.Limits`` as JSON.
"""

import json
import os

from afm_kernels.triton import launch

for _name, _value in json.loads(os.environ["AFM_TRITON_LIMITS"]).items():
    if not hasattr(launch.LIMITS, _name):
        raise ValueError(f"Limits has no field {_name}")
    setattr(launch.LIMITS, _name, _value)
