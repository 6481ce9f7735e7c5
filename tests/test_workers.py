"""Do test processes side by side share the machine: one thread each, and the slow files first?"""

from __future__ import annotations

import os

import pytest
import torch

pytestmark = pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="one process has the machine: -n 0")


def test_a_worker_has_one_thread():
    assert torch.get_num_threads() == 1


def test_no_file_with_slow_tests_is_left_for_the_end(request):
    items = request.session.items
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    later = [item.path not in slow for item in items]
    assert later == sorted(later)
