"""Writes torch.bin: tensors of every kind that checkpoints hold, saved by PyTorch itself.

python -m venv venv && venv/bin/pip install torch==2.15.0 numpy
venv/bin/python tests/golden/make_torch.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

SHAPES = {"matrix": (5, 6), "half": (4, 2), "brain": (7,), "whole": (6, 4), "parameter": (2, 3), "none": (0, 4)}


def main():
    import torch

    from families import tensor

    made = {name: torch.from_numpy(tensor("torch", name, shape)) for name, shape in SHAPES.items()}
    made |= {"half": made["half"].half(), "brain": made["brain"].bfloat16(), "count": torch.arange(4)}
    made |= {"view": made["whole"][2:5], "tied": made["whole"], "scalar": torch.tensor(3.5)}
    module = torch.nn.Module()
    module.register_parameter("parameter", torch.nn.Parameter(made.pop("parameter")))
    state = module.state_dict(keep_vars=True)  # an OrderedDict with `_metadata`, as models save
    state.update(made)
    torch.save(state, Path(__file__).with_name("torch.bin"))


if __name__ == "__main__":
    main()
