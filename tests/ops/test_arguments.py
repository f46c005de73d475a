"""Which expert a row belongs to."""

from __future__ import annotations

import torch

from megapoly.ops.arguments import expert_of_row


def test_expert_of_row_skips_experts_without_rows():
    offsets = torch.tensor([0, 0, 2, 2, 5, 5])
    assert expert_of_row(offsets, 5).tolist() == [1, 1, 3, 3, 3]


def test_expert_of_no_rows():
    assert expert_of_row(torch.tensor([0, 0]), 0).tolist() == []
