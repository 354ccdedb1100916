"""DistributedDataParallel on two ranks, each with half of the batch, trains the convolutions as one process does."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from dynconv_hf import freeze_base

from .models import random_model, tokens
from .ranks import Ranks


def assert_frozen_base_trains_as_one_process() -> None:
    # The second backward fails if gradients of the base are waited for in the first.
    single, divided = freeze_base(random_model()), DistributedDataParallel(freeze_base(random_model()))
    assert freeze_base(divided) is divided
    input_ids = tokens(batch=4)
    own_ids = input_ids.chunk(2)[torch.distributed.get_rank()]
    for _ in range(2):
        single(input_ids, labels=input_ids).loss.backward()
        divided(own_ids, labels=own_ids).loss.backward()
    for (name, expected), parameter in zip(single.named_parameters(), divided.parameters(), strict=True):
        assert (parameter.grad is None) != parameter.requires_grad, name
        if parameter.requires_grad:
            assert parameter.grad.any(), name
            torch.testing.assert_close(parameter.grad, expected.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_frozen_base(two_ranks: Ranks) -> None:
    two_ranks.run(assert_frozen_base_trains_as_one_process)


def assert_frozen_too_late_is_refused() -> None:
    with pytest.raises(ValueError, match=r"freeze the base before wrapping the model"):
        freeze_base(DistributedDataParallel(random_model()))


def test_frozen_too_late(two_ranks: Ranks) -> None:
    two_ranks.run(assert_frozen_too_late_is_refused)
