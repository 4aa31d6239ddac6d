"""The model in bfloat16: close to float32, the same however it is cut, and trainable."""

import pytest
import torch
import torch.nn.functional as F

from dsv4.model.transformer import Transformer
from dsv4.testing.toys import flash_like, pro_like, toy_model, toy_token_ids

TOYS = {"flash_like": flash_like, "pro_like": pro_like}
TOKENS = 264


@pytest.fixture(scope="module", params=TOYS)
def both(request):
    """The same parameters twice, rounded to bfloat16 and not, and token ids."""
    config = TOYS[request.param]()
    exact = toy_model(config)
    rounded = Transformer(config, weight_dtype=torch.bfloat16, activation_dtype=torch.bfloat16)
    rounded.load_state_dict(exact.state_dict())
    return rounded, exact, toy_token_ids(config, 2, TOKENS)


def test_logits_are_float32_and_close(both):
    rounded, exact, token_ids = both
    with torch.no_grad():
        ours, expected = rounded(token_ids, mtp=True), exact(token_ids, mtp=True)
    for logits, wanted in ((ours.logits, expected.logits), (ours.mtp_logits, expected.mtp_logits)):
        assert logits.dtype == torch.float32
        # Eight bits round by 2e-3 (root mean square); a dozen sub-layers amplify that to 0.1, of which a part comes
        # from other experts and entries chosen. Unrelated logits have a cosine of 0.
        assert F.cosine_similarity(logits.flatten(), wanted.flatten(), dim=0) > 0.98


def test_cuts_change_little(both):
    rounded, _, token_ids = both
    state = rounded.new_state(2)
    with torch.no_grad():
        whole = rounded(token_ids).logits
        parts = [rounded(part, state=state).logits for part in token_ids.split([100, 1, 1, 26, 136], dim=1)]
    # Sums of another order round to another bfloat16 now and then.
    assert (torch.cat(parts, dim=1) - whole).norm() < 0.05 * whole.norm()


def test_a_state_takes_half_the_bytes_but_for_its_tails(both):
    rounded, exact, token_ids = both
    states = [model.new_state(2) for model in (rounded, exact)]
    with torch.no_grad():
        for model, state in zip((rounded, exact), states, strict=True):
            model(token_ids[:, :256], state=state)  # no HCA tail; a CSA tail keeps its last block in float32
    tails = sum(
        2 * 2 * 4 * 4 * 2 * (exact.config.attention.head_dim + exact.config.indexer.head_dim)
        for kind in exact.config.layer_kinds
        if kind == "csa"
    )
    assert states[0].num_bytes() - tails == (states[1].num_bytes() - tails) / 2


def test_gradients_are_finite_and_point_the_same_way(both):
    rounded, exact, token_ids = both
    weights = torch.randn(*token_ids.shape, exact.config.vocab_size, generator=torch.Generator().manual_seed(6))
    names = [name for name, p in exact.named_parameters() if p.requires_grad and not name.startswith("mtp.")]
    names = [name for name in names if ".indexer." not in name]
    grads = []
    for model in (rounded, exact):
        parameters = [model.get_parameter(name) for name in names]
        grads.append(torch.autograd.grad((model(token_ids).logits * weights).sum(), parameters))
        assert all(
            grad.dtype == p.dtype and grad.isfinite().all() for grad, p in zip(grads[-1], parameters, strict=True)
        )
    ours, theirs = (torch.cat([grad.float().flatten() for grad in both_grads]) for both_grads in grads)
    # 0.93 is seen: besides rounding, some tokens go to other experts, whose weights get their gradients instead.
    assert F.cosine_similarity(ours, theirs, dim=0) > 0.85
