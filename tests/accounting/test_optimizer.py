"""FLOPs of an optimiser step: by hand, and the products that an optimiser really runs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dsv4.accounting.optimizer import NEWTON_SCHULZ_STEPS, newton_schulz_flops
from dsv4.config.presets import nano
from dsv4.config.train import OptimizerConfig
from dsv4.ops.orthogonalize import HYBRID
from dsv4.optim import Optimizer
from dsv4.testing.toys import flash_like, pro_like, toy_model


def settings(per_head):
    return OptimizerConfig(
        peak_lr=1e-3, end_lr=1e-4, warmup_steps=0, decay_fraction=0.1, muon_momentum=0.95, muon_update_rms=0.18,
        muon_per_head=per_head, muon_dtype="float32", adam_betas=(0.9, 0.95), adam_eps=1e-20, weight_decay=0.1,
        clip_norm=1.0,
    )  # fmt: skip


def test_the_number_of_steps_is_that_of_the_iteration():
    assert len(HYBRID) == NEWTON_SCHULZ_STEPS


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("make", [flash_like, pro_like])
def test_the_products_an_optimiser_runs(make, per_head):
    model = toy_model(make())
    optimizer = Optimizer(model, settings(per_head))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    with FlopCounterMode(display=False) as counter:
        optimizer.step(1e-3)
    assert counter.get_total_flops() == newton_schulz_flops(make(), per_head=per_head)


def test_nano_by_hand():
    def flops(n, m):
        return 10 * (2 * n * n * m + 2 * n * n * n + 2 * n * n * m)

    # 128 x 256: of each of 6 layers wq_a, wkv, two parts of wo_a, 3 matrices of 8 experts and of the shared one; both
    # projections of the HCA compressor.
    small = 6 * (4 + 3 * 9) + 1 * 2
    square = 6 + 2 + 2 * 2  # 256 x 256: wo_b, MTP's projections, CSA's compressors
    rest = 6 * (flops(128, 512) + flops(8, 256) + 2 * flops(24, 1024)) + 2 * flops(4, 1024)
    indexers = 2 * (flops(2 * 32, 128) + flops(2, 256) + 2 * flops(2 * 32, 256))  # queries, weights, the compressor
    wanted = small * flops(128, 256) + square * flops(256, 256) + rest + indexers
    assert newton_schulz_flops(nano(), per_head=False) == wanted
    heads = 6 * (4 * flops(128, 128) - flops(128, 512)) + 2 * (2 * flops(32, 128) - flops(2 * 32, 128))
    assert newton_schulz_flops(nano(), per_head=True) == wanted + heads
