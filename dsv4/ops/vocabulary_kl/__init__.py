"""How far a student's next tokens are from a teacher's, over the whole vocabulary, straight from hidden states.

    kl[t] = sum_v p[t, v] * (log p[t, v] - log q[t, v]),    p = softmax(hidden . weight^T), q the same of the teacher
    loss  = sum_t token_weight_t * kl[t]

The reverse KL of on-policy distillation (report 5.1.2, equation 29), exact instead of estimated at the token that was
drawn (report 5.2.2): a teacher leaves its last hidden states alone, and its logits are formed again beside the
student's, for a slice of tokens at a time. The gradient reaches the student alone; in its logits it is
token_weight_t * p (log p - log q - kl). Probabilities stay logarithms until they are multiplied by p, so one that is 0
as a number costs what it should. Logits and their statistics are float32. A student that is its teacher has a
divergence of exactly 0.
"""

from __future__ import annotations

import torch

from dsv4.ops.backend import Backend, pick
from dsv4.ops.shapes import Shapes
from dsv4.ops.vocabulary_kl import portable, reference


def vocabulary_kl(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    token_weights: torch.Tensor,
    *,
    backend: Backend = "portable",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weighted divergence, a float32 scalar, and each token's, [T] float32.

    hidden: [T, D]; weight: [V, D]: the student's, which alone gets gradients. teacher_hidden: [T, E]; teacher_weight:
    [V, E], of any width and dtypes. token_weights: [T] float32, 0 for tokens that are left out, 1 / (their number) for
    a mean. The divergences of tokens carry no gradient; rounding may leave one below 0 by as much.
    """
    shapes = Shapes()
    shapes.check("hidden", hidden, "T D")
    shapes.check("weight", weight, "V D")
    shapes.check("teacher_hidden", teacher_hidden, "T E")
    shapes.check("teacher_weight", teacher_weight, "V E")
    shapes.check("token_weights", token_weights, "T")
    chosen = pick(
        backend,
        reference=reference.vocabulary_kl,
        portable=portable.vocabulary_kl,
        triton="vocabulary_kl.triton:vocabulary_kl",
    )
    return chosen(hidden, weight, teacher_hidden.detach(), teacher_weight.detach(), token_weights)
