"""What kernels take for granted of bfloat16, of which the interpreter is put right."""

import torch
from triton import jit
from triton import language as tl

from tests.ops.triton_lane import DEVICE


@jit
def _widen(x, y):
    here = tl.arange(0, 65536)
    tl.store(y + here, tl.load(x + here).to(tl.bfloat16, bitcast=True).to(tl.float32))


def test_every_bfloat16_is_widened_to_the_same_number():
    """Subnormal ones too: codes are decoded through these."""
    x = torch.arange(65536).to(torch.int16)
    wide = torch.empty(65536, device=DEVICE)
    _widen[(1,)](x.to(DEVICE), wide)
    wanted = x.view(torch.bfloat16).float()
    assert ((wide.cpu().view(torch.int32) == wanted.view(torch.int32)) | (wide.cpu().isnan() & wanted.isnan())).all()
