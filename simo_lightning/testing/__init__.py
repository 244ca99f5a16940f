"""Checks of your own module, loss or data module; each raises an AssertionError that names the difference.

They train on the CPU on few images. ``check_gradient_parity`` starts processes that import the module's class: define
it in a file, and guard a script with ``if __name__ == "__main__"``.
"""

from simo_lightning.testing.batches import check_batch_composition
from simo_lightning.testing.gradients import check_gradient_parity
from simo_lightning.testing.resume import check_resume
from simo_lightning.testing.round_trips import check_checkpoint_round_trip, check_cli_round_trip

__all__ = [
    "check_batch_composition",
    "check_checkpoint_round_trip",
    "check_cli_round_trip",
    "check_gradient_parity",
    "check_resume",
]
