"""The processes that the tests fork behave as new ones."""

import gc
import sys

import forked
import pytest
from torch.utils.data import DataLoader


@pytest.mark.skipif(sys.platform == "win32", reason="processes cannot be forked")
def test_what_the_test_process_has_not_collected_is_not_collected_by_its_children():
    """torch's destructor of an iterator with loader processes raises in any process but the one that started them."""
    gc.collect()
    gc.disable()
    try:
        cycle = [iter(DataLoader([1, 2], num_workers=1))]
        next(cycle[0])
        cycle.append(cycle)
        del cycle
        done = forked.run([sys.executable, "-c", "import gc; gc.collect()"])
    finally:
        gc.enable()
        gc.collect()
    assert done.returncode == 0 and done.stderr == ""
